"""Every sharding product against one device, what it communicates, plans, donation, garbage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from meshes import collectives, make
from samples import random_cache, relative_error, rows

import mla_jax
from tests.compiling import QUICK

PRODUCTS = [(d, h, 8 // d // h) for d in (1, 2, 4, 8) for h in (1, 2, 4, 8) if d * h <= 8]
KINDS = [AxisType.Auto, AxisType.Explicit]
TOLERANCE = 2e-3  # relative, of `out` against one device
PAGE = 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def jitted(function, **options):
    return jax.jit(function, compiler_options=QUICK, **options)


def dense_call(rng, ds, fmt, *, b=8, s_q=1, h=8, lengths=None, num_pages=128):
    """A batch whose last data groups are empty, and arrays that serve one device as well."""
    if lengths is None:
        lengths = np.array([61, 1, 5, 18, 4, 0, 0, 0], np.int32)
    table = ds.make_table(lengths, num_pages=num_pages, page_size=PAGE, max_pages=19, seed=1)
    ds.check_table(table, lengths, num_pages=num_pages, page_size=PAGE)
    table[table < 0] = rng.integers(-(2**31), 2**31, (table < 0).sum())  # behind a request's end: garbage
    cache = random_cache(rng, fmt, num_pages, PAGE)
    return rows(rng, b, s_q, h, fmt=fmt), cache, jnp.asarray(table), jnp.asarray(lengths)


def sparse_call(rng, ds, fmt, extra_fmt, *, b=8, s_q=1, h=8, topk=21, extra_topk=13, num_pages=32, extra_pages=8):
    """Indices into the pages of each request's own data group, with holes; an extra pool that all groups share."""
    own = num_pages // ds.num_data * PAGE  # slots of a data group
    group = np.arange(b) // (b // ds.num_data)
    indices = rng.integers(0, own, (b, s_q, topk)) + group[:, None, None] * own
    indices = np.where(rng.random(indices.shape) < 0.2, -1, indices)
    extra = rng.integers(-3, extra_pages * PAGE + 3, (b, s_q, extra_topk))
    length, extra_length = rng.integers(-2, topk + 3, (b, s_q)), rng.integers(0, extra_topk + 1, b)
    length[-1], extra_length[-1] = 0, 0  # one request without any key
    integers = dict(indices=indices, topk_length=length, extra_indices=extra, extra_topk_length=extra_length)
    return dict(
        q=rows(rng, b, s_q, h, fmt=fmt),
        cache=random_cache(rng, fmt, num_pages, PAGE),
        extra_cache=random_cache(rng, extra_fmt, extra_pages, PAGE),
        attn_sink=jnp.asarray(rng.standard_normal(h), jnp.float32),
        **{name: jnp.asarray(x, jnp.int32) for name, x in integers.items()},
    )


def place_sparse(ds, call):
    """The call's arrays where they belong on the mesh."""
    where = dict.fromkeys(("indices", "topk_length", "extra_indices", "extra_topk_length"), ds.row_sharding())
    where |= dict(q=ds.q_sharding(), attn_sink=ds.head_sharding(), cache=ds.cache_sharding())
    where |= dict(extra_cache=ds.cache_sharding(shared=True))
    return {name: jax.device_put(x, where[name]) for name, x in call.items()}


def place(ds, cache, *, shared=False):
    return jax.device_put(cache, ds.cache_sharding(shared=shared))


def assert_same(got, want, tolerance=TOLERANCE):
    assert relative_error(got[0], want[0]) <= tolerance
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


