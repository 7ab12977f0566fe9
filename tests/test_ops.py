"""Both ops against the reference, and what JAX does to them: jit, vmap, shard_map, export, guards."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mla_jax
from mla_jax import reference
from tests import samples


def dense(*args, **kwargs):
    return mla_jax.mla_decode(*args, **kwargs, return_lse=True)


def sparse(*args, **kwargs):
    return mla_jax.sparse_mla_decode(*args, **kwargs, return_lse=True)


by_name = lambda x: getattr(x, "name", None)  # noqa: E731


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# (page size, s_q, heads, causal)
DENSE_SHAPES = [(5, 3, 9, True), (64, 2, 4, False), (1, 1, 1, True)]


DENSE_CASES = [(fmt, DENSE_SHAPES[0]) for fmt in samples.FORMATS]
# The byte maps depend on the page size.
DENSE_CASES += [(fmt, shape) for fmt in (mla_jax.V32, mla_jax.MODEL1) for shape in DENSE_SHAPES[1:]]


@pytest.mark.parametrize(("fmt", "shape"), DENSE_CASES, ids=by_name)
def test_dense_equals_reference(rng, fmt, shape):
    page_size, s_q, h, is_causal = shape
    call = samples.dense_call(rng, fmt, page_size=page_size, s_q=s_q, h=h, lengths=[0, 2, 4 * page_size])
    got = dense(**call, is_causal=is_causal)
    samples.assert_equal_results(got, reference.mla_decode(**call, is_causal=is_causal), fmt, str(shape))
    assert (np.asarray(got[0][0]) == 0).all() and np.isneginf(got[1][0]).all()


SPARSE_SHAPES = {
    # (topk, extra topk, s_q, heads) by main and extra format
    (mla_jax.V32, mla_jax.BF16_576): [(37, 19, 2, 4), (0, 7, 1, 3)],
    (mla_jax.BF16_576, mla_jax.V32): [(37, 19, 2, 4)],
    (mla_jax.MODEL1, mla_jax.MODEL1): [(37, 19, 2, 4), (300, 0, 3, 5)],
    (mla_jax.MODEL1, mla_jax.BF16_512): [(1, 1, 1, 1)],
    (mla_jax.F32_512, mla_jax.F32_512): [(37, 19, 2, 4)],
    (mla_jax.V32, None): [(37, 0, 2, 4), (300, 0, 1, 1)],
}


@pytest.mark.parametrize(("fmt", "extra"), SPARSE_SHAPES, ids=by_name)
def test_sparse_equals_reference(rng, fmt, extra):
    for topk, extra_topk, s_q, h in SPARSE_SHAPES[fmt, extra]:
        call = samples.sparse_call(rng, fmt, extra, topk=topk, extra_topk=extra_topk, s_q=s_q, h=h)
        got = sparse(**call)
        samples.assert_equal_results(got, reference.sparse_mla_decode(**call), fmt, f"{topk} {extra_topk} {s_q} {h}")


def test_many_chunks_and_groups(rng, monkeypatch):
    """Small working sets, so that one call runs several groups of several chunks each."""
    monkeypatch.setattr("mla_jax.xla.GROUP_BYTES", 1)
    monkeypatch.setattr("mla_jax.xla.CHUNK_TOKENS", 8)
    call = samples.dense_call(rng, mla_jax.V32, b=5, page_size=7, max_pages=6)
    samples.assert_equal_results(dense(**call), reference.mla_decode(**call), mla_jax.V32)
    call = samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.MODEL1, b=3, s_q=3, topk=50, extra_topk=21)
    samples.assert_equal_results(sparse(**call), reference.sparse_mla_decode(**call), mla_jax.MODEL1)


def test_contiguous_cache(rng):
    """block_table=None: page i is request i's cache."""
    for fmt in (mla_jax.BF16_576, mla_jax.MODEL1):
        cache = samples.random_cache(rng, fmt, 3, 21)
        q = samples.rows(rng, 3, 2, 4, fmt=fmt)
        lengths = jnp.asarray([21, 0, 13], jnp.int32)
        got = dense(q, cache, None, lengths, sm_scale=0.1, is_causal=True)
        table = jnp.arange(3, dtype=jnp.int32)[:, None]
        chex.assert_trees_all_equal(got, dense(q, cache, table, lengths, sm_scale=0.1, is_causal=True))
        samples.assert_equal_results(
            got, reference.mla_decode(q, cache, None, lengths, sm_scale=0.1, is_causal=True), fmt
        )


