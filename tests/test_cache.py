"""Caches: pack, append, gather, unpack, slots, and the pytree."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mla_jax
from mla_jax import quantize
from tests import samples

by_name = lambda fmt: fmt.name  # noqa: E731
QUANTIZED = [f for f in samples.FORMATS if f.is_quantized]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("fmt", samples.FORMATS, ids=by_name)
@pytest.mark.parametrize("page_size", [1, 2, 5, 64])
def test_round_trip(rng, fmt, page_size):
    kv = samples.rows(rng, 3, page_size, fmt=fmt)
    cache = mla_jax.pack_kv(kv, fmt)
    assert cache.data.shape == (3, *fmt.page_shape(page_size)) and cache.data.dtype == fmt.storage_dtype
    got = mla_jax.unpack_kv(cache)
    assert got.shape == kv.shape and got.dtype == kv.dtype
    np.testing.assert_array_equal(got[..., fmt.d_nope :], kv[..., fmt.d_nope :])
    if not fmt.is_quantized:
        np.testing.assert_array_equal(got, kv)
    # e4m3 keeps 3 mantissa bits: half a step is 1/16 of the value; below the smallest normal, half of 2^-9 scales.
    x, y = np.asarray(kv, np.float64), np.asarray(got, np.float64)
    amax = np.abs(x).max(initial=1e-4)
    assert (np.abs(x - y) <= np.abs(x) / 16 + 2**-9 * 2 * amax / 448).all()


@pytest.mark.parametrize("fmt", QUANTIZED, ids=by_name)
def test_packing_what_was_unpacked_changes_nothing(rng, fmt):
    once = mla_jax.unpack_kv(samples.random_cache(rng, fmt, 2, 9))
    np.testing.assert_array_equal(mla_jax.unpack_kv(mla_jax.pack_kv(once, fmt)), once)


def test_rounding_is_unbiased():
    """Values between two neighbours of e4m3 go to either as often as they are nearer to it: the mean error is nil."""
    fmt = mla_jax.V32
    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.uniform(1, 448, (40, 64, fmt.d_qk)), jnp.bfloat16).at[..., ::128].set(448)
    error = np.asarray(mla_jax.unpack_kv(mla_jax.pack_kv(kv, fmt)), np.float64) - np.asarray(kv, np.float64)
    error = error[..., : fmt.d_nope]
    assert error.std() > 1  # something was rounded
    assert abs(error.mean()) < 5 * error.std() / error.size**0.5


@pytest.mark.parametrize("under_jit", [False, True])
def test_every_bf16_amax_gives_the_exact_scale(under_jit):
    bits = np.arange(0x7F80, dtype=np.uint16)
    assert bits.size == 32640
    amax = bits.view(ml_dtypes.bfloat16).astype(np.float64)
    # 2^ceil(log2(max(amax / 448, 1e-4))) in exact integer arithmetic: the least k with 448 * 2^k >= amax, at least -13.
    fraction, exponent = np.frexp(amax)  # amax = fraction * 2^exponent, fraction in [0.5, 1)
    want = np.where(fraction > 448 / 512, exponent - 8, exponent - 9)
    want = np.where(amax == 0, -13, np.maximum(want, -13))
    f = functools.partial(quantize.pow2_exponents, largest=448.0)
    got = (jax.jit(f) if under_jit else f)(jnp.asarray(amax, jnp.float32))
    np.testing.assert_array_equal(np.asarray(got) - 127, want)
    kv = jnp.zeros((510, 64, mla_jax.MODEL1.d_qk), jnp.bfloat16)
    kv = kv.at[:, :, 5].set(jnp.asarray(bits.view(ml_dtypes.bfloat16).reshape(510, 64)))
    pack = lambda kv: mla_jax.pack_kv(kv, mla_jax.MODEL1).data  # noqa: E731
    data = np.asarray((jax.jit(pack) if under_jit else pack)(kv))
    first = mla_jax.MODEL1.area_offset_bytes(1, 64)
    scales = data[:, first : first + 8 * 64].reshape(510, 64, 8)[..., 0]
    np.testing.assert_array_equal(scales.ravel().astype(int) - 127, want)


@pytest.mark.parametrize("scale_rule", ["pow2", "amax"])
def test_zero_and_huge_tiles(scale_rule):
    fmt = mla_jax.V32
    kv = np.zeros((1, 4, fmt.d_qk), np.float32)
    kv[0, 1] = 1e38
    kv[0, 2] = 1e-38
    kv[0, 3, 0] = -np.inf
    cache = mla_jax.pack_kv(jnp.asarray(kv, jnp.bfloat16), fmt, scale_rule=scale_rule)
    got = np.asarray(mla_jax.unpack_kv(cache), np.float32)
    assert (got[0, 0] == 0).all() and np.isfinite(got[0, :3]).all()
    np.testing.assert_allclose(got[0, 1], kv[0, 1], rtol=1 / 16)


def test_amax_rule_uses_the_whole_range(rng):
    fmt = mla_jax.V32
    kv = samples.rows(rng, 1, 3, fmt=fmt)
    _, offset, scale = fmt.locate("scale")
    data = np.asarray(mla_jax.pack_kv(kv, fmt, scale_rule="amax").data)
    got = data[..., offset : offset + scale.num_bytes].copy().view(np.float32)
    amax = np.abs(np.asarray(kv, np.float32)[..., : fmt.d_nope]).reshape(1, 3, 4, 128).max(-1)
    np.testing.assert_array_equal(got, amax / np.float32(448))


# -- append, gather ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", samples.FORMATS, ids=by_name)
def test_append_and_gather(rng, fmt):
    cache = samples.random_cache(rng, fmt, 4, 5)
    slots = np.array([19, 0, 7, -1, 20, -(2**31), 2**31 - 1, 12], np.int32)
    kv = samples.rows(rng, len(slots), fmt=fmt)
    after = mla_jax.append_kv(cache, kv, jnp.asarray(slots))
    want = np.asarray(mla_jax.unpack_kv(cache)).reshape(20, -1).copy()
    fresh = np.asarray(mla_jax.unpack_kv(mla_jax.pack_kv(kv[None], fmt)))[0]
    for row, slot in zip(fresh, slots, strict=True):
        if 0 <= slot < 20:
            want[slot] = row
    np.testing.assert_array_equal(np.asarray(mla_jax.unpack_kv(after)).reshape(20, -1), want)
    got = np.asarray(mla_jax.gather_kv(after, jnp.asarray(slots)))
    inside = (slots >= 0) & (slots < 20)
    np.testing.assert_array_equal(got[inside], want[slots[inside]])
    assert (got[~inside] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 30), min_size=6, max_size=6))
def test_append_touches_only_what_it_names(slots):
    fmt = mla_jax.MODEL1
    rng = np.random.default_rng(0)
    cache = samples.random_cache(rng, fmt, 5, 5)
    kv = samples.rows(rng, 6, fmt=fmt)
    before = np.asarray(mla_jax.unpack_kv(cache)).reshape(25, -1)
    after = np.asarray(mla_jax.unpack_kv(mla_jax.append_kv(cache, kv, jnp.asarray(slots, jnp.int32)))).reshape(25, -1)
    untouched = [s for s in range(25) if s not in slots]
    np.testing.assert_array_equal(after[untouched], before[untouched])


@pytest.mark.parametrize("fmt", samples.FORMATS, ids=by_name)
def test_donated_append_updates_in_place(rng, fmt):
    cache = samples.random_cache(rng, fmt, 8, 16)
    kv, slots = samples.rows(rng, 3, fmt=fmt), jnp.asarray([1, 50, 127], jnp.int32)
    want = mla_jax.unpack_kv(mla_jax.append_kv(cache, kv, slots))
    append = jax.jit(mla_jax.append_kv, donate_argnums=0)
    where = cache.data.unsafe_buffer_pointer()
    after = append(cache, kv, slots)
    assert cache.data.is_deleted() and after.data.unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(mla_jax.unpack_kv(after), want)
    compiled = append.lower(after, kv, slots).compile().memory_analysis()
    assert compiled.alias_size_in_bytes >= after.data.nbytes
    assert compiled.temp_size_in_bytes < after.data.nbytes / 2


def test_appending_row_by_row_equals_packing(rng):
    for fmt in QUANTIZED:
        kv = samples.rows(rng, 2, 3, fmt=fmt)
        cache = mla_jax.PagedKVCache.zeros(fmt, 2, 3)
        for slot in range(6):
            cache = mla_jax.append_kv(cache, kv.reshape(6, -1)[slot : slot + 1], jnp.asarray([slot], jnp.int32))
        np.testing.assert_array_equal(cache.data, mla_jax.pack_kv(kv, fmt).data)


# -- slots -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 40), min_size=6, max_size=6),
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 9), min_size=6, max_size=6),
)
def test_slots_from_positions(positions, pages):
    positions, table = np.array(positions, np.int32).reshape(2, 3), np.array(pages, np.int32).reshape(2, 3)
    got = np.asarray(mla_jax.slots_from_positions(jnp.asarray(positions), jnp.asarray(table), 4))
    for r, c in np.ndindex(2, 3):
        t = int(positions[r, c])
        page = int(table[r, t // 4]) if 0 <= t < 12 else -1
        legal = 0 <= page <= (2**31 - 1 - 4) // 4
        assert got[r, c] == (page * 4 + t % 4 if legal else -1)


def test_slots_of_contiguous_caches():
    got = mla_jax.slots_from_positions(jnp.asarray([[0, 3, 4], [1, -1, 2]], jnp.int32), None, 4)
    np.testing.assert_array_equal(got, [[0, 3, -1], [5, -1, 6]])


# -- the pytree --------------------------------------------------------------------------------------------------------


def test_pytree(rng):
    cache = samples.random_cache(rng, mla_jax.MODEL1, 2, 3)
    leaves, treedef = jax.tree.flatten(cache)
    assert len(leaves) == 1 and leaves[0] is cache.data
    assert jax.tree.unflatten(treedef, [None]).data is None
    spec = jax.tree.map(lambda _: jax.sharding.PartitionSpec("x"), cache)
    assert (spec.format, spec.page_size) == (mla_jax.MODEL1, 3)
    assert [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(cache)] == [".data"]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), cache, cache)
    assert stacked.data.shape[0] == 2 and stacked.page_size == 3
    assert cache.num_pages == 2 and cache.num_slots == 6 and "MODEL1" in repr(cache)
    chex.assert_trees_all_equal(jax.jit(lambda c: c)(cache), cache)


def test_zeros_with_a_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    cache = mla_jax.PagedKVCache.zeros(mla_jax.V32, 4, 8, sharding=sharding)
    assert cache.data.sharding == sharding and not np.asarray(cache.data).any()


def test_dlpack_bytes_from_another_framework(rng):
    """uint8 pages made elsewhere arrive through DLPack without a copy of their meaning."""
    want = samples.random_cache(rng, mla_jax.V32, 2, 4)

    class Foreign:
        """An array that speaks DLPack and nothing else."""

        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **kwargs):
            return self.x.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    data = jax.dlpack.from_dlpack(Foreign(np.array(want.data)))
    cache = mla_jax.PagedKVCache(data, mla_jax.V32, 4)
    np.testing.assert_array_equal(mla_jax.unpack_kv(cache), mla_jax.unpack_kv(want))
