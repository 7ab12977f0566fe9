"""Rows of the cache -> bf16 keys in shared memory, by index: copy, wait, dequantise in place.

A block of 64 keys becomes one stage `kv[stage]`, bf16 [64, d_qk] in swizzled tiles of 8 rows by 64 columns, so that 8
rows are one contiguous run of memory, a *group*. Each of the 4 warps owns two groups of a block and works on them
without any other warp. Raw rows (656 or 576 bytes) have no buffer of their own:

1. The copy warpgroup has the raw rows brought to the beginning of the group's own memory (8 * d_qk * 2 bytes, nearly
   twice as much), one `cp.async.bulk` a row, as soon as the stage is free.
2. The gather warpgroup reads all raw bytes of a group into registers (11 times 16 bytes a lane), then overwrites them
   with the dequantised values.

Lane l works on row l % 8 of the group and on 16-byte chunks l // 8, l // 8 + 4, ...; with raw rows an odd number of
chunks apart, reads of raw bytes and writes of swizzled values are free of bank conflicts.

    value = bf16(e4m3 * scale), product in float32, one rounding

`SparseHardware` is what runs on a GPU; `SparseInterpreted` says the same in plain jax.numpy for the CPU interpreter.
Rows of keys that do not count are zeros, read from nowhere.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import formats, mgpu
from pallas_kernels.mgpu import asm
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    CHUNK_BYTES,
    COLUMN_TILE,
    COLUMN_TILE_BYTES,
    GROUP_ROWS,
    STAGES,
    Scope,
)

GROUPS_PER_WARP = 2  # 4 warps, 64 rows
LANE_CHUNKS = 4  # lanes that share a row
STAGED_BYTES = LANE_CHUNKS * CHUNK_BYTES  # what the lanes of a row cover with one instruction
MASKED = -float("inf")
MINUS_INFINITY = 0xFF800000 - 2**32  # the same as the bits of a float32, seen as int32

# Rows of the small float32 buffer `rows` [ROWS, 64].
BIAS_ROW = 0  # STAGES rows: 0 for a key, -inf for none
RESCALE_ROW = STAGES  # what the accumulators are multiplied by before a block
FACTOR_ROW = STAGES + 1  # what they are multiplied by at the end
BARRIER_ROW = STAGES + 2  # the bulk copies' mbarriers: one a stage, warp and group
ROWS = STAGES + 3

# One value a row of a block: row = 32 * register + 8 * warp + lane % 8.
BLOCK_ROW = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 64), (8, 16), (8,))), warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1
).reduce(1)
SPLAT = plgpu.Layout.WG_SPLAT
REF = plgpu.RefType()
TILES = plgpu.RefType(mgpu.tile((GROUP_ROWS, COLUMN_TILE)).transforms)


# -- address arithmetic, inside inline_mgpu functions ------------------------------------------------------------


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _int(value: int, like: ir.Type) -> ir.Value:
    return mosaic.utils.c(value, like)


def _add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, _int(y, x.type) if isinstance(y, int) else y)


def _mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, _int(y, x.type))


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(_i64(), x)


def _less(x: ir.Value, y: ir.Value | int) -> ir.Value:
    """Unsigned: a negative x is not less than any length or number of slots."""
    return arith.cmpi(arith.CmpIPredicate.ult, x, _int(y, x.type) if isinstance(y, int) else y)


def _equal(x: ir.Value, y: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, x, _int(y, x.type))


def _smem(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32(), mosaic.utils.memref_ptr(ref))


def _gmem(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i64(), mosaic.utils.memref_ptr(ref))


def _scalar(array) -> ir.Value:
    return array.registers[()]


def _fields(struct: ir.Value, types: list[ir.Type]) -> list[ir.Value]:
    return [llvm.extractvalue(t, struct, [k]) for k, t in enumerate(types)]


def _row_values(array) -> list[ir.Value]:
    """The calling lane's two values of an array in BLOCK_ROW layout."""
    return [vector.extract(v, dynamic_position=[], static_position=[0]) for v in array.registers.reshape(-1)]


def _row_array(values: list[ir.Value]):
    layout = BLOCK_ROW.to_mgpu()
    registers = np.empty(layout.registers_shape((BLOCK_TOKENS,)), object)
    flat = registers.reshape(-1)
    for k, value in enumerate(values):
        flat[k] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