def test_indices_of_rank_two(rng):
    call = samples.sparse_call(rng, mla_jax.V32, s_q=1)
    flat = call | {"indices": call["indices"][:, 0], "topk_length": call["topk_length"][:, 0]}
    chex.assert_trees_all_equal(sparse(**call), sparse(**flat))


def test_empty_batches_and_caches(rng):
    fmt = mla_jax.MODEL1
    cache = samples.random_cache(rng, fmt, 2, 4)
    for b, s_q in ((0, 1), (2, 0)):
        q = jnp.zeros((b, s_q, 3, fmt.d_qk), fmt.compute_dtype)
        out, lse = dense(q, cache, jnp.zeros((b, 2), jnp.int32), jnp.zeros(b, jnp.int32), sm_scale=1.0)
        assert out.shape == (b, s_q, 3, fmt.d_v) and lse.shape == (b, s_q, 3)
        out, lse = sparse(q, cache, jnp.zeros((b, s_q, 5), jnp.int32), sm_scale=1.0)
        assert out.shape == (b, s_q, 3, fmt.d_v) and lse.shape == (b, s_q, 3)
    q = samples.rows(rng, 2, 1, 3, fmt=fmt)
    for pages, width in ((2, 0), (0, 2), (0, 0)):
        none = mla_jax.PagedKVCache.zeros(fmt, pages, 4)
        out, lse = dense(q, none, jnp.zeros((2, width), jnp.int32), jnp.full(2, 5, jnp.int32), sm_scale=1.0)
        assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()
        out, lse = sparse(q, none, jnp.full((2, 1, width), 99, jnp.int32), sm_scale=1.0)
        assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()


# -- garbage -----------------------------------------------------------------------------------------------------------

EXTREMES = np.array([-(2**31), 2**31 - 1, -1, -2, 2**30, 655, 10**9], np.int32)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_integer_garbage(seed):
    """Any integer in any integer argument: finite, equal to the reference, other rows bitwise unchanged."""
    rng = np.random.default_rng(seed)
    fmt = (mla_jax.V32, mla_jax.MODEL1)[seed % 2]
    call = samples.dense_call(rng, fmt, b=4, lengths=[20, 20, 20, 20], spare_pages=0)
    call["cache"] = samples.random_cache(rng, fmt, call["cache"].num_pages, call["cache"].page_size)
    clean_out, clean_lse = dense(**call)
    table, lengths = np.array(call["block_table"]), np.array(call["cache_seqlens"])
    table[1] = rng.choice(EXTREMES, table.shape[1])
    table[2, rng.integers(0, 4)] = rng.integers(-(2**31), 2**31)
    lengths[3] = rng.choice(EXTREMES)
    dirty = call | dict(block_table=jnp.asarray(table), cache_seqlens=jnp.asarray(lengths))
    out, lse = dense(**dirty)
    samples.assert_equal_results((out, lse), reference.mla_decode(**dirty), fmt)
    chex.assert_trees_all_equal((out[0], lse[0]), (clean_out[0], clean_lse[0]))

    call = samples.sparse_call(rng, fmt, fmt, b=4)
    clean_out, clean_lse = sparse(**call)
    dirty = dict(call)
    for name in ("indices", "extra_indices", "topk_length", "extra_topk_length"):
        x = np.array(call[name])
        x[1] = rng.choice(EXTREMES[[0, 1, 2, 3, 6]], x[1].shape)
        dirty[name] = jnp.asarray(x)
    out, lse = sparse(**dirty)
    samples.assert_equal_results((out, lse), reference.sparse_mla_decode(**dirty), fmt)
    for row in (0, 2, 3):
        chex.assert_trees_all_equal((out[row], lse[row]), (clean_out[row], clean_lse[row]))


def test_wide_and_narrow_integers(rng):
    """Integers that int32 cannot hold name nothing; narrower ones are widened."""
    call = samples.sparse_call(rng, mla_jax.V32, topk=16, page_size=3)
    want = sparse(**call)
    unsigned = jnp.asarray(np.array(call["indices"]).astype(np.int64) % 2**32, jnp.uint32)
    chex.assert_trees_all_equal(want, sparse(**(call | {"indices": unsigned})))
    with jax.enable_x64(True):
        wide = jnp.asarray(
            np.where(np.array(call["indices"]) < 0, np.int64(2**40 + 3), np.array(call["indices"])), jnp.int64
        )
        chex.assert_trees_all_equal(want, sparse(**(call | {"indices": wide})))
    small = np.clip(np.array(call["indices"]), -1, 100)
    narrow = call | {"indices": jnp.asarray(small, jnp.int8)}
    chex.assert_trees_all_equal(sparse(**narrow), sparse(**(call | {"indices": jnp.asarray(small, jnp.int32)})))


