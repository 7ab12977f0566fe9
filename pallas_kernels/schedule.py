"""The split plan: request lengths -> which part of the GPU works on which KV blocks.

Vocabulary, used by the kernels as well:

* *item*: what one softmax runs over. Dense decode: a request. Sparse decode: a (request, query row) pair.
* *block*: `BLOCK_TOKENS` consecutive keys of an item. A sparse item's blocks are those of its main scope, then those
  of its extra scope.
* *piece*: a run of blocks of one item, worked on without interruption. An item of one piece writes its result at once;
  of several, each writes a partial result, which `combine.py` merges.
* *part*: the pieces that one persistent CTA (or cluster, or column of CTAs) runs, one after the other.

    items    |------0------|--1--|---------------2---------------|3|---4---|
    pieces   |------0------|--1--|-----2-----|-----3-----|---4---|5|---6---|
    parts    |----------0--------|-----1-----|-----2-----|--------3--------|

Everything is a closed form over small arrays (no loop, no sort), in jnp, with static shapes: it runs inside jit and
does not recompile when lengths change. On the GPUs of the Mosaic kernels one kernel computes the same integers
(`plan_kernel.py`); `batch_invariant` plans and those of 512 items and more stay with jnp there too.

A plan only balances work. The kernels take lengths from the op's own arguments, and an item's last piece runs to the
item's end whatever the plan thought it was: a plan made for other lengths gives the right answer, at worst slowly.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import plan_kernel
from pallas_kernels.plan_kernel import Problem, Scope

BLOCK_TOKENS = 64
TILE_ROWS = 64  # query rows (s_q * heads) of one CTA of the dense kernel
H100_SMS = 132  # H100 SXM and H200; a plan for fewer SMs than the GPU has is correct, only slower
B200_SMS = 148  # B200 and B300

# What a piece costs beside its blocks (prologue, epilogue), in blocks. Chosen by measurement and model (docs/log.md);
# FlashMLA's scheduler has 5.
PIECE_OVERHEAD_BLOCKS = 2
# What it costs that anything is cut, in blocks: the combine kernel then has partial results to merge.
MERGE_BLOCKS = 2
# The dense kernel works on pairs of blocks: cuts at even blocks waste no half pair.
CUT_ALIGN_BLOCKS = 2

# Batch-invariant plans cut every item into pieces of at least this many blocks (4096 tokens dense), and into at most
# this many pieces, since the partials' buffer has that many places per item.
INVARIANT_PIECE_BLOCKS = {"dense": 64, "sparse": 8}
INVARIANT_MAX_PIECES = 8

TO_THE_END = int(jnp.iinfo(jnp.int32).max)
"""`end_block` of an item's last piece."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "pieces", "splits"],
    meta_fields=[
        "op", "batch", "s_q", "num_heads", "page_size", "topk", "extra_topk", "num_parts", "batch_invariant"
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """How the work of one decode step is cut up. A pytree: the arrays are leaves, everything else is static.

    Attributes:
      parts: int32 `[num_parts + 1]`. Part p runs the pieces from `parts[p]` (inclusive) to `parts[p + 1]` (exclusive).
      pieces: int32 `[max_pieces, 4]`: item, first block (inclusive), last block (exclusive; `TO_THE_END` for the item's
        last piece), number of pieces of that item. Piece s writes its partial result to place s. Rows that no part
        names hold nothing of meaning.
      splits: int32 `[items + 1]`. Item i owns the pieces from `splits[i]` (inclusive) to `splits[i + 1]` (exclusive):
        always at least one.
      op: "dense" or "sparse".
      batch, s_q, num_heads: static shapes of the call the plan is for.
      page_size: tokens a page (dense; 0 for sparse plans).
      topk, extra_topk: width of the index arrays (sparse; 0 for dense plans).
      num_parts: how many parts there are.
      batch_invariant: whether an item's pieces depend on its own length alone.
    """

    parts: jax.Array
    pieces: jax.Array
    splits: jax.Array
    op: str
    batch: int
    s_q: int
    num_heads: int
    page_size: int
    topk: int
    extra_topk: int
    num_parts: int
    batch_invariant: bool

    @property
    def max_pieces(self) -> int:
        """Places for partial results: the most pieces there can be."""
        return self.pieces.shape[0]

    def check(self, **shapes: int | str) -> None:
        """Raises ValueError if the plan was made for other static shapes than those named."""
        wrong = [
            f"{name} {getattr(self, name)!r} (the call has {value!r})"
            for name, value in shapes.items()
            if getattr(self, name) != value
        ]
        if wrong:
            raise ValueError(f"plan does not fit this call: it was made for {', '.join(wrong)}")


def num_sms(capability: tuple[int, int]) -> int:
    """Multiprocessors of the data-centre GPUs of a compute capability."""
    return B200_SMS if capability[0] == 10 else H100_SMS


def plan_decode(
    cache_seqlens: jax.Array,
    *,
    s_q: int,
    num_heads: int,
    page_size: int,
    batch_invariant: bool = False,
    num_sms: int = H100_SMS,
) -> SplitPlan:
    """Plans a dense decode step.

    Args:
      cache_seqlens: int32 `[b]`, tokens of each request, the s_q new ones included. Any value is legal.
      s_q: query rows a request.
      num_heads: query heads (local ones, under tensor parallelism).
      page_size: tokens a page.
      batch_invariant: make a request's result independent, bitwise, of its neighbours in the batch.
      num_sms: multiprocessors to spread the work over.

    Returns:
      A `SplitPlan` for any number of calls with these shapes; make it once a step, share it between layers.
    """
    if cache_seqlens.ndim != 1 or not jnp.issubdtype(cache_seqlens.dtype, jnp.integer):
        raise ValueError(
            f"cache_seqlens must be integers of shape [b], got {cache_seqlens.dtype}{list(cache_seqlens.shape)}"
        )
    _check_positive(s_q=s_q, num_heads=num_heads, page_size=page_size, num_sms=num_sms)
    batch = cache_seqlens.shape[0]
    num_parts = dense_parts(s_q, num_heads, num_sms)
    parts, pieces, splits = _split(
        [(cache_seqlens, Scope(limit=int(jnp.iinfo(jnp.int32).max), items_each=1))], 0, batch, num_parts,
        invariant_blocks=INVARIANT_PIECE_BLOCKS["dense"] if batch_invariant else None,
    )  # fmt: skip
    return SplitPlan(
        parts, pieces, splits, op="dense", batch=batch, s_q=s_q, num_heads=num_heads, page_size=page_size,
        topk=0, extra_topk=0, num_parts=num_parts, batch_invariant=batch_invariant,
    )  # fmt: skip


def plan_sparse_decode(
    topk: int,
    *,
    batch: int,
    s_q: int,
    num_heads: int,
    topk_length: jax.Array | None = None,
    extra_topk: int = 0,
    extra_topk_length: jax.Array | None = None,
    batch_invariant: bool = False,
    num_sms: int = H100_SMS,
) -> SplitPlan:
    """Plans a sparse decode step.

    Args:
      topk: width of `indices`, main scope.
      batch, s_q, num_heads: static shapes of the call.
      topk_length: int32 `[b]` or `[b, s_q]`: how many of the leftmost indices count; None for all. Any value is legal.
      extra_topk, extra_topk_length: the same for the extra scope; 0 and None without one.
      batch_invariant: make a request's result independent, bitwise, of its neighbours in the batch.
      num_sms: multiprocessors to spread the work over.

    Returns:
      A `SplitPlan` for any number of calls with these shapes; make it once a step, share it between layers.
    """
    _check_positive(batch=batch, s_q=s_q, num_heads=num_heads, num_sms=num_sms)
    if topk < 0 or extra_topk < 0:
        raise ValueError(f"topk and extra_topk must not be negative, got {topk} and {extra_topk}")
    if extra_topk_length is not None and not extra_topk:
        raise ValueError("extra_topk_length is given, but extra_topk is 0: name the width of extra_indices")
    scopes, fixed_blocks = [], 0
    for name, width, length in (
        ("topk_length", topk, topk_length), ("extra_topk_length", extra_topk, extra_topk_length)
    ):  # fmt: skip
        if length is None:
            fixed_blocks += -(-width // BLOCK_TOKENS)
            continue
        if length.shape not in ((batch,), (batch, s_q)) or not jnp.issubdtype(length.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape [{batch}] or [{batch}, {s_q}], got "
                f"{length.dtype}{list(length.shape)}"
            )
        scopes.append((length, Scope(limit=width, items_each=s_q if length.ndim == 1 else 1)))
    num_parts = sparse_parts(num_heads, num_sms)
    parts, pieces, splits = _split(
        scopes, fixed_blocks, batch * s_q, num_parts,
        invariant_blocks=INVARIANT_PIECE_BLOCKS["sparse"] if batch_invariant else None,
    )  # fmt: skip
    return SplitPlan(
        parts, pieces, splits, op="sparse", batch=batch, s_q=s_q, num_heads=num_heads, page_size=0,
        topk=topk, extra_topk=extra_topk, num_parts=num_parts, batch_invariant=batch_invariant,
    )  # fmt: skip


def dense_parts(s_q: int, num_heads: int, num_sms: int = H100_SMS) -> int:
    """A part of the dense kernel is one CTA per tile of `TILE_ROWS` query rows: they share the KV blocks through L2."""
    return max(1, num_sms // -(-s_q * num_heads // TILE_ROWS))


def sparse_parts(num_heads: int, num_sms: int = H100_SMS) -> int:
    """A part of the sparse kernel is one CTA per 64 heads."""
    return max(1, num_sms // -(-num_heads // TILE_ROWS))


def split_work(
    num_blocks: jax.Array,
    num_parts: int,
    *,
    overhead: int = PIECE_OVERHEAD_BLOCKS,
    invariant_blocks: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts items into pieces and deals the pieces to parts: the planner's core.

    Args:
      num_blocks: int32 `[items]`, blocks of each item, not negative.
      num_parts: how many parts share the work.
      overhead: cost of a piece beside its blocks, in blocks.
      invariant_blocks: if given, an item's pieces depend on its own length alone, and hold at least so many blocks.

    Returns:
      `(parts, pieces, splits)` as in `SplitPlan`.
    """
    num_items = num_blocks.shape[0]
    num_blocks = jnp.minimum(num_blocks, _most_blocks(num_items, num_parts, overhead))  # [items]
    if invariant_blocks is None:
        return _balanced(num_blocks, num_parts, overhead)
    return _invariant(num_blocks, num_parts, overhead, invariant_blocks)


def _split(scopes, fixed_blocks, num_items, num_parts, *, invariant_blocks):
    """`split_work` of items that have the blocks of all `scopes`, pairs (lengths, Scope), and `fixed_blocks` more."""
    lengths = [length.astype(jnp.int32).reshape(-1) for length, _ in scopes]
    problem = problem_of(tuple(scope for _, scope in scopes), fixed_blocks, num_items, num_parts)
    if invariant_blocks is not None or not plan_kernel.fits(problem):
        return _split_in_jnp(*lengths, problem=problem, invariant_blocks=invariant_blocks)
    return _split_by_platform(*lengths, problem=problem)


def problem_of(scopes: tuple[Scope, ...], fixed_blocks: int, num_items: int, num_parts: int) -> Problem:
    """The static facts of a balanced plan, with the constants of this module."""
    return Problem(
        num_items, num_parts, scopes, fixed_blocks, block_tokens=BLOCK_TOKENS, overhead=PIECE_OVERHEAD_BLOCKS,
        merging=MERGE_BLOCKS, align=CUT_ALIGN_BLOCKS, to_the_end=TO_THE_END,
        most_blocks=_most_blocks(num_items, num_parts, PIECE_OVERHEAD_BLOCKS),
    )  # fmt: skip


def _split_in_jnp(*lengths, problem, invariant_blocks=None):
    num_blocks = jnp.full(problem.num_items, problem.fixed_blocks, jnp.int32)  # [items]
    for length, scope in zip(lengths, problem.scopes, strict=True):  # [items / items_each]
        num_blocks += jnp.repeat(_num_blocks(jnp.clip(length, 0, scope.limit)), scope.items_each)  # [items]
    return split_work(
        num_blocks, problem.num_parts, overhead=problem.overhead, invariant_blocks=invariant_blocks
    )


@functools.partial(jax.jit, static_argnames="problem", inline=True)
def _split_by_platform(*lengths, problem):
    in_jnp = functools.partial(_split_in_jnp, problem=problem)
    kernel = functools.partial(plan_kernel.plan, problem=problem, reference=in_jnp)
    return lax.platform_dependent(*lengths, cuda=kernel, default=in_jnp)


def _most_blocks(num_items: int, num_parts: int, overhead: int) -> int:
    """With these at most in each item, sums over items, and twice the product of a length with num_parts, stay below
    2^30 whatever the lengths hold."""
    return 2**29 // max(num_items, num_parts + 1) - overhead


def _balanced(num_blocks, num_parts, overhead):
    """Cuts the line of all blocks at equal distances, where a cut may move to avoid making small pieces.

    In integers alone, so that a plan is the same however XLA compiles it.
    """
    num_items = num_blocks.shape[0]
    cost = num_blocks + overhead  # [items]
    end = _cumsum(cost)  # [items]
    total = end[-1] - overhead  # []: behind the last item's blocks nothing is left to share
    order = jnp.arange(num_parts + 1, dtype=jnp.int32)  # [parts + 1]
    share = jnp.maximum(-(-total // num_parts), CUT_ALIGN_BLOCKS)  # []
    # Where each part would begin, [parts + 1]: evenly, but not in smaller steps than what may be cut. A lone item is
    # cut in whole steps: as much for the busiest part, and fewer pieces.
    even_steps = order * (total // num_parts) + jnp.minimum(order, total % num_parts)  # [parts + 1]
    whole_steps = order * (-(-share // CUT_ALIGN_BLOCKS) * CUT_ALIGN_BLOCKS)  # [parts + 1]
    at = jnp.where((share == CUT_ALIGN_BLOCKS) | (num_items == 1), whole_steps, even_steps)  # [parts + 1]
    item = jnp.sum(end[None, :] <= at[:, None], axis=1, dtype=jnp.int32)  # [parts + 1]: the item that lies there
    inside = jnp.minimum(item, num_items - 1)  # [parts + 1]: the same, safe to index with
    blocks = num_blocks[inside]  # [parts + 1]
    offset = jnp.minimum(at - (end - cost)[inside], blocks)  # [parts + 1]: blocks of that item before the cut

    # Two ways to place the cuts; the cheaper one wins. "near": where they fall, but a cut within half an
    # overhead of an item's end goes there, since another piece would cost more than it evens out. "even": on
    # the grid that divides each item into equal pieces of about one share, so that equal requests are cut
    # alike and short ones not at all.
    margin = overhead // 2 if num_items > 1 else 0  # a lone item has no neighbour to save a piece with
    near = offset // CUT_ALIGN_BLOCKS * CUT_ALIGN_BLOCKS  # [parts + 1]
    near = jnp.where(offset <= margin, 0, jnp.where(offset >= blocks - margin, blocks, near))
    units = -(-blocks // CUT_ALIGN_BLOCKS)  # [parts + 1]
    num_even = jnp.clip((2 * (blocks + overhead) + share) // (2 * share), 1, jnp.maximum(units, 1))
    whole = blocks + overhead  # [parts + 1]; the grid's points lie whole / num_even apart
    step = (2 * (at - (end - cost)[inside]) * num_even + whole) // (2 * whole)  # [parts + 1], rounded half up
    even = jnp.where(step >= num_even, blocks, step * units // num_even * CUT_ALIGN_BLOCKS)  # [parts + 1]
    all_done = (item >= num_items) | (jnp.arange(num_parts + 1) == num_parts)  # [parts + 1]

    def place(cut):
        """[parts + 1] -> each cut as (item, block), with block 0 of the next item for an item's end."""
        moved = (cut >= blocks) & (cut > 0)  # [parts + 1]; an empty item keeps its cut
        at_end = all_done | (moved & (item == num_items - 1))  # [parts + 1]
        return jnp.where(at_end, num_items, item + moved.astype(jnp.int32)), jnp.where(at_end | moved, 0, cut)

    def most_work(cut):
        """[parts + 1] -> []: cost of the busiest part, and of merging if anything is cut."""
        cut_item, cut_block = place(cut)  # [parts + 1] each
        line = cut_block + jnp.where(cut_item < num_items, (end - cost)[cut_item], end[-1])  # [parts + 1]
        # The line holds one overhead at each item's end; a piece that ends inside an item adds another.
        work = jnp.max(line[1:] - line[:-1] + jnp.where(cut_block > 0, overhead, 0)[1:])
        return work + jnp.where(jnp.any(cut_block > 0), MERGE_BLOCKS, 0)

    # Where both are about as good, "even" makes fewer pieces of several items, and "near" of one.
    near_work = most_work(near)
    better = most_work(even) <= near_work + near_work // 64 if num_items > 1 else False
    cut_item, cut_block = place(jnp.where(better, even, near))

    # A cut inside an item begins a new piece, and so does every item. The first terms of the sums below could stand
    # outside of them, at the price of a kernel each.
    before = jnp.maximum(order - 1, 0)  # [parts + 1]
    same = (order > 0) & (cut_item == cut_item[before]) & (cut_block == cut_block[before])  # [parts + 1]
    new = ((cut_block > 0) & ~same)[None, :]  # [1, parts + 1]
    first = order[None, :] == 0  # [1, parts + 1]
    earlier = new & (order[None, :] <= order[:, None])  # [parts + 1, parts + 1]
    parts = jnp.sum(jnp.where(first, cut_item[:, None], 0) + earlier.astype(jnp.int32), axis=1, dtype=jnp.int32)
    items = jnp.arange(num_items + 1, dtype=jnp.int32)
    earlier = new & (cut_item[None, :] < items[:, None])  # [items + 1, parts + 1]
    splits = jnp.sum(jnp.where(first, items[:, None], 0) + earlier.astype(jnp.int32), axis=1, dtype=jnp.int32)

    piece = jnp.arange(num_items + num_parts - 1, dtype=jnp.int32)  # [max_pieces]

    def begin_block(piece):  # [max_pieces] -> [max_pieces]: 0 unless a cut began this piece
        here = new & (parts[None, :] == piece[:, None])  # [max_pieces, parts + 1]
        return jnp.sum(jnp.where(here, cut_block[None, :], 0), axis=1, dtype=jnp.int32)

    return parts, _piece_rows(piece, splits, begin_block), splits


def _invariant(num_blocks, num_parts, overhead, piece_blocks):
    """Cuts each item by its own length; only the dealing of whole pieces to parts looks at the others."""
    num_items = num_blocks.shape[0]
    size = jnp.maximum(-(-num_blocks // INVARIANT_MAX_PIECES), piece_blocks)  # [items]
    size = -(-size // CUT_ALIGN_BLOCKS) * CUT_ALIGN_BLOCKS  # [items]
    num_pieces = jnp.maximum(-(-num_blocks // size), 1)  # [items]
    splits = jnp.concatenate([jnp.zeros(1, jnp.int32), _cumsum(num_pieces)])  # [items + 1]
    piece = jnp.arange(num_items * INVARIANT_MAX_PIECES, dtype=jnp.int32)  # [max_pieces]

    def item_of(piece):
        return jnp.sum(splits[None, 1:-1] <= piece[:, None], axis=1, dtype=jnp.int32)  # [max_pieces]

    def begin_block(piece):
        item = item_of(piece)  # [max_pieces]
        return (piece - splits[item]) * size[item]  # [max_pieces]

    cost = num_blocks + overhead * num_pieces  # [items]
    end = _cumsum(cost)  # [items]
    item = item_of(piece)  # [max_pieces]
    line = (end - cost)[item] + begin_block(piece) + (piece - splits[item]) * overhead  # [max_pieces]
    share = -(-end[-1] // num_parts)  # []
    at = jnp.arange(num_parts + 1, dtype=jnp.int32) * share  # [parts + 1]
    real = piece < splits[-1]  # [max_pieces]
    parts = jnp.sum(real[None, :] & (line[None, :] < at[:, None]), axis=1, dtype=jnp.int32)  # [parts + 1]
    return parts, _piece_rows(piece, splits, begin_block), splits


def _piece_rows(piece, splits, begin_block):
    """int32 `[max_pieces, 4]`, the rows of `SplitPlan.pieces`."""
    item = jnp.sum(splits[None, 1:-1] <= piece[:, None], axis=1, dtype=jnp.int32)  # [max_pieces]
    first, behind = splits[item], splits[item + 1]  # [max_pieces] each
    end_block = jnp.where(piece + 1 < behind, begin_block(piece + 1), TO_THE_END)  # [max_pieces]
    return jnp.stack([item, begin_block(piece), end_block, behind - first], axis=1)


def _num_blocks(lengths):
    return lengths // BLOCK_TOKENS + jnp.minimum(lengths % BLOCK_TOKENS, 1)  # lengths may be as large as 2^31 - 1


def _cumsum(x):
    """Inclusive prefix sum. XLA's own takes several kernels; for a batch's sizes, one masked reduction is faster."""
    if x.shape[0] > 1024:
        return jnp.cumsum(x, dtype=jnp.int32)
    order = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(order[None, :] <= order[:, None], x[None, :], 0), axis=1, dtype=jnp.int32)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive Python int, got {value!r}")
