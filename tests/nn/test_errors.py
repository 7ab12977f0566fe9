"""Errors come before anything is written, name the argument, and say what is accepted; caches survive files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import PagedKVCache
from mla_jax.nn import (
    Model1Config,
    Model1Layer,
    Model1Tables,
    PagePool,
    RopeConfig,
    V32Config,
    init_params,
    model1,
    v32,
)
from pallas_kernels.formats import BF16_576, F32_512, INDEX_FP8, MODEL1, V32
from tests.compiling import QUICK

I32 = functools.partial(jnp.asarray, dtype=jnp.int32)
V = V32Config.small(cache="f32")
M = Model1Config.small(cache="f32", ratios=(4, 128))

BAD_CONFIGS = {
    "num_heads=0": lambda: V32Config.small(num_heads=0),
    "hidden_size=64.0": lambda: V32Config.small(hidden_size=64.0),
    "kv_lora_rank=256": lambda: V32Config.small(kv_lora_rank=256),
    "index_dim=64": lambda: V32Config.small(index_dim=64),
    "index_topk=-1": lambda: V32Config.small(index_topk=-1),
    "cache='int8'": lambda: V32Config.small(cache="int8"),
    "index_cache='bf16'": lambda: V32Config.small(index_cache="bf16"),
    "precision='f16'": lambda: V32Config.small(precision="f16"),
    "cache='fp8' with index_topk=0": lambda: V32Config.small(index_topk=0),
    "scale_rule is 'mean'": lambda: V32Config.small(scale_rule="mean"),
    "scale_rule='amax'": lambda: Model1Config.small(scale_rule="amax"),
    r"ratios=\(2,\)": lambda: Model1Config.small(ratios=(2,)),
    r"ratios=\(\)": lambda: Model1Config.small(ratios=()),
    "o_groups=3": lambda: Model1Config.small(o_groups=3),
    "page_tokens=64": lambda: Model1Config.small(page_tokens=64),
    "rope.dim=32": lambda: Model1Config.small(rope=RopeConfig(dim=32)),
    "rope.mscale=1.0": lambda: Model1Config.small(rope=RopeConfig(mscale=1.0)),
    "dim=7": lambda: RopeConfig(dim=7),
    "theta=0.5": lambda: RopeConfig(theta=0.5),
    "factor=0.5": lambda: RopeConfig(factor=0.5),
    "beta_fast=1.0": lambda: RopeConfig(beta_fast=1.0),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs(message):
    with pytest.raises(ValueError, match=message):
        BAD_CONFIGS[message]()


def test_published_sizes():
    c = V32Config.deepseek_v3_2()
    assert c.sm_scale == pytest.approx(0.1352338, abs=1e-7) and c.index_topk == 2048 and c.kv_format == V32
    specs = c.param_specs()
    assert specs["wq_b"].shape == (128 * 192, 1536) and specs["index_wq_b"].shape == (64 * 128, 1536)
    assert specs["wo"].shape == (7168, 128 * 128) and specs["wo"].dtype == jnp.bfloat16
    assert not V32Config.deepseek_v3().is_sparse and V32Config.deepseek_v3().kv_format == BF16_576
    flash, pro = Model1Config.deepseek_v4_flash(), Model1Config.deepseek_v4_pro()
    assert flash.num_layers == 43 and flash.ratios[:5] == (0, 0, 4, 128, 4) and flash.ratios[-1] == 4
    assert pro.num_layers == 61 and pro.ratios[:5] == (128, 128, 4, 128, 4) and pro.ratios[-1] == 4
    assert (flash.ratios.count(4), flash.ratios.count(128)) == (21, 20)
    assert pro.layers[4] == Model1Layer(ratio=4, layer=4, rank=1) and pro.kv_format == MODEL1
    assert pro.param_specs(4)["wo_a"].shape == (16, 1024, 8 * 512)
    assert flash.index_topk == 512 and pro.index_topk == 1024 and flash.sm_scale == 512**-0.5
    assert hash(flash) != hash(pro) and flash == Model1Config.deepseek_v4_flash()


def v32_call(op="decode", **changes):
    kw = dict(
        params=init_params(V, 0, jax.random.key(0)),
        config=V,
        cache=v32.init_cache(V, 4, 8),
        x=jnp.zeros((2, 1, 64)),
        block_table=I32([[0, 1], [2, 3]]),
        cache_seqlens=I32([3, 3]),
    )
    kw |= changes
    if op == "prefill":
        kw["lengths"] = kw.pop("cache_seqlens")
    return getattr(v32, op)(**kw)


def model1_call(op="decode", **changes):
    kw = dict(
        params=init_params(M, 0, jax.random.key(0)),
        config=M,
        cache=model1.init_cache(M, window_pages=18, context_pages=2, rows=2, window_page_size=16),
        x=jnp.zeros((2, 1, 64)),
        tables=Model1Tables(I32(np.arange(18).reshape(2, 9)), I32([[0], [1]]), I32([0, 1])),
        cache_seqlens=I32([3, 3]),
    )
    kw |= changes
    if op == "prefill":
        kw["lengths"] = kw.pop("cache_seqlens")
    return getattr(model1, op)(**kw)


def replace(tree, **changes):
    return dataclasses.replace(tree, **changes)


V_CACHE = v32.init_cache(V, 4, 8)
M_CACHE = model1.init_cache(M, window_pages=18, context_pages=2, rows=2, window_page_size=16)
M_TABLES = Model1Tables(I32(np.arange(18).reshape(2, 9)), I32([[0], [1]]), I32([0, 1]))
POOL = PagedKVCache.zeros

BAD_CALLS = {
    "x is float32.2, 64": lambda: v32_call(x=jnp.zeros((2, 64))),
    "x is bfloat16": lambda: v32_call(x=jnp.zeros((2, 1, 64), jnp.bfloat16)),
    "at least one request": lambda: v32_call(x=jnp.zeros((2, 0, 64))),
    "params lack": lambda: v32_call(params={}),
    "block_table is float32": lambda: v32_call(block_table=jnp.zeros((2, 2))),
    "at least one column": lambda: v32_call(block_table=I32(np.zeros((2, 0)))),
    "cache_seqlens is int32.1": lambda: v32_call(cache_seqlens=I32([3])),
    "cache is a PagedKVCache": lambda: v32_call(cache=V_CACHE.kv),
    "cache.kv has format V32; accepted: F32_576": lambda: v32_call(cache=replace(V_CACHE, kv=POOL(V32, 4, 8))),
    "cache.index has page_size=16; accepted: 8": lambda: v32_call(
        cache=replace(V_CACHE, index=POOL(V.index_format, 4, 16))
    ),
    "cache.index has format INDEX_FP8": lambda: v32_call(cache=replace(V_CACHE, index=POOL(INDEX_FP8, 4, 8))),
    "cache.index has 5 pages": lambda: v32_call(cache=replace(V_CACHE, index=POOL(V.index_format, 5, 8))),
    "cache.index is None": lambda: v32_call(cache=replace(V_CACHE, index=None)),
    "cache.num_layers=2": lambda: v32_call(cache=replace(V_CACHE, num_layers=2)),
    "position 16; accepted: below 16": lambda: v32_call(cache_seqlens=I32([3, 17])),
    r"block_table\[1, 0\] is -1": lambda: v32_call(block_table=I32([[0, 1], [-1, 3]])),
    r"block_table\[0, 0\] is 9; accepted: 0 to 3": lambda: v32_call(block_table=I32([[9, 1], [2, 3]])),
    r"lengths=\[2, 1\]; accepted: 0 to 1": lambda: v32_call("prefill", cache_seqlens=I32([2, 1])),
    "chunk=0": lambda: v32_call("prefill", cache_seqlens=I32([1, 1]), chunk=0),
    "tables is a": lambda: model1_call(tables=M_TABLES.window),
    "tables.window has 1 columns": lambda: model1_call(tables=replace(M_TABLES, window=I32([[0], [1]]))),
    "tables.row is int32.1": lambda: model1_call(tables=replace(M_TABLES, row=I32([0]))),
    r"tables.row=\[0, 2\]": lambda: model1_call(tables=replace(M_TABLES, row=I32([0, 2]))),
    r"tables.context\[0, 0\] is 7": lambda: model1_call(tables=replace(M_TABLES, context=I32([[7], [1]]))),
    "position 256; accepted: below 256": lambda: model1_call(cache_seqlens=I32([257, 1])),
    r"tables.window\[1, 0\] is -3": lambda: model1_call(
        tables=replace(M_TABLES, window=I32(np.full((2, 9), -3)).at[0].set(1))
    ),
    "layer.ratio=0": lambda: model1_call(layer=Model1Layer(0, 0, 0)),
    "cache.window has format MODEL1": lambda: model1_call(cache=replace(M_CACHE, window=POOL(MODEL1, 36, 16))),
    "cache.window has 35 pages; accepted: a multiple of 2": lambda: model1_call(
        cache=replace(M_CACHE, window=POOL(F32_512, 35, 16))
    ),
    "cache.ratio4 is None": lambda: model1_call(cache=replace(M_CACHE, ratio4=None)),
    "cache.ratio4.rings is float32": lambda: model1_call(
        cache=replace(M_CACHE, ratio4=replace(M_CACHE.ratio4, rings=jnp.zeros((2, 3, 2, 1024))))
    ),
    "cache.ratio128.entries has page_size=64; accepted: 2": lambda: model1_call(
        cache=replace(M_CACHE, ratio128=replace(M_CACHE.ratio128, entries=POOL(F32_512, 2, 64)))
    ),
    "cache.ratio4.num_layers=2": lambda: model1_call(
        cache=replace(M_CACHE, ratio4=replace(M_CACHE.ratio4, num_layers=2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


# -- pages on the host -------------------------------------------------------------------------------------------------


def test_a_full_pool_changes_nothing():
    pool = PagePool(4, 16, batch=3, columns=3)
    pool.grow([20, 5, 0])
    table, tokens, free = pool.table.copy(), pool.tokens.copy(), pool.num_free
    assert free == 1
    with pytest.raises(ValueError, match="the pool is full: 1 more free pages are needed, 1 are left"):
        pool.grow([0, 12, 1])
    with pytest.raises(ValueError, match="request 0 would hold 49 tokens; accepted: 48"):
        pool.grow([29, 0, 0])
    with pytest.raises(ValueError, match="new_tokens="):
        pool.grow([-1, 0, 0])
    np.testing.assert_array_equal(pool.table, table)
    np.testing.assert_array_equal(pool.tokens, tokens)
    assert pool.num_free == free
    pool.leave(0)
    assert pool.num_free == 3 and (pool.table[0] == -1).all()
    assert pool.grow([0, 12, 1]).tolist() == [0, 17, 1]
    pages = pool.table[pool.table >= 0]
    assert len(set(pages.tolist())) == len(pages) == 3
    pool.shrink(1, 2)
    assert pool.tokens[1] == 15 and pool.grow([0, 1, 0])[1] == 16
    with pytest.raises(ValueError, match="tokens=17"):
        pool.shrink(1, 17)
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0, 16, batch=3, columns=3)


def test_a_ring_never_outgrows_its_columns():
    pool = PagePool(3, 16, batch=1, columns=3, ring=True)
    for _ in range(20):
        pool.grow([10])
    assert pool.tokens[0] == 200 and sorted(pool.table[0].tolist()) == [0, 1, 2]


# -- files -------------------------------------------------------------------------------------------------------------


def filled(cache, seed=0):
    rng = np.random.default_rng(seed)

    def fill(leaf):
        bits = rng.integers(0, 256, leaf.size * leaf.dtype.itemsize, dtype=np.uint8)
        return jnp.asarray(bits.view(leaf.dtype).reshape(leaf.shape))  # NaN patterns included

    return jax.tree.map(fill, cache)


CACHES = {
    "v32": lambda: v32.init_cache(V32Config.small(num_layers=2), 3, 8),
    "model1": lambda: model1.init_cache(Model1Config.small(), window_pages=2, context_pages=2, rows=2),
}


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("kind", CACHES)
def test_caches_survive_numpy_files(kind, tmp_path):
    cache = filled(CACHES[kind]())
    leaves, structure = jax.tree.flatten(cache)
    np.savez(tmp_path / "cache.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "cache.npz") as z:
        restored = jax.tree.unflatten(structure, [jnp.asarray(z[f"arr_{i}"]) for i in range(len(leaves))])
    assert_same_bits(restored, cache)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CACHES)
def test_caches_survive_orbax(kind, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint (group test)")
    cache = filled(CACHES[kind]())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        empty = jax.tree.map(_abstract, CACHES[kind]())
        restored = checkpointer.restore(tmp_path / "cache", empty)
    assert_same_bits(restored, cache)


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def test_a_restored_cache_goes_on(tmp_path):
    """A session that is saved between two steps continues as if it had not been."""
    config = V32Config.small()
    params = init_params(config, 0, jax.random.key(0))
    step = jax.jit(functools.partial(v32.decode, params, config), compiler_options=QUICK)
    x = jax.random.normal(jax.random.key(1), (1, 1, 64), jnp.bfloat16)
    _, cache = step(v32.init_cache(config, 2, 8), x, I32([[1, 0]]), I32([1]))
    leaves, structure = jax.tree.flatten(cache)
    np.savez(tmp_path / "c.npz", *map(np.asarray, leaves))
    with np.load(tmp_path / "c.npz") as z:
        restored = jax.tree.unflatten(structure, [jnp.asarray(z[f"arr_{i}"]) for i in range(len(leaves))])
    got, want = (step(c, x, I32([[1, 0]]), I32([2])) for c in (restored, cache))
    jax.tree.map(np.testing.assert_array_equal, got, want)