def test_nan_in_one_request_stays_there(rng):
    call = samples.dense_call(rng, mla_jax.BF16_576, lengths=[20, 20, 20])
    want = dense(**call)
    got = dense(**(call | {"q": call["q"].at[1].set(jnp.nan)}))
    assert np.isnan(np.asarray(got[0][1], np.float32)).all()
    for row in (0, 2):
        chex.assert_trees_all_equal((got[0][row], got[1][row]), (want[0][row], want[1][row]))


def test_nan_scale_on_a_valid_key():
    """e8m0 255 on a key that counts makes its row NaN; on one that does not, nothing."""
    rng = np.random.default_rng(3)
    fmt = mla_jax.MODEL1
    cache = samples.random_cache(rng, fmt, 2, 4)
    data = np.array(cache.data)
    data[0, fmt.area_offset_bytes(1, 4)] = 255  # first scale of slot 0
    bad = cache.replace(jnp.asarray(data))
    q = samples.rows(rng, 1, 1, 2, fmt=fmt)
    with_it, _ = sparse(q, bad, jnp.asarray([[[0, 1]]], jnp.int32), sm_scale=0.1)
    assert np.isnan(np.asarray(with_it, np.float32)).any()
    chex.assert_trees_all_equal(*(sparse(q, c, jnp.asarray([[[5, 1]]], jnp.int32), sm_scale=0.1) for c in (bad, cache)))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_for_other_lengths_changes_nothing_here(rng):
    """Right, or NaN for the request; never a plausible wrong result. Here the plan is not read: the result is right."""
    call = samples.dense_call(rng, mla_jax.V32)
    want = dense(**call)
    plan = jax.jit(functools.partial(mla_jax.plan_decode, s_q=2, num_heads=4, page_size=5))
    for lengths in ([1, 1, 9999], [2**31 - 1, -(2**31), 7]):
        stale = plan(jnp.asarray(lengths, jnp.int32))
        chex.assert_trees_all_equal(dense(**call, plan=stale), want)
    with pytest.raises(ValueError, match="plan does not fit this call: it was made for batch 2"):
        mla_jax.mla_decode(**call, plan=dataclasses.replace(stale, batch=2))
    call = samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.MODEL1)
    plan = jax.jit(lambda: mla_jax.plan_sparse_decode(37, batch=3, s_q=2, num_heads=4, extra_topk=19))()
    chex.assert_trees_all_equal(sparse(**call), sparse(**call, plan=plan))


# -- jit and friends ---------------------------------------------------------------------------------------------------


def test_no_retrace_when_data_change(rng):
    call = samples.dense_call(rng, mla_jax.V32)
    decode = jax.jit(chex.assert_max_traces(dense, 1), static_argnames=("is_causal",))
    for scale, shift in itertools.product((0.1, 0.2), (0, 1, 7)):
        changed = call | dict(
            block_table=call["block_table"] + shift, cache_seqlens=call["cache_seqlens"] - shift, sm_scale=scale
        )
        got = decode(**changed)
        want = reference.mla_decode(**changed)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    call = samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.MODEL1)
    decode = jax.jit(chex.assert_max_traces(sparse, 1))
    for shift in range(4):
        decode(**(call | dict(indices=call["indices"] + shift, topk_length=call["topk_length"] - shift)))


def test_eager_scale_does_not_recompile(rng):
    call = samples.dense_call(rng, mla_jax.BF16_512)
    dense(**call)
    from mla_jax.decode import _jitted

    before = _jitted._cache_size()
    for scale in (0.11, 0.12, np.float32(0.13), jnp.float32(0.14)):
        dense(**(call | {"sm_scale": scale}))
    assert _jitted._cache_size() == before


