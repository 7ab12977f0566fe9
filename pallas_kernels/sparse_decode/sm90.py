"""Sparse MLA decode on SM90: 64 heads of one query against the cache rows that its indices name.

    S = scale * Q K^T    P = softmax(S)    O = P V    with K [keys, d_qk] gathered and dequantised, V = K[:, :d_v]

One CTA works on one tile of 64 heads of the items (query rows) of its part; docs/sparse-decode.md explains the choice
and has the budget. Four warpgroups:

    copy     row indices -> raw rows in shared memory, as soon as a stage is free           (dequant.py)
    gather   raw rows -> bf16 keys in their place; two stages of 64 keys                    (dequant.py)
    softmax  S = Q K^T, softmax, P to shared memory, left half of O
    value    right half of O

and the barriers between them (the raw rows' arrival at the gathering warps is an mbarrier of dequant.py's own):

    full[stage]   gather  -> softmax               a block's keys and mask are there
    empty[stage]  softmax, value -> copy, gather   nobody reads the stage any more
    p_ready       softmax -> value                 P and the rescale factors (or the final factors) are there
    p_free        value -> softmax                 they have been read
    q_ready       TMA     -> softmax               the piece's queries are there
    copies_ready  gather  -> copy                  the mbarriers exist

        stage A   |--copy--|--dequantise--|--QK--|softmax|--PV--|--copy--|--dequantise--| ...
        stage B            ...--QK--|softmax|--PV--|--copy--|--dequantise--|--QK--|softmax| ...
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import combine, mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import WGMMA, WGMMA_ROW, rows_to_tile
from pallas_kernels.schedule import SplitPlan
from pallas_kernels.sparse_decode import dequant
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    MAX_REGISTERS,
    STAGES,
    TILE_HEADS,
    Scope,
    SparseConfig,
    heuristic,
)
from pallas_kernels.sparse_decode.dequant import BIAS_ROW, FACTOR_ROW, RESCALE_ROW, ROWS

SOFTMAX, VALUE, GATHER, COPY = range(4)  # warpgroups
WGMMA_COLUMN = WGMMA.reduce(0)
Q_ROW_ALIGN = 8  # a TMA copy into swizzled memory begins at a multiple of 8 rows
ACC_COLUMNS = 128  # of one accumulator; ptxas refuses wgmma with 256 columns in a kernel of four warpgroups
LOWEST = -3.0e38  # below any score, and finite: exp2(-inf - LOWEST) is 0, not NaN


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def scratch_types(fmt: KVFormat) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    return dict(
        q=mgpu.tile((1, TILE_HEADS, fmt.d_qk)),
        kv=mgpu.tile((STAGES, BLOCK_TOKENS, fmt.d_qk)),
        p=mgpu.tile((TILE_HEADS, BLOCK_TOKENS)),
        rows=plgpu.SMEM((ROWS, BLOCK_TOKENS), jnp.float32),
        q_ready=plgpu.Barrier(),
        full=plgpu.Barrier(num_barriers=STAGES),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        p_ready=plgpu.Barrier(),
        p_free=plgpu.Barrier(),
        copies_ready=plgpu.Barrier(),
    )


# -- what a piece is ---------------------------------------------------------------------------------------------


def _num_blocks(length):
    return lax.div(length + (BLOCK_TOKENS - 1), jnp.int32(BLOCK_TOKENS))


def _length(ref, topk):
    """item [] -> how many of its indices count []. Any integer may stand in the array."""
    if ref is None:
        return lambda item: jnp.int32(topk)
    return lambda item: jnp.clip(ref[item], 0, topk)


def _piece(index, pieces, lengths):
    """(item, first block, number of blocks, blocks of the main scope, number of pieces of the item), all []."""
    item, begin, end, siblings = (pieces[index, k] for k in range(4))
    blocks = [_num_blocks(length(item)) for length in lengths]
    end = jnp.minimum(end, functools.reduce(jnp.add, blocks))
    return item, begin, jnp.maximum(end - begin, 0), blocks[0], siblings


def _pieces_of_part(parts, pieces, lengths, run):
    """Folds `run(piece index, piece, next piece, first block) -> next first block` over the calling CTA's pieces, where
    blocks are numbered through the CTA. The next piece's numbers are loaded one piece ahead; the last one has none."""
    part = lax.axis_index("part")
    begin, end = parts[part], parts[part + 1]
    load = functools.partial(_piece, pieces=pieces, lengths=lengths)
    last = jnp.maximum(end - 1, begin)

    def step(index, carry):
        this, first_block = carry
        following = load(jnp.minimum(index + 1, last))
        return following, run(index, this, following, first_block)

    lax.fori_loop(begin, end, step, (load(begin), jnp.int32(0)))


