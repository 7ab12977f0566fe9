"""One pool for all layers, carried through a scan and donated: a decode step must not copy it, on CPU or on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.nn import Model1Config, Model1Tables, V32Config, init_params, model1, v32
from mla_jax.nn.config import Model1Layer
from tests import compiling
from tests.compiling import QUICK

LAYERS, STEPS, BATCH = 4, 64, 4
SDS = jax.ShapeDtypeStruct


def v32_model(cache):
    """(config, step, state): step decodes one token through four scanned layers; all shapes only."""
    config = V32Config.small(cache=cache, num_layers=LAYERS)
    pages = 8192 if cache == "fp8" else 2048  # 64 tokens each
    state = jax.eval_shape(lambda: v32.init_cache(config, pages))
    table = SDS((BATCH, 64), jnp.int32)

    def step(params, cache, x, table, seqlens):
        plan = v32.plan(config, cache, table, seqlens, 1)  # one for all layers

        def layer(carry, at):
            x, cache = carry
            out, cache = v32.decode(at[0], config, cache, x, table, seqlens, layer=at[1], plan=plan)
            return (x + out, cache), None

        (x, cache), _ = jax.lax.scan(layer, (x, cache), (params, jnp.arange(LAYERS, dtype=jnp.int32)))
        return x, cache

    return config, step, state, table


def model1_model(cache):
    config = Model1Config.small(cache=cache, ratios=(4,) * LAYERS)
    state = jax.eval_shape(lambda: model1.init_cache(config, window_pages=4096, context_pages=4096, rows=16))
    i32 = functools.partial(SDS, dtype=jnp.int32)
    tables = Model1Tables(i32((BATCH, 3)), i32((BATCH, 16)), i32((BATCH,)))

    def step(params, cache, x, tables, seqlens):
        plan = model1.plan(config, cache, tables, seqlens, 1)

        def layer(carry, at):
            x, cache = carry
            where = Model1Layer(4, at[1], at[1])
            out, cache = model1.decode(at[0], config, cache, x, tables, seqlens, layer=where, plan=plan)
            return (x + out, cache), None

        (x, cache), _ = jax.lax.scan(layer, (x, cache), (params, jnp.arange(LAYERS, dtype=jnp.int32)))
        return x, cache

    return config, step, state, tables


def many_steps(step):
    """64 dependent steps in one program."""

    def run(params, cache, x, tables, seqlens):
        def body(i, carry):
            return step(params, carry[1], carry[0], tables, seqlens + i)

        return jax.lax.fori_loop(0, STEPS, body, (x, cache))

    return run


def lower(model, cache, place=lambda s: s):
    config, step, state, tables = model(cache)
    one = jax.eval_shape(lambda: init_params(config, 0, jax.random.key(0)))
    params = jax.tree.map(lambda p: SDS((LAYERS, *p.shape), p.dtype), one)
    arguments = (params, state, SDS((BATCH, 1, 64), config.dtype), tables, SDS((BATCH,), jnp.int32))
    arguments = jax.tree.map(place, arguments)
    return jax.jit(many_steps(step), donate_argnums=1).lower(*arguments), state


def check(compiled, state):
    memory = compiled.memory_analysis()
    pools = jax.tree.leaves(state)
    one_layer = max(p.size * p.dtype.itemsize for p in pools) // LAYERS
    everything = sum(p.size * p.dtype.itemsize for p in pools)
    assert memory.alias_size_in_bytes >= everything  # every pool is updated in place
    assert memory.temp_size_in_bytes < one_layer / 10, (memory.temp_size_in_bytes, one_layer)


@pytest.mark.parametrize("cache", ["fp8", pytest.param("f32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [v32_model, model1_model])
def test_donated_steps_copy_no_pool(model, cache):
    lowered, state = lower(model, cache)
    check(lowered.compile(QUICK), state)


@pytest.mark.slow
def test_stacked_caches_would_not_pass():
    """The negative control: the same layers with caches as the scan's xs and ys do copy the pools."""
    config, _, state, table = v32_model("fp8")
    one = jax.eval_shape(lambda: init_params(config, 0, jax.random.key(0)))
    params = jax.tree.map(lambda p: SDS((LAYERS, *p.shape), p.dtype), one)
    single = V32Config.small(cache="fp8")
    each = jax.eval_shape(lambda: v32.init_cache(single, state.pages_per_layer))
    stacked = jax.tree.map(lambda p: SDS((LAYERS, *p.shape), p.dtype), each)

    def step(params, caches, x, table, seqlens):
        def layer(x, at):
            out, cache = v32.decode(at[0], single, at[1], x, table, seqlens)
            return x + out, cache

        return jax.lax.scan(layer, x, (params, caches))

    arguments = (params, stacked, SDS((BATCH, 1, 64), config.dtype), table, SDS((BATCH,), jnp.int32))
    compiled = jax.jit(many_steps(step), donate_argnums=1).lower(*arguments).compile(QUICK)
    with pytest.raises(AssertionError):
        check(compiled, state)


def test_the_scanned_model_computes_what_its_layers_do():
    """The same four layers, scanned with traced layer numbers and one by one: same outputs, same pools."""
    config, step, _, _ = v32_model("f32")
    params = [init_params(config, 0, jax.random.key(i)) for i in range(LAYERS)]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *params)
    table = jnp.array([[3, 0], [1, 2]], jnp.int32)
    scanned = separate = v32.init_cache(config, 4, 8)
    run = jax.jit(step, compiler_options=QUICK)
    one = jax.jit(v32.decode, static_argnames=("config",), compiler_options=QUICK)
    for n in range(1, 11):
        x = jax.random.normal(jax.random.key(n), (2, 1, 64))
        seqlens = jnp.array([n, n + 1 if n > 3 else 0], jnp.int32)
        got, scanned = run(stacked, scanned, x, table, seqlens)
        want = x
        for i, p in enumerate(params):
            out, separate = one(p, config, separate, want, table, seqlens, layer=jnp.int32(i))
            want = want + out
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), scanned, separate)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("model", [v32_model, model1_model])
def test_donated_steps_copy_no_pool_on_cuda(model):
    """The same program compiled for an H100 without one."""
    device = compiling.h100()
    sharding = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):
        lowered, state = lower(model, "fp8", lambda s: SDS(s.shape, s.dtype, sharding=sharding))
        check(lowered.compile(), state)
