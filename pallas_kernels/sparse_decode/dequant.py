"""Rows of the cache -> bf16 keys in shared memory, by index: copy, wait, dequantise in place.

A block of 64 keys becomes one stage `kv[stage]`, bf16 [64, d_qk] in swizzled tiles of 8 rows by 64 columns, so that 8
rows are one contiguous run of memory, a *group*. Each of the 4 warps owns two groups of a block (one, where two
warpgroups share it) and works on them without any other warp. Raw rows have no buffer of their own:

1. The copy warpgroup has the raw rows brought to the end of the group's own memory (8 * d_qk * 2 bytes, nearly twice as
   much), one `cp.async.bulk` a row, as soon as the stage is free. In a cluster each of two CTAs copies one of a warp's
   groups, to both. Scales that lie apart go behind their row.
2. The gather warpgroup converts the first column tiles, which lie in front of all raw bytes, while it reads the rest of
   the group into registers, and then overwrites those.

Lane l works on row l % 8 of the group and on 16-byte chunks l // 8, l // 8 + 4, ...; with raw rows an odd number of
chunks apart, reads of raw bytes and writes of swizzled values are free of bank conflicts.

    value = bf16(e4m3 * scale), product in float32, one rounding

`SparseHardware` is what runs on a GPU; `SparseInterpreted` says the same in plain jax.numpy for the CPU interpreter.
Rows of keys that do not count are zeros, read from nowhere.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import formats, mgpu
from pallas_kernels.mgpu import asm
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    CHUNK_BYTES,
    COLUMN_TILE,
    COLUMN_TILE_BYTES,
    GROUP_ROWS,
    Scope,
)
from pallas_kernels.sparse_decode.lanes import (
    BLOCK_ROW,
    GROUPS_PER_WARP,
    LANE_CHUNKS,
    MINUS_INFINITY,
    REF,
    SPLAT,
    STAGED_BYTES,
    Lane,
    add,
    const,
    dequantize_latent,
    equal,
    gmem,
    i32,
    is_key,
    less,
    load8,
    load16,
    mul,
    row_address,
    row_array,
    row_number,
    row_values,
    scalar,
    scale_values,
    smem,
    store16,
    sync_warp,
    wide,
)

MASKED = -float("inf")

# Rows of the small float32 buffer `rows`, [*, 64]. What a kernel needs besides lies behind these.
BARRIER_ROW = 0  # the bulk copies' mbarriers: one a stage, warp and group; there is room for 4 stages
BIAS_ROW = 1  # as many as stages: 0 for a key, -inf for none
BOTH_GROUPS = (0, 1)  # of a warp: a warpgroup dequantises a whole block, or one of these and so half of the rows

TILES = plgpu.RefType(mgpu.tile((GROUP_ROWS, COLUMN_TILE)).transforms)


# -- the two tables ----------------------------------------------------------------------------------------------


class SparseHardware(mgpu.Hardware):
    """Gather, dequantisation and masked stores, as they are on a GPU."""

    def copy_scratch(self, stages: int) -> dict[str, plgpu.Barrier]:
        """Scratch types beside `rows` that `start_copy` and `finish_block` need."""
        return {}

    def init_copies(self, rows, stages: int) -> None:
        """Prepares the mbarriers of bulk copies. One warpgroup does; the others must be told."""

        @plgpu.inline_mgpu(arg_types=(REF,))
        def init(_, rows):
            lane = Lane()
            for stage in range(stages):
                for k in range(GROUPS_PER_WARP):
                    barrier = _barrier(lane, rows, const(stage, i32()), k)
                    text = f"@$0 mbarrier.init.shared::cta.b64 [$1], {GROUP_ROWS};"
                    asm(text, "b,r", equal(lane.lane, 0), barrier)
            asm("fence.mbarrier_init.release.cluster;")
            asm("fence.proxy.async.shared::cta;")

        init(rows)

    def load_slots(self, indices, item, block, length, scope: Scope) -> jax.Array:
        """int32 [64] in BLOCK_ROW layout: the block's slots, -1 from `length` on."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SPLAT, SPLAT, SPLAT),
            return_type=plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.dtype(jnp.int32), BLOCK_ROW),
        )
        def load(_, indices, item, block, length):
            lane = Lane()
            first = add(mul(scalar(block), BLOCK_TOKENS), add(mul(lane.warp, GROUP_ROWS), lane.row))
            row = add(gmem(indices), mul(wide(scalar(item)), 4 * scope.topk))
            address = add(row, mul(wide(first), 4))
            slots = []
            for k in range(GROUPS_PER_WARP):
                counts = less(add(first, 32 * k), scalar(length))
                text = f"{{ mov.b32 $0, -1; @$1 ld.global.nc.b32 $0, [$2+{128 * k}]; }}"
                slots.append(asm(text, "=&r,b,l", counts, address, result="i32"))
            return row_array(slots)

        return load(indices, item, block, length)

    def start_copy(self, data, slots, kv, rows, stage, scope: Scope, share: bool, copied=None) -> None:
        """Begins to copy a block's raw rows to a free stage. Of plain rows it only says that the stage's turn has come:
        every block takes one phase of the mbarriers, whatever its format, so that nobody falls a phase behind.

        share: whether a cluster of two CTAs wants the same rows. Each then copies every other group, for both.
        """
        copy = functools.partial(_copy_raw, share=share) if scope.fmt.is_quantized else _copy_nothing
        self._start(copy, data, slots, kv, rows, stage, scope, BOTH_GROUPS)

    def copy_plain(self, data, slots, kv, rows, stage, scope: Scope, groups=BOTH_GROUPS) -> None:
        """Begins to copy a block's bf16 rows, those of `groups`, to a free stage; the same warpgroup finishes."""
        self._start(_copy_plain, data, slots, kv, rows, stage, scope, groups)

    def _start(self, copy, data, slots, kv, rows, stage, scope, groups) -> None:
        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW, TILES, REF, SPLAT))
        def start(_, data, slots, kv, rows, stage):
            lane = Lane()
            for k in groups:
                slot = row_values(slots)[k]
                group = lane.group(kv, scalar(stage), k, scope.fmt.d_qk)
                copy(lane, group, data, slot, _barrier(lane, rows, scalar(stage), k), scope, k)

        start(data, slots, kv, rows, stage)

    def finish_block(self, slots, kv, rows, stage, parity, data, scope: Scope, groups=BOTH_GROUPS, copied=None) -> None:
        """Waits for the rows of `groups`, dequantises them, writes their mask, makes it all visible to wgmma."""
        del data

        @plgpu.inline_mgpu(arg_types=(BLOCK_ROW, TILES, REF, SPLAT, SPLAT))
        def finish(_, slots, kv, rows, stage, parity):
            lane = Lane()
            keys = {k: is_key(row_values(slots)[k], scope) for k in groups}
            bias = add(smem(rows), add(mul(scalar(stage), 4 * BLOCK_TOKENS), 4 * BLOCK_TOKENS * BIAS_ROW))
            bias = add(bias, mul(add(mul(lane.warp, GROUP_ROWS), lane.row), 4))
            for k, key in keys.items():
                mask = arith.select(key, const(0, i32()), const(MINUS_INFINITY, i32()))
                asm(f"st.shared.b32 [$0+{128 * k}], $1;", "r,r", bias, mask)
            for k, key in keys.items():
                _wait(_barrier(lane, rows, scalar(stage), k), scalar(parity))
                if scope.fmt.is_quantized:
                    _dequantize_group(lane, lane.group(kv, scalar(stage), k, scope.fmt.d_qk), key, scope)
            if not scope.fmt.is_quantized:
                asm("cp.async.wait_all;")
            asm("fence.proxy.async.shared::cta;")

        finish(slots, kv, rows, stage, parity)


