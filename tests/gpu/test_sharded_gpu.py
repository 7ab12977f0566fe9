"""Sharded decode with the Mosaic kernels equals one GPU, on a machine of two GPUs or more.

`NCCL_NVLS_ENABLE=0 pytest -m gpu tests/gpu/test_sharded_gpu.py`; step times: `python -m mla_jax.bench.sharded`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import mla_jax
from mla_jax import nn
from mla_jax.nn import model1, v32
from mla_jax.sharding import DecodeSharding, ModuleSharding
from tests import samples

PAGE = 64
AXES = ("data", "heads", "context")


def gpus(axis, count):
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} GPUs")
    sizes = [count if name == axis else 1 for name in AXES]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])
    return DecodeSharding(mesh, *AXES)


def assert_close(got, want, limit):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.isfinite(want).all() and np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("s_q", [1, 2])
def test_dense(axis, s_q, count):
    ds, rng, h = gpus(axis, count), np.random.default_rng(0), 128
    lengths = np.array([9000, 64, 3, 20_000], np.int32)
    num_pages = 1024
    table = ds.make_table(lengths, num_pages=num_pages, page_size=PAGE, seed=0)
    cache = samples.random_cache(rng, mla_jax.BF16_576, num_pages, PAGE, std=0.1)
    q = samples.rows(rng, 4, s_q, h, fmt=cache.format, std=0.1)
    options = dict(sm_scale=7.0, is_causal=True, implementation="mosaic", return_lse=True)
    want, want_lse = jax.jit(functools.partial(mla_jax.mla_decode, **options))(q, cache, table, lengths)
    cache = jax.device_put(cache, ds.cache_sharding())
    got, lse = jax.jit(functools.partial(ds.mla_decode, **options))(q, cache, table, lengths)
    assert_close(got, want, 2e-3)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=lambda fmt: fmt.name)
def test_sparse(axis, fmt, count):
    ds, rng, h, topk = gpus(axis, count), np.random.default_rng(1), 64, 2048
    b, num_pages = 4, 512
    own = num_pages * PAGE // ds.num_data  # slots of a data group
    group = np.arange(b) // (b // ds.num_data)
    indices = (rng.integers(-50, own, (b, 1, topk)) + group[:, None, None] * own).astype(np.int32)
    cache = samples.random_cache(rng, fmt, num_pages, PAGE, std=0.1)
    q = samples.rows(rng, b, 1, h, fmt=fmt, std=0.1)
    sink = jnp.asarray(rng.standard_normal(h), jnp.float32)
    if axis == "data":  # indices below a group's run are no keys there
        indices = np.maximum(indices, group[:, None, None].astype(np.int32) * own)
    options = dict(sm_scale=5.0, implementation="mosaic", return_lse=True)
    want, want_lse = jax.jit(functools.partial(mla_jax.sparse_mla_decode, **options))(q, cache, indices, attn_sink=sink)
    cache = jax.device_put(cache, ds.cache_sharding())
    got, lse = jax.jit(functools.partial(ds.sparse_mla_decode, **options))(q, cache, indices, attn_sink=sink)
    assert_close(got, want, 2e-3)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # of the indexer's kernels
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("axis", ["context", "heads"])
@pytest.mark.parametrize("kind", ["v3", "v32", "ratio4", "ratio128"])
def test_modules(axis, kind, count):
    """A prompt, 8 tokens at a time since the indexer's kernel is unrolled over a step's queries, and one more token.

    Outputs are bfloat16 behind two projections: the bound is twice that of the ops.
    """
    ds, b, s = gpus(axis, count), 4, 700
    if kind in ("v3", "v32"):
        changes = dict(index_topk=0, cache="bf16") if kind == "v3" else dict(index_topk=128)
        config, module, layer = nn.V32Config.small(num_heads=32, **changes), v32, 0
        pages = 2 * b * (s // PAGE + 2)
        tables = jnp.asarray(ds.make_table([s + 1] * b, num_pages=pages, page_size=PAGE, seed=0))
        sizes = dict(num_pages=pages, page_size=PAGE)
    else:
        config = nn.Model1Config.small(num_heads=32, ratios=(4, 128), index_topk=64)
        module, layer = model1, config.layers[0 if kind == "ratio4" else 1]
        columns, pages = model1.window_columns(config, PAGE, s), 2 * b * (s // config.page_tokens + 2)
        context = ds.make_table([s + 1] * b, num_pages=pages, page_size=config.page_tokens, seed=0)
        window = np.arange(b * columns, dtype=np.int32).reshape(b, columns)
        tables = nn.Model1Tables(*map(jnp.asarray, (window, context, np.arange(b, dtype=np.int32))))
        sizes = dict(window_pages=b * columns, context_pages=pages, rows=b, window_page_size=PAGE)
    modules = ModuleSharding(config, ds)
    params = nn.init_params(config, 0 if layer == 0 else config.layers.index(layer), jax.random.key(1))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((b, s + 1, config.hidden_size)), config.dtype)
    lengths = jnp.full(b, s, jnp.int32)

    def run(prefill, decode, params, cache):
        out, cache = prefill(params, cache, x[:, :s], tables, lengths, layer=layer, chunk=8)
        more, _ = decode(params, cache, x[:, s:], tables, lengths + 1, layer=layer)
        return jnp.concatenate([out, more], axis=1)

    def alone(function):
        return lambda params, cache, *args, **options: function(params, config, cache, *args, **options)

    one = jax.jit(functools.partial(run, alone(module.prefill), alone(module.decode)))
    want = one(params, module.init_cache(config, **sizes))
    many = jax.jit(functools.partial(run, modules.prefill, modules.decode))
    got = many(modules.place_params(params), modules.init_cache(**sizes))
    assert_close(got, want, 4e-3)