# -- warpgroup roles ---------------------------------------------------------------------------------------------


def _set_registers(count):
    # The wrong direction is an illegal instruction.
    plgpu.set_max_registers(count, action="increase" if count > MAX_REGISTERS // 4 else "decrease")


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) == 2 else WGMMA_ROW)


def _scaled(acc, factor):
    """Accumulators ([64, 128], ...) times one factor a row, [64]."""
    return tuple(x * rows_to_tile(factor, x.shape) for x in acc)


def _no_values(fmt):
    """Accumulators of half of O."""
    return tuple(_zeros((TILE_HEADS, ACC_COLUMNS)) for _ in range(fmt.d_v // 2 // ACC_COLUMNS))


def _add_values(acc_refs, probabilities, kv, stage, column):
    """O += P V for V's columns from `column` on."""
    for n, acc_ref in enumerate(acc_refs):
        plgpu.wgmma(acc_ref, probabilities, kv.at[stage, :, pl.ds(column + n * ACC_COLUMNS, ACC_COLUMNS)])


def _softmax_warpgroup(
    q_gmem, parts, pieces, lengths, scale, sink, results,
    *, fmt, num_heads, config, ops, q, kv, p, rows, q_ready, full, empty, p_ready, p_free,
):  # fmt: skip
    """Scores, softmax and the left half of O."""
    _set_registers(config.softmax_registers)
    tile = lax.axis_index("tile")
    q_rows = _round_up(num_heads, Q_ROW_ALIGN)
    scale2 = scale[0] * mgpu.LOG2_E
    for stage in range(STAGES):
        plgpu.barrier_arrive(empty.at[stage])

    def load_q(item, count):
        @pl.when(count > 0)
        def _():
            first = item * q_rows + tile * TILE_HEADS
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(first, TILE_HEADS)], q.at[0], q_ready)

    def scores(s_ref, stage, i):
        plgpu.wgmma(s_ref, q.at[mgpu.opaque_zero(i)], kv.at[stage].transpose((1, 0)))

    def block(i, carry, first_block, last=False):
        """One block: softmax of its scores, then O += P V while the next block's scores are computed."""
        acc, s, top, total = carry  # d_v / 2 columns of [64, 128] each, [64, 64], [64], [64]
        stage = lax.rem(first_block + i, jnp.int32(STAGES))
        following = lax.rem(first_block + i + 1, jnp.int32(STAGES))
        bias = plgpu.load(rows.at[BIAS_ROW + stage], layout=WGMMA_COLUMN)  # [64 keys]
        s = s * scale2 + lax.broadcast_in_dim(bias, s.shape, [1])
        new_top = jnp.maximum(top, s.max(axis=1))
        rescale = jnp.exp2(top - new_top)
        weights = jnp.exp2(s - rows_to_tile(new_top, s.shape))
        probabilities = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(p_free)
        p[...] = probabilities
        rows[RESCALE_ROW] = rescale
        plgpu.barrier_arrive(p_ready)
        acc = _scaled(acc, rescale)
        total = total * rescale + weights.sum(axis=1)

        def products(refs):
            acc_refs, s_ref = (refs, None) if last else (refs[:-1], refs[-1])
            _add_values(acc_refs, probabilities, kv, stage, 0)
            if not last:
                plgpu.barrier_wait(full.at[following])
                scores(s_ref, following, i)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(empty.at[stage])

        if last:
            acc = pl.run_state(products)(tuple(map(plgpu.ACC.init, acc)))
            plgpu.barrier_arrive(empty.at[stage])
            return acc, new_top, total
        nothing = _zeros((TILE_HEADS, BLOCK_TOKENS))
        *acc, s = pl.run_state(products)((*map(plgpu.ACC.init, acc), plgpu.ACC.init(nothing)))
        return tuple(acc), s, new_top, total

    def attend(index, this, following, first_block):
        item, _, count, _, siblings = this
        plgpu.barrier_wait(q_ready)
        stage = lax.rem(first_block, jnp.int32(STAGES))
        plgpu.barrier_wait(full.at[stage])
        s = pl.run_state(lambda s_ref: scores(s_ref, stage, index))(
            plgpu.ACC.init(_zeros((TILE_HEADS, BLOCK_TOKENS)))
        )
        top = plgpu.layout_cast(jnp.full((TILE_HEADS,), LOWEST, jnp.float32), WGMMA_ROW)
        carry = (_no_values(fmt), s, top, _zeros((TILE_HEADS,)))
        carry = lax.fori_loop(0, count - 1, functools.partial(block, first_block=first_block), carry)
        load_q(*following)  # the last scores are here, so Q may go
        acc, top, total = block(count - 1, carry, first_block, last=True)
        has_keys = total != 0  # NaN counts as a key
        some = jnp.where(has_keys, total, 1.0)
        factor = jnp.where(has_keys, 1.0 / some, 0.0)
        lse2 = jnp.where(has_keys, top + jnp.log2(some), -jnp.inf)
        if sink is not None:
            logit = plgpu.load(sink.at[pl.ds(tile * TILE_HEADS, TILE_HEADS)], layout=WGMMA_ROW, optimized=False)
            with_sink = factor / (1.0 + jnp.exp2(logit * mgpu.LOG2_E - lse2))
            whole = lax.broadcast_in_dim(siblings == 1, factor.shape, [])
            factor = jnp.where(whole & has_keys, with_sink, factor)  # partial results come without it
        plgpu.barrier_wait(p_free)
        rows[FACTOR_ROW] = factor
        plgpu.barrier_arrive(p_ready)
        results.store(_scaled(acc, factor), index, item, siblings, tile, 0)
        results.store_lse(lse2, index, item, siblings, tile)

    def piece(index, this, following, first_block):
        item, _, count, _, siblings = this
        after = (following[0], jnp.where(index + 1 < end, following[2], 0))

        @pl.when(count > 0)
        def _some():
            attend(index, this, after, first_block)

        @pl.when(count == 0)
        def _none():
            results.store(_no_values(fmt), index, item, siblings, tile, 0)
            nothing = plgpu.layout_cast(jnp.full((TILE_HEADS,), -jnp.inf, jnp.float32), WGMMA_ROW)
            results.store_lse(nothing, index, item, siblings, tile)
            load_q(*after)

        return first_block + count

    part = lax.axis_index("part")
    begin, end = parts[part], parts[part + 1]
    item, _, count, _, _ = _piece(begin, pieces, lengths)
    load_q(item, jnp.where(begin < end, count, 0))
    _pieces_of_part(parts, pieces, lengths, piece)
    plgpu.barrier_wait(p_free)  # drains it