def test_vmap_with_a_shared_cache(rng):
    calls = [samples.dense_call(rng, mla_jax.V32, page_size=4) for _ in range(3)]
    cache = samples.random_cache(rng, mla_jax.V32, calls[0]["cache"].num_pages, 4)
    stack = lambda name: jnp.stack([c[name] for c in calls])  # noqa: E731
    f = lambda q, table, lengths: dense(q, cache, table, lengths, sm_scale=0.1)  # noqa: E731
    got = jax.jit(jax.vmap(f))(stack("q"), stack("block_table"), stack("cache_seqlens"))
    want = [f(c["q"], c["block_table"], c["cache_seqlens"]) for c in calls]
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), rtol=1e-2, atol=1e-3)
    got = jax.vmap(lambda q: f(q, calls[0]["block_table"], calls[0]["cache_seqlens"]))(stack("q"))
    np.testing.assert_allclose(got[1][0], want[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=by_name)
def test_vmap_over_caches(rng, fmt):
    calls = [samples.dense_call(rng, fmt, page_size=4) for _ in range(3)]
    for c in calls:
        c.pop("sm_scale")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    plan_of = lambda lengths: mla_jax.plan_decode(lengths, s_q=2, num_heads=4, page_size=4)  # noqa: E731
    got = jax.vmap(lambda c: dense(**c, sm_scale=0.07, plan=plan_of(c["cache_seqlens"])))(stacked)
    for i, call in enumerate(calls):
        want = reference.mla_decode(**call, sm_scale=0.07)
        samples.assert_equal_results((got[0][i], got[1][i]), want, fmt)

    def without_a_table(decode):
        def f(c):
            cache = c["cache"].replace(c["cache"].data[:3])
            return decode(c["q"], cache, None, c["cache_seqlens"] // 4, sm_scale=0.1)

        return jax.vmap(f)(stacked)

    got, want = without_a_table(dense), without_a_table(reference.mla_decode)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)

    calls = [samples.sparse_call(rng, fmt, fmt) for _ in range(3)]
    for c in calls:
        c.pop("attn_sink"), c.pop("sm_scale")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    got = jax.vmap(lambda c: sparse(**c, sm_scale=0.05))(stacked)
    for i, call in enumerate(calls):
        want = reference.sparse_mla_decode(**call, sm_scale=0.05)
        samples.assert_equal_results((got[0][i], got[1][i]), want, fmt)


def test_vmap_over_scales_and_sinks(rng):
    calls = [samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.MODEL1) for _ in range(2)]
    for i, call in enumerate(calls):
        call["sm_scale"] = jnp.float32(0.05 + i)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    got = jax.vmap(lambda c: sparse(**c))(stacked)
    for i, call in enumerate(calls):
        samples.assert_equal_results((got[0][i], got[1][i]), reference.sparse_mla_decode(**call), mla_jax.MODEL1)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_the_batch(rng, check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    call = samples.dense_call(rng, mla_jax.V32, b=4)
    cache = call["cache"]

    def local(q, table, lengths, cache):
        return dense(q, cache, table, lengths, sm_scale=0.07)

    specs = (P("data"), P("data"), P("data"), P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    got = jax.jit(mapped)(call["q"], call["block_table"], call["cache_seqlens"], cache)
    samples.assert_equal_results(got, reference.mla_decode(**call), mla_jax.V32)


def test_partitioned_caches_under_explicit_axes_are_refused(rng):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    call = samples.dense_call(rng, mla_jax.V32, spare_pages=0)
    split = NamedSharding(mesh, P("x"))
    with jax.set_mesh(mesh):
        cache = jax.device_put(call["cache"], split)
        with pytest.raises(ValueError, match=r"cache\.data .*partitioned.*mla_jax\.sharding"):
            mla_jax.mla_decode(**(call | {"cache": cache}))
        with pytest.raises(ValueError, match=r"cache\.data .*partitioned"):
            mla_jax.sparse_mla_decode(call["q"], cache, jnp.zeros((3, 2, 4), jnp.int32), sm_scale=1.0)


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda")])
def test_export(rng, platforms):
    call = samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.MODEL1)

    @jax.jit
    def step(call, dense_call):
        return sparse(**call), dense(**dense_call)

    dense_call = samples.dense_call(rng, mla_jax.V32)
    exported = jax.export.export(step, platforms=platforms)(call, dense_call)
    again = jax.export.deserialize(exported.serialize())
    assert ("mosaic_gpu" in exported.mlir_module()) == ("cuda" in platforms)  # the kernels are in it, GPU or no GPU
    assert again.platforms == platforms
    if "cpu" in platforms:
        got, _ = again.call(call, dense_call)
        samples.assert_equal_results(got, reference.sparse_mla_decode(**call), mla_jax.MODEL1)


def test_x64(rng):
    with jax.enable_x64(True):
        call = samples.sparse_call(rng, mla_jax.V32, mla_jax.BF16_576)
        samples.assert_equal_results(sparse(**call), reference.sparse_mla_decode(**call), mla_jax.V32)
        call = samples.dense_call(rng, mla_jax.F32_576)
        samples.assert_equal_results(dense(**call), reference.mla_decode(**call), mla_jax.F32_576)


def test_debug_nans(rng):
    call = samples.sparse_call(rng, mla_jax.V32, mla_jax.BF16_576)
    dense_call = samples.dense_call(rng, mla_jax.MODEL1)
    with jax.debug_nans(True):
        sparse(**call)
        dense(**dense_call)


def test_transfer_guard(rng):
    call = jax.device_put(samples.sparse_call(rng, mla_jax.V32, mla_jax.BF16_576) | {"sm_scale": 0.0})
    dense_call = samples.dense_call(rng, mla_jax.MODEL1)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(sparse(**(call | {"sm_scale": 0.05})))
        jax.block_until_ready(dense(**dense_call))
        jax.block_until_ready(jax.jit(dense)(**(dense_call | {"sm_scale": jax.device_put(np.float32(0.1))})))


def test_named_scopes(rng):
    call = samples.dense_call(rng, mla_jax.V32)
    text = jax.jit(dense).lower(**call).as_text(debug_info=True)
    assert "mla_decode" in text
    call = samples.sparse_call(rng, mla_jax.V32)
    assert "sparse_mla_decode" in jax.jit(sparse).lower(**call).as_text(debug_info=True)


def test_differentiation_is_refused(rng):
    call = samples.dense_call(rng, mla_jax.BF16_576)
    loss = lambda q: mla_jax.mla_decode(**(call | {"q": q})).astype(jnp.float32).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="for inference"):
        jax.grad(loss)(call["q"])
    gradient = jax.grad(lambda q: reference.mla_decode(**(call | {"q": q}))[0].sum())(call["q"])
    assert gradient.shape == call["q"].shape


