"""The parts on their own: frequencies, rotations, norms, the Hadamard transform, index keys by the byte, the ring."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax import PagedKVCache, append_kv, unpack_kv
from mla_jax.nn import RopeConfig, V32Config, compressor, indexer, layers, rope, steps
from mla_jax.nn.paging import layer_table
from pallas_kernels.formats import INDEX_F32, INDEX_FP8

PUBLISHED = {
    "v3.2": RopeConfig(factor=40.0, original_positions=4096, mscale=1.0),
    "v4 window": RopeConfig(),
    "v4 compressed": RopeConfig(theta=160_000.0, factor=16.0, original_positions=65_536),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies(name):
    config = PUBLISHED[name]
    want = oracle.angles(np.ones(1), config)[0]
    np.testing.assert_allclose(rope.frequencies(config), want, rtol=1e-6)
    plain = config.theta ** (-np.arange(32) / 32)
    assert rope.frequencies(config)[0] == 1.0  # the fastest pair is never stretched
    np.testing.assert_allclose(rope.frequencies(config)[-1], plain[-1] / config.factor, rtol=1e-6)


def test_the_softmax_scale_of_v3_2():
    assert V32Config.deepseek_v3_2().sm_scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("halves", [False, True])
def test_rotations(halves):
    rng = np.random.default_rng(0)
    config = PUBLISHED["v3.2"]
    x = rng.standard_normal((1, 9, 3, 64)).astype(np.float32)
    positions = np.array([[0, 1, 2, 77, 1000, 4095, 4096, 9999, 5]], np.int32)
    cos, sin = rope.cos_sin(jnp.asarray(positions), config)
    turn = rope.rotate_halves if halves else rope.rotate_pairs
    got = turn(jnp.asarray(x), cos[:, :, None], sin[:, :, None])
    want = oracle.turn(x[0].astype(np.float64), oracle.angles(positions[0], config), halves=halves)
    np.testing.assert_allclose(got[0], want, atol=3e-3)  # float32 angles at position 9999
    np.testing.assert_allclose(got[0, :5], want[:5], atol=2e-4)
    back = turn(got, cos[:, :, None], -sin[:, :, None])
    np.testing.assert_allclose(back, x, atol=1e-5)
    other = (rope.rotate_pairs if halves else rope.rotate_halves)(jnp.asarray(x), cos[:, :, None], sin[:, :, None])
    assert np.abs(np.asarray(other) - np.asarray(got)).max() > 0.1  # the two pairings do differ


def test_partial_rotations_leave_the_rest():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 128)), jnp.bfloat16)
    cos, sin = rope.cos_sin(jnp.array([[3, 4]], jnp.int32), RopeConfig())
    tail, head = rope.rotate_tail(x, cos, sin), rope.rotate_head(x, cos, sin)
    assert tail.dtype == head.dtype == jnp.bfloat16
    np.testing.assert_array_equal(tail[..., :64], x[..., :64])
    np.testing.assert_array_equal(head[..., 64:], x[..., 64:])
    np.testing.assert_array_equal(tail[..., 64:], rope.rotate_pairs(x[..., 64:], cos, sin))


def test_norms():
    rng = np.random.default_rng(2)
    x, w, b = rng.standard_normal((3, 5, 96)) * 4 + 1, rng.standard_normal(96), rng.standard_normal(96)
    f = [jnp.asarray(a, jnp.float32) for a in (x, w, b)]
    np.testing.assert_allclose(layers.rms_norm(f[0], f[1], 1e-6), oracle.rms(x, w, 1e-6), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layers.rms_norm(f[0], None, 1e-6), oracle.rms(x, None, 1e-6), rtol=1e-5, atol=1e-6)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * w + b
    np.testing.assert_allclose(layers.layer_norm(*f, 1e-6), want, rtol=1e-4, atol=1e-5)
    assert layers.rms_norm(f[0].astype(jnp.bfloat16), f[1], 1e-6).dtype == jnp.bfloat16


def test_hadamard_is_orthogonal():
    h = indexer.hadamard_matrix(128).astype(int)
    np.testing.assert_array_equal(h @ h.T, 128 * np.eye(128, dtype=int))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 128)), jnp.float32)
    y = indexer.hadamard(x)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=1e-4)
    with pytest.raises(ValueError, match="d=96"):
        indexer.hadamard_matrix(96)


# -- index keys --------------------------------------------------------------------------------------------------------


def test_index_keys_take_132_bytes():
    assert INDEX_FP8.bytes_per_token == 132
    assert INDEX_FP8.page_bytes(64) == 64 * 132
    assert INDEX_FP8.area_offset_bytes(1, 64) == 64 * 128


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-7, 0.0, 1e4])
def test_index_key_bytes(magnitude):
    """Written byte by byte in numpy: data of a page, then its scales, 2^ceil(log2(max(amax, 1e-4) / 448))."""
    rng = np.random.default_rng(4)
    page, pages, n = 32, 3, 40
    keys = (rng.standard_normal((n, 128)) * magnitude).astype(ml_dtypes.bfloat16)
    slots = rng.permutation(page * pages)[:n].astype(np.int32)
    cache = PagedKVCache.zeros(INDEX_FP8, pages, page)
    cache = append_kv(cache, jnp.asarray(keys), jnp.asarray(slots), scale_rule=indexer.SCALE_RULE)
    data = np.asarray(cache.data)
    for key, slot in zip(keys.astype(np.float64), slots, strict=True):
        p, i = divmod(int(slot), page)
        scale = 2.0 ** np.ceil(np.log2(max(np.abs(key).max(), 1e-4) / 448))
        assert data[p, page * 128 + 4 * i : page * 128 + 4 * i + 4].view(np.float32)[0] == scale
        want = (key / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(data[p, 128 * i : 128 * i + 128], want.view(np.uint8))
    rows = np.asarray(unpack_kv(cache), np.float64).reshape(-1, 128)[slots]
    np.testing.assert_allclose(rows, keys.astype(np.float64), rtol=0.07, atol=1e-6 + magnitude * 0.02)


@pytest.mark.parametrize("fmt", [INDEX_F32, INDEX_FP8])
def test_scores(fmt, monkeypatch):
    """Against a plain loop, with pages missing, NaN where nobody looks, and the table in several pieces."""
    monkeypatch.setattr(indexer, "SCORE_BYTES", 2 * 3 * 4 * 16 * 4 * 2)  # two columns at a time
    rng = np.random.default_rng(5)
    b, s, heads, page, pages, columns = 2, 3, 4, 16, 12, 5
    cache = PagedKVCache.zeros(fmt, pages, page)
    keys = rng.standard_normal((pages * page, 128)).astype(fmt.compute_dtype)
    slots = jnp.arange(pages * page, dtype=jnp.int32)
    cache = append_kv(cache, jnp.asarray(keys), slots, scale_rule="pow2_low")
    rows = np.asarray(unpack_kv(cache), np.float64).reshape(pages * page, 128)
    table = rng.permutation(pages)[: b * columns].reshape(b, columns).astype(np.int32)
    table[1, 2], table[1, 4] = -7, pages
    poisoned = sorted(set(range(pages)) - set(table.ravel().tolist()))
    nan = 0xFF if fmt is INDEX_FP8 else np.nan
    cache = PagedKVCache(cache.data.at[jnp.array(poisoned)].set(nan), fmt, page)
    q = rng.standard_normal((b, s, heads, 128)).astype(fmt.compute_dtype)
    w = rng.standard_normal((b, s, heads)).astype(np.float32)
    visible = np.array([[3, 4, 5], [60, 70, 80]], np.int32)
    got = np.asarray(jax.jit(indexer.scores)(jnp.asarray(q), jnp.asarray(w), cache, jnp.asarray(table), visible))
    assert got.shape == (b, s, columns * page)
    for r in range(b):
        for j in range(s):
            for t in range(visible[r, j]):
                p = table[r, t // page]
                if not 0 <= p < pages:
                    assert got[r, j, t] == -np.inf
                    continue
                dot = q[r, j].astype(np.float64) @ rows[p * page + t % page]
                np.testing.assert_allclose(got[r, j, t], (np.maximum(dot, 0) * w[r, j]).sum(), rtol=2e-4, atol=2e-3)


# -- the compressor ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 10**6))
def test_any_cutting_into_chunks_gives_the_same_entries(cuts, seed):
    """Ratio 4, a ring full of NaN at first, chunks of 0 to 9 tokens: entries equal those of the whole sequence."""
    rng = np.random.default_rng(seed)
    t, d, s = sum(cuts), 8, 9
    values, gates = rng.standard_normal((2, t + s, 2 * d)).astype(np.float32)
    rings = jnp.full((3, compressor.ring_tokens(4, 4), 2, 2 * d), jnp.nan)
    run = jax.jit(compressor.compress, static_argnames="ratio")
    found, start = {}, 0
    for count in cuts:
        part = [jnp.asarray(a[None, start : start + s]) for a in (values, gates)]
        row, at, n = (jnp.array([v], jnp.int32) for v in (1, start, count))
        entries, number, rings = run(*part, rings, row, at, n, ratio=4)
        found |= {int(k): np.asarray(e) for k, e in zip(number[0], entries[0], strict=True) if k >= 0}
        start += count
    assert sorted(found) == list(range(t // 4))
    for k, entry in found.items():
        kv = np.concatenate([values[4 * k - 4 : 4 * k, :d] if k else np.zeros((0, d)), values[4 * k : 4 * k + 4, d:]])
        z = np.concatenate([gates[4 * k - 4 : 4 * k, :d] if k else np.zeros((0, d)), gates[4 * k : 4 * k + 4, d:]])
        weight = np.exp(z) / np.exp(z).sum(0)
        np.testing.assert_allclose(entry, (weight * kv).sum(0), rtol=1e-4, atol=1e-5)
    assert np.isnan(np.asarray(rings)[[0, 2]]).all()  # other requests' rings


def test_steps():
    step = steps.decode_step(jnp.array([5, 0, 2], jnp.int32), 3)
    assert step.positions.tolist() == [[2, 3, 4], [-1, -1, -1], [-1, 0, 1]]
    assert step.visible.tolist() == [[3, 4, 5], [0, 0, 0], [0, 1, 2]]
    step = steps.chunk_step(jnp.array([7, 0], jnp.int32), jnp.array([2, 0], jnp.int32), 4)
    assert step.positions.tolist() == [[7, 8, -1, -1], [-1] * 4]
    table = layer_table(jnp.array([[0, 4, 5, -2, 2**31 - 1]], jnp.int32), 2, 5)
    assert table.tolist() == [[10, 14, -1, -1, -1]]
    rows = jnp.arange(8).reshape(2, 4)
    assert steps.roll(rows, jnp.array([[1], [0]], jnp.int32)).tolist() == [[3, 0, 1, 2], [4, 5, 6, 7]]
