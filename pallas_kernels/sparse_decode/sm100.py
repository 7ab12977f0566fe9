"""Sparse MLA decode on SM100: 64 heads of one query against the cache rows that its indices name.

    S = scale * Q K^T    P = softmax(S)    O = P V    with K [keys, d_qk] gathered and dequantised, V = K[:, :d_v]

One CTA works on one tile of 64 heads of the items (query rows) of its part; docs/sparse-decode.md explains the choice
and has the budgets of shared and tensor memory. Four warpgroups:

    softmax  S from tensor memory, softmax, P to shared memory, rescales O in tensor memory where it must, results
    key      raw rows -> bf16 keys in their place                                                    (gather.py)
    copy     row indices -> raw rows in shared memory by TMA gather, as soon as a stage is free      (gather.py)
    multiply two warps that issue products, each in its own order:
               scores  loads Q; S = Q K^T
               values  O += P V

and the barriers between them (those that `tcgen05_commit_arrive` completes in brackets):

    landed[stage]    TMA     -> key             a block's raw rows are there
    full[stage]      key     -> scores          a block's keys and mask are there
    [empty[stage]]   values  -> copy            nobody reads the stage any more
    [s_ready]        scores  -> softmax         S is there, and with it the mask
    s_free           softmax -> scores          S has been read
    p_ready          softmax -> values          P is there, O is rescaled
    [pv_done]        values  -> softmax         P may be overwritten, O read
    q_ready, [q_free]           TMA -> scores, scores -> scores

        tensor cores  | QK 1 | PV 0 | QK 2 | PV 1 | QK 3 | ...
        softmax               |  1  |       |  2  |

The tensor cores take products in the order of issue; with two issuers neither waits for what the other needs.

O is rescaled only when a row's maximum has grown by more than `rescale_above` since the last time: P is then at
most 2 to that power instead of 1, which float32 sums do not mind, and most blocks leave O alone.
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

from pallas_kernels import mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import WGMMA, WGMMA_ROW, rows_to_tile
from pallas_kernels.sparse_decode import gather, sm100_pair, work
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    PAIR_HEADS,
    STAGES,
    TILE_HEADS,
    SparseConfigSm100,
    sm100_heuristic,
)
from pallas_kernels.sparse_decode.gather import for_stage
from pallas_kernels.sparse_decode.work import LOWEST, each_block, final_factor, pieces_of_part

SOFTMAX, KEY, COPY, MULTIPLY = range(4)  # warpgroups
SCORES, VALUES = range(2)  # warps of the last one
WGMMA_COLUMN = WGMMA.reduce(0)  # a product of 64 rows lies in registers as a wgmma's does
# A thread, of each. What several warpgroups use (addresses) must lie in registers that each of them has, and softmax
# has few of those left beside a part of O: with fewer for the last two, ptxas keeps addresses on the stack
# (docs/log.md).
REGISTERS = (160, 128, 112, 112)
REGISTERS_TWO_QUANTIZED = (176, 112, 112, 112)  # where both caches are quantised
ACC_COLUMNS = 128  # of one accumulator at most: 64 registers a thread when it is rescaled


def value_parts(fmt: KVFormat) -> list[tuple[str, int, int]]:
    """V's columns as accumulators hold them: (buffer, first column of it, number of columns), in order."""
    parts = [
        ("latent", column, min(ACC_COLUMNS, fmt.d_nope - column)) for column in range(0, fmt.d_nope, ACC_COLUMNS)
    ]
    if fmt.d_v > fmt.d_nope:
        parts.append(("rope", 0, fmt.d_v - fmt.d_nope))
    return parts


def scratch_types(fmt: KVFormat) -> dict[str, Any]:
    """Shared memory, tensor memory and barriers of one CTA."""
    barrier, by_tensor_core = plgpu.Barrier, functools.partial(plgpu.Barrier, orders_tensor_core=True)
    return dict(
        q=mgpu.tile((TILE_HEADS, fmt.d_qk), swizzle_bytes=gather.KEY_TILE_BYTES),
        stages=gather.stage_types(fmt),
        p=mgpu.tile((TILE_HEADS, BLOCK_TOKENS)),
        rows=plgpu.SMEM((STAGES, BLOCK_TOKENS), jnp.float32),  # 0 for a key, -inf for none
        s=plgpu.TMEM((TILE_HEADS, BLOCK_TOKENS), jnp.float32),
        o=[plgpu.TMEM((TILE_HEADS, columns), jnp.float32) for _, _, columns in value_parts(fmt)],
        landed=barrier(num_arrivals=2, num_barriers=STAGES),
        full=barrier(num_barriers=STAGES),
        empty=by_tensor_core(num_barriers=STAGES),
        s_ready=by_tensor_core(),
        s_free=by_tensor_core(),
        p_ready=by_tensor_core(),
        pv_done=by_tensor_core(),
        q_ready=barrier(),
        q_free=by_tensor_core(),
    )


# -- warpgroup roles ---------------------------------------------------------------------------------------------


def _stage(block):
    return lax.rem(block, jnp.int32(STAGES))


