"""Top-k as a set: every method against numpy, on ties, short rows, special values and hypothesis data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.nn.topk import kth_largest, nth_set, select_topk

METHODS = ("sort", "chunked", "radix")


def check(scores, visible, k, columns):
    """columns [r, k] names the k best visible columns of scores [r, n], each once, -1 filling up at the end."""
    assert columns.dtype == np.int32 and columns.shape == (len(scores), k)
    for row, n, got in zip(scores, visible, columns, strict=True):
        n = int(np.clip(n, 0, len(row)))
        count = min(n, k)
        chosen = got[:count]
        assert (got[count:] == -1).all()
        assert ((chosen >= 0) & (chosen < n)).all() and len(set(chosen.tolist())) == count
        best = np.sort(row[:n])[::-1][:count]
        np.testing.assert_array_equal(np.sort(row[chosen])[::-1], best)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 8), (130, 16), (700, 129), (4096, 300)])
def test_random_rows(method, n, k):
    rng = np.random.default_rng(n + k)
    scores = rng.standard_normal((7, n)).astype(np.float32)
    visible = np.array([0, 1, n // 2, n, n + 9, -4, max(n - 1, 0)], np.int32)
    columns = select_topk(jnp.asarray(scores), jnp.asarray(visible), k, method=method)
    check(scores, visible, k, np.asarray(columns))


@pytest.mark.parametrize("method", METHODS)
def test_hidden_columns_hold_anything(method):
    scores = np.full((3, 512), np.nan, np.float32)
    scores[:, :40] = np.random.default_rng(0).standard_normal((3, 40))
    scores[1, 40:] = np.inf
    visible = np.full(3, 40, np.int32)
    columns = np.asarray(select_topk(jnp.asarray(scores), jnp.asarray(visible), 16, method=method))
    check(scores, visible, 16, columns)


@pytest.mark.parametrize("method", METHODS)
def test_ties_and_infinities(method):
    rng = np.random.default_rng(1)
    scores = rng.integers(-2, 3, (6, 1000)).astype(np.float32)
    scores[1] = 0.0
    scores[2] = -np.inf
    scores[3, ::3] = np.inf
    scores[4] = rng.choice(np.array([-1e-45, 1e-45, 3e38, -3e38], np.float32), 1000)
    visible = np.array([1000, 1000, 1000, 1000, 1000, 3], np.int32)
    columns = np.asarray(select_topk(jnp.asarray(scores), jnp.asarray(visible), 100, method=method))
    check(scores, visible, 100, columns)
    again = np.asarray(select_topk(jnp.asarray(scores[::-1]), jnp.asarray(visible[::-1]), 100, method=method))[::-1]
    np.testing.assert_array_equal(columns, again)  # a row's choice depends on that row alone
    assert set(columns[1].tolist()) == set(range(100))  # all equal: the lowest columns


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300), st.integers(0, 310))
def test_methods_agree(row, visible):
    scores = np.zeros((1, 300), np.float32)  # one shape: one compilation
    scores[0, : len(row)] = row
    scores = scores + np.float32(0)  # +0 and -0 are one value to numpy
    for method in METHODS:
        columns = select_topk(jnp.asarray(scores), jnp.array([visible], jnp.int32), 20, method=method)
        check(scores, [visible], 20, np.asarray(columns))


def test_parts():
    keys = np.random.default_rng(2).integers(0, 2**32, (3, 777), dtype=np.uint32)
    for k in (1, 2, 100, 777):
        np.testing.assert_array_equal(jax.jit(kth_largest, static_argnums=1)(keys, k), np.sort(keys, axis=1)[:, -k])
    mask = np.random.default_rng(3).random((4, 1000)) < np.array([[0.0], [0.01], [0.5], [1.0]])
    found = np.asarray(jax.jit(nth_set, static_argnums=1)(mask, 300))
    for row, got in zip(mask, found, strict=True):
        want = np.flatnonzero(row)[:300]
        np.testing.assert_array_equal(got[: len(want)], want)
        assert (got[len(want) :] == -1).all()


def test_a_method_that_keeps_the_last_k_fails_the_check():
    scores = np.arange(64, 0, -1, dtype=np.float32)[None]
    with pytest.raises(AssertionError):
        check(scores, [64], 8, np.arange(56, 64, dtype=np.int32)[None])


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (dict(k=0), "k=0"),
        (dict(k=1, method="bitonic"), "method='bitonic'"),
        (dict(k=1, visible=jnp.zeros((3,), jnp.int32)), "visible has shape"),
    ],
)
def test_bad_arguments(call, names):
    arguments = dict(scores=jnp.zeros((2, 8)), visible=jnp.zeros((2,), jnp.int32)) | call
    with pytest.raises(ValueError, match=names):
        select_topk(**arguments)
