"""Who holds what: parts, tables, padding, and errors that say what to change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import make

import mla_jax
from mla_jax.sharding import DecodeSharding


def test_parts_cover_the_pool_in_the_order_of_the_shards():
    ds = make(2, 2, 2)
    data = jax.device_put(jnp.arange(24), ds.cache_sharding())  # page i holds i
    for shard in data.addressable_shards:
        group, _, rank = np.argwhere(ds.mesh.devices == shard.device)[0]
        assert list(np.asarray(shard.data)) == list(ds.pages_of(group, rank, 24))
    assert sorted(p for g in range(2) for r in range(2) for p in ds.pages_of(g, r, 24)) == list(range(24))
    shared = jax.device_put(jnp.arange(24), ds.cache_sharding(shared=True))
    for shard in shared.addressable_shards:
        group, _, rank = np.argwhere(ds.mesh.devices == shard.device)[0]
        assert list(np.asarray(shard.data)) == list(ds.pages_of(group, rank, 24, shared=True))


@pytest.mark.parametrize("seed", [None, 3])
def test_tables_respect_the_rule(seed):
    ds = make(2, 1, 4)
    lengths = [50, 0, 7, 33, 1, 64]
    table = ds.make_table(lengths, num_pages=64, page_size=4, seed=seed)
    assert table.shape == (6, 16) and table.dtype == np.int32
    used = table[table >= 0]
    assert len(set(used)) == len(used) == sum(-(-n // 4) for n in lengths)
    for row in range(6):
        for column in range(-(-lengths[row] // 4)):
            assert table[row, column] in ds.pages_of(row // 3, column % 4, 64)
    ds.check_table(table, np.array(lengths), num_pages=64, page_size=4)
    table[0, [0, 1]] = table[0, [1, 0]]
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is page .*data group 0, context rank 0"):
        ds.check_table(table, np.array(lengths), num_pages=64, page_size=4)


def test_make_table_says_what_is_too_small():
    ds = make(2, 1, 2)
    with pytest.raises(ValueError, match=r"num_pages=8: data group 1, context rank 0 has 2 pages.*more pages"):
        ds.make_table([1, 40], num_pages=8, page_size=4)
    with pytest.raises(ValueError, match="max_pages=3; accepted: at least 10"):
        ds.make_table([1, 40], num_pages=80, page_size=4, max_pages=3)


def test_pad_batch():
    ds = make(4)
    lengths, slots = jnp.arange(1, 6, dtype=jnp.int32), jnp.ones((5, 2), jnp.int32)
    assert list(ds.pad_batch(lengths)) == [1, 2, 3, 4, 5, 0, 0, 0]
    assert (ds.pad_batch(slots, -1)[5:] == -1).all()
    assert ds.pad_batch(jnp.zeros((0, 3))).shape == (0, 3)


def test_axes_that_the_mesh_does_not_have():
    mesh = jax.make_mesh((2,), ("x",))
    with pytest.raises(ValueError, match=r"heads='tp' is no axis of the mesh; accepted: None, or one of \['x'\]"):
        DecodeSharding(mesh, heads="tp")
    with pytest.raises(ValueError, match="context='x' is already data"):
        DecodeSharding(mesh, data="x", context="x")
    with pytest.raises(ValueError, match=r"mesh is str .*accepted: a jax\.sharding\.Mesh"):
        DecodeSharding("x")


def _call(ds, *, b=4, h=4, pages=16, kind=mla_jax.BF16_576):
    cache = mla_jax.PagedKVCache.zeros(kind, pages, 4)
    q = jnp.zeros((b, 1, h, kind.d_qk), kind.compute_dtype)
    return q, cache, jnp.zeros((b, 2), jnp.int32), jnp.ones(b, jnp.int32)


def test_shapes_that_do_not_divide():
    ds = make(2, 2, 2)

    def run(**shape):
        q, cache, table, lengths = _call(ds, **shape)
        ds.mla_decode(q, cache, table, lengths, sm_scale=1.0)

    with pytest.raises(ValueError, match=r"q has 3 requests; accepted: a multiple of 2.*next: 4; pad_batch"):
        run(b=3)
    with pytest.raises(ValueError, match=r"q has 5 heads; accepted: a multiple of 2.*next: 6"):
        run(h=5)
    with pytest.raises(ValueError, match=r"cache has 18 pages; accepted: a multiple of 4.*next: 20"):
        run(pages=18)
    cache = mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, 16, 4, sharding=ds.cache_sharding())
    with pytest.raises(ValueError, match="kv has 3 rows; accepted: a multiple of 2"):
        ds.append_kv(cache, jnp.zeros((3, 576), jnp.bfloat16), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="num_heads has 3 heads; accepted: a multiple of 2"):
        ds.plan_decode(jnp.ones(4, jnp.int32), s_q=1, num_heads=3, page_size=4)


@pytest.mark.parametrize("jit", [False, True])
def test_a_cache_placed_another_way(jit):
    ds = make(2, 2, 2, AxisType.Explicit)
    q, cache, table, lengths = _call(ds)
    if jit:
        q, table, lengths = (jax.device_put(x, ds.sharding(P())) for x in (q, table, lengths))
    wrong = jax.device_put(cache, ds.sharding(P("d")))
    run = lambda q, cache, table, lengths: ds.mla_decode(q, cache, table, lengths, sm_scale=1.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"cache\.data is placed as .*'d'.*accepted: .*\('d', 'c'\).*cache_sharding"):
        (jax.jit(run) if jit else run)(q, wrong, table, lengths)
    with pytest.raises(ValueError, match=r"cache\.data is placed as .*device_put"):
        ds.append_kv(wrong, jnp.zeros((4, 576), jnp.bfloat16), jnp.zeros(4, jnp.int32))
    shared = jax.device_put(cache, ds.cache_sharding())
    with pytest.raises(ValueError, match=r"extra_cache\.data is placed as .*shared=True"):
        ds.sparse_mla_decode(
            q, shared, table, sm_scale=1.0, extra_cache=shared, extra_indices=table, extra_shared=True
        )


def test_operands_placed_another_way():
    ds = make(2, 2, 2, AxisType.Explicit)
    q, cache, table, lengths = _call(ds)
    cache = jax.device_put(cache, ds.cache_sharding())
    with pytest.raises(ValueError, match=r"q is partitioned as .*'c'.*accepted: .*unpartitioned"):
        ds.mla_decode(jax.device_put(q, ds.sharding(P("c"))), cache, table, lengths, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"block_table is partitioned as"):
        ds.mla_decode(q, cache, jax.device_put(table, ds.sharding(P(None, "c"))), lengths, sm_scale=1.0)


def test_other_misuse():
    ds = make(2, 1, 2)
    q, cache, table, lengths = _call(ds)
    cache = jax.device_put(cache, ds.cache_sharding())
    with pytest.raises(ValueError, match=r"block_table is None and context='c'; accepted with a context axis"):
        ds.mla_decode(q, cache, None, lengths, sm_scale=1.0)
    plan = jax.jit(lambda n: mla_jax.plan_decode(n, s_q=1, num_heads=4, page_size=4))(lengths)
    with pytest.raises(ValueError, match=r"plan is for one device .*plan_decode of this DecodeSharding"):
        ds.mla_decode(q, cache, table, lengths, sm_scale=1.0, plan=plan)
    with pytest.raises(ValueError, match="extra_cache is given without extra_indices"):
        ds.sparse_mla_decode(q, cache, table, sm_scale=1.0, extra_cache=cache)
