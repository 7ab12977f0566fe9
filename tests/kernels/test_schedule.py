"""The split plan: complete, disjoint, balanced, and legal for any integers (CPU, hypothesis)."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import schedule


@functools.partial(jax.jit, static_argnums=(1, 2))
def split(num_blocks, num_parts, invariant_blocks):
    return schedule.split_work(num_blocks, num_parts, invariant_blocks=invariant_blocks)


def walk(num_blocks, plan_arrays):
    """Checks a plan from the kernel's side; returns the blocks and the pieces of every part."""
    parts, pieces, splits = map(np.asarray, plan_arrays)
    seen = [np.zeros(n, int) for n in num_blocks]
    written = np.zeros(len(pieces), int)
    work = []
    assert parts[0] == 0 and parts[-1] == splits[-1] <= len(pieces)
    assert splits[0] == 0 and (np.diff(splits) >= 1).all() and (np.diff(parts) >= 0).all()
    for first, behind in itertools.pairwise(parts):
        blocks = 0
        for piece in range(first, behind):
            item, begin, end, num_pieces = pieces[piece]
            assert splits[item] <= piece < splits[item + 1] and num_pieces == splits[item + 1] - splits[item]
            assert (end == schedule.TO_THE_END) == (piece + 1 == splits[item + 1])
            end = min(end, num_blocks[item])
            assert 0 <= begin < end or num_blocks[item] == 0
            seen[item][begin:end] += 1
            written[piece] += 1
            blocks += end - begin
        work.append((blocks, behind - first))
    assert all((count == 1).all() for count in seen), "a block is missing, or worked on twice"
    assert (written[: splits[-1]] == 1).all(), "a piece is missing, or worked on twice"
    return np.array(work).T


# Few shapes, many values: a new shape is a new compilation.
SHAPES = st.sampled_from([(1, 1), (1, 66), (2, 132), (7, 3), (40, 66), (128, 132)])


@st.composite
def cases(draw):
    items, num_parts = draw(SHAPES)
    top = draw(st.sampled_from([1, 6, 64, 2000]))
    return draw(st.lists(st.integers(0, top), min_size=items, max_size=items)), num_parts