def _barrier(lane: Lane, rows: ir.Value, stage: ir.Value, k: int) -> ir.Value:
    """Address of the mbarrier of the warp's k-th group of a stage."""
    number = add(mul(add(mul(stage, 4), lane.warp), GROUPS_PER_WARP), k)
    return add(smem(rows), add(mul(number, 8), 4 * BLOCK_TOKENS * BARRIER_ROW))


def _raw_row(lane: Lane, group: ir.Value, scope: Scope) -> ir.Value:
    """Where the raw row of the lane's row is staged."""
    return add(group, add(mul(lane.row, scope.staged_row_bytes), scope.staged_offset_bytes))


def _copy_plain(lane, group, data, slot, barrier, scope, k) -> None:
    """bf16 rows, straight to their swizzled places."""
    key, (row, _) = is_key(slot, scope), row_address(data, slot, scope)
    size = arith.select(key, const(CHUNK_BYTES, i32()), const(0, i32()))
    source = add(arith.select(key, row, gmem(data)), wide(mul(lane.chunk, CHUNK_BYTES)))
    targets = [lane.swizzled(group, add(lane.chunk, LANE_CHUNKS * half)) for half in range(2)]
    for n in range(scope.row_chunks // LANE_CHUNKS):
        at = COLUMN_TILE_BYTES * (n // 2)
        text = f"cp.async.cg.shared.global.L2::128B [$0+{at}], [$1+{STAGED_BYTES * n}], 16, $2;"
        asm(text, "r,l,r", targets[n % 2], source, size)


def _copy_raw(lane, group, data, slot, barrier, scope, k, *, share) -> None:
    """Raw rows, one bulk copy each; scales that lie apart go behind their row."""
    key, owns = is_key(slot, scope), equal(lane.chunk, 0)  # lane r owns row r
    own = _raw_row(lane, group, scope)
    num_bytes = arith.select(key, const(scope.row_bytes, i32()), const(0, i32()))
    if scope.has_scales_apart:
        asm("@$0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$1], $2;", "b,r,r", owns, barrier, num_bytes)
        _, scales = row_address(data, slot, scope)
        text = f"@$0 cp.async.ca.shared.global [$1+{scope.row_bytes}], [$2], {scope.scale_record_bytes};"
        asm(text, "b,r,l", arith.andi(key, owns), own, scales)
        asm("@$0 cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$1];", "b,r", owns, barrier)
    else:
        asm("@$0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;", "b,r,r", owns, barrier, num_bytes)
    go = arith.andi(key, owns)
    if share:  # two CTAs, and two groups a warp
        go = arith.andi(go, equal(asm("mov.u32 $0, %cluster_ctarank;", "=r", result="i32"), k))

    def copy(to):
        text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        if share:
            return f"{text}.multicast::cluster [{to}], [from], {scope.row_bytes}, [$6], both;"
        return f"{text} [{to}], [from], {scope.row_bytes}, [$6];"

    # The instruction takes its operands from uniform registers, so lanes that each issue one do so in turn: 105 cycles
    # a row on an H200, a third of a block's time. Where all rows of a group count, one lane issues all of them.
    rows = asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", "=r,b", go, result="i32")
    numbers = "".join(f"\n      shfl.sync.idx.b32 n{r}, $0, {r}, 31, 0xffffffff;" for r in range(GROUP_ROWS))
    copies = "".join(
        f"\n      mad.wide.u32 from, n{r}, {scope.row_bytes}, $1; "
        + copy(f"$4+{scope.staged_offset_bytes + r * scope.staged_row_bytes}")
        for r in range(GROUP_ROWS)
    )
    text = f"""{{
      .reg .pred one, all; .reg .b32 n<{GROUP_ROWS}>; .reg .b64 from; .reg .b16 both; mov.b16 both, 3;
      setp.eq.u32 all, $2, {2**GROUP_ROWS - 1};
      @!all bra SOME_${{:uid}};{numbers}
      elect.sync _|one, 0xffffffff;
      @!one bra DONE_${{:uid}};{copies}
      bra DONE_${{:uid}};
      SOME_${{:uid}}:
      mad.wide.u32 from, $0, {scope.row_bytes}, $1;
      @$3 {copy("$5")}
      DONE_${{:uid}}: }}"""
    asm(text, "r,l,r,b,r,r,r", row_number(slot, scope), gmem(data), rows, go, group, own, barrier)


def _copy_nothing(lane, group, data, slot, barrier, scope, k) -> None:
    """Plain rows: `_copy_plain` brings them, another warpgroup's."""
    asm("@$0 mbarrier.arrive.shared::cta.b64 _, [$1];", "b,r", equal(lane.chunk, 0), barrier)


def _wait(barrier: ir.Value, parity: ir.Value) -> None:
    asm(
        "{ .reg .pred p; AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
        "@p bra DONE_${:uid}; bra AGAIN_${:uid}; DONE_${:uid}: }",
        "r,r",
        barrier,
        parity,
    )


def _dequantize_group(lane, group, key, scope) -> None:
    """8 raw rows -> 8 rows of bf16, zeros for keys that do not count.

    The bf16 values of the first column tiles lie in front of all raw rows, and are written while others are read; what
    comes behind waits until every lane holds its raw bytes.
    """
    fmt = scope.fmt
    num_tiles = fmt.d_nope // COLUMN_TILE
    raw_row = _raw_row(lane, group, scope)
    raw = add(raw_row, mul(lane.chunk, CHUNK_BYTES))
    # The lane's 16-byte chunks: one a column tile of the latent, then two of RoPE.
    offsets = [STAGED_BYTES * n for n in range(num_tiles)]
    offsets += [scope.rope_offset_bytes + STAGED_BYTES * half for half in range(2)]
    clear = "".join(f" @!$0 st.shared.v4.b32 [$1+{at}], {{zero, zero, zero, zero}};" for at in offsets)
    asm(
        "{ .reg .pred all; .reg .b32 zero; vote.sync.all.pred all, $0, 0xffffffff; @all bra FULL_${:uid}; "
        f"mov.b32 zero, 0;{clear} FULL_${{:uid}}: }}",
        "b,r",
        key,
        raw,
    )
    # Four lanes share the scales: what one of them cleared, another might have read before.
    zero = const(0, i32())
    words = load8(raw_row, scope.row_bytes) if scope.has_scales_apart else load16(raw_row, scope.scale_offset_bytes)
    scales = scale_values([arith.select(key, word, zero) for word in words], fmt)
    even = lane.swizzled(group, mul(lane.chunk, 2))
    num_free = scope.staged_offset_bytes // COLUMN_TILE_BYTES
    chunks = [load16(raw, at) for at in offsets[:num_free]]
    behind = []
    for n in range(num_free):
        behind += [load16(raw, at) for at in offsets[num_free + 2 * n : num_free + 2 * n + 2]]
        dequantize_latent(even, chunks[n : n + 1], scales, fmt, first_tile=n)
    behind += [load16(raw, at) for at in offsets[3 * num_free :]]
    sync_warp()
    dequantize_latent(even, behind[: num_tiles - num_free], scales, fmt, first_tile=num_free)
    for half, words in enumerate(behind[num_tiles - num_free :]):
        place = lane.swizzled(group, add(lane.chunk, LANE_CHUNKS * half))
        store16(place, COLUMN_TILE_BYTES * num_tiles, words)


class SparseInterpreted(mgpu.Interpreted):
    """The same in plain jax.numpy."""

    def copy_scratch(self, stages):
        return {"copied": plgpu.Barrier(num_barriers=stages)}

    def init_copies(self, rows, stages) -> None:
        for stage in range(stages):
            rows[BARRIER_ROW, stage] = jnp.float32(0)  # phases that have ended: what an mbarrier keeps

    def load_slots(self, indices, item, block, length, scope):
        place = block * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)  # [64]
        slots = jnp.take(indices[item], jnp.minimum(place, scope.topk - 1))  # [64]
        return jnp.where(place < length, slots, -1)

    def start_copy(self, data, slots, kv, rows, stage, scope, share, copied) -> None:
        if scope.fmt.is_quantized:
            self.copy_plain(data, slots, kv, rows, stage, scope)
        rows[BARRIER_ROW, stage] = rows[BARRIER_ROW, stage] + 1
        plgpu.barrier_arrive(copied.at[stage])

    def copy_plain(self, data, slots, kv, rows, stage, scope, groups=BOTH_GROUPS) -> None:
        # The stage holds neither the old keys nor the new ones from here on.
        for group in groups:
            kv[stage, _rows_of(group)] = jnp.full((GROUP_KEYS, scope.fmt.d_qk), jnp.nan, jnp.bfloat16)

    def finish_block(self, slots, kv, rows, stage, parity, data, scope, groups=BOTH_GROUPS, *, copied) -> None:
        plgpu.barrier_wait(copied.at[stage])
        # On a GPU a wait for the wrong parity is over too early, or never: here it spoils the keys.
        is_due = lax.rem(rows[BARRIER_ROW, stage].astype(jnp.int32) - 1, jnp.int32(2)) == parity
        keys = jnp.where(is_due, _interpreted_rows(data[...], slots, scope), jnp.bfloat16(jnp.nan))
        key = (slots >= 0) & (slots < scope.num_slots)
        bias = jnp.where(key, 0.0, MASKED).astype(jnp.float32)
        for group in groups:
            first = group * GROUP_KEYS
            kv[stage, _rows_of(group)] = keys[first : first + GROUP_KEYS]
            rows[BIAS_ROW + stage, _rows_of(group)] = bias[first : first + GROUP_KEYS]
        self.publish_smem()


GROUP_KEYS = BLOCK_TOKENS // GROUPS_PER_WARP  # of all warps' k-th groups


def _rows_of(group: int):
    return pl.ds(group * GROUP_KEYS, GROUP_KEYS)


def _interpreted_rows(data, slots, scope: Scope) -> jax.Array:
    """bf16 [64, d_qk]: the rows of a block, zeros for keys that do not count."""
    fmt = scope.fmt
    key = (slots >= 0) & (slots < scope.num_slots)  # [64]
    slot = jnp.where(key, slots, 0)  # [64]
    page, offset = lax.div(slot, jnp.int32(scope.page_size)), lax.rem(slot, jnp.int32(scope.page_size))
    if not fmt.is_quantized:
        values = data[page, offset]  # [64, d_qk]
        return jnp.where(key[:, None], values, jnp.zeros_like(values))
    pages = data.reshape(data.shape[0], -1)  # [pages, page bytes]

    def record(index):  # [64, record bytes]
        size = fmt.record_bytes[index]
        start = fmt.area_offset_bytes(index, scope.page_size) + offset * size  # [64]
        return pages[page[:, None], start[:, None] + jnp.arange(size)[None, :]]

    def field(role):  # [64, count]
        index, start, what = fmt.locate(role)
        raw = record(index)[:, start : start + what.num_bytes]  # [64, bytes]
        if what.dtype.itemsize > 1:
            raw = raw.reshape(BLOCK_TOKENS, what.count, what.dtype.itemsize)
        return raw if what.dtype == formats.E8M0 else lax.bitcast_convert_type(raw, what.dtype)

    scales = field("scale")  # [64, scales]
    if fmt.locate("scale")[2].dtype == formats.E8M0:
        bits = lax.shift_left(scales.astype(jnp.int32), jnp.int32(23))
        bits = jnp.where(scales == 255, jnp.int32(0x7FC00000), bits)
        scales = lax.bitcast_convert_type(bits, jnp.float32)
    latent = field("nope").astype(jnp.float32) * jnp.repeat(scales, fmt.scale_tile, axis=1)  # [64, d_nope]
    values = jnp.concatenate([latent.astype(jnp.bfloat16), field("rope")], axis=1)  # [64, d_qk]
    return jnp.where(key[:, None], values, jnp.zeros_like(values))


SPARSE_HARDWARE = SparseHardware()
SPARSE_INTERPRETED = SparseInterpreted()


def operations(interpret) -> SparseHardware | SparseInterpreted:
    """The table that goes with the `interpret` argument of `plgpu.kernel`."""
    return SPARSE_HARDWARE if interpret is None else SPARSE_INTERPRETED