def assert_only_the_merge(ds, compiled, rows, d_v=512):
    """Nothing without a context axis; with one, the collectives of the merge, none larger than `out` in float32 and
    `lse`, `rows` rows of them on every device (CPUs gather bfloat16 as float32)."""
    found = collectives(compiled)
    if ds.num_context == 1:
        assert found == []
        return
    assert {name for name, _ in found} == {"all-to-all", "all-gather"} and len(found) == 4
    assert max(size for _, size in found) <= rows * (d_v + 1) * 4
    assert sum(size for _, size in found) <= 2 * rows * (d_v + 1) * 4


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_dense_products(rng, sizes):
    ds = make(*sizes, KINDS[PRODUCTS.index(sizes) % 2])
    q, cache, table, lengths = dense_call(rng, ds, mla_jax.BF16_576)
    options = dict(sm_scale=0.07, return_lse=True)
    want = mla_jax.mla_decode(q, cache, table, lengths, **options)
    q, table, lengths = jax.device_put((q, table, lengths), (ds.q_sharding(), ds.row_sharding(), ds.row_sharding()))
    args = q, place(ds, cache), table, lengths
    step = jitted(lambda *args: ds.mla_decode(*args, **options)).lower(*args).compile()
    got = step(*args)
    assert_same(got, want)
    assert got[0].dtype == jnp.bfloat16 and got[0].sharding.is_equivalent_to(ds.q_sharding(), 4)
    assert np.isneginf(np.asarray(got[1])[5:]).all() and not np.asarray(got[0])[5:].any()
    assert_only_the_merge(ds, step, rows=8 * 8 // ds.num_data // ds.num_heads)


@pytest.mark.parametrize(
    "sizes",
    # The others take as long again to compile and differ in nothing that the dense ones do not show.
    [s if PRODUCTS.index(s) % 2 or s == (2, 2, 2) else pytest.param(s, marks=pytest.mark.slow) for s in PRODUCTS],
    ids=str,
)
def test_sparse_products(rng, sizes):
    ds = make(*sizes, KINDS[(PRODUCTS.index(sizes) + 1) % 2])
    call = sparse_call(rng, ds, mla_jax.MODEL1, mla_jax.BF16_512)
    options = dict(sm_scale=0.05, return_lse=True)
    want = mla_jax.sparse_mla_decode(**call, **options)
    call = place_sparse(ds, call)
    step = jitted(lambda call: ds.sparse_mla_decode(**call, **options, extra_shared=True)).lower(call).compile()
    assert_same(step(call), want)
    assert_only_the_merge(ds, step, rows=8 * 8 // ds.num_data // ds.num_heads)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outside_jit_with_operands_on_one_device(rng, kind):
    ds = make(2, 2, 2, kind)
    q, cache, table, lengths = dense_call(rng, ds, mla_jax.F32_576, h=6)  # 3 heads a rank
    options = dict(sm_scale=jnp.float32(0.07), return_lse=True)
    want = mla_jax.mla_decode(q, cache, table, lengths, **options)
    assert_same(ds.mla_decode(q, place(ds, cache), table, lengths, **options), want, 1e-5)


def test_two_dimensional_indices_and_no_sink(rng):
    ds = make(2, 1, 2)
    call = sparse_call(rng, ds, mla_jax.F32_576, mla_jax.F32_576)
    call = {k: call[k] for k in ("q", "cache", "indices")} | {"indices": call["indices"][:, 0]}
    want = mla_jax.sparse_mla_decode(**call, sm_scale=0.05, return_lse=True)
    call["cache"] = place(ds, call["cache"])
    assert_same(ds.sparse_mla_decode(**call, sm_scale=0.05, return_lse=True), want, 1e-5)


@pytest.mark.parametrize("s_q", [2, 7])
def test_causal_rows_end_on_different_ranks(rng, s_q):
    """Every remainder of a page, and requests shorter than s_q."""
    ds = make(1, 1, 4)
    lengths = np.array([0, 1, 2, 3, 16, 17, 18, 19, 20, 21, 22, 23, 24, 65, 66, 67], np.int32)
    q, cache, table, lengths = dense_call(rng, ds, mla_jax.F32_512, b=16, s_q=s_q, h=2, lengths=lengths, num_pages=256)
    options = dict(sm_scale=0.07, is_causal=True, return_lse=True)
    want = mla_jax.mla_decode(q, cache, table, lengths, **options)
    assert_same(ds.mla_decode(q, place(ds, cache), table, lengths, **options), want, 1e-5)


def test_requests_that_are_one_page_each(rng):
    ds = make(4, 2, 1)
    cache = random_cache(rng, mla_jax.F32_576, 8, 16)  # request i's cache is page i
    q, lengths = rows(rng, 8, 1, 4, fmt=cache.format), jnp.asarray(rng.integers(0, 17, 8), jnp.int32)
    want = mla_jax.mla_decode(q, cache, None, lengths, sm_scale=0.1, return_lse=True)
    assert_same(ds.mla_decode(q, place(ds, cache), None, lengths, sm_scale=0.1, return_lse=True), want, 1e-5)


def test_a_main_scope_without_keys(rng):
    """As when all that is read lies in a shared pool."""
    ds = make(2, 1, 2)
    call = sparse_call(rng, ds, mla_jax.F32_576, mla_jax.F32_576)
    call |= dict(indices=jnp.zeros((8, 1, 0), jnp.int32), topk_length=jnp.zeros(8, jnp.int32))
    want = mla_jax.sparse_mla_decode(**call, sm_scale=0.05, return_lse=True)
    got = ds.sparse_mla_decode(**place_sparse(ds, call), sm_scale=0.05, extra_shared=True, return_lse=True)
    assert_same(got, want, 1e-5)


def test_an_empty_batch():
    ds = make(2, 2, 2)
    cache = mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, 8, 4, sharding=ds.cache_sharding())
    q, table = jnp.zeros((0, 1, 4, 576), jnp.bfloat16), jnp.zeros((0, 3), jnp.int32)
    out, lse = ds.mla_decode(q, cache, table, jnp.zeros(0, jnp.int32), sm_scale=1.0, return_lse=True)
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)
    out, lse = ds.sparse_mla_decode(q, cache, jnp.zeros((0, 1, 5), jnp.int32), sm_scale=1.0, return_lse=True)
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)


