"""What the GPU tests of both ops share: covering lists of shapes, the scale of inputs, and FlashMLA's tolerances."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

INPUT_STD = 0.1
"""Standard deviation of queries and keys, as in FlashMLA's tests, for which its absolute tolerance is made. The tests'
softmax scales are larger than FlashMLA's, so that the weights of a row's keys differ by far more than in its tests."""


def pairwise(
    factors: Mapping[str, Sequence[Any]], accept: Callable[[dict[str, Any]], bool] = lambda values: True
) -> tuple[dict[str, Any], ...]:
    """A list of choices in which every pair of values of two factors occurs: greedy, deterministic.

    Args:
      factors: name -> values.
      accept: which choices may be listed. Every pair must occur in one of them.
    """
    names, levels = list(factors), list(factors.values())
    rng = np.random.default_rng(0)
    missing = {
        (i, x, j, y)
        for i, j in itertools.combinations(range(len(names)), 2)
        for x in range(len(levels[i]))
        for y in range(len(levels[j]))
    }
    chosen: list[dict[str, Any]] = []
    while missing:
        best: dict[str, Any] = {}
        best_new: set[tuple[int, int, int, int]] = set()
        order = sorted(missing)
        for _ in range(60):
            i, x, j, y = order[rng.integers(len(order))]
            picks = [int(rng.integers(len(values))) for values in levels]
            picks[i], picks[j] = x, y
            values = {name: level[pick] for name, level, pick in zip(names, levels, picks, strict=True)}
            pairs = {(a, picks[a], c, picks[c]) for a, c in itertools.combinations(range(len(names)), 2)}
            if len(pairs & missing) > len(best_new) and accept(values):
                best, best_new = values, pairs & missing
        if best_new:
            chosen.append(best)
            missing -= best_new
    return tuple(chosen)


def sweep(request, name: str, case: Any, check: Callable[[Any], None]) -> None:
    """`check(case)`, unless it passed in an earlier run; skips without a GPU.

    `--cache-clear` begins a sweep anew; without pytest's cache (`-p no:cacheprovider`) every case runs.
    """
    if jax.default_backend() != "gpu":
        pytest.skip("the sweep needs an NVIDIA GPU")
    cache, key = getattr(request.config, "cache", None), f"mla_jax/{name}"
    if cache is not None and str(case) in cache.get(key, []):
        pytest.skip("passed in an earlier run of this sweep; --cache-clear begins anew")
    check(case)
    if cache is not None:
        cache.set(key, [*cache.get(key, []), str(case)])


def large_pool(data: jax.Array, gib: float, fill) -> jax.Array:
    """A pool of so many GiB that ends with these pages, everything before them being `fill`."""
    pages = int(gib * 2**30) // (data.nbytes // len(data))

    @jax.jit  # in one program, so that the pool is made once and not copied
    def make(data):
        pool = jnp.full((pages, *data.shape[1:]), fill, data.dtype)
        return jax.lax.dynamic_update_slice(pool, data, (pages - len(data),) + (0,) * (data.ndim - 1))

    return make(data)


def assert_close(got, want):
    """(out, lse) of a kernel and of the reference, within FlashMLA's tolerances."""
    (out, lse), (want_out, want_lse) = [[np.asarray(x, np.float64) for x in pair] for pair in (got, want)]
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    np.testing.assert_allclose(out, want_out, atol=8e-4, rtol=2.01 / 128)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6, rtol=8.01 / 65536)
    norm = (out**2).sum() + (want_out**2).sum()
    assert norm == 0 or 1 - 2 * (out * want_out).sum() / norm < 5e-6
