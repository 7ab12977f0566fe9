"""Sparse MLA decode on SM90: 64 heads of one query against the cache rows that its indices name.

    S = scale * Q K^T    P = softmax(S)    O = P V    with K [keys, d_qk] gathered and dequantised, V = K[:, :d_v]

One CTA works on one tile of 64 heads of the items (query rows) of its part; docs/sparse-decode.md explains the choice
and has the budget. Up to 16 heads have a kernel of their own, sm90_few.py. Four warpgroups:

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

With an even number of tiles the CTAs of two neighbours are a cluster, in which each copies half of a block's rows for
both: `empty` and `copies_ready` then wait for both CTAs, and `meetings` gather a warpgroup before one of its threads
arrives there.

        stage A   |--copy--|--dequantise--|--QK--|softmax|--PV--|--copy--|--dequantise--| ...
        stage B            ...--QK--|softmax|--PV--|--copy--|--dequantise--|--QK--|softmax| ...
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import WGMMA, WGMMA_ROW, rows_to_tile
from pallas_kernels.sparse_decode import dequant, sm90_few, work
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    FEW_HEADS,
    MAX_REGISTERS,
    STAGES,
    TILE_HEADS,
    Scope,
    SparseConfig,
    heuristic,
)
from pallas_kernels.sparse_decode.dequant import BIAS_ROW, BOTH_GROUPS
from pallas_kernels.sparse_decode.work import each_block, final_factor, piece_at, pieces_of_part

SOFTMAX, VALUE, GATHER, COPY = range(4)  # warpgroups
WGMMA_COLUMN = WGMMA.reduce(0)
ACC_COLUMNS = 128  # of one accumulator; ptxas refuses wgmma with 256 columns in a kernel of four warpgroups

# Rows of `rows` behind those of dequant.py.
RESCALE_ROW = BIAS_ROW + STAGES  # what the accumulators are multiplied by before a block
FACTOR_ROW = RESCALE_ROW + 1  # what they are multiplied by at the end
ROWS = FACTOR_ROW + 1
LOWEST = -3.0e38  # below any score, and finite: exp2(-inf - LOWEST) is 0, not NaN


def scratch_types(fmt: KVFormat, cluster_tiles: int) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    shared: Any = plgpu.Barrier
    if cluster_tiles > 1:
        shared = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster_tile",))
    return dict(
        q=mgpu.tile((1, TILE_HEADS, fmt.d_qk)),
        kv=mgpu.tile((STAGES, BLOCK_TOKENS, fmt.d_qk)),
        p=mgpu.tile((TILE_HEADS, BLOCK_TOKENS)),
        rows=plgpu.SMEM((ROWS, BLOCK_TOKENS), jnp.float32),
        q_ready=plgpu.Barrier(),
        full=plgpu.Barrier(num_barriers=STAGES),
        empty=shared(num_arrivals=2, num_barriers=STAGES),
        p_ready=plgpu.Barrier(),
        p_free=plgpu.Barrier(),
        copies_ready=shared(num_arrivals=1),
    )


# -- warpgroup roles ---------------------------------------------------------------------------------------------


def set_registers(count):
    # The wrong direction is an illegal instruction.
    plgpu.set_max_registers(count, action="increase" if count > MAX_REGISTERS // 4 else "decrease")


def _cluster_tiles(config: SparseConfig, tiles: int, scopes: list[Scope]) -> int:
    shares = config.share_copies and tiles % 2 == 0 and any(scope.fmt.is_quantized for scope in scopes)
    return 2 if shares else 1


def _tile(cluster_tiles):
    """The calling CTA's tile of heads."""
    tile = lax.axis_index("tile")
    return tile if cluster_tiles == 1 else tile * cluster_tiles + lax.axis_index("cluster_tile")


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) == 2 else WGMMA_ROW)


def _scaled(acc, factor):
    """Accumulators ([64, 128], ...) times one factor a row, [64]."""
    return tuple(x * rows_to_tile(factor, x.shape) for x in acc)


