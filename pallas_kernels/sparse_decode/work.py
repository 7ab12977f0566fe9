"""What the sparse kernels of all architectures have in common: pieces of work, where results go, and the host's side.

A CTA takes one *part* of the plan for one tile of 64 heads. A part is a run of *pieces*; a piece is some blocks of 64
keys of one item (query row): first those of the main scope, then those of the extra one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import combine, mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.schedule import SplitPlan
from pallas_kernels.sparse_decode.config import BLOCK_TOKENS, TILE_HEADS, Scope

Q_ROW_ALIGN = 8  # a TMA copy into swizzled memory begins at a multiple of 8 rows
LOWEST = -3.0e38  # below any score, and finite: exp2(-inf - LOWEST) is 0, not NaN


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


# -- what a piece is ---------------------------------------------------------------------------------------------


def num_blocks(length):
    return lax.div(length + (BLOCK_TOKENS - 1), jnp.int32(BLOCK_TOKENS))


def _length(ref, topk):
    """item [] -> how many of its indices count []. Any integer may stand in the array."""
    if ref is None:
        return lambda item: jnp.int32(topk)
    return lambda item: jnp.clip(ref[item], 0, topk)


def piece_at(index, pieces, lengths):
    """(item, first block, number of blocks, blocks of the main scope, number of pieces of the item), all []."""
    item, begin, end, siblings = (pieces[index, k] for k in range(4))
    blocks = [num_blocks(length(item)) for length in lengths]
    end = jnp.minimum(end, functools.reduce(jnp.add, blocks))
    return item, begin, jnp.maximum(end - begin, 0), blocks[0], siblings


def pieces_of_part(parts, pieces, lengths, run, ahead=True):
    """Folds `run(piece index, piece, next piece, first block) -> next first block` over the calling CTA's pieces, where
    blocks are numbered through the CTA. The next piece's numbers are loaded one piece ahead; the last one has none.
    Without `ahead` a piece's are loaded when it begins, no registers hold the next one's, and it is None."""
    part = lax.axis_index("part")
    begin, end = parts[part], parts[part + 1]
    load = functools.partial(piece_at, pieces=pieces, lengths=lengths)
    if not ahead:
        lax.fori_loop(begin, end, lambda index, first: run(index, load(index), None, first), jnp.int32(0))
        return
    last = jnp.maximum(end - 1, begin)

    def step(index, carry):
        this, first_block = carry
        following = load(jnp.minimum(index + 1, last))
        return following, run(index, this, following, first_block)

    lax.fori_loop(begin, end, step, (load(begin), jnp.int32(0)))


def each_block(parts, pieces, lengths, scopes, prepare, run, ahead=True):
    """Calls run(scope number, item, block of the scope, number of the block in the CTA, what `prepare` or the last call
    returned) for every block of every piece; prepare(scope number, item, block) before the first of each scope.
    `ahead` as in `pieces_of_part`."""

    def piece(index, this, following, first_block):
        del index, following
        item, begin, count, main_blocks, _ = this
        for k in range(len(scopes)):
            before = main_blocks if k else 0  # blocks of the item in front of this scope
            first = jnp.maximum(begin - before, 0)
            behind = jnp.minimum(begin + count - before, num_blocks(lengths[k](item)))

            @pl.when(first < behind)
            def _(k=k, before=before, first=first, behind=behind):
                def step(j, carry):
                    return run(k, item, j, first_block + (j + before - begin), carry)

                lax.fori_loop(first, behind, step, prepare(k, item, first))

        return first_block + count

    pieces_of_part(parts, pieces, lengths, piece, ahead)


def final_factor(top, total, sink, siblings, tile, layout=mgpu.WGMMA_ROW):
    """What the accumulators of a piece are multiplied by at the end, and its base-2 LSE: two [rows of a tile].

    Args:
      top, total: float32 [rows]: what scores were reduced by before exp2, and the sum of weights; 0 without any key.
      sink: float32 `[tiles * 64]` in global memory, or None. Items of several pieces get it when they are merged.
      siblings: int32 [], pieces of the item.
      tile: number of the tile of heads.
      layout: of top and total.
    """
    rows = top.shape[0]
    has_keys = total != 0  # NaN counts as a key
    some = jnp.where(has_keys, total, 1.0)
    factor = jnp.where(has_keys, 1.0 / some, 0.0)
    lse2 = jnp.where(has_keys, top + jnp.log2(some), -jnp.inf)
    if sink is not None:
        logit = plgpu.load(sink.at[pl.ds(tile * rows, rows)], layout=layout, optimized=False)
        with_sink = factor / (1.0 + jnp.exp2(logit * mgpu.LOG2_E - lse2))
        whole = lax.broadcast_in_dim(siblings == 1, factor.shape, [])
        factor = jnp.where(whole & has_keys, with_sink, factor)
    return factor, lse2


class Results:
    """Where a piece's results go: `out` and `lse` if it is all of its item, else its place among the partial ones."""

    def __init__(self, refs, num_heads, ops):
        self._out, self._lse, self._partial_out, self._partial_lse2 = refs
        self._num_heads, self._ops = num_heads, ops

    def store(self, x, index, item, siblings, tile, column):
        """x: tuple of [64, n], columns from `column` on."""

        def store(out, place):
            first = column
            for part in x:
                self._ops.store_rows(part, out=out, index=place, tile=tile, column=first, num_rows=self._num_heads)
                first += part.shape[1]

        pl.when(siblings == 1)(lambda: store(self._out, item))
        pl.when(siblings != 1)(lambda: store(self._partial_out, index))

    def store_lse(self, lse2, index, item, siblings, tile):
        """lse2 [64], in base 2 as the partial ones stay."""
        store = functools.partial(self._ops.store_row_values, tile=tile, num_rows=self._num_heads)
        pl.when(siblings == 1)(lambda: store(lse2 * mgpu.LN_2, out=self._lse, index=item))
        pl.when(siblings != 1)(lambda: store(lse2, out=self._partial_lse2, index=index))