# -- memory ------------------------------------------------------------------------------------------------------------


def _temporaries(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def _abstract(fmt, pages, page_size):
    data = jax.ShapeDtypeStruct((pages, *fmt.page_shape(page_size)), fmt.storage_dtype)
    return mla_jax.PagedKVCache(data, fmt, page_size)


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=by_name)
def test_sparse_temporaries(fmt):
    cache = _abstract(fmt, 2 * 2**30 // fmt.page_bytes(64), 64)
    q = jax.ShapeDtypeStruct((128, 2, 128, fmt.d_qk), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((128, 2, 2048), jnp.int32)
    used = _temporaries(lambda q, c, i: mla_jax.sparse_mla_decode(q, c, i, sm_scale=0.1), q, cache, indices)
    assert used < 200 * 2**20, used


@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("fmt", [mla_jax.BF16_576, mla_jax.V32], ids=by_name)
def test_dense_temporaries(fmt, s_q):
    cache = _abstract(fmt, 128 * 512, 64)
    q = jax.ShapeDtypeStruct((128, s_q, 128, fmt.d_qk), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((128, 512), jnp.int32)
    lengths = jax.ShapeDtypeStruct((128,), jnp.int32)
    used = _temporaries(lambda q, c, t, n: mla_jax.mla_decode(q, c, t, n, sm_scale=0.1), q, cache, table, lengths)
    assert used < 200 * 2**20, used


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576], ids=by_name)
def test_pools_of_60_gib_compile(fmt):
    pages = 60 * 2**30 // (fmt.page_bytes(64) * fmt.storage_dtype.itemsize // fmt.storage_dtype.itemsize)
    cache = _abstract(fmt, pages, 64)
    kv = jax.ShapeDtypeStruct((128, fmt.d_qk), fmt.compute_dtype)
    slots = jax.ShapeDtypeStruct((128,), jnp.int32)
    append = jax.jit(mla_jax.append_kv, donate_argnums=0).lower(cache, kv, slots).compile().memory_analysis()
    assert append.temp_size_in_bytes < 2**20 and append.alias_size_in_bytes >= pages * fmt.page_bytes(64)
    assert _temporaries(mla_jax.gather_kv, cache, slots) < 2**21
    q = jax.ShapeDtypeStruct((4, 1, 8, fmt.d_qk), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((4, 1, 2048), jnp.int32)
    sparse_step = lambda q, c, i: mla_jax.sparse_mla_decode(q, c, i, sm_scale=0.1)  # noqa: E731
    assert _temporaries(sparse_step, q, cache, indices) < 200 * 2**20
    whole = jax.ShapeDtypeStruct((pages, 64, fmt.d_qk), fmt.compute_dtype)
    jax.jit(lambda kv: mla_jax.pack_kv(kv, fmt)).lower(whole).compile()