class _Lane:
    """Where the calling lane stands."""

    def __init__(self) -> None:
        thread = mosaic.utils.thread_idx()
        self.lane = arith.remui(thread, _int(mgpu.WARP, _i32()))
        self.warp = arith.remui(arith.divui(thread, _int(mgpu.WARP, _i32())), _int(4, _i32()))
        self.row = arith.remui(self.lane, _int(GROUP_ROWS, _i32()))  # of a group
        self.chunk = arith.divui(self.lane, _int(GROUP_ROWS, _i32()))  # of LANE_CHUNKS

    def group(self, kv: ir.Value, stage: ir.Value, k: int, d_qk: int) -> ir.Value:
        """Shared-memory address of the warp's k-th group."""
        group_bytes = GROUP_ROWS * d_qk * 2
        first = _add(_smem(kv), _mul(stage, BLOCK_TOKENS * d_qk * 2))
        return _add(first, _mul(_add(self.warp, 4 * k), group_bytes))

    def swizzled(self, group: ir.Value, chunk: ir.Value) -> ir.Value:
        """Address of the lane's row's 16-byte chunk (0 to 7) in the first column tile of a group."""
        place = arith.xori(chunk, self.row)
        return _add(group, _add(_mul(self.row, 2 * COLUMN_TILE), _mul(place, CHUNK_BYTES)))


def _row_address(data: ir.Value, slot: ir.Value, scope: Scope) -> tuple[ir.Value, ir.Value]:
    """64-bit addresses of a slot's first record and, for formats that keep scales apart, of its scale record."""
    base = _gmem(data)
    if scope.is_row_major:
        row = _add(base, _mul(_wide(slot), scope.row_bytes))
        return row, row
    page = arith.divui(slot, _int(scope.page_size, _i32()))
    offset = arith.subi(slot, _mul(page, scope.page_size))
    page_base = _add(base, _mul(_wide(page), scope.page_bytes))
    row = _add(page_base, _wide(_mul(offset, scope.row_bytes)))
    if not scope.fmt.is_quantized:
        return row, row
    scales = _add(page_base, scope.scale_area_bytes + scope.scale_offset_bytes)
    return row, _add(scales, _wide(_mul(offset, scope.scale_record_bytes)))


def _is_key(slot: ir.Value, scope: Scope) -> ir.Value:
    return _less(slot, min(scope.num_slots, 2**31 - 1))


WORDS = "!llvm.struct<(i32, i32, i32, i32)>"


def _load16(address: ir.Value, offset_bytes: int) -> list[ir.Value]:
    """16 bytes of shared memory as four registers."""
    text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset_bytes}];"
    return _fields(asm(text, "=r,=r,=r,=r,r", address, result=WORDS), [_i32()] * 4)


def _store16(address: ir.Value, offset_bytes: int, words: list[ir.Value]) -> None:
    asm(f"st.shared.v4.b32 [$0+{offset_bytes}], {{$1, $2, $3, $4}};", "r,r,r,r,r", address, *words)


def _dequantize(word: ir.Value, scale: ir.Value) -> list[ir.Value]:
    """Four e4m3 values in a register -> two registers of two bf16. e4m3 -> f16 -> f32 is exact."""
    text = """{
      .reg .b16 lo, hi, x0, x1, x2, x3; .reg .b32 a, b; .reg .f32 f0, f1, f2, f3;
      mov.b32 {lo, hi}, $2;
      cvt.rn.f16x2.e4m3x2 a, lo; cvt.rn.f16x2.e4m3x2 b, hi;
      mov.b32 {x0, x1}, a; mov.b32 {x2, x3}, b;
      cvt.f32.f16 f0, x0; cvt.f32.f16 f1, x1; cvt.f32.f16 f2, x2; cvt.f32.f16 f3, x3;
      mul.rn.f32 f0, f0, $3; mul.rn.f32 f1, f1, $3; mul.rn.f32 f2, f2, $3; mul.rn.f32 f3, f3, $3;
      cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2; }"""
    pair = llvm.inline_asm(ir.Type.parse("!llvm.struct<(i32, i32)>"), [word, scale], text, "=&r,=&r,r,f")
    return _fields(pair, [_i32()] * 2)