def _value_warpgroup(
    parts, pieces, lengths, results, *, fmt, config, kv, p, rows, empty, p_ready, p_free
):  # fmt: skip
    """The right half of O."""
    _set_registers(config.value_registers)
    tile = lax.axis_index("tile")
    half = fmt.d_v // 2
    for stage in range(STAGES):
        plgpu.barrier_arrive(empty.at[stage])
    plgpu.barrier_arrive(p_free)

    def block(i, acc, first_block):
        stage = lax.rem(first_block + i, jnp.int32(STAGES))
        plgpu.barrier_wait(p_ready)
        probabilities = plgpu.load(p, layout=WGMMA)  # [64 heads, 64 keys]
        rescale = plgpu.load(rows.at[RESCALE_ROW], layout=WGMMA_ROW)  # [64]
        plgpu.barrier_arrive(p_free)
        acc = _scaled(acc, rescale)
        products = functools.partial(_add_values, probabilities=probabilities, kv=kv, stage=stage, column=half)
        acc = pl.run_state(products)(tuple(map(plgpu.ACC.init, acc)))
        plgpu.barrier_arrive(empty.at[stage])
        return acc

    def piece(index, this, following, first_block):
        del following
        item, _, count, _, siblings = this

        @pl.when(count > 0)
        def _some():
            acc = lax.fori_loop(0, count, functools.partial(block, first_block=first_block), _no_values(fmt))
            plgpu.barrier_wait(p_ready)
            factor = plgpu.load(rows.at[FACTOR_ROW], layout=WGMMA_ROW)  # [64]
            plgpu.barrier_arrive(p_free)
            results.store(_scaled(acc, factor), index, item, siblings, tile, half)

        @pl.when(count == 0)
        def _none():
            results.store(_no_values(fmt), index, item, siblings, tile, half)

        return first_block + count

    _pieces_of_part(parts, pieces, lengths, piece)


