"""LSE algebra: merging is associative, commutative, with (0, -inf) as identity, and is attention over the union."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mla_jax
from mla_jax import reference
from tests import samples

finite = st.floats(-80, 80, width=32, allow_subnormal=False)  # XLA may flush those to zero
lse_values = finite | st.just(-np.inf)


def partials(lses, seed=0):
    lses = np.asarray(lses, np.float32)  # [parts, rows]
    outs = np.random.default_rng(seed).standard_normal((*lses.shape, 1, 8)).astype(np.float32)
    return jnp.where(lses[..., None, None] == -np.inf, 0.0, outs), jnp.asarray(lses)[..., None]


def assert_same(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=2e-6, atol=2e-5)


three = st.lists(st.lists(lse_values, min_size=4, max_size=4), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(three)
def test_merge_is_associative_and_commutative(lses):
    outs, lses = partials(lses)
    whole = mla_jax.merge_partials(outs, lses)
    pair = mla_jax.merge_partials(outs[:2], lses[:2])
    assert_same(mla_jax.merge_partials(jnp.stack([pair[0], outs[2]]), jnp.stack([pair[1], lses[2]])), whole)
    assert_same(mla_jax.merge_partials(outs[::-1], lses[::-1]), whole)


@settings(max_examples=40, deadline=None)
@given(st.lists(lse_values, min_size=4, max_size=4))
def test_identity(lses):
    outs, lses = partials([lses, [-np.inf] * 4])
    garbage = outs.at[1].set(jnp.nan)  # what an empty part's `out` holds does not matter
    got = mla_jax.merge_partials(garbage, lses)
    np.testing.assert_array_equal(got[0], outs[0])
    np.testing.assert_array_equal(got[1], lses[0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 31), min_size=0, max_size=3), st.integers(0, 5))
def test_split_anywhere_equals_the_whole(cuts, seed):
    """Attention over contiguous pieces of the keys, merged, is attention over all; so is any order of the keys."""
    rng = np.random.default_rng(seed)
    fmt = mla_jax.F32_512
    cache = samples.random_cache(rng, fmt, 4, 8)
    q = samples.rows(rng, 1, 1, 2, fmt=fmt)
    sink = jnp.asarray(rng.standard_normal(2), jnp.float32)
    keys = rng.permutation(32).astype(np.int32)
    want = reference.sparse_mla_decode(q, cache, jnp.arange(32, dtype=jnp.int32)[None], sm_scale=0.1, attn_sink=sink)
    parts, edges = [], [0, *sorted(cuts), 32, 32]
    for i in range(5):
        lo, hi = (edges[i], edges[i + 1]) if i + 1 < len(edges) else (32, 32)
        chosen = np.full(32, -1, np.int32)
        chosen[: hi - lo] = keys[lo:hi]
        parts.append(mla_jax.sparse_mla_decode(q, cache, jnp.asarray(chosen[None]), sm_scale=0.1, return_lse=True))
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    assert_same(mla_jax.merge_partials(outs, lses, attn_sink=sink), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_and_jit(dtype):
    outs, lses = partials([[0.0, 1.0], [2.0, -np.inf]])
    outs = outs.astype(dtype)
    got = jax.jit(mla_jax.merge_partials)(outs, lses)
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    chex.assert_trees_all_close(got, mla_jax.merge_partials(outs, lses))


def test_sinks():
    outs, lses = partials([[0.5, 0.5, 0.5, -np.inf], [-np.inf] * 4])
    plain = mla_jax.merge_partials(outs, lses)
    for sink, factor in ((-np.inf, 1.0), (np.inf, 0.0), (0.5, 0.5), (1e30, 0.0), (-1e30, 1.0)):
        out, lse = mla_jax.merge_partials(outs, lses, attn_sink=jnp.asarray([sink], jnp.float32))
        np.testing.assert_allclose(out, plain[0] * factor, rtol=1e-6)
        np.testing.assert_array_equal(lse, plain[1])


def test_large_lse_does_not_overflow():
    outs, lses = partials([[3e38, -3e38, 500.0], [3e38, 3e38, 499.0]])
    out, lse = mla_jax.merge_partials(outs, lses)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
