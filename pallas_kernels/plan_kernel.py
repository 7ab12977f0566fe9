"""The balanced split plan in one kernel of one CTA: what `schedule.py` says in jnp, thread by thread.

XLA makes a dozen kernels of the jnp plan, of 0.85 us each, since every sum over items or cuts ends one. Here a thread
is an item, a cut between parts and a piece in turn. Running sums are shuffles, lookups are binary searches in shared
memory, and six barriers stand where XLA has kernel boundaries:

    items   lengths -> blocks; running sum of costs: where each item ends on the line of all blocks
    cuts    place on the line -> item there (a search) -> the two ways to cut; the busiest part under each; the choice
    items   first piece of each item: the item's number + how many cuts lie inside of earlier items (a search)
    pieces  items and cuts write where a piece begins; a piece ends where the next one begins

All numbers equal those of `schedule._balanced`, which names and explains them; tests compare every entry.

`plan` binds a primitive that becomes this kernel when it is lowered for a GPU that has decode kernels in Mosaic GPU,
and jnp where there is no such kernel: on other GPUs, under vmap, and in programs that XLA itself splits over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels import architectures

logger = logging.getLogger("mla_jax")

WARPGROUP = 128  # threads
WARP = 32
MAX_THREADS = 512  # of a CTA: 896 leave 72 registers each, which spills
CAPABILITIES = (9, 10)  # major ones, of the decode kernels in Mosaic GPU


@dataclasses.dataclass(frozen=True)
class Scope:
    """Keys that an array of lengths counts.

    Attributes:
      limit: a length counts as at most this, and as 0 if it is negative.
      items_each: how many consecutive items share an entry.
    """

    limit: int
    items_each: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a plan.

    Attributes:
      num_items, num_parts: as in `schedule.py`.
      scopes: of the arrays of lengths; an item has the blocks of all of them, and `fixed_blocks` more.
      block_tokens, overhead, merging, align, most_blocks, to_the_end: constants of `schedule.py`; what it clamps blocks
        to.
    """

    num_items: int
    num_parts: int
    scopes: tuple[Scope, ...]
    fixed_blocks: int
    block_tokens: int
    overhead: int
    merging: int
    align: int
    most_blocks: int
    to_the_end: int

    @property
    def max_pieces(self) -> int:
        return self.num_items + self.num_parts - 1

    @property
    def num_threads(self) -> int:
        """One an item and one behind the last, one a cut; whole warpgroups."""
        return -(-(max(self.num_items, self.num_parts) + 1) // WARPGROUP) * WARPGROUP

    @property
    def num_warps(self) -> int:
        return self.num_threads // WARP

    def scratch(self) -> dict[str, int]:
        """int32 arrays in shared memory: name -> entries."""
        cuts = self.num_parts + 1
        return dict(
            ends=self.num_items, blocks=self.num_items, near_lines=cuts, even_lines=cuts, cut_items=cuts, counts=cuts,
            splits=self.num_items + 1, piece_items=self.max_pieces, piece_begins=self.max_pieces,
            sums=self.num_warps, work=3 * self.num_warps,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ thread by thread


def make_plan(m: Any, problem: Problem, lengths: Sequence[Any], out: dict[str, Any], scratch: dict[str, Any]) -> None:
    """One CTA's program, see `threads.py`.

    Args:
      m: the machine.
      problem: static facts.
      lengths: int32 arrays in global memory, one a scope.
      out: `parts`, `pieces`, `splits` in global memory, as in `SplitPlan`.
      scratch: see `Problem.scratch`.
    """
    items, overhead, align = problem.num_items, problem.overhead, problem.align
    thread = m.thread

    # Items: where each ends on the line.
    is_item = thread < items
    blocks = _blocks_of(m, m.minimum(thread, items - 1), problem, lengths)
    end, line_end, _ = _scan(m, m.where(is_item, blocks + overhead, 0), (), scratch["sums"])
    m.store(scratch["ends"], thread, end, where=is_item)
    m.store(scratch["blocks"], thread, blocks, where=is_item)
    m.sync()
    total = line_end - overhead

    # Cuts: the item that lies where this part would begin.
    order = m.minimum(thread, problem.num_parts)  # threads behind the last cut repeat it
    is_cut = thread <= problem.num_parts
    step = total // problem.num_parts
    share = m.maximum((total + (problem.num_parts - 1)) // problem.num_parts, align)
    whole_steps = order * ((share + (align - 1)) // align * align)
    even_steps = order * step + m.minimum(order, total - step * problem.num_parts)
    at = whole_steps if items == 1 else m.where(share == align, whole_steps, even_steps)
    item = _count_up_to(m, scratch["ends"], items, at)
    inside = m.minimum(item, items - 1)
    blocks = m.load(scratch["blocks"], inside)
    whole = blocks + overhead
    end = m.load(scratch["ends"], inside)
    start = end - whole
    offset = m.minimum(at - start, blocks)
    all_done = (item >= items) | (order == problem.num_parts)

    # The two ways to cut.
    margin = overhead // 2 if items > 1 else 0
    near = offset // align * align
    near = m.where(offset <= margin, 0, m.where(offset >= blocks - margin, blocks, near))
    units = (blocks + (align - 1)) // align
    num_even = (whole * 2 + share) // (share * 2)
    num_even = m.maximum(m.minimum(num_even, m.maximum(units, 1)), 1)
    point = ((at - start) * 2 * num_even + whole) // (whole * 2)
    even = m.where(point >= num_even, blocks, point * units // num_even * align)

    def place(cut):
        """Item and block of a cut, and its place on the line."""
        moved = (cut >= blocks) & (cut > 0)
        at_end = all_done | (moved & (item == items - 1))
        line = m.where(all_done, line_end, m.where(moved, end, start + cut))
        return m.where(at_end, items, m.where(moved, item + 1, item)), m.where(at_end | moved, 0, cut), line

    near_item, near_block, near_line = place(near)
    even_item, even_block, even_line = place(even)
    m.store(scratch["near_lines"], thread, near_line, where=is_cut)
    m.store(scratch["even_lines"], thread, even_line, where=is_cut)
    m.sync()

    def between(name, block, line):
        """What the part in front of a cut works, and 1 if the cut begins a piece inside of an item."""
        before = m.load(scratch[name], m.maximum(order - 1, 0))
        is_inside = block > 0
        # Inside of an item, equal places are equal cuts.
        return line - before + m.where(is_inside, overhead, 0), m.where(is_inside & (line != before), 1, 0)

    near_work, near_new = between("near_lines", near_block, near_line)
    even_work, even_new = between("even_lines", even_block, even_line)
    # Threads behind the last cut see the one before it, as that cut does; they count nothing, since it is at the end.
    both = near_new + even_new * 2**16  # two sums in one: there are at most 1023 cuts
    count, num_new, (near_work, even_work) = _scan(m, both, (near_work, even_work), scratch["work"])
    near_work += m.where((num_new & 0xFFFF) > 0, problem.merging, 0)
    even_work += m.where(num_new // 2**16 > 0, problem.merging, 0)
    is_even = even_work <= near_work + near_work // 64

    def chosen(near, even):
        return near if items == 1 else m.where(is_even, even, near)

    cut_item, cut_block, new = chosen(near_item, even_item), chosen(near_block, even_block), chosen(near_new, even_new)
    count, num_new = (chosen(x & 0xFFFF, x // 2**16) for x in (count, num_new))
    part = cut_item + count
    m.store(out["parts"], thread, part, where=is_cut)
    m.store(scratch["cut_items"], thread, cut_item, where=is_cut)
    m.store(scratch["counts"], thread, count, where=is_cut)
    m.sync()

    # Items: the first piece of each.
    earlier = _count_up_to(m, scratch["cut_items"], problem.num_parts + 1, thread - 1)
    count = m.load(scratch["counts"], m.minimum(m.maximum(earlier - 1, 0), problem.num_parts))
    split = thread + m.where(earlier > 0, count, 0)
    m.store(out["splits"], thread, split, where=thread <= items)
    m.store(scratch["splits"], thread, split, where=thread <= items)

    # Pieces: begun by an item, or by a cut inside of one.
    m.store(scratch["piece_items"], split, thread, where=is_item)
    m.store(scratch["piece_begins"], split, 0, where=is_item)
    is_new = new > 0
    m.store(scratch["piece_items"], part, cut_item, where=is_new)
    m.store(scratch["piece_begins"], part, cut_block, where=is_new)
    m.sync()
    for first in range(0, problem.max_pieces, problem.num_threads):
        piece = m.minimum(thread + first, problem.max_pieces - 1)
        is_piece = piece < num_new + items
        item = m.where(is_piece, m.load(scratch["piece_items"], piece), items - 1)
        begin = m.where(is_piece, m.load(scratch["piece_begins"], piece), 0)
        first_of_item, behind = m.load(scratch["splits"], item), m.load(scratch["splits"], item + 1)
        following = m.load(scratch["piece_begins"], m.minimum(piece + 1, problem.max_pieces - 1))
        end = m.where(piece + 1 < behind, following, problem.to_the_end)
        row = [item, begin, end, behind - first_of_item]
        m.store_row(out["pieces"], piece, row, where=thread + first < problem.max_pieces)


def _blocks_of(m, item, problem, lengths):
    blocks = None
    for scope, array in zip(problem.scopes, lengths, strict=True):
        length = m.load(array, item // scope.items_each)
        length = m.minimum(m.maximum(length, 0), scope.limit)
        whole = length // problem.block_tokens
        more = whole + m.minimum(length - whole * problem.block_tokens, 1)  # rounded up; the length may be 2^31 - 1
        blocks = more if blocks is None else blocks + more
    return m.minimum(blocks + problem.fixed_blocks, problem.most_blocks)


def _scan(m, x, maxima, scratch):
    """(sum of x up to and with this thread, sum over all, maxima over all threads). One barrier inside.

    Args:
      x: to add up.
      maxima: any number of values to take the maximum of.
      scratch: (1 + len(maxima)) entries a warp, of this call alone.
    """
    warp = m.thread // WARP
    inclusive = m.warp_scan(x)
    values = [inclusive, *map(m.warp_max, maxima)]
    is_last = m.thread - warp * WARP == WARP - 1
    for k, value in enumerate(values):
        m.store(scratch, warp * len(values) + k, value, where=is_last)
    m.sync()
    before, total, tops = 0, None, [None] * len(maxima)
    for w in range(m.num_threads // WARP):
        of_warp = m.load(scratch, w * len(values))
        before = m.where(warp > w, of_warp, 0) + before
        total = of_warp if total is None else total + of_warp
        for k, top in enumerate(tops):
            other = m.load(scratch, w * len(values) + 1 + k)
            tops[k] = other if top is None else m.maximum(top, other)
    return inclusive + before, total, tops


def _count_up_to(m, array, size, value):
    """How many of the first `size` entries, which do not fall, are at most `value`: a search by quarters, whose three
    loads a round take as long as one."""
    found = m.thread * 0
    step = 1
    while 4 * step <= size:
        step *= 4
    while step:
        tried = [found + k * step for k in (1, 2, 3)]
        entries = [m.load(array, m.minimum(t, size) - 1) for t in tried]
        for t, entry in zip(tried, entries, strict=True):
            found = found + m.where((t <= size) & (entry <= value), step, 0)
        step //= 4
    return found


# ------------------------------------------------------------------------------------------------ one CTA, and when


def fits(problem: Problem) -> bool:
    """Whether one CTA can make the plan. With no array of lengths there is nothing to compute on the GPU."""
    return bool(problem.scopes) and problem.num_items > 0 and problem.num_threads <= MAX_THREADS


def plan(*lengths: jax.Array, problem: Problem, reference: Callable[..., Any]) -> tuple[jax.Array, ...]:
    """The plan of `problem`, for CUDA alone: the kernel, or `reference` where there is no kernel for it.

    Args:
      lengths: int32, an array a scope; entry i is of the items from `items_each * i` on.
      problem: one that `fits`.
      reference: lengths -> (parts, pieces, splits) in jnp.

    Returns:
      `(parts, pieces, splits)` as in `SplitPlan`.
    """
    out_avals = tuple(jax.make_jaxpr(reference)(*lengths).out_avals)  # with the mesh axes over which lengths differ
    return tuple(_plan_p.bind(*lengths, problem=problem, reference=reference, out_avals=out_avals))


def launch(*lengths: jax.Array, problem: Problem) -> tuple[jax.Array, ...]:
    """The kernel itself. Arguments and result as `plan`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels.threads import Threads

    out_types = dict(
        parts=jax.ShapeDtypeStruct((problem.num_parts + 1,), jnp.int32),
        pieces=jax.ShapeDtypeStruct((problem.max_pieces, 4), jnp.int32),
        splits=jax.ShapeDtypeStruct((problem.num_items + 1,), jnp.int32),
    )

    def body(*refs, **scratch):
        all_refs = (refs[: len(lengths)], dict(zip(out_types, refs[len(lengths) :], strict=True)), scratch)

        @plgpu.inline_mgpu(arg_types=jax.tree.map(lambda _: plgpu.RefType(), all_refs))
        def program(_, *arrays):
            make_plan(Threads(problem.num_threads), problem, *arrays)

        program(*all_refs)

    return plgpu.kernel(
        body,
        out_type=tuple(out_types.values()),
        grid=(1,),
        grid_names=("cta",),
        num_threads=problem.num_threads // WARPGROUP,
        thread_name="wg",
        scratch_types={name: plgpu.SMEM((size,), jnp.int32) for name, size in problem.scratch().items()},
        kernel_name="mla_plan",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*lengths)


_plan_p = Primitive("mla_plan")
_plan_p.multiple_results = True
_plan_p.def_abstract_eval(lambda *_, out_avals, **__: out_avals)


def _lower_for_cuda(ctx, *lengths, problem, reference, out_avals):
    ctx = ctx.replace(platforms=("cuda",))  # Pallas refuses to lower for more than one platform at a time
    if architectures.on_one_device(ctx):
        try:
            if architectures.lowered_for()[0] in CAPABILITIES:
                kernel = functools.partial(launch, problem=problem)
                return mlir.lower_fun(kernel, multiple_results=True)(ctx, *lengths)
        except Exception as error:  # another jax, say; a step must not fail for what makes it 5 us faster
            _warn_once(f"the split plan is made by XLA, since its kernel could not be lowered: {error!r}")
    return mlir.lower_fun(reference, multiple_results=True)(ctx, *lengths)


def _lower_elsewhere(ctx, *lengths, reference, **_):
    # In a module for several platforms JAX lowers the CUDA branch for each, though none else runs it.
    return mlir.lower_fun(reference, multiple_results=True)(ctx, *lengths)


def _batch(lengths, axes, *, reference, **_):
    return jax.vmap(reference, in_axes=axes)(*lengths), (0, 0, 0)


mlir.register_lowering(_plan_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_plan_p, _lower_elsewhere)
batching.primitive_batchers[_plan_p] = _batch


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
