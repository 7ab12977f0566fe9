"""Sparse MLA decode on SM100 for 65 to 128 heads (and every other even number of tiles): two CTAs a tile of 128 heads.

One CTA cannot take 128 heads: O, 128 x 512 in float32, would be all of tensor memory. So each CTA of a pair gathers and
dequantises all keys, computes all scores, and multiplies half of V's columns (`half`). Against two tiles of 64 heads,
which also gather and dequantise every row twice, the products run at the full rate of the tensor cores, and P and more
than half of Q are read from tensor memory, not from shared memory. Nothing is exchanged between the two.

    softmax  as for 64 heads; also brings the columns of Q that its half of V lacks to tensor memory, and P
    key, copy  those of sm100.py
    multiply   scores: loads the other columns of Q; S = Q K^T          values: O += P V[:, half]

| tensor memory, columns of 512 | V32 | MODEL1 | | shared memory, bytes of 232 448 | V32 | MODEL1 |
|---|---|---|---|---|---|---|
| O, 128 x 256 float32 | 256 | 256 | | Q, 128 x 256 | 65 536 | 65 536 |
| S, 128 x 64 float32 | 64 | 64 | | two stages | 147 456 | 131 072 |
| P, 128 x 64 bf16 | 32 | 32 | | mask | 1 024 | 1 024 |
| Q, the other columns, bf16 | 160 | 128 | | | | |
| sum | 512 | 480 | | sum | 214 016 | 197 632 |

A row of O or S belongs to one thread. Barriers are those of sm100.py, and one more:

    q_tmem   softmax -> scores   Q's columns are in tensor memory
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import rows_to_tile
from pallas_kernels.sparse_decode import gather
from pallas_kernels.sparse_decode.config import BLOCK_TOKENS, PAIR_HEADS, STAGES
from pallas_kernels.sparse_decode.gather import for_stage
from pallas_kernels.sparse_decode.work import LOWEST, final_factor, pieces_of_part

SCORES, VALUES = range(2)  # warps of the multiplying warpgroup
# A thread, of the four warpgroups; with 128 for all ptxas spills more than 100 bytes (V32).
REGISTERS = (208, 128, 88, 88)
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # one row of 128 a thread
NATIVE_ROW, NATIVE_COLUMN = NATIVE.reduce(1), NATIVE.reduce(0)
PART_COLUMNS = 64  # of O or Q in registers at a time
Group = tuple[str, int, int]  # columns of a stage: buffer, first column of it, number of columns


def half_groups(fmt: KVFormat, half: int) -> list[Group]:
    """Half of V's columns as a stage holds them, in order. Both halves have groups of the same widths."""
    width = fmt.d_v // 2
    in_latent = min(width, fmt.d_nope - width)  # the second half may end with the rope columns
    groups = [("latent", half * width, in_latent)]
    if in_latent < width:
        groups.append(("rope", 0, width - in_latent) if half else ("latent", in_latent, width - in_latent))
    return groups


def other_groups(fmt: KVFormat, half: int) -> list[Group]:
    """The columns of a key that are not of this half of V."""
    rope = [("rope", 0, fmt.d_rope)] if fmt.d_v <= fmt.d_nope else []
    return half_groups(fmt, 1 - half) + rope


def q_column(fmt: KVFormat, group: Group) -> int:
    """The first column of Q that meets a group."""
    buffer, first, _ = group
    return first + (fmt.d_nope if buffer == "rope" else 0)