def _e8m0(word: ir.Value, byte: int) -> ir.Value:
    """A byte of a register as the float32 2^(byte - 127): 0 for byte 0 (2^-127 is subnormal), NaN for 255."""
    text = f"""{{
      .reg .b32 x; .reg .pred p;
      bfe.u32 x, $1, {8 * byte}, 8;
      setp.eq.u32 p, x, 255;
      shl.b32 x, x, 23;
      @p mov.b32 x, 0x7fc00000;
      mov.b32 $0, x; }}"""
    return llvm.inline_asm(ir.F32Type.get(), [word], text, "=f,r")


def _sync_warp() -> None:
    asm("bar.warp.sync 0xffffffff;")


# -- the two tables ----------------------------------------------------------------------------------------------


class SparseHardware(mgpu.Hardware):
    """Gather, dequantisation and masked stores, as they are on a GPU."""

    def copy_scratch(self) -> dict[str, plgpu.Barrier]:
        """Scratch types beside `rows` that `start_copy` and `await_copy` need."""
        return {}

    def init_copies(self, rows) -> None:
        """Prepares the mbarriers of bulk copies. One warpgroup does; the others must be told."""

        @plgpu.inline_mgpu(arg_types=(REF,))
        def init(_, rows):
            lane = _Lane()
            for stage in range(STAGES):
                for k in range(GROUPS_PER_WARP):
                    barrier = _barrier(lane, rows, _int(stage, _i32()), k)
                    asm("@$0 mbarrier.init.shared::cta.b64 [$1], 1;", "b,r", _equal(lane.lane, 0), barrier)
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
            lane = _Lane()
            first = _add(_mul(_scalar(block), BLOCK_TOKENS), _add(_mul(lane.warp, GROUP_ROWS), lane.row))
            row = _add(_gmem(indices), _mul(_wide(_scalar(item)), 4 * scope.topk))
            address = _add(row, _mul(_wide(first), 4))
            slots = []
            for k in range(GROUPS_PER_WARP):
                counts = _less(_add(first, 32 * k), _scalar(length))
                text = f"{{ mov.b32 $0, -1; @$1 ld.global.nc.b32 $0, [$2+{128 * k}]; }}"
                slots.append(asm(text, "=&r,b,l", counts, address, result="i32"))
            return _row_array(slots)

        return load(indices, item, block, length)

    def load_scales(self, data, slots, scope: Scope) -> tuple[jax.Array, ...]:
        """Scales that do not lie in the rows (MODEL1): two int32 [64] in BLOCK_ROW layout, 8 bytes a row."""
        if not scope.fmt.is_quantized or scope.scale_record == 0:
            return ()
        word = plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.dtype(jnp.int32), BLOCK_ROW)

        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW), return_type=(word, word))
        def load(_, data, slots):
            words = []
            for slot in _row_values(slots):
                _, scales = _row_address(data, slot, scope)
                text = "{ mov.b32 $0, 0; mov.b32 $1, 0; @$2 ld.global.nc.v2.b32 {$0, $1}, [$3]; }"
                pair = asm(text, "=&r,=&r,b,l", _is_key(slot, scope), scales, result="!llvm.struct<(i32, i32)>")
                words.append(_fields(pair, [_i32()] * 2))
            return tuple(_row_array([w[k] for w in words]) for k in range(2))

        return tuple(load(data, slots))

    def start_copy(self, data, slots, kv, rows, stage, scope: Scope, copied=None) -> None:
        """Begins to copy a block's raw rows to a free stage."""
        self._start(_copy_raw, data, slots, kv, rows, stage, scope)

    def copy_plain(self, data, slots, kv, rows, stage, scope: Scope) -> None:
        """Begins to copy a block's bf16 rows to a free stage; the same warpgroup finishes."""
        self._start(_copy_plain, data, slots, kv, rows, stage, scope)

    def _start(self, copy, data, slots, kv, rows, stage, scope) -> None:
        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW, TILES, REF, SPLAT))
        def start(_, data, slots, kv, rows, stage):
            lane = _Lane()
            for k, slot in enumerate(_row_values(slots)):
                row, _ = _row_address(data, slot, scope)
                group = lane.group(kv, _scalar(stage), k, scope.fmt.d_qk)
                barrier = _barrier(lane, rows, _scalar(stage), k)
                copy(lane, group, row, _is_key(slot, scope), barrier, _gmem(data), scope)

        start(data, slots, kv, rows, stage)

    def finish_block(self, data, slots, scales, kv, rows, stage, parity, scope: Scope, copied=None) -> None:
        """Waits for the rows, dequantises them, writes the mask, makes it all visible to wgmma."""

        @plgpu.inline_mgpu(arg_types=(BLOCK_ROW, (BLOCK_ROW,) * len(scales), TILES, REF, SPLAT, SPLAT))
        def finish(_, slots, scales, kv, rows, stage, parity):
            lane = _Lane()
            keys = [_is_key(slot, scope) for slot in _row_values(slots)]
            scale_words = [_row_values(s) for s in scales]
            bias = _add(_smem(rows), _add(_mul(_scalar(stage), 4 * BLOCK_TOKENS), 4 * BLOCK_TOKENS * BIAS_ROW))
            bias = _add(bias, _mul(_add(_mul(lane.warp, GROUP_ROWS), lane.row), 4))
            for k, key in enumerate(keys):
                mask = arith.select(key, _int(0, _i32()), _int(MINUS_INFINITY, _i32()))
                asm(f"st.shared.b32 [$0+{128 * k}], $1;", "r,r", bias, mask)
            if not scope.fmt.is_quantized:
                asm("cp.async.wait_all;")
            for k, key in enumerate(keys if scope.fmt.is_quantized else ()):
                group = lane.group(kv, _scalar(stage), k, scope.fmt.d_qk)
                _wait(_barrier(lane, rows, _scalar(stage), k), _scalar(parity))
                chunks = _read_raw(lane, group, key, scope)
                _dequantize_group(lane, group, chunks, [w[k] for w in scale_words], scope)
            asm("fence.proxy.async.shared::cta;")

        finish(slots, tuple(scales), kv, rows, stage, parity)

    def store_rows(self, x, *, out, index, tile, column: int, num_rows: int) -> None:
        """x [64, n] -> out[index, 64 * tile + row, column:column + n] for rows that exist. float32 or bf16."""
        narrow = out.dtype == jnp.bfloat16
        width = out.shape[-1]

        @plgpu.inline_mgpu(arg_types=(mgpu.WGMMA, REF, SPLAT, SPLAT))
        def store(_, x, out, index, tile):
            lane = _Lane()
            quad, within = arith.divui(lane.lane, _int(4, _i32())), arith.remui(lane.lane, _int(4, _i32()))
            row = _add(_mul(_scalar(tile), 64), _add(_mul(lane.warp, 16), quad))
            size = out.type.element_type.width // 8
            place = _add(_mul(_wide(_scalar(index)), num_rows), _wide(row))
            address = _add(_gmem(out), _mul(place, width * size))
            address = _add(address, _wide(_add(_mul(within, 2 * size), column * size)))
            flat = x.registers.reshape(-1)  # register 2 * j + half: columns 8 * j + 2 * (lane % 4), row + 8 * half
            for half in range(2):
                exists = _less(_add(row, 8 * half), num_rows)
                for j in range(flat.size // 2):
                    offset = 8 * j * size + 8 * half * width * size
                    if narrow:
                        word = mosaic.utils.bitcast(flat[2 * j + half], _i32())
                        asm(f"@$0 st.global.b32 [$1+{offset}], $2;", "b,l,r", exists, address, word)
                    else:
                        pair = [
                            vector.extract(flat[2 * j + half], dynamic_position=[], static_position=[e])
                            for e in range(2)
                        ]
                        text = f"@$0 st.global.v2.f32 [$1+{offset}], {{$2, $3}};"
                        asm(text, "b,l,f,f", exists, address, *pair)

        store(x.astype(out.dtype), out, index, tile)

    def store_row_values(self, x, *, out, index, tile, num_rows: int) -> None:
        """x [64] -> out[index, 64 * tile + row] for rows that exist. float32."""

        @plgpu.inline_mgpu(arg_types=(mgpu.WGMMA_ROW, REF, SPLAT, SPLAT))
        def store(_, x, out, index, tile):
            lane = _Lane()
            row = _add(_mul(_scalar(tile), 64), _add(_mul(lane.warp, 16), arith.divui(lane.lane, _int(4, _i32()))))
            place = _add(_mul(_wide(_scalar(index)), num_rows), _wide(row))
            address = _add(_gmem(out), _mul(place, 4))
            first = _equal(arith.remui(lane.lane, _int(4, _i32())), 0)
            for half, register in enumerate(x.registers.reshape(-1)):
                value = register
                if isinstance(register.type, ir.VectorType):
                    value = vector.extract(register, dynamic_position=[], static_position=[0])
                exists = arith.andi(first, _less(_add(row, 8 * half), num_rows))
                asm(f"@$0 st.global.f32 [$1+{32 * half}], $2;", "b,l,f", exists, address, value)

        store(x, out, index, tile)


def _barrier(lane: _Lane, rows: ir.Value, stage: ir.Value, k: int) -> ir.Value:
    """Address of the mbarrier of the warp's k-th group of a stage."""
    number = _add(_mul(_add(_mul(stage, 4), lane.warp), GROUPS_PER_WARP), k)
    return _add(_smem(rows), _add(_mul(number, 8), 4 * BLOCK_TOKENS * BARRIER_ROW))


def _staged(lane: _Lane, group: ir.Value, scope: Scope) -> ir.Value:
    """Where the lane's first chunk of its raw row is staged."""
    return _add(group, _add(_mul(lane.row, scope.staged_row_bytes), _mul(lane.chunk, CHUNK_BYTES)))


def _copy_plain(lane, group, row, key, barrier, fallback, scope) -> None:
    """bf16 rows, straight to their swizzled places."""
    size = arith.select(key, _int(CHUNK_BYTES, _i32()), _int(0, _i32()))
    source = _add(arith.select(key, row, fallback), _wide(_mul(lane.chunk, CHUNK_BYTES)))
    targets = [lane.swizzled(group, _add(lane.chunk, LANE_CHUNKS * half)) for half in range(2)]
    for n in range(scope.row_chunks // LANE_CHUNKS):
        at = COLUMN_TILE_BYTES * (n // 2)
        text = f"cp.async.cg.shared.global.L2::128B [$0+{at}], [$1+{STAGED_BYTES * n}], 16, $2;"
        asm(text, "r,l,r", targets[n % 2], source, size)


def _copy_raw(lane, group, row, key, barrier, fallback, scope) -> None:
    """Raw rows, one bulk copy each, issued by the 8 lanes of chunk 0."""
    go = arith.andi(key, _equal(lane.chunk, 0))
    text = f"{{ vote.sync.ballot.b32 $0, $1, 0xffffffff; popc.b32 $0, $0; mul.lo.u32 $0, $0, {scope.row_bytes}; }}"
    num_bytes = asm(text, "=r,b", go, result="i32")
    text = "@$0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;"
    asm(text, "b,r,r", _equal(lane.lane, 0), barrier, num_bytes)
    text = (
        "@$0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$1], [$2], {scope.row_bytes}, [$3];"
    )
    asm(text, "b,r,l,r", go, _staged(lane, group, scope), row, barrier)


def _wait(barrier: ir.Value, parity: ir.Value) -> None:
    asm(
        "{ .reg .pred p; AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
        "@p bra DONE_${:uid}; bra AGAIN_${:uid}; DONE_${:uid}: }",
        "r,r",
        barrier,
        parity,
    )


def _raw_offsets(scope: Scope) -> list[tuple[int, bool]]:
    """The 16-byte chunks of a raw row that a lane holds: byte offset, and whether it counts from the lane's own chunk.
    First the latent columns, a column tile each; then RoPE, in two; then the scales, if they are in the row."""
    latent = [(STAGED_BYTES * n, True) for n in range(scope.fmt.d_nope // COLUMN_TILE)]
    rotary = [(scope.rope_offset_bytes + STAGED_BYTES * half, True) for half in range(2)]
    scales = [(scope.scale_offset_bytes, False)] if scope.scale_record == 0 else []
    return latent + rotary + scales


def _read_raw(lane, group, key, scope) -> list[list[ir.Value]]:
    """The lane's chunks of a group that `_copy_raw` has brought, zeros for keys that do not count."""
    raw_row = _add(group, _mul(lane.row, scope.staged_row_bytes))
    places = [(_staged(lane, group, scope) if per_lane else raw_row, at) for at, per_lane in _raw_offsets(scope)]
    missing = arith.xori(key, _int(1, ir.IntegerType.get_signless(1)))
    for address, at in places:
        asm(f"@$0 st.shared.v4.b32 [$1+{at}], {{$2, $2, $2, $2}};", "b,r,r", missing, address, _int(0, _i32()))
    chunks = [_load16(address, at) for address, at in places]
    _sync_warp()  # every lane holds its raw bytes: they may be overwritten
    return chunks


def _dequantize_group(lane, group, chunks, scale_words, scope) -> None:
    """The lane's chunks of 8 raw rows -> 8 rows of bf16."""
    fmt = scope.fmt
    column_tiles = fmt.d_nope // COLUMN_TILE
    latent, rotary = chunks[:column_tiles], chunks[column_tiles : column_tiles + 2]
    if scale_words:
        scales = [_e8m0(scale_words[n // 4], n % 4) for n in range(fmt.num_scales)]
    else:
        scales = [arith.bitcast(ir.F32Type.get(), word) for word in chunks[-1]]
    even = lane.swizzled(group, _mul(lane.chunk, 2))
    odd = arith.xori(even, _int(CHUNK_BYTES, _i32()))
    for n, words in enumerate(latent):
        scale = scales[n * COLUMN_TILE // fmt.scale_tile]
        pairs = [_dequantize(word, scale) for word in words]
        _store16(even, COLUMN_TILE_BYTES * n, pairs[0] + pairs[1])
        _store16(odd, COLUMN_TILE_BYTES * n, pairs[2] + pairs[3])
    for half, words in enumerate(rotary):
        place = lane.swizzled(group, _add(lane.chunk, LANE_CHUNKS * half))
        _store16(place, COLUMN_TILE_BYTES * column_tiles, words)


class SparseInterpreted(mgpu.Interpreted):
    """The same in plain jax.numpy."""

    def copy_scratch(self):
        return {"copied": plgpu.Barrier(num_barriers=STAGES)}

    def init_copies(self, rows) -> None:
        pass

    def load_slots(self, indices, item, block, length, scope):
        place = block * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)  # [64]
        slots = jnp.take(indices[item], jnp.minimum(place, scope.topk - 1))  # [64]
        return jnp.where(place < length, slots, -1)

    def load_scales(self, data, slots, scope):
        return ()

    def start_copy(self, data, slots, kv, rows, stage, scope, copied) -> None:
        self.copy_plain(data, slots, kv, rows, stage, scope)
        plgpu.barrier_arrive(copied.at[stage])

    def copy_plain(self, data, slots, kv, rows, stage, scope) -> None:
        # The stage holds neither the old keys nor the new ones from here on.
        kv[stage] = jnp.full((BLOCK_TOKENS, scope.fmt.d_qk), jnp.nan, jnp.bfloat16)

    def finish_block(self, data, slots, scales, kv, rows, stage, parity, scope, copied) -> None:
        if scope.fmt.is_quantized:
            plgpu.barrier_wait(copied.at[stage])
        kv[stage] = _interpreted_rows(data[...], slots, scope)
        key = (slots >= 0) & (slots < scope.num_slots)
        rows[BIAS_ROW + stage] = jnp.where(key, 0.0, MASKED).astype(jnp.float32)
        self.publish_smem()

    def store_rows(self, x, *, out, index, tile, column, num_rows) -> None:
        def store(first, count):
            out[index, pl.ds(first, count), pl.ds(column, x.shape[1])] = x[:count].astype(out.dtype)

        _store_tile(store, tile, num_rows)

    def store_row_values(self, x, *, out, index, tile, num_rows) -> None:
        def store(first, count):
            out[index, pl.ds(first, count)] = x[:count]

        _store_tile(store, tile, num_rows)


def _store_tile(store, tile, num_rows: int) -> None:
    """store(first row, how many) for the rows of a tile that exist."""
    whole, rest = divmod(num_rows, 64)
    pl.when(tile < whole)(lambda: store(tile * 64, 64))
    if rest:
        pl.when(tile == whole)(lambda: store(whole * 64, rest))


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