@hypothesis.given(case=cases(), invariant_blocks=st.sampled_from([None, 8]))
@hypothesis.settings(max_examples=150, deadline=None)
def test_every_block_once_and_balanced(case, invariant_blocks):
    num_blocks, num_parts = case
    arrays = split(jnp.array(num_blocks, jnp.int32), num_parts, invariant_blocks)
    blocks, pieces = walk(num_blocks, arrays)
    if invariant_blocks is None:
        cost = blocks + schedule.PIECE_OVERHEAD_BLOCKS * pieces
        ideal = -(-(sum(num_blocks) + schedule.PIECE_OVERHEAD_BLOCKS * len(num_blocks)) // num_parts)
        # A part may begin late by one snapped cut, end late by another, and pay for one piece more.
        slack = 3 * schedule.PIECE_OVERHEAD_BLOCKS + 2 * schedule.CUT_ALIGN_BLOCKS
        assert cost.max() <= ideal + slack
        assert np.asarray(arrays[2])[-1] <= len(num_blocks) + num_parts - 1


@pytest.mark.parametrize(
    "num_blocks, num_parts, max_blocks, max_pieces",
    [
        ([64] * 128, 66, 128, 128),  # b=128, h=128, 4096 tokens: two whole requests each, nothing to combine
        ([64] * 128, 132, 64, 128),
        ([128] * 32, 66, 64, 64),  # halves
        ([16], 66, 2, 8),
        ([128], 66, 2, 64),
        ([1024], 66, 16, 64),
        ([0], 66, 0, 1),
        ([0] * 5, 3, 0, 5),
        ([256] * 128, 66, 506, 194),
        ([64] * 66, 66, 64, 66),  # a request a part: nothing is cut
        ([64] * 132, 132, 64, 132),
        ([16] * 12, 12, 16, 12),
        ([128] * 32, 132, 32, 128),  # quarters
        ([256] * 128, 132, 256, 128),  # whole: the last 3 % of the parts are not worth merging (docs/log.md)
        ([64] * 8, 132, 4, 132),
        ([64] * 128, 33, 256, 128),  # four whole requests each, though cutting some would even things out by 1 %
    ],
)
def test_balance_of_named_cases(num_blocks, num_parts, max_blocks, max_pieces):
    arrays = split(jnp.array(num_blocks, jnp.int32), num_parts, None)
    blocks, _ = walk(num_blocks, arrays)
    assert blocks.max() <= max_blocks
    assert np.asarray(arrays[2])[-1] <= max_pieces


def test_a_plan_is_the_same_under_jit_and_outside():
    for num_blocks, num_parts in (([16] * 12, 12), ([64] * 66, 66), ([7, 128, 3, 64, 0, 31], 132)):
        num_blocks = jnp.array(num_blocks, jnp.int32)
        chex.assert_trees_all_equal(schedule.split_work(num_blocks, num_parts), split(num_blocks, num_parts, None))


def test_thousands_of_requests():
    num_blocks = np.random.default_rng(0).integers(0, 300, 5000)
    blocks, pieces = walk(num_blocks, split(jnp.array(num_blocks, jnp.int32), 132, None))
    cost = blocks + schedule.PIECE_OVERHEAD_BLOCKS * pieces
    assert cost.max() < cost.mean() * 1.02


@pytest.mark.parametrize("invariant", [False, True])
def test_garbage_lengths(invariant):
    lengths = np.array([2**31 - 1, -5, 0, 130, -(2**31), 2**30, 64], np.int32)
    plan = schedule.plan_decode(jnp.array(lengths), s_q=1, num_heads=128, page_size=64, batch_invariant=invariant)
    # The planner clamps what it plans for; what it leaves out belongs to the item's last piece.
    blocks = np.minimum(-(-np.clip(lengths.astype(np.int64), 0, None) // 64), 64 * 200)
    parts, pieces, splits = map(np.asarray, (plan.parts, plan.pieces, plan.splits))
    assert parts[-1] == splits[-1] and splits[-1] <= plan.max_pieces
    for item in range(len(lengths)):
        rows = pieces[splits[item] : splits[item + 1]]
        assert (rows[:, 0] == item).all() and rows[0, 1] == 0 and rows[-1, 2] == schedule.TO_THE_END
        assert (rows[1:, 1] == rows[:-1, 2]).all(), "consecutive pieces leave no block out"
        if blocks[item] < 64 * 200:
            assert len(rows) <= max(1, blocks[item])


@hypothesis.given(st.lists(st.integers(0, 3000), min_size=6, max_size=6), st.integers(0, 200_000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_batch_invariant_pieces_ignore_neighbours(neighbours, length):
    def pieces_of_last(others):
        lengths = jnp.array([*others, length], jnp.int32)
        plan = schedule.plan_decode(lengths, s_q=1, num_heads=16, page_size=64, batch_invariant=True)
        first, behind = np.asarray(plan.splits)[-2:]
        return np.asarray(plan.pieces)[first:behind, 1:]

    np.testing.assert_array_equal(pieces_of_last(neighbours), pieces_of_last([]))


def test_values_do_not_retrace():
    traces = []

    @jax.jit
    def plan(lengths):
        traces.append(1)
        return schedule.plan_decode(lengths, s_q=2, num_heads=16, page_size=64)

    for value in (0, 5, 10_000):
        plan(jnp.full(4, value, jnp.int32))
    assert len(traces) == 1


def test_sparse_items_are_query_rows_over_both_scopes():
    topk_length = jnp.array([[0, 64], [65, 999]], jnp.int32)
    extra_topk_length = jnp.array([-1, 70], jnp.int32)
    plan = schedule.plan_sparse_decode(
        128, batch=2, s_q=2, num_heads=64, topk_length=topk_length, extra_topk=200, extra_topk_length=extra_topk_length
    )
    num_blocks = [0, 1, 2 + 2, 2 + 2]  # topk_length 999 counts as 128, extra -1 as 0
    walk(num_blocks, (plan.parts, plan.pieces, plan.splits))
    assert plan.batch == 2 and plan.topk == 128 and plan.extra_topk == 200 and plan.op == "sparse"


def test_mismatch_names_what_differs():
    plan = schedule.plan_decode(jnp.zeros(3, jnp.int32), s_q=1, num_heads=16, page_size=64)
    plan.check(op="dense", batch=3, s_q=1)
    with pytest.raises(ValueError, match=r"batch 3 \(the call has 4\)"):
        plan.check(op="dense", batch=4)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: schedule.plan_decode(jnp.zeros((2, 2), jnp.int32), s_q=1, num_heads=1, page_size=1), "cache_seqlens"),
        (lambda: schedule.plan_decode(jnp.zeros(2), s_q=1, num_heads=1, page_size=1), "cache_seqlens"),
        (lambda: schedule.plan_decode(jnp.zeros(2, jnp.int32), s_q=0, num_heads=1, page_size=1), "s_q"),
        (lambda: schedule.plan_sparse_decode(-1, batch=1, s_q=1, num_heads=1), "topk"),
        (
            lambda: schedule.plan_sparse_decode(1, batch=2, s_q=1, num_heads=1, topk_length=jnp.zeros(3, jnp.int32)),
            "topk_length",
        ),
        (
            lambda: schedule.plan_sparse_decode(
                1, batch=2, s_q=1, num_heads=1, extra_topk_length=jnp.zeros(2, jnp.int32)
            ),
            "extra_topk",
        ),
    ],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_plan_is_a_pytree_with_three_leaves():
    plan = schedule.plan_decode(jnp.zeros(3, jnp.int32), s_q=1, num_heads=16, page_size=64)
    leaves, treedef = jax.tree.flatten(plan)
    assert [leaf.shape for leaf in leaves] == [(133,), (3 + 131, 4), (4,)]
    assert jax.tree.unflatten(treedef, [None] * 3).num_parts == 132