def scratch_types(fmt: KVFormat) -> dict[str, Any]:
    """Shared memory, tensor memory and barriers of one CTA."""
    barrier, by_tensor_core = plgpu.Barrier, functools.partial(plgpu.Barrier, orders_tensor_core=True)

    def tmem(columns, dtype=jnp.float32):
        return plgpu.TMEM((PAIR_HEADS, columns), dtype, packed=True if dtype == jnp.bfloat16 else None)

    p, o = tmem(BLOCK_TOKENS, jnp.bfloat16), [tmem(columns) for _, _, columns in half_groups(fmt, 0)]
    return dict(
        # In this order in tensor memory, before the others. What lies first needs no address of its own, which ptxas
        # keeps on the stack: V32 has none with P first, BF16 with V32 fewer with O first (docs/log.md).
        o_and_p=[p, o] if fmt.is_quantized else [o, p],
        q=mgpu.tile((PAIR_HEADS, fmt.d_v // 2), swizzle_bytes=gather.KEY_TILE_BYTES),
        stages=gather.stage_types(fmt),
        rows=plgpu.SMEM((STAGES, BLOCK_TOKENS), jnp.float32),  # 0 for a key, -inf for none
        s=tmem(BLOCK_TOKENS),
        q_others=[tmem(columns, jnp.bfloat16) for _, _, columns in other_groups(fmt, 0)],
        landed=barrier(num_arrivals=2, num_barriers=STAGES),
        full=barrier(num_barriers=STAGES),
        empty=by_tensor_core(num_barriers=STAGES),
        s_ready=by_tensor_core(),
        s_free=by_tensor_core(),
        p_ready=by_tensor_core(),
        pv_done=by_tensor_core(),
        q_ready=barrier(),
        q_free=by_tensor_core(),
        q_tmem=by_tensor_core(),
    )


def _pair_and_half():
    """Which tile of 128 heads, and which half of V."""
    tile = lax.axis_index("tile")
    return lax.div(tile, jnp.int32(2)), lax.rem(tile, jnp.int32(2))


def _for_half(half, run: Callable[[int], None]) -> None:
    """run(half), known when the kernel is compiled."""
    for n in range(2):
        pl.when(half == n)(functools.partial(run, n))


def _stage(block):
    return lax.rem(block, jnp.int32(STAGES))


def _row_vector(value):
    return plgpu.layout_cast(jnp.full((PAIR_HEADS,), value, jnp.float32), NATIVE_ROW)


def _parts(o):
    """(first column of the half, reference to as many columns as fit registers), of all of O."""
    first = 0
    for o_ref in o:
        for column in range(0, o_ref.shape[1], PART_COLUMNS):
            yield first + column, o_ref.at[:, pl.ds(column, PART_COLUMNS)]
        first += o_ref.shape[1]


def _load(ref):
    x = plgpu.async_load_tmem(ref, layout=NATIVE)
    plgpu.wait_load_tmem()
    return x


def _softmax_warpgroup(call, *, rows, s, p, o, q_others, s_ready, s_free, p_ready, pv_done, q_tmem):
    """Softmax, the upkeep of O, Q in tensor memory, and results."""
    pair, half = _pair_and_half()
    scale2 = call.scale[0] * mgpu.LOG2_E
    plgpu.barrier_arrive(s_free)

    def load_q(item):
        """The scores of the piece before have been read, so nothing reads Q any more."""
        heads = pl.ds(item * call.q_rows + pair * PAIR_HEADS, PAIR_HEADS)
        for number, q_ref in enumerate(q_others):
            first = [q_column(call.fmt, other_groups(call.fmt, n)[number]) for n in range(2)]
            for column in range(0, q_ref.shape[1], PART_COLUMNS):
                columns = pl.ds(first[0] + half * (first[1] - first[0]) + column, PART_COLUMNS)
                # 16 bytes a load. (Pallas calls a transfer optimized if it goes to shared memory.)
                x = plgpu.load(call.q.at[heads, columns], layout=NATIVE(8), optimized=False)
                plgpu.async_store_tmem(q_ref.at[:, pl.ds(column, PART_COLUMNS)], plgpu.layout_cast(x, NATIVE))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(q_tmem)

    def block(i, carry, first_block):
        top, total = carry  # [128] each
        plgpu.barrier_wait(s_ready)
        scores = _load(s)  # [128 heads, 64 keys]
        plgpu.barrier_arrive(s_free)
        bias = plgpu.load(rows.at[_stage(first_block + i)], layout=NATIVE_COLUMN)  # [64 keys]
        scores = scores * scale2 + lax.broadcast_in_dim(bias, scores.shape, [1])
        highest = jnp.maximum(top, scores.max(axis=1))
        grown = call.ops.any_positive(highest - (top + call.config.rescale_above), NATIVE_ROW)
        new_top = jnp.where(lax.broadcast_in_dim(grown, top.shape, []), highest, top)
        rescale = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - rows_to_tile(new_top, scores.shape))
        total = total * rescale + weights.sum(axis=1)
        probabilities = weights.astype(jnp.bfloat16)

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(pv_done)  # of the block before: P has been read, O is whole

        plgpu.async_store_tmem(p, probabilities)

        @pl.when(grown & (i > 0))
        def _():
            for _, part in _parts(o):
                x = _load(part)  # [128, 64]
                plgpu.async_store_tmem(part, x * rows_to_tile(rescale, x.shape))

        plgpu.commit_tmem()
        plgpu.barrier_arrive(p_ready)
        return new_top, total

    def store_lse(lse2, index, item, siblings):
        pl.when(half == 0)(lambda: call.results.store_lse(lse2, index, item, siblings, pair))

    def attend(index, this, first_block):
        item, _, count, _, siblings = this
        load_q(item)
        carry = _row_vector(LOWEST), _row_vector(0)
        top, total = lax.fori_loop(0, count, functools.partial(block, first_block=first_block), carry)
        factor, lse2 = final_factor(top, total, call.sink, siblings, pair, NATIVE_ROW)
        store_lse(lse2, index, item, siblings)
        plgpu.barrier_wait(pv_done)
        for column, part in _parts(o):
            x = _load(part)  # [128, 64]
            x = x * rows_to_tile(factor, x.shape)
            call.results.store((x,), index, item, siblings, pair, half * (call.fmt.d_v // 2) + column)

    def piece(index, this, following, first_block):
        del following
        item, _, count, _, siblings = this
        pl.when(count > 0)(lambda: attend(index, this, first_block))

        @pl.when(count == 0)
        def _none():
            nothing = plgpu.layout_cast(jnp.zeros((PAIR_HEADS, PART_COLUMNS), jnp.float32), NATIVE)
            for column in range(0, call.fmt.d_v // 2, PART_COLUMNS):
                call.results.store(
                    (nothing,), index, item, siblings, pair, half * (call.fmt.d_v // 2) + column
                )
            store_lse(_row_vector(-jnp.inf), index, item, siblings)

        return first_block + count

    pieces_of_part(call.parts, call.pieces, call.lengths, piece)


def _multiply_warpgroup(
    call, *, q, stages, s, p, o, q_others, full, empty, s_ready, s_free, p_ready, pv_done, q_ready, q_free, q_tmem
):  # fmt: skip
    """Issues products: one warp the scores', one the values'."""
    pair, half = _pair_and_half()
    fmt = call.fmt

    def keys(stage, group):
        buffer, first, columns = group
        return getattr(stage, buffer).at[:, pl.ds(first, columns)]

    def scores(half):
        def products(stage):
            for number, group in enumerate(other_groups(fmt, half)):
                plgpu.tcgen05_mma(s, q_others[number], keys(stage, group).transpose((1, 0)), accumulate=number > 0)
            for group in half_groups(fmt, half):
                columns = pl.ds(q_column(fmt, group) - half * (fmt.d_v // 2), group[2])
                plgpu.tcgen05_mma(s, q.at[:, columns], keys(stage, group).transpose((1, 0)))

        def block(i, carry, first_block):
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
                heads = pl.ds(item * call.q_rows + pair * PAIR_HEADS, PAIR_HEADS)
                columns = pl.ds(half * (fmt.d_v // 2), fmt.d_v // 2)
                plgpu.copy_gmem_to_smem(call.q.at[heads, columns], q, q_ready)
                plgpu.barrier_wait(q_ready)
                plgpu.barrier_wait(q_tmem)
                lax.fori_loop(0, count, functools.partial(block, first_block=first_block), jnp.int32(0))
                plgpu.tcgen05_commit_arrive(q_free)
                plgpu.barrier_wait(q_free)  # Q may be overwritten

            return first_block + count

        pieces_of_part(call.parts, call.pieces, call.lengths, piece)
        plgpu.barrier_wait(s_free)  # drains it

    def values(half):
        for number in range(STAGES):
            plgpu.tcgen05_commit_arrive(empty.at[number])  # after nothing: they are empty

        def block(i, carry, first_block):
            def products(stage):
                for o_ref, group in zip(o, half_groups(fmt, half), strict=True):
                    plgpu.tcgen05_mma(o_ref, p, keys(stage, group), accumulate=i > 0)

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

        pieces_of_part(call.parts, call.pieces, call.lengths, piece)

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == SCORES)(lambda: _for_half(half, scores))
        pl.when(warp == VALUES)(lambda: _for_half(half, values))


def run(call, key_warpgroup: Callable[..., None], copy_warpgroup: Callable[..., None], **scratch) -> None:
    """One CTA: four warpgroups, in the order of sm100.py, of which it brings two."""
    scratch["stages"] = gather.stages(scratch["stages"])
    o_and_p = scratch.pop("o_and_p")
    scratch["p"], scratch["o"] = o_and_p if call.fmt.is_quantized else o_and_p[::-1]
    wg = lax.axis_index("wg")
    softmax = "rows s p o q_others s_ready s_free p_ready pv_done q_tmem"
    multiply = "q stages s p o q_others full empty s_ready s_free p_ready pv_done q_ready q_free q_tmem"
    roles: list[tuple[Callable[..., None], str]] = [
        (_softmax_warpgroup, softmax),
        (key_warpgroup, "stages rows landed full"),
        (copy_warpgroup, "stages landed empty"),
        (_multiply_warpgroup, multiply),
    ]

    def play(role, names, registers):
        gather.set_registers(registers)
        role(call, **{name: scratch[name] for name in names.split()})

    for number, ((role, names), registers) in enumerate(zip(roles, REGISTERS, strict=True)):
        pl.when(wg == number)(functools.partial(play, role, names, registers))
