"""`ModuleSharding`: the attention modules over meshes of CPU devices equal themselves on one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import make

from mla_jax import nn
from mla_jax.nn import model1, v32
from mla_jax.sharding import ModuleSharding
from tests.compiling import QUICK

B, S, PAGE, STEPS = 4, 40, 16, 1
MESHES = [
    dict(data=2, heads=2),
    *(pytest.param(axes, marks=pytest.mark.slow) for axes in [dict(data=4), dict(heads=2)]),
]
MORE = [("4", "f32"), ("v3", "bf16"), ("v32", "f32"), ("4", "fp8"), ("128", "f32")]


def config_of(kind, cache):
    if kind == "v32":
        return nn.V32Config.small(cache=cache, num_layers=2)
    if kind == "v3":
        return nn.V32Config.small(cache=cache, index_topk=0, num_layers=2)
    return nn.Model1Config.small(cache=cache, window=24, ratios=(0, int(kind)))


def tables_of(config, groups):
    """Pages in each data group's run of them, and the sizes to give `init_cache`."""
    rng = np.random.default_rng(0)

    def table(columns, spare=1):
        each = (B // groups) * columns + spare
        pages = np.concatenate([g * each + rng.permutation(each)[:-spare] for g in range(groups)])
        return jnp.asarray(pages.reshape(B, columns), jnp.int32), groups * each

    if isinstance(config, nn.V32Config):
        pages, num = table(-(-(S + STEPS) // PAGE))
        return pages, dict(num_pages=num, page_size=PAGE)
    window, num_window = table(model1.window_columns(config, PAGE, S))
    context, num_context = table(1)
    sizes = dict(window_pages=num_window, context_pages=num_context, rows=B, window_page_size=PAGE)
    return nn.Model1Tables(window, context, jnp.arange(B, dtype=jnp.int32)), sizes


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(
    "kind, cache",
    [("v32", "fp8"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_equals_one_device(kind, cache, axes):
    config, number = config_of(kind, cache), 1
    ds = make(**axes)
    modules = ModuleSharding(config, ds)
    params = nn.init_params(config, number, jax.random.key(1))
    module = v32 if isinstance(config, nn.V32Config) else model1
    layer = number if module is v32 else config.layers[number]
    tables, sizes = tables_of(config, ds.num_data)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((B, S + STEPS, config.hidden_size)), config.dtype)
    lengths = jnp.asarray([S, S - 7, 0, 5], jnp.int32)

    def run(prefill, decode, plan, params, cache):
        out, cache = prefill(params, cache, x[:, :S], tables, lengths, layer=layer)
        outs, seqlens = [out], jnp.where(lengths > 0, lengths, 0)
        for i in range(STEPS):
            seqlens = jnp.where(lengths > 0, seqlens + 1, 0)
            out, cache = decode(
                params, cache, x[:, S + i : S + i + 1], tables, seqlens, layer=layer,
                plan=plan(cache, tables, seqlens, 1),
            )  # fmt: skip
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    def alone(function):
        return lambda params, cache, *args, **options: function(params, config, cache, *args, **options)

    one_plan = functools.partial(module.plan, config)
    one = jax.jit(
        functools.partial(run, alone(module.prefill), alone(module.decode), one_plan), compiler_options=QUICK
    )
    want = one(params, module.init_cache(config, **sizes))
    many = jax.jit(
        functools.partial(run, modules.prefill, modules.decode, modules.plan),
        donate_argnums=1, compiler_options=QUICK,
    )  # fmt: skip
    operands = modules.place_params(params), modules.init_cache(**sizes)
    many = many.lower(*operands).compile()
    got = many(*operands)
    assert not np.isnan(np.asarray(want, np.float32)).any()
    # Data parallel differs in nothing; over heads, partial outputs are rounded before they are added.
    limit = 0 if ds.num_heads == 1 else 2e-6 if cache == "f32" else 4e-3
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)
    collective = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+)(?:-start)?\("
    sent = set(re.findall(collective, many.as_text()))
    assert sent == ({"all-reduce"} if ds.num_heads > 1 else set())


def test_flax_module_on_a_mesh():
    nnx = pytest.importorskip("flax.nnx")
    config = nn.V32Config.small(cache="f32", index_topk=0)
    ds = make(data=2, heads=2)
    one = nn.V32Attention(config, rngs=nnx.Rngs(0))
    many = nn.V32Attention(config, params=one.params, sharding=ds)
    assert len(many.params["wq_b"].sharding.device_set) == 4
    tables, sizes = tables_of(config, 2)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((B, S, config.hidden_size)), config.dtype)
    lengths = jnp.full(B, S, jnp.int32)
    outs = []
    for module in (one, many):
        run = jax.jit(functools.partial(module.prefill, x), compiler_options=QUICK)
        outs.append(run(module.init_cache(**sizes), tables, lengths)[0])
    chex.assert_trees_all_close(*[np.asarray(out) for out in outs], rtol=1e-4, atol=1e-5)


def test_misuse_says_what_to_change():
    config = nn.V32Config.small()
    with pytest.raises(ValueError, match=r"context='c' has 2 ranks; accepted by modules"):
        ModuleSharding(config, make(data=2, context=2))
    with pytest.raises(ValueError, match=r"num_heads=3; accepted: a multiple of 2"):
        ModuleSharding(nn.V32Config.small(num_heads=3), make(heads=2))
    with pytest.raises(ValueError, match=r"o_groups=2; accepted: a multiple of 4"):
        ModuleSharding(nn.Model1Config.small(), make(heads=4))
    modules = ModuleSharding(config, make(data=2, heads=2))
    with pytest.raises(ValueError, match=r"3 num_pages a layer; accepted: a multiple of 2"):
        modules.init_cache(3, PAGE)
    params = modules.place_params(nn.init_params(config, 0, jax.random.key(0)))
    x, table, one = jnp.zeros((2, 1, 64), config.dtype), jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match=r"cache\.kv\.data is not cut as .*ModuleSharding\.init_cache"):
        modules.decode(params, v32.init_cache(config, 4, PAGE), x, table, one)
    with pytest.raises(ValueError, match="x has 1 requests; accepted: a multiple of 2"):
        modules.decode(params, modules.init_cache(4, PAGE), x[:1], table[:1], one[:1])