def _row_vector(value):
    return plgpu.layout_cast(jnp.full((TILE_HEADS,), value, jnp.float32), WGMMA_ROW)


def _rescale(o, factor, ops):
    """O *= factor [64], in tensor memory."""
    for o_ref in o:
        x = plgpu.async_load_tmem(o_ref, layout=WGMMA)
        plgpu.wait_load_tmem()
        plgpu.async_store_tmem(o_ref, ops.scale_rows(x, factor))


def _softmax_warpgroup(call, *, p, rows, s, o, s_ready, s_free, p_ready, pv_done):
    """Softmax, the upkeep of O, and results."""
    scale2 = call.scale[0] * mgpu.LOG2_E
    plgpu.barrier_arrive(s_free)

    def block(i, carry, first_block):
        top, total = carry  # [64] each
        plgpu.barrier_wait(s_ready)
        scores = plgpu.async_load_tmem(s, layout=WGMMA)  # [64 heads, 64 keys]
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(s_free)
        bias = plgpu.load(rows.at[_stage(first_block + i)], layout=WGMMA_COLUMN)  # [64 keys]
        scores = scores * scale2 + lax.broadcast_in_dim(bias, scores.shape, [1])
        highest = jnp.maximum(top, scores.max(axis=1))
        grown = call.ops.any_row((highest > top + call.config.rescale_above).astype(jnp.int32)) != 0
        new_top = jnp.where(lax.broadcast_in_dim(grown, top.shape, []), highest, top)
        rescale = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - rows_to_tile(new_top, scores.shape))
        total = total * rescale + weights.sum(axis=1)
        probabilities = weights.astype(jnp.bfloat16)

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(pv_done)  # of the block before: P has been read, O is whole
            pl.when(grown)(lambda: _rescale(o, rescale, call.ops))

        p[...] = probabilities
        call.ops.publish_smem()
        plgpu.commit_tmem()
        plgpu.barrier_arrive(p_ready)
        return new_top, total

    def this_tile(index):
        # Else the addresses of a thread's results would be computed before all pieces, and spilled.
        return lax.axis_index("tile") + mgpu.opaque_zero(index)

    def attend(index, this, first_block):
        item, _, count, _, siblings = this
        carry = _row_vector(LOWEST), _row_vector(0)
        top, total = lax.fori_loop(0, count, functools.partial(block, first_block=first_block), carry)
        tile = this_tile(index)
        factor, lse2 = final_factor(top, total, call.sink, siblings, tile)
        call.results.store_lse(lse2, index, item, siblings, tile)
        plgpu.barrier_wait(pv_done)
        column = 0
        for o_ref in o:
            x = plgpu.async_load_tmem(o_ref, layout=WGMMA)
            plgpu.wait_load_tmem()
            call.results.store((x * rows_to_tile(factor, x.shape),), index, item, siblings, tile, column)
            column += x.shape[1]

    def piece(index, this, following, first_block):
        del following
        item, _, count, _, siblings = this
        pl.when(count > 0)(lambda: attend(index, this, first_block))

        @pl.when(count == 0)
        def _none():
            tile = this_tile(index)
            nothing = [plgpu.layout_cast(jnp.zeros(o_ref.shape, jnp.float32), WGMMA) for o_ref in o]
            call.results.store(nothing, index, item, siblings, tile, 0)
            call.results.store_lse(_row_vector(-jnp.inf), index, item, siblings, tile)

        return first_block + count

    pieces_of_part(call.parts, call.pieces, call.lengths, piece, ahead=False)


def _multiply_warpgroup(call, *, q, stages, p, s, o, full, empty, s_ready, s_free, p_ready, pv_done, q_ready,
                        q_free):  # fmt: skip
    """Issues products: one warp the scores', one the values'."""
    tile = lax.axis_index("tile")
    fmt = call.fmt

    def scores():
        def block(i, carry, first_block):
            def products(stage):
                nope, rope = pl.ds(0, fmt.d_nope), pl.ds(fmt.d_nope, fmt.d_rope)
                plgpu.tcgen05_mma(s, q.at[:, nope], stage.latent.transpose((1, 0)), accumulate=False)
                plgpu.tcgen05_mma(s, q.at[:, rope], stage.rope.transpose((1, 0)))

            number = _stage(first_block + i)
            plgpu.barrier_wait(full.at[number])
            plgpu.barrier_wait(s_free)
            for_stage(number, stages, products)
            plgpu.tcgen05_commit_arrive(s_ready)
            return carry

        def piece(index, this, following, first_block):
            del index, following
            item, _, count, _, _ = this

            @pl.when(count > 0)
            def _some():
                first_row = item * call.q_rows + tile * TILE_HEADS
                plgpu.copy_gmem_to_smem(call.q.at[pl.ds(first_row, TILE_HEADS)], q, q_ready)
                plgpu.barrier_wait(q_ready)
                lax.fori_loop(0, count, functools.partial(block, first_block=first_block), jnp.int32(0))
                plgpu.tcgen05_commit_arrive(q_free)
                plgpu.barrier_wait(q_free)  # Q may be overwritten

            return first_block + count

        pieces_of_part(call.parts, call.pieces, call.lengths, piece, ahead=False)
        plgpu.barrier_wait(s_free)  # drains it

    def values():
        for number in range(STAGES):
            plgpu.tcgen05_commit_arrive(empty.at[number])  # after nothing: they are empty

        def block(i, carry, first_block):
            def products(stage):
                for o_ref, (buffer, column, columns) in zip(o, value_parts(fmt), strict=True):
                    keys = getattr(stage, buffer)
                    plgpu.tcgen05_mma(o_ref, p, keys.at[:, pl.ds(column, columns)], accumulate=i > 0)

            number = _stage(first_block + i)
            plgpu.barrier_wait(p_ready)
            for_stage(number, stages, products)
            plgpu.tcgen05_commit_arrive(empty.at[number])
            plgpu.tcgen05_commit_arrive(pv_done)
            return carry

        def piece(index, this, following, first_block):
            del index, following
            count = this[2]
            lax.fori_loop(0, count, functools.partial(block, first_block=first_block), jnp.int32(0))
            return first_block + count

        pieces_of_part(call.parts, call.pieces, call.lengths, piece, ahead=False)

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == SCORES)(scores)
        pl.when(warp == VALUES)(values)