def _each_block(parts, pieces, lengths, scopes, prepare, run):
    """Calls run(scope number, item, block of the scope, number of the block in the CTA, what `prepare` or the last call
    returned) for every block of every piece; prepare(scope number, item, block) before the first of each scope."""

    def piece(index, this, following, first_block):
        del index, following
        item, begin, count, main_blocks, _ = this
        for k in range(len(scopes)):
            before = main_blocks if k else 0  # blocks of the item in front of this scope
            first = jnp.maximum(begin - before, 0)
            behind = jnp.minimum(begin + count - before, _num_blocks(lengths[k](item)))

            @pl.when(first < behind)
            def _(k=k, before=before, first=first, behind=behind):
                def step(j, carry):
                    return run(k, item, j, first_block + (j + before - begin), carry)

                lax.fori_loop(first, behind, step, prepare(k, item, first))

        return first_block + count

    _pieces_of_part(parts, pieces, lengths, piece)


def _gather_warpgroup(
    data, indices, parts, pieces, lengths, *, scopes, config, ops, kv, rows, full, empty, copies_ready, copied
):  # fmt: skip
    """Keys of every block from their raw rows."""
    _set_registers(config.gather_registers)
    ops.init_copies(rows)
    plgpu.barrier_arrive(copies_ready)

    def load(k, item, j):
        slots = ops.load_slots(indices[k], item, j, lengths[k](item), scopes[k])
        return slots, ops.load_scales(data[k], slots, scopes[k])

    def block(k, item, j, number, carry):
        slots, scales = carry
        stage, use = lax.rem(number, jnp.int32(STAGES)), lax.div(number, jnp.int32(STAGES))
        plgpu.barrier_wait(empty.at[stage])
        if not scopes[k].fmt.is_quantized:
            ops.copy_plain(data[k], slots, kv, rows, stage, scopes[k])
        following = load(k, item, j + 1)
        parity = lax.rem(use, jnp.int32(2))
        ops.finish_block(data[k], slots, scales, kv, rows, stage, parity, scopes[k], **copied)
        plgpu.barrier_arrive(full.at[stage])
        return following

    _each_block(parts, pieces, lengths, scopes, load, block)
    for stage in range(STAGES):
        plgpu.barrier_wait(empty.at[stage])  # drains it


def _copy_warpgroup(
    data, indices, parts, pieces, lengths, *, scopes, config, ops, kv, rows, empty, copies_ready, copied
):  # fmt: skip
    """Raw rows of every block into its stage, as soon as that is free."""
    _set_registers(config.copy_registers)
    plgpu.barrier_wait(copies_ready)

    def load(k, item, j):
        return ops.load_slots(indices[k], item, j, lengths[k](item), scopes[k])

    def block(k, item, j, number, slots):
        stage = lax.rem(number, jnp.int32(STAGES))
        plgpu.barrier_wait(empty.at[stage])
        if scopes[k].fmt.is_quantized:
            ops.start_copy(data[k], slots, kv, rows, stage, scopes[k], **copied)
        return load(k, item, j + 1)

    _each_block(parts, pieces, lengths, scopes, load, block)
    for stage in range(STAGES):
        plgpu.barrier_wait(empty.at[stage])  # drains it


