"""Sparse MLA decode on SM90 for 16 heads or fewer: keys are the rows of both products, heads the columns.

    S^T = scale * K Q^T    P^T = softmax(S^T)    O^T = V^T P^T    with K [keys, d_qk], V = K[:, :d_v]

A wgmma has 64 rows, but any multiple of 8 columns, so nothing is paid for heads that do not exist: K and V are read
once from shared memory and Q hardly at all, where the kernel of 64 heads (sm90.py) reads Q for every block. One
warpgroup holds all of O^T (4 * heads registers a thread), which leaves two for dequantisation. Four warpgroups:

    attend           S, softmax, P to shared memory, O
    gather 0, 1      raw rows -> bf16 keys in their place, half of the rows each   (sm90.gather_warpgroup)
    copy             row indices -> raw rows in shared memory                      (sm90.copy_warpgroup)

and the barriers between them:

    full[stage]   both gathers -> attend    a block's keys and mask are there
    empty[stage]  attend -> copy, gathers   nobody reads the stage any more
    q_ready       TMA -> attend             the piece's queries are there
    copies_ready  gather 0 -> the other two the mbarriers exist

A score's key is its row, and rows are spread over lanes and warps; so the maximum over a block's keys, which every
block needs, goes through a little shared memory, and sums stay apart until the end of a piece.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import WGMMA, WGMMA_ROW, asm, rows_to_tile
from pallas_kernels.sparse_decode import dequant
from pallas_kernels.sparse_decode.config import BLOCK_TOKENS, COLUMN_TILE_BYTES, FEW_HEADS, STAGES
from pallas_kernels.sparse_decode.dequant import BIAS_ROW, TILES
from pallas_kernels.sparse_decode.lanes import (
    REF,
    SPLAT,
    Lane,
    add,
    const,
    equal,
    fields,
    gmem,
    i32,
    less,
    mul,
    scalar,
    smem,
    wide,
)
from pallas_kernels.sparse_decode.work import LOWEST, final_factor, piece_at, pieces_of_part

ATTEND, GATHER_0, GATHER_1, COPY = range(4)  # warpgroups
REGISTERS = (176, 144, 144, 48)  # a thread of each: with jax 0.11.2 and 0.12, ptxas spills in no loop over blocks
MORE_STAGES = 3  # where they fit
WARPS = 4
EXCHANGE_BYTES = WARPS * FEW_HEADS * 4  # of `rows`: one float32 a warp and head
WGMMA_COLUMN = WGMMA.reduce(0)


def scratch_types(fmt: KVFormat, columns: int, ops: Any) -> dict[str, Any]:
    """Shared memory and barriers of one CTA for so many heads, a multiple of 8."""

    def of(stages):
        exchange_rows = EXCHANGE_BYTES // (4 * BLOCK_TOKENS)
        return dict(
            q=mgpu.tile((1, columns, fmt.d_qk)),
            kv=mgpu.tile((stages, BLOCK_TOKENS, fmt.d_qk)),
            p=mgpu.tile((columns, BLOCK_TOKENS)),
            rows=plgpu.SMEM((BIAS_ROW + stages + exchange_rows, BLOCK_TOKENS), jnp.float32),
            q_ready=plgpu.Barrier(),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
            copies_ready=plgpu.Barrier(),
        )

    stages = MORE_STAGES if mgpu.smem_bytes(of(MORE_STAGES)) <= mgpu.MAX_SMEM_BYTES else STAGES
    return of(stages) | ops.copy_scratch(stages)


# -- the two tables ----------------------------------------------------------------------------------------------


class FewHardware(dequant.SparseHardware):
    """What differs where accumulators have heads as columns."""

    def over_keys(self, x: jax.Array, rows, what: str) -> jax.Array:
        """Folds float32 x [64 keys, heads] over its keys: [heads] in WGMMA_COLUMN layout.

        Between two calls all threads must have met once more: they write where others of the last call may still read.

        Args:
          x: WGMMA layout.
          rows: the small buffer, for what warps tell each other.
          what: "max" (NaN if any is) or "sum".
        """
        fold = {"max": arith.maximumf, "sum": arith.addf}[what]
        heads = x.shape[1]
        result = plgpu.ShapeDtypeStruct((heads,), jnp.dtype(jnp.float32), WGMMA_COLUMN)

        @plgpu.inline_mgpu(arg_types=(WGMMA, REF), return_type=result)
        def run(_, x, rows):
            lane = Lane()
            first_byte = 4 * BLOCK_TOKENS * ir.MemRefType(rows.type).shape[0] - EXCHANGE_BYTES
            place = add(smem(rows), add(mul(arith.remui(lane.lane, const(4, i32())), 8), first_byte))
            own = add(place, mul(lane.warp, 4 * heads))
            speaks = less(lane.lane, 4)
            for j, (x0, x1) in enumerate(x.registers.reshape(-1, 2)):  # 2 heads each, of rows 8 apart
                value = fold(x0, x1)
                for distance in (4, 8, 16):
                    value = fold(value, mosaic.utils.shfl_bfly(value, distance))
                asm(f"@$0 st.shared.v2.f32 [$1+{32 * j}], {{$2, $3}};", "b,r,f,f", speaks, own, *_pair(value))
            asm(f"bar.sync {mgpu.Barriers.VOTE_ID}, {mgpu.WARPGROUP};")
            layout = WGMMA_COLUMN.to_mgpu()
            registers = np.empty(layout.registers_shape((heads,)), object)
            for j in range(heads // 8):
                values = [_load_pair(place, 32 * j + 4 * heads * warp) for warp in range(WARPS)]
                registers.reshape(-1)[j] = functools.reduce(fold, values)
            return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return run(x, rows)

    def store_weights(self, p, weights: jax.Array) -> None:
        """bf16 weights [64 keys, heads] in WGMMA layout -> p [heads, 64 keys], swizzled. To be followed by a fence."""

        @plgpu.inline_mgpu(arg_types=(TILES, WGMMA))
        def store(_, p, weights):
            lane = Lane()
            # Lanes 0 to 15 name the rows of two 8 x 8 matrices: a row is a head, and a warp's 16 keys are two chunks.
            half = arith.andi(lane.chunk, const(1, i32()))
            place = lane.swizzled(smem(p), add(mul(lane.warp, 2), half))
            for j, halves in enumerate(weights.registers.reshape(-1, 2)):
                words = [mosaic.utils.bitcast(x, i32()) for x in halves]
                text = f"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0+{COLUMN_TILE_BYTES * j}], {{$1, $2}};"
                asm(text, "r,r,r", place, *words)

        store(p, weights)

    def store_rows(self, x: jax.Array, *, out, index, tile, column: int, num_rows: int) -> None:
        """x [n, heads] -> out[index, head, column:column + n], heads from `num_rows` on left out. `tile` is 0."""
        del tile
        width, size = out.shape[-1], jnp.dtype(out.dtype).itemsize

        @plgpu.inline_mgpu(arg_types=(WGMMA, REF, SPLAT))
        def store(_, x, out, index):
            lane = Lane()
            head = mul(arith.remui(lane.lane, const(4, i32())), 2)  # of each 8
            first = add(mul(lane.warp, 16), add(arith.divui(lane.lane, const(4, i32())), column))
            address = add(gmem(out), mul(wide(scalar(index)), num_rows * width * size))
            address = add(address, wide(mul(add(mul(head, width), first), size)))
            registers = x.registers.reshape(x.registers.shape[0], -1, 2)  # rows 64 m + 8 half, columns 8 j
            for (m, j, half), register in np.ndenumerate(registers):
                for e, value in enumerate(_pair(register)):
                    if size == 2:
                        value = arith.bitcast(ir.IntegerType.get_signless(16), value)
                    at = ((8 * j + e) * width + 64 * m + 8 * half) * size
                    exists = less(head, max(0, num_rows - 8 * j - e))
                    kind, operand = ("b16", "h") if size == 2 else ("f32", "f")
                    asm(f"@$0 st.global.{kind} [$1+{at}], $2;", f"b,l,{operand}", exists, address, value)

        store(x.astype(out.dtype), out, index)

    def store_row_values(self, x: jax.Array, *, out, index, tile, num_rows: int) -> None:
        """The same of one float32 a head: x `[heads]` in WGMMA_COLUMN layout, out `[items, num_rows]`."""
        del tile

        @plgpu.inline_mgpu(arg_types=(WGMMA_COLUMN, REF, SPLAT))
        def store(_, x, out, index):
            lane = Lane()
            head = mul(lane.lane, 2)  # of each 8, in the first 4 lanes of the first warp
            speaks = arith.andi(less(lane.lane, 4), equal(lane.warp, 0))
            address = add(gmem(out), mul(wide(scalar(index)), 4 * num_rows))
            address = add(address, wide(mul(head, 4)))
            for j, register in enumerate(x.registers.reshape(-1)):
                for e, value in enumerate(_pair(register)):
                    exists = arith.andi(speaks, less(head, max(0, num_rows - 8 * j - e)))
                    asm(f"@$0 st.global.f32 [$1+{4 * (8 * j + e)}], $2;", "b,l,f", exists, address, value)

        store(x, out, index)


def _pair(register: ir.Value) -> list[ir.Value]:
    return [vector.extract(register, dynamic_position=[], static_position=[e]) for e in range(2)]


def _load_pair(address: ir.Value, offset_bytes: int) -> ir.Value:
    """Two float32 of shared memory as a vector."""
    text = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{offset_bytes}];"
    struct = asm(text, "=f,=f,r", address, result="!llvm.struct<(f32, f32)>")
    f32 = ir.F32Type.get()
    return vector.from_elements(ir.VectorType.get((2,), f32), fields(struct, [f32, f32]))


class FewInterpreted(dequant.SparseInterpreted):
    """The same in plain jax.numpy."""

    def over_keys(self, x, rows, what):
        return x.max(axis=0) if what == "max" else x.sum(axis=0)

    def store_weights(self, p, weights):
        p[...] = weights.T

    def store_rows(self, x, *, out, index, tile, column, num_rows):
        out[index, :, pl.ds(column, x.shape[0])] = x.T[:num_rows].astype(out.dtype)

    def store_row_values(self, x, *, out, index, tile, num_rows):
        out[index] = x[:num_rows]


FEW_HARDWARE, FEW_INTERPRETED = FewHardware(), FewInterpreted()


def operations(interpret) -> FewHardware | FewInterpreted:
    """The table that goes with the `interpret` argument of `plgpu.kernel`."""
    return FEW_HARDWARE if interpret is None else FEW_INTERPRETED


# -- warpgroup roles ---------------------------------------------------------------------------------------------


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def _heads(heads, value):
    """[heads], all the same."""
    return plgpu.layout_cast(jnp.full((heads,), value, jnp.float32), WGMMA_COLUMN)


def _columns(x, shape):
    """[heads] -> [rows, heads], the same value along a column."""
    return lax.broadcast_in_dim(x, shape, [1])


def _attend_warpgroup(call, *, q, kv, p, rows, q_ready, full, empty):
    """Scores, softmax and O."""
    fmt, ops = call.fmt, call.ops
    parts, pieces, lengths = call.parts, call.pieces, call.lengths
    stages, heads = kv.shape[0], p.shape[0]
    scale2 = call.scale[0] * mgpu.LOG2_E
    for stage in range(stages):
        plgpu.barrier_arrive(empty.at[stage])

    def load_q(item, count):
        @pl.when(count > 0)
        def _():
            plgpu.copy_gmem_to_smem(call.q.at[pl.ds(item * heads, heads)], q.at[0], q_ready)

    def block(i, carry, first_block):
        """S^T of one block, its softmax, O^T += V^T P^T."""
        acc, top, total = carry  # [d_v, heads], [heads], [64, heads]
        stage = lax.rem(first_block + i, jnp.int32(stages))
        plgpu.barrier_wait(full.at[stage])

        def scores(s_ref):
            plgpu.wgmma(s_ref, kv.at[stage], q.at[mgpu.opaque_zero(i)].transpose((1, 0)))

        s = pl.run_state(scores)(plgpu.ACC.init(_zeros(BLOCK_TOKENS, heads)))
        bias = plgpu.load(rows.at[BIAS_ROW + stage], layout=WGMMA_ROW)  # [64]
        s = s * scale2 + rows_to_tile(bias, s.shape)
        # All threads meet in this call and at the fence below. So P is written when everyone's last product is done,
        # read when all of it is written, and maxima are written when the last ones have been read.
        new_top = jnp.maximum(top, ops.over_keys(s, rows, "max"))
        rescale = jnp.exp2(top - new_top)
        weights = jnp.exp2(s - _columns(new_top, s.shape))
        ops.store_weights(p, weights.astype(jnp.bfloat16))
        plgpu.commit_smem()
        total = total * _columns(rescale, total.shape) + weights

        def values(acc_ref):
            v = kv.at[stage, :, pl.ds(0, fmt.d_v)]
            plgpu.wgmma(acc_ref, v.transpose((1, 0)), p.transpose((1, 0)))

        acc = pl.run_state(values)(plgpu.ACC.init(acc * _columns(rescale, acc.shape)))
        plgpu.barrier_arrive(empty.at[stage])
        return acc, new_top, total

    def attend(index, this, following, first_block):
        item, _, count, _, siblings = this
        plgpu.barrier_wait(q_ready)
        carry = (_zeros(fmt.d_v, heads), _heads(heads, LOWEST), _zeros(BLOCK_TOKENS, heads))
        acc, top, total = lax.fori_loop(0, count, functools.partial(block, first_block=first_block), carry)
        total = ops.over_keys(total, rows, "sum")
        plgpu.commit_smem()  # for the next maxima; and nobody reads Q any more
        load_q(*following)
        factor, lse2 = final_factor(top, total, call.sink, siblings, 0, WGMMA_COLUMN)
        call.results.store((acc * _columns(factor, acc.shape),), index, item, siblings, 0, 0)
        call.results.store_lse(lse2, index, item, siblings, 0)

    def piece(index, this, following, first_block):
        item, _, count, _, siblings = this
        after = (following[0], jnp.where(index + 1 < end, following[2], 0))

        @pl.when(count > 0)
        def _some():
            attend(index, this, after, first_block)

        @pl.when(count == 0)
        def _none():
            call.results.store((_zeros(fmt.d_v, heads),), index, item, siblings, 0, 0)
            call.results.store_lse(_heads(heads, -jnp.inf), index, item, siblings, 0)
            load_q(*after)

        return first_block + count

    part = lax.axis_index("part")
    begin, end = parts[part], parts[part + 1]
    item, _, count, _, _ = piece_at(begin, pieces, lengths)
    load_q(item, jnp.where(begin < end, count, 0))
    pieces_of_part(parts, pieces, lengths, piece)


def run(
    call, set_registers, gather_warpgroup, copy_warpgroup,
    *, q, kv, p, rows, q_ready, full, empty, copies_ready, **copied,
):  # fmt: skip
    """One CTA. The roles that dequantise and copy are sm90.py's."""
    wg = lax.axis_index("wg")

    def begin(group):
        if group:
            plgpu.barrier_wait(copies_ready)
        else:
            call.ops.init_copies(rows, kv.shape[0])
            plgpu.barrier_arrive(copies_ready)

    operands = (call.data, call.indices, call.parts, call.pieces, call.lengths)
    gathering = dict(scopes=call.scopes, ops=call.ops, kv=kv, rows=rows, empty=empty, copied=copied)

    @pl.when(wg == ATTEND)
    def _attend():
        set_registers(REGISTERS[ATTEND])
        _attend_warpgroup(call, q=q, kv=kv, p=p, rows=rows, q_ready=q_ready, full=full, empty=empty)

    for group, number in enumerate((GATHER_0, GATHER_1)):

        @pl.when(wg == number)
        def _gather(group=group, number=number):
            gather_warpgroup(
                *operands, registers=REGISTERS[number], full=full, begin=lambda: begin(group), groups=(group,),
                **gathering,
            )  # fmt: skip

    @pl.when(wg == COPY)
    def _copy():
        copy_warpgroup(
            *operands, share=False, registers=REGISTERS[COPY], copies_ready=copies_ready, **gathering
        )  # fmt: skip