def _key_warpgroup(call, *, stages, rows, landed, full):
    """Keys of every block from their raw rows."""

    def load(k, item, j):
        slots = call.ops.load_slots(call.indices[k], item, j, call.lengths[k](item), call.scopes[k])
        return slots, call.ops.load_scales(call.data[k], slots, call.scopes[k])

    def block(k, item, j, number, carry):
        slots, scales = carry
        following = load(k, item, j + 1)
        number = _stage(number)
        plgpu.barrier_wait(landed.at[number])
        call.ops.finish_keys(slots, scales, stages, number, rows, call.scopes[k])
        plgpu.barrier_arrive(full.at[number])
        return following

    each_block(call.parts, call.pieces, call.lengths, call.scopes, load, block, ahead=False)


def _copy_warpgroup(call, *, stages, landed, empty):
    """Raw rows of every block into its stage, as soon as that is free."""

    def load(k, item, j):
        return call.ops.copy_indices(call.indices[k], item, j, call.lengths[k](item), call.scopes[k])

    def block(k, item, j, number, slots):
        number = _stage(number)
        following = load(k, item, j + 1)
        plgpu.barrier_wait(empty.at[number])
        start_gather = functools.partial(call.ops.start_gather, call.data[k], slots)
        for_stage(
            number, stages, functools.partial(start_gather, landed=landed.at[number], scope=call.scopes[k])
        )
        return following

    each_block(call.parts, call.pieces, call.lengths, call.scopes, load, block)
    for number in range(STAGES):
        plgpu.barrier_wait(empty.at[number])  # drains it


def _run(call, **scratch):
    """One CTA."""
    scratch["stages"] = gather.stages(scratch["stages"])
    wg = lax.axis_index("wg")
    roles: dict[int, tuple[Callable[..., None], str]] = {
        SOFTMAX: (_softmax_warpgroup, "p rows s o s_ready s_free p_ready pv_done"),
        KEY: (_key_warpgroup, "stages rows landed full"),
        COPY: (_copy_warpgroup, "stages landed empty"),
        MULTIPLY: (
            _multiply_warpgroup,
            "q stages p s o full empty s_ready s_free p_ready pv_done q_ready q_free",
        ),
    }

    two_quantized = sum(scope.fmt.is_quantized for scope in call.scopes) == 2
    registers = REGISTERS_TWO_QUANTIZED if two_quantized else REGISTERS

    def play(number, role, names):
        gather.set_registers(registers[number])
        role(call, **{name: scratch[name] for name in names.split()})

    for number, (role, names) in roles.items():
        pl.when(wg == number)(functools.partial(play, number, role, names))


KERNEL = work.Kernel(
    heuristic=sm100_heuristic,
    operations=gather.operations,
    scratch_types=lambda fmt, ops, cluster_tiles: scratch_types(fmt),
    view=gather.row_view,
    run=_run,
    num_warpgroups=4,
)


def _run_pair(call, **scratch):
    """One CTA of two that share a tile of 128 heads."""
    sm100_pair.run(call, _key_warpgroup, _copy_warpgroup, **scratch)


PAIR_KERNEL = dataclasses.replace(
    KERNEL,
    scratch_types=lambda fmt, ops, cluster_tiles: sm100_pair.scratch_types(fmt),
    run=_run_pair,
    q_row_align=PAIR_HEADS,
)


def sparse_decode(
    q: jax.Array, cache_data: jax.Array, fmt: KVFormat, *args, config: SparseConfigSm100 | None = None, **options
) -> tuple[jax.Array, jax.Array]:
    """`work.sparse_decode` with the kernel for the tiles that `config` wants."""
    config = config or sm100_heuristic(fmt, q.shape[2])
    kernel = PAIR_KERNEL if config.tile_heads == PAIR_HEADS else KERNEL
    return work.sparse_decode(kernel, q, cache_data, fmt, *args, config=config, **options)