@pytest.mark.parametrize("op", ["dense", "sparse"])
def test_data_parallel_is_bitwise_equal_with_batch_invariant(rng, op):
    ds = make(8)
    if op == "dense":
        q, cache, table, lengths = dense_call(rng, ds, mla_jax.BF16_576)
        sizes = dict(s_q=1, num_heads=8, page_size=PAGE, batch_invariant=True)
        plan = jax.jit(lambda n: mla_jax.plan_decode(n, **sizes))(lengths)
        want = mla_jax.mla_decode(q, cache, table, lengths, sm_scale=0.07, plan=plan, return_lse=True)
        got = ds.mla_decode(
            q, place(ds, cache), table, lengths, sm_scale=0.07, plan=ds.plan_decode(lengths, **sizes), return_lse=True
        )
    else:
        call = sparse_call(rng, ds, mla_jax.V32, mla_jax.BF16_576)
        sizes = dict(
            topk=21, batch=8, s_q=1, num_heads=8, topk_length=call["topk_length"], extra_topk=13,
            extra_topk_length=call["extra_topk_length"], batch_invariant=True,
        )  # fmt: skip
        options = dict(sm_scale=0.07, return_lse=True)
        want = mla_jax.sparse_mla_decode(**call, **options, plan=jax.jit(lambda: mla_jax.plan_sparse_decode(**sizes))())
        call = place_sparse(ds, call)
        got = ds.sparse_mla_decode(**call, **options, extra_shared=True, plan=ds.plan_sparse_decode(**sizes))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_plans_are_those_of_the_shards(rng):
    ds = make(2, 2, 2)
    q, cache, table, lengths = dense_call(rng, ds, mla_jax.BF16_576)
    plan = jax.jit(lambda n: ds.plan_decode(n, s_q=1, num_heads=8, page_size=PAGE))(lengths)
    assert (plan.batch, plan.num_heads) == (4, 4)
    shares = [32, 1, 4, 10], [29, 0, 1, 8]  # of 61, 1, 5 and 18 tokens, in pages of 4, on two ranks
    for rank in (0, 1):
        share = jnp.asarray(shares[rank], jnp.int32)
        want = jax.jit(lambda n: mla_jax.plan_decode(n, s_q=1, num_heads=4, page_size=PAGE))(share)
        part = np.asarray(plan.splits).reshape(4, -1)[rank]
        np.testing.assert_array_equal(part, want.splits)
    want = mla_jax.mla_decode(q, cache, table, lengths, sm_scale=0.07, return_lse=True)
    got = ds.mla_decode(q, place(ds, cache), table, lengths, sm_scale=0.07, plan=plan, return_lse=True)
    assert_same(got, want)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576], ids=lambda f: f.name)