def _rescaled(acc, factor, config, ops):
    """The same for factors of which most may be 1."""
    return _scaled(acc, factor) if config.rescale_above is None else mgpu.rescale(acc, factor, ops)


def _no_values(fmt):
    """Accumulators of half of O."""
    return tuple(_zeros((TILE_HEADS, ACC_COLUMNS)) for _ in range(fmt.d_v // 2 // ACC_COLUMNS))


def _add_values(acc_refs, probabilities, kv, stage, column):
    """O += P V for V's columns from `column` on."""
    for n, acc_ref in enumerate(acc_refs):
        plgpu.wgmma(acc_ref, probabilities, kv.at[stage, :, pl.ds(column + n * ACC_COLUMNS, ACC_COLUMNS)])


def _softmax_warpgroup(
    q_gmem, parts, pieces, lengths, scale, sink, results,
    *, fmt, q_rows, tile, config, ops, q, kv, p, rows, q_ready, full, release, p_ready, p_free,
):  # fmt: skip
    """Scores, softmax and the left half of O."""
    set_registers(config.softmax_registers)
    scale2 = scale[0] * mgpu.LOG2_E
    for stage in range(STAGES):
        release(stage)

    def load_q(item, count):
        @pl.when(count > 0)
        def _():
            first = item * q_rows + tile * TILE_HEADS
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(first, TILE_HEADS)], q.at[0], q_ready)

    def scores(stage, i):
        """S of the block in a stage, once it is there: float32 [64, 64]."""
        plgpu.barrier_wait(full.at[stage])

        def product(s_ref):
            plgpu.wgmma(s_ref, q.at[mgpu.opaque_zero(i)], kv.at[stage].transpose((1, 0)))

        return pl.run_state(product)(plgpu.ACC.init(_zeros((TILE_HEADS, BLOCK_TOKENS))))

    def block(i, carry, first_block, last=False):
        """One block: softmax of its scores, O += P V, then the next block's scores."""
        acc, s, top, total = carry  # d_v / 2 columns of [64, 128] each, [64, 64], [64], [64]
        stage = lax.rem(first_block + i, jnp.int32(STAGES))
        following = lax.rem(first_block + i + 1, jnp.int32(STAGES))
        bias = plgpu.load(rows.at[BIAS_ROW + stage], layout=WGMMA_COLUMN)  # [64 keys]
        s = s * scale2 + lax.broadcast_in_dim(bias, s.shape, [1])
        highest = s.max(axis=1)
        lazy = config.rescale_above is not None
        new_top = mgpu.raised(top, highest, config.rescale_above) if lazy else jnp.maximum(top, highest)
        rescale = jnp.exp2(top - new_top)
        weights = jnp.exp2(s - rows_to_tile(new_top, s.shape))
        probabilities = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(p_free)
        p[...] = probabilities
        rows[RESCALE_ROW] = rescale
        plgpu.barrier_arrive(p_ready)
        acc = _rescaled(acc, rescale, config, ops)
        total = total * rescale + weights.sum(axis=1)

        products = functools.partial(_add_values, probabilities=probabilities, kv=kv, stage=stage, column=0)
        acc = pl.run_state(products)(tuple(map(plgpu.ACC.init, acc)))
        # Before the wait for the next block: the stage is wanted for the one behind that.
        release(stage)
        return (acc, new_top, total) if last else (acc, scores(following, i), new_top, total)

    def attend(index, this, following, first_block):
        item, _, count, _, siblings = this
        plgpu.barrier_wait(q_ready)
        s = scores(lax.rem(first_block, jnp.int32(STAGES)), index)
        top = plgpu.layout_cast(jnp.full((TILE_HEADS,), LOWEST, jnp.float32), WGMMA_ROW)
        carry = (_no_values(fmt), s, top, _zeros((TILE_HEADS,)))
        carry = lax.fori_loop(0, count - 1, functools.partial(block, first_block=first_block), carry)
        load_q(*following)  # the last scores are here, so Q may go
        acc, top, total = block(count - 1, carry, first_block, last=True)
        factor, lse2 = final_factor(top, total, sink, siblings, tile)
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
    item, _, count, _, _ = piece_at(begin, pieces, lengths)
    load_q(item, jnp.where(begin < end, count, 0))
    pieces_of_part(parts, pieces, lengths, piece)
    plgpu.barrier_wait(p_free)  # drains it


