"""What a rank of a context axis knows: which tokens it has, and which of its candidates are among the best of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make

from mla_jax.context import ContextAxis
from mla_jax.nn import topk

RANKS, PAGE = 4, 3


def on_ranks(function, *args):
    """`function(axis, *args)` on every rank: results stacked on axis 0."""
    mesh = make(context=RANKS).mesh
    body = lambda *args: function(ContextAxis("c", RANKS), *args)[None]  # noqa: E731
    run = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("c"), check_vma=False)
    return np.asarray(jax.jit(run)(*args))


def test_every_token_is_on_one_rank():
    columns = 10
    tokens = np.arange(columns * PAGE, dtype=np.int32)
    counts = on_ranks(lambda axis, n: axis.own_tokens(n, PAGE), jnp.arange(columns * PAGE + 1, dtype=jnp.int32))
    np.testing.assert_array_equal(counts.sum(axis=0), np.arange(columns * PAGE + 1))
    own = jnp.arange(-1, 3 * PAGE, dtype=jnp.int32)
    positions = on_ranks(lambda axis, own: axis.positions(own, PAGE), own)  # [ranks, 1 + tokens of three columns]
    assert (positions[:, 0] == -1).all()
    np.testing.assert_array_equal(positions[:, 1:], [tokens_of(rank)[: 3 * PAGE] for rank in range(RANKS)])
    # What `own_tokens` counts are the first ones of the rank.
    for n in (0, 1, 7, 23, columns * PAGE):
        for rank in range(RANKS):
            assert counts[rank, n] == np.isin(tokens_of(rank), tokens[:n]).sum()
    table = jnp.arange(columns, dtype=jnp.int32)[None]
    kept = on_ranks(lambda axis, table: axis.only_own(table), table)[:, 0]
    for rank, row in enumerate(on_ranks(lambda axis, table: axis.own_columns(table), table)[:, 0]):
        want = np.arange(rank, columns, RANKS)
        np.testing.assert_array_equal(row[row >= 0], want)
        np.testing.assert_array_equal(np.flatnonzero(kept[rank] >= 0), want)


def tokens_of(rank):
    """Of twelve columns."""
    return np.concatenate([np.arange(PAGE) + column * PAGE for column in range(rank, 12, RANKS)])


@pytest.mark.parametrize("k", [5, 17, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 40))])
def test_ranks_choose_what_one_device_would(k):
    """With ties at the boundary, within a rank and between ranks, with infinities, and rows shorter than k."""
    rng, n = np.random.default_rng(0), 12 * PAGE
    scores = np.concatenate([rng.integers(-most, most, (7, n)) for most in (1, 4, 10_000)]).astype(np.float32)
    scores[1::7, ::5], scores[2::7, ::4], scores[3::7] = np.inf, -np.inf, -0.0
    visible = np.tile(np.array([n, n, n, n, 19, 2, 0], np.int32), 3)
    want = np.asarray(topk.select_topk(jnp.asarray(scores), jnp.asarray(visible), k))

    def choose(axis, scores, visible):
        own = jnp.asarray(np.stack([tokens_of(rank) for rank in range(RANKS)]))[axis.rank]  # [n / ranks]
        mine = scores[:, own]
        best = topk.select_topk(mine, axis.own_tokens(visible, PAGE), min(k, own.size))
        values = jnp.take_along_axis(mine, jnp.maximum(best, 0), axis=1)
        positions = axis.positions(best, PAGE)
        return jnp.where(topk.among_best(values, positions, k, axis.name), positions, -1)

    got = on_ranks(choose, jnp.asarray(scores), jnp.asarray(visible))  # [ranks, rows, at most k]
    for row in range(len(scores)):
        chosen = got[:, row][got[:, row] >= 0]
        np.testing.assert_array_equal(np.sort(chosen), np.sort(want[row][want[row] >= 0]))