# -- host --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What differs between architectures.

    Attributes:
      heuristic: (format, heads, extra format or None) -> config.
      operations: `interpret` argument -> the table of operations.
      scratch_types: (format, operations, tiles of a cluster) -> shared memory, tensor memory and barriers of a CTA.
      view: (cache array, scope) -> the array that the kernel gets.
      run: (work, **scratch): one CTA, all warpgroups.
      num_warpgroups: how many.
      q_row_align: an item's rows of Q begin at a multiple of it.
      cluster_tiles: (config, tiles, scopes) -> how many tiles of heads are a cluster of CTAs; divides `tiles`.
    """

    heuristic: Callable[[KVFormat, int, KVFormat | None], Any]
    operations: Callable[[Any], Any]
    scratch_types: Callable[[KVFormat, Any, int], dict[str, Any]]
    view: Callable[[jax.Array, Scope], jax.Array]
    run: Callable[..., None]
    num_warpgroups: int
    q_row_align: int = Q_ROW_ALIGN
    cluster_tiles: Callable[[Any, int, list[Scope]], int] = lambda config, tiles, scopes: 1


@dataclasses.dataclass(frozen=True)
class Work:
    """A call as the warpgroups see it: references in global memory, and static facts.

    Attributes:
      q: bf16 `[rows, d_qk]`; head h of item i is row i * q_rows + h.
      scale, sink: float32 `[1]`, and `[tiles * 64]` or None.
      parts, pieces: of the plan.
      data, indices: of each scope: what `Kernel.view` made, and int32 `[items, topk]`.
      lengths: of each scope: item -> how many indices count.
      q_rows: rows of `q` an item.
      cluster_tiles: tiles of heads whose CTAs are a cluster.
    """

    q: Any
    scale: Any
    sink: Any
    parts: Any
    pieces: Any
    data: list[Any]
    indices: list[Any]
    lengths: list[Callable]
    results: Results
    scopes: list[Scope]
    fmt: KVFormat
    num_heads: int
    config: Any
    ops: Any
    q_rows: int
    cluster_tiles: int


def sparse_decode(
    kernel: Kernel,
    q: jax.Array,
    cache_data: jax.Array,
    fmt: KVFormat,
    page_size: int,
    indices: jax.Array,
    plan: SplitPlan,
    sm_scale: float | jax.Array,
    *,
    topk_length: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_data: jax.Array | None = None,
    extra_fmt: KVFormat | None = None,
    extra_page_size: int | None = None,
    extra_indices: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Any = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Token-level sparse MLA decode.

    Args:
      kernel: the architecture's; bound by `sm90.sparse_decode` and `sm100.sparse_decode`.
      q: bf16 `[b, s_q, h, d_qk]`.
      cache_data: pages of the cache, in the shape that `fmt` gives them (`KVFormat.page_shape`).
      fmt: the cache's format: V32, MODEL1, BF16_576 or BF16_512.
      page_size: tokens a page.
      indices: int32 `[b, s_q, topk]`, physical slots (page * page_size + offset). A value outside the cache is no key.
      plan: from `plan_sparse_decode` for these shapes.
      sm_scale: softmax scale; a float or a float32 scalar.
      topk_length: int32 `[b, s_q]`: only so many of the leftmost indices count; clamped to [0, topk]. None: all.
      attn_sink: float32 `[h]`, a logit without a value; -inf is none. Not part of the LSE.
      extra_data, extra_fmt, extra_page_size, extra_indices, extra_topk_length: a second cache with its own format
        (equal d_qk and d_v), page size, indices and lengths, under the same softmax. All or none.
      out_dtype: bfloat16, or float32 for results that will be merged with others.
      config: tuning; None chooses.
      interpret: Pallas' GPU interpreter parameters, for tests.

    Returns:
      out `[b, s_q, h, d_v]` and lse float32 `[b, s_q, h]`, natural logarithm, -inf (and out 0) without any key.
    """
    b, s_q, num_heads, d_qk = q.shape
    items = b * s_q
    config = config or kernel.heuristic(fmt, num_heads, extra_fmt)
    plan.check(op="sparse", batch=b, s_q=s_q, num_heads=num_heads, topk=indices.shape[-1])
    plan.check(extra_topk=0 if extra_indices is None else extra_indices.shape[-1])

    caches = [(cache_data, fmt, page_size, indices, topk_length)]
    if extra_data is not None:
        assert extra_fmt is not None and extra_page_size is not None and extra_indices is not None
        caches.append((extra_data, extra_fmt, extra_page_size, extra_indices, extra_topk_length))
    scopes, data, index_rows, lengths = [], [], [], []
    for pages, scope_fmt, size, scope_indices, length in caches:
        topk = scope_indices.shape[-1]
        if pages.size == 0 or topk == 0:  # nothing to point at
            pages = jnp.zeros((1, *scope_fmt.page_shape(size)), pages.dtype)
            scope_indices, length = jnp.full((b, s_q, 1), -1, jnp.int32), jnp.zeros((b, s_q), jnp.int32)
        scopes.append(Scope(scope_fmt, size, pages.shape[0] * size, scope_indices.shape[-1]))
        data.append(kernel.view(pages, scopes[-1]))
        index_rows.append(scope_indices.astype(jnp.int32).reshape(items, -1))
        lengths.append(None if length is None else length.astype(jnp.int32).reshape(items))

    tiles = -(-num_heads // TILE_HEADS)
    cluster_tiles = kernel.cluster_tiles(config, tiles, scopes)
    # A tile of heads may reach into the next item's rows; those results go nowhere.
    q_rows = round_up(num_heads, kernel.q_row_align)
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, q_rows - num_heads), (0, 0))).reshape(items * q_rows, d_qk)
    rows = jnp.pad(rows, ((0, max(0, TILE_HEADS - items * q_rows)), (0, 0)))
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    sink = None
    if attn_sink is not None:
        sink = jnp.pad(attn_sink.astype(jnp.float32), (0, tiles * TILE_HEADS - num_heads))  # [tiles * 64]
    operands = dict(
        q=rows, scale=scale, sink=sink, parts=plan.parts, pieces=plan.pieces, data=data, indices=index_rows,
        lengths=lengths,
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(operands)

    ops = kernel.operations(interpret)

    def body(*refs, **scratch):
        given = jax.tree.unflatten(structure, refs[: len(leaves)])
        given["lengths"] = [_length(ref, scope.topk) for ref, scope in zip(given["lengths"], scopes, strict=True)]
        work = Work(
            **given, results=Results(refs[len(leaves) :], num_heads, ops), scopes=scopes, fmt=fmt,
            num_heads=num_heads, config=config, ops=ops, q_rows=q_rows, cluster_tiles=cluster_tiles,
        )  # fmt: skip
        kernel.run(work, **scratch)

    shape = jax.ShapeDtypeStruct
    out, lse, partial_out, partial_lse = plgpu.kernel(
        body,
        out_type=(
            shape((items, num_heads, fmt.d_v), out_dtype),
            shape((items, num_heads), jnp.float32),
            shape((plan.max_pieces, num_heads, fmt.d_v), jnp.float32),
            shape((plan.max_pieces, num_heads), jnp.float32),
        ),
        grid=(tiles // cluster_tiles, plan.num_parts),
        grid_names=("tile", "part"),
        cluster=(cluster_tiles,) if cluster_tiles > 1 else (),
        cluster_names=("cluster_tile",) if cluster_tiles > 1 else (),
        num_threads=kernel.num_warpgroups,
        thread_name="wg",
        scratch_types=kernel.scratch_types(fmt, ops, cluster_tiles),
        kernel_name=f"sparse_mla_{fmt.name.lower()}",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*leaves)
    out, lse = combine.combine(
        out, lse, partial_out, partial_lse, plan.splits, attn_sink, interpret=interpret
    )
    return out.reshape(b, s_q, num_heads, fmt.d_v), lse.reshape(b, s_q, num_heads)