def _value_warpgroup(
    parts, pieces, lengths, results, *, fmt, tile, config, ops, kv, p, rows, release, p_ready, p_free
):  # fmt: skip
    """The right half of O."""
    set_registers(config.value_registers)
    half = fmt.d_v // 2
    for stage in range(STAGES):
        release(stage)
    plgpu.barrier_arrive(p_free)

    def block(i, acc, first_block):
        stage = lax.rem(first_block + i, jnp.int32(STAGES))
        plgpu.barrier_wait(p_ready)
        probabilities = plgpu.load(p, layout=WGMMA)  # [64 heads, 64 keys]
        rescale = plgpu.load(rows.at[RESCALE_ROW], layout=WGMMA_ROW)  # [64]
        plgpu.barrier_arrive(p_free)
        acc = _rescaled(acc, rescale, config, ops)
        products = functools.partial(_add_values, probabilities=probabilities, kv=kv, stage=stage, column=half)
        acc = pl.run_state(products)(tuple(map(plgpu.ACC.init, acc)))
        release(stage)
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

    pieces_of_part(parts, pieces, lengths, piece)


def gather_warpgroup(
    data, indices, parts, pieces, lengths,
    *, scopes, registers, ops, kv, rows, full, empty, begin, copied, groups=BOTH_GROUPS,
):  # fmt: skip
    """Keys of every block from their raw rows, or every half block of two such warpgroups. `begin()` returns when the
    copies' mbarriers exist."""
    set_registers(registers)
    begin()
    stages = kv.shape[0]

    def load(k, item, j):
        return ops.load_slots(indices[k], item, j, lengths[k](item), scopes[k])

    def block(k, item, j, number, slots):
        stage, use = lax.rem(number, jnp.int32(stages)), lax.div(number, jnp.int32(stages))
        plgpu.barrier_wait(empty.at[stage])
        if not scopes[k].fmt.is_quantized:
            ops.copy_plain(data[k], slots, kv, rows, stage, scopes[k], groups)
        following = load(k, item, j + 1)
        parity = lax.rem(use, jnp.int32(2))
        ops.finish_block(slots, kv, rows, stage, parity, data[k], scopes[k], groups, **copied)
        plgpu.barrier_arrive(full.at[stage])
        return following

    each_block(parts, pieces, lengths, scopes, load, block)
    for stage in range(stages):
        plgpu.barrier_wait(empty.at[stage])  # drains it


def copy_warpgroup(
    data, indices, parts, pieces, lengths,
    *, scopes, share, registers, ops, kv, rows, empty, copies_ready, copied,
):  # fmt: skip
    """Raw rows of every block into its stage, as soon as that is free."""
    set_registers(registers)
    plgpu.barrier_wait(copies_ready)
    stages = kv.shape[0]

    def load(k, item, j):
        return ops.load_slots(indices[k], item, j, lengths[k](item), scopes[k])

    def block(k, item, j, number, slots):
        stage = lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(empty.at[stage])
        ops.start_copy(data[k], slots, kv, rows, stage, scopes[k], share, **copied)
        return load(k, item, j + 1)

    each_block(parts, pieces, lengths, scopes, load, block)
    for stage in range(stages):
        plgpu.barrier_wait(empty.at[stage])  # drains it


# Threads meet before one of them arrives for their warpgroup, as it is at barriers of a cluster.
MEETINGS = {name: mgpu.Handoff(mgpu.WARPGROUP, 0) for name in ("softmax", "value", "gather")}