def test_append_in_place(rng, fmt, kind):
    """Same bytes as on one device; no collective; a donated pool is not copied."""
    ds = make(2, 2, 2, kind)
    pages = 64
    cache = random_cache(rng, fmt, pages, PAGE)
    table = ds.make_table([9, 3, 0, 30], num_pages=pages, page_size=PAGE)
    positions = jnp.asarray([[8], [2], [-1], [29]], jnp.int32)
    slots = mla_jax.slots_from_positions(positions, jnp.asarray(table), PAGE)[:, 0]
    kv = rows(rng, 4, fmt=fmt)
    want = mla_jax.append_kv(cache, kv, slots)
    row = ds.row_sharding()
    kv, table, positions = jax.device_put((kv, table, positions), row)

    def step(cache, kv, table, positions):
        slots = ds.slots_from_positions(positions, table, PAGE)
        return ds.append_kv(cache, kv, slots[:, 0])

    args = place(ds, cache), kv, table, positions
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    assert collectives(compiled) == []
    memory = compiled.memory_analysis()
    own_bytes = want.data.nbytes // 4
    assert memory.alias_size_in_bytes == own_bytes and memory.temp_size_in_bytes < own_bytes / 4
    got = compiled(*args)
    np.testing.assert_array_equal(np.asarray(got.data).view(np.uint8), np.asarray(want.data).view(np.uint8))
    assert got.data.sharding.is_equivalent_to(ds.cache_sharding(), got.data.ndim)


def test_append_to_a_shared_pool(rng):
    ds = make(2, 2, 2)
    cache = random_cache(rng, mla_jax.V32, 6, PAGE)
    kv, slots = rows(rng, 5, fmt=cache.format), jnp.asarray([23, 0, -1, 13, 24], jnp.int32)
    want = mla_jax.append_kv(cache, kv, slots)
    got = ds.append_kv(place(ds, cache, shared=True), kv, slots, shared=True)
    np.testing.assert_array_equal(got.data, want.data)


def test_other_groups_pages_are_out_of_reach(rng):
    """A row's page ids are data: those of another data group are no keys, and are not written."""
    ds = make(2)
    cache = random_cache(rng, mla_jax.F32_576, 8, PAGE)
    q = rows(rng, 2, 1, 2, fmt=cache.format)
    table = jnp.asarray([[4, 5], [4, 5]], jnp.int32)  # group 1 has pages 4 to 7
    out, lse = ds.mla_decode(
        q, place(ds, cache), table, jnp.asarray([8, 8], jnp.int32), sm_scale=0.1, return_lse=True
    )
    assert np.isneginf(lse[0]).all() and not np.asarray(out[0]).any() and np.isfinite(lse[1]).all()
    kv = rows(rng, 2, fmt=cache.format)
    got = ds.append_kv(place(ds, cache), kv, jnp.asarray([16, 17], jnp.int32))
    assert (got.data[4, 0] == cache.data[4, 0]).all() and (got.data[4, 1] == kv[1]).all()