class _Results:
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


def sparse_decode(
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
    config: SparseConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Token-level sparse MLA decode on SM90.

    Args:
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
      config: tuning; None chooses.
      interpret: Pallas' GPU interpreter parameters, for tests.

    Returns:
      out bf16 `[b, s_q, h, d_v]` and lse float32 `[b, s_q, h]`, natural logarithm, -inf (and out 0) without any key.
    """
    b, s_q, num_heads, d_qk = q.shape
    items = b * s_q
    config = config or heuristic(fmt, num_heads)
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
        data.append(pages)
        index_rows.append(scope_indices.astype(jnp.int32).reshape(items, -1))
        lengths.append(None if length is None else length.astype(jnp.int32).reshape(items))

    tiles = -(-num_heads // TILE_HEADS)
    # A tile of heads may reach into the next item's rows; those results go nowhere.
    q_rows = _round_up(num_heads, Q_ROW_ALIGN)
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, q_rows - num_heads), (0, 0))).reshape(items * q_rows, d_qk)
    rows = jnp.pad(rows, ((0, max(0, TILE_HEADS - items * q_rows)), (0, 0)))
    scale = jnp.asarray(sm_scale, jnp.float32).reshape(1)
    sink = None
    if attn_sink is not None:
        sink = jnp.pad(attn_sink.astype(jnp.float32), (0, tiles * TILE_HEADS - num_heads))  # [tiles * 64]
    operands = dict(
        q_gmem=rows, scale=scale, sink=sink, parts=plan.parts, pieces=plan.pieces, data=data, indices=index_rows,
        lengths=lengths,
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(operands)

    ops = dequant.operations(interpret)

    def kernel(*refs, q, kv, p, rows, q_ready, full, empty, p_ready, p_free, copies_ready, **copied):
        results = _Results(refs[len(leaves) :], num_heads, ops)
        given = jax.tree.unflatten(structure, refs[: len(leaves)])
        parts, pieces = given["parts"], given["pieces"]
        lengths = [_length(ref, scope.topk) for ref, scope in zip(given["lengths"], scopes, strict=True)]
        wg = lax.axis_index("wg")

        @pl.when(wg == SOFTMAX)
        def _softmax():
            _softmax_warpgroup(
                given["q_gmem"], parts, pieces, lengths, given["scale"], given["sink"], results, fmt=fmt,
                num_heads=num_heads, config=config, ops=ops, q=q, kv=kv, p=p, rows=rows, q_ready=q_ready, full=full,
                empty=empty, p_ready=p_ready, p_free=p_free,
            )  # fmt: skip

        @pl.when(wg == VALUE)
        def _value():
            _value_warpgroup(
                parts, pieces, lengths, results, fmt=fmt, config=config, kv=kv, p=p, rows=rows, empty=empty,
                p_ready=p_ready, p_free=p_free,
            )  # fmt: skip

        gathering = dict(
            scopes=scopes, config=config, ops=ops, kv=kv, rows=rows, empty=empty, copies_ready=copies_ready,
            copied=copied,
        )  # fmt: skip

        @pl.when(wg == GATHER)
        def _gather():
            _gather_warpgroup(
                given["data"], given["indices"], parts, pieces, lengths, full=full, **gathering
            )  # fmt: skip

        @pl.when(wg == COPY)
        def _copy():
            _copy_warpgroup(given["data"], given["indices"], parts, pieces, lengths, **gathering)

    shape = jax.ShapeDtypeStruct
    out, lse, partial_out, partial_lse = plgpu.kernel(
        kernel,
        out_type=(
            shape((items, num_heads, fmt.d_v), jnp.bfloat16),
            shape((items, num_heads), jnp.float32),
            shape((plan.max_pieces, num_heads, fmt.d_v), jnp.float32),
            shape((plan.max_pieces, num_heads), jnp.float32),
        ),
        grid=(tiles, plan.num_parts),
        grid_names=("tile", "part"),
        num_threads=4,
        thread_name="wg",
        scratch_types=scratch_types(fmt) | ops.copy_scratch(),
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