def _run(call, *, q, kv, p, rows, q_ready, full, empty, p_ready, p_free, copies_ready, meetings, **copied):
    """One CTA."""
    fmt, config, ops = call.fmt, call.config, call.ops
    parts, pieces, lengths = call.parts, call.pieces, call.lengths
    wg, tile = lax.axis_index("wg"), _tile(call.cluster_tiles)
    bar = ops.barriers(MEETINGS, meetings)

    def arrive(warpgroup, barrier):
        if call.cluster_tiles > 1:
            bar.meet(warpgroup)
        plgpu.barrier_arrive(barrier)

    @pl.when(wg == SOFTMAX)
    def _softmax():
        _softmax_warpgroup(
            call.q, parts, pieces, lengths, call.scale, call.sink, call.results, fmt=fmt, q_rows=call.q_rows,
            tile=tile, config=config, ops=ops, q=q, kv=kv, p=p, rows=rows, q_ready=q_ready, full=full,
            release=lambda stage: arrive("softmax", empty.at[stage]), p_ready=p_ready, p_free=p_free,
        )  # fmt: skip

    @pl.when(wg == VALUE)
    def _value():
        _value_warpgroup(
            parts, pieces, lengths, call.results, fmt=fmt, tile=tile, config=config, ops=ops, kv=kv, p=p,
            rows=rows, release=lambda stage: arrive("value", empty.at[stage]), p_ready=p_ready, p_free=p_free,
        )  # fmt: skip

    gathering = dict(scopes=call.scopes, ops=ops, kv=kv, rows=rows, empty=empty, copied=copied)

    def begin():
        ops.init_copies(rows, STAGES)
        arrive("gather", copies_ready)

    @pl.when(wg == GATHER)
    def _gather():
        gather_warpgroup(
            call.data, call.indices, parts, pieces, lengths, registers=config.gather_registers, full=full,
            begin=begin, **gathering,
        )  # fmt: skip

    @pl.when(wg == COPY)
    def _copy():
        copy_warpgroup(
            call.data, call.indices, parts, pieces, lengths, share=call.cluster_tiles > 1,
            registers=config.copy_registers, copies_ready=copies_ready, **gathering,
        )  # fmt: skip


def _run_few(call, **scratch):
    """One CTA for all of at most `FEW_HEADS` heads."""
    sm90_few.run(call, set_registers, gather_warpgroup, copy_warpgroup, **scratch)


KERNEL = work.Kernel(
    heuristic=heuristic,
    operations=dequant.operations,
    scratch_types=lambda fmt, ops, cluster_tiles: (
        scratch_types(fmt, cluster_tiles) | {"meetings": ops.barrier_scratch(MEETINGS)} | ops.copy_scratch(STAGES)
    ),
    view=lambda pages, scope: pages,
    run=_run,
    num_warpgroups=4,
    cluster_tiles=_cluster_tiles,
)


def _few_kernel(num_heads: int) -> work.Kernel:
    columns = work.round_up(num_heads, KERNEL.q_row_align)
    return dataclasses.replace(
        KERNEL,
        operations=sm90_few.operations,
        scratch_types=lambda fmt, ops, cluster_tiles: sm90_few.scratch_types(fmt, columns, ops),
        run=_run_few,
        cluster_tiles=lambda config, tiles, scopes: 1,
    )


def sparse_decode(
    q: jax.Array, cache_data: jax.Array, fmt: KVFormat, *args, config: SparseConfig | None = None, **options
) -> tuple[jax.Array, jax.Array]:
    """`work.sparse_decode` with the kernel for so many heads."""
    num_heads = q.shape[2]
    config = config or heuristic(fmt, num_heads, options.get("extra_fmt"))
    kernel = _few_kernel(num_heads) if config.few_heads and num_heads <= FEW_HEADS else KERNEL
    return work.sparse_decode(kernel, q, cache_data, fmt, *args, config=config, **options)
