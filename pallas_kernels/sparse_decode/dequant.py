"""Rows of the cache -> bf16 keys in shared memory, by index: copy, wait, dequantise in place.

A block of 64 keys becomes one stage `kv[stage]`, bf16 [64, d_qk] in swizzled tiles of 8 rows by 64 columns, so that 8
rows are one contiguous run of memory, a *group*. Each of the 4 warps owns two groups of a block and works on them
without any other warp. Raw rows (656 or 576 bytes) have no buffer of their own:

* The first `ahead` groups travel through registers. They are loaded while the previous block's products run, before
  their stage is free.
* The others are copied to the beginning of their own memory (8 * d_qk * 2 bytes, nearly twice as much) once the stage
  is free, one `cp.async.bulk` a row. The warp reads all raw bytes of a group into registers, then overwrites them with
  the dequantised values.

The lanes of a warp lie along a row, 16 bytes each: the 512 latent bytes of V32 are one access of 4 or 5 cache lines.
(With eight rows an access, each of its four phases touches eight lines: loads took 1.5 times as long on an H200.)

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
MASKED = -float("inf")
MINUS_INFINITY = 0xFF800000 - 2**32  # the same as the bits of a float32, seen as int32

# Rows of the small float32 buffer `rows` [ROWS, 64].
BIAS_ROW = 0  # STAGES rows: 0 for a key, -inf for none
RESCALE_ROW = STAGES  # what the accumulators are multiplied by before a block
FACTOR_ROW = STAGES + 1  # what they are multiplied by at the end
BARRIER_ROW = STAGES + 2  # the bulk copies' 8 mbarriers
ROWS = STAGES + 3

# One value a row of a block: row = 32 * register + 8 * warp + lane % 8.
BLOCK_ROW = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 64), (8, 16), (8,))), warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1
).reduce(1)
# The raw bytes of a group as int32 [4 * 8 rows, 16 * n]: n registers of 16 bytes a lane.
RAW_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 16), (8, 4))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
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


def _div(x: ir.Value, y: int) -> ir.Value:
    return arith.divui(x, _int(y, x.type))


def _rem(x: ir.Value, y: int) -> ir.Value:
    return arith.remui(x, _int(y, x.type))


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
        self.lane = _rem(thread, mgpu.WARP)
        self.warp = _rem(_div(thread, mgpu.WARP), 4)
        self.row = _rem(self.lane, GROUP_ROWS)  # of a group: the row whose slot the lane knows

    def group(self, kv: ir.Value, stage: ir.Value, k: int, d_qk: int) -> ir.Value:
        """Shared-memory address of the warp's k-th group."""
        group_bytes = GROUP_ROWS * d_qk * 2
        first = _add(_smem(kv), _mul(stage, BLOCK_TOKENS * d_qk * 2))
        return _add(first, _mul(_add(self.warp, 4 * k), group_bytes))


def _place(group: ir.Value, tile: ir.Value | int, row: ir.Value | int, chunk: ir.Value) -> ir.Value:
    """Address of a row's swizzled 16-byte chunk (0 to 7) in a column tile of a group."""
    if isinstance(row, int):
        row = _int(row, _i32())
    inside = _add(_mul(row, 2 * COLUMN_TILE), _mul(arith.xori(chunk, row), CHUNK_BYTES))
    start = _mul(tile, COLUMN_TILE_BYTES) if isinstance(tile, ir.Value) else COLUMN_TILE_BYTES * tile
    return _add(_add(group, inside), start)


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


def _shuffle(value: ir.Value, source: ir.Value | int) -> ir.Value:
    """A 32-bit value of another lane."""
    source = _int(source, _i32()) if isinstance(source, int) else source
    return asm("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", value, source, result="i32")


class _Rows:
    """Addresses of a group's rows, for every lane. Address 0 stands for a key that does not count."""

    def __init__(self, row: ir.Value, key: ir.Value):
        row = arith.select(key, row, _int(0, _i64()))
        self._low = arith.trunci(_i32(), row)
        self._high = arith.trunci(_i32(), arith.shrui(row, _int(32, _i64())))

    def __getitem__(self, row: ir.Value | int) -> tuple[ir.Value, ir.Value]:
        """(address, whether it is one) of a row, which may differ between lanes."""
        low, high = _wide(_shuffle(self._low, row)), _wide(_shuffle(self._high, row))
        address = arith.ori(arith.shli(high, _int(32, _i64())), low)
        return address, arith.cmpi(arith.CmpIPredicate.ne, address, _int(0, _i64()))


def _row_chunks(lane: _Lane, scope: Scope) -> list[tuple[ir.Value | int, ir.Value]]:
    """(row, chunk of the raw row) of each 16 bytes that a lane handles of a group, so that its lanes cover the group:
    first chunk `lane` of each of the 8 rows, then what is left of the rows."""
    first = [(row, lane.lane) for row in range(GROUP_ROWS)]
    rest = scope.data_chunks - mgpu.WARP  # 8 (V32: RoPE) or 4 (MODEL1: half of RoPE)
    rows = mgpu.WARP // rest
    skip = mgpu.WARP + scope.skipped_chunks
    left = [
        (_add(_div(lane.lane, rest), rows * n), _add(_rem(lane.lane, rest), skip)) for n in range(GROUP_ROWS // rows)
    ]
    return first + left


WORDS = "!llvm.struct<(i32, i32, i32, i32)>"


def _load16(address: ir.Value) -> list[ir.Value]:
    """16 bytes of shared memory as four registers."""
    text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    return _fields(asm(text, "=r,=r,=r,=r,r", address, result=WORDS), [_i32()] * 4)


def _load16_global(key: ir.Value, address: ir.Value) -> list[ir.Value]:
    """16 bytes of global memory as four registers; zeros, and no access, unless `key`."""
    text = (
        "{ mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@$4 ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$5]; }"
    )
    return _fields(asm(text, "=&r,=&r,=&r,=&r,b,l", key, address, result=WORDS), [_i32()] * 4)


def _raw_array(chunks: list[list[ir.Value]]):
    layout = RAW_ROWS.to_mgpu()
    registers = np.empty(layout.registers_shape((4 * GROUP_ROWS, 16 * len(chunks))), object)
    flat = registers.reshape(-1)
    for k, words in enumerate(chunks):
        flat[k] = vector.from_elements(ir.VectorType.get((4,), _i32()), words)
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _raw_chunks(array) -> list[list[ir.Value]]:
    return [
        [vector.extract(v, dynamic_position=[], static_position=[e]) for e in range(4)]
        for v in array.registers.reshape(-1)
    ]


def _store16(address: ir.Value, words: list[ir.Value], condition: ir.Value | None = None) -> None:
    if condition is None:
        asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", address, *words)
    else:
        asm("@$5 st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,b", address, *words, condition)


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


def _e8m0(byte: ir.Value) -> ir.Value:
    """A byte as the float32 2^(byte - 127): 0 for byte 0 (2^-127 is subnormal), NaN for 255."""
    text = """{
      .reg .b32 x; .reg .pred p;
      setp.eq.u32 p, $1, 255;
      shl.b32 x, $1, 23;
      @p mov.b32 x, 0x7fc00000;
      mov.b32 $0, x; }"""
    return llvm.inline_asm(ir.F32Type.get(), [byte], text, "=f,r")


def _load_scale_word(lane: _Lane, rows: _Rows, scales: ir.Value, key: ir.Value, scope: Scope) -> ir.Value:
    """The word that the calling lane keeps of a group's scales, for `_scale_of_row`."""
    if scope.scale_record == 0:  # float32 scale l % 4 of row l // 4
        address, exists = rows[_div(lane.lane, 4)]
        address = _add(address, _wide(_mul(_rem(lane.lane, 4), 4)))
        text = f"{{ mov.b32 $0, 0; @$1 ld.global.nc.b32 $0, [$2+{scope.scale_offset_bytes}]; }}"
        return asm(text, "=&r,b,l", exists, address, result="i32")
    # Bytes 0 to 3 of row l % 8 in the first half of the warp, bytes 4 to 7 in the second.
    address = _add(scales, _wide(_mul(_div(lane.lane, 16), 4)))
    return asm("{ mov.b32 $0, 0; @$1 ld.global.nc.b32 $0, [$2]; }", "=&r,b,l", key, address, result="i32")


def _scale_of_row(lane: _Lane, word: ir.Value, row: int, scope: Scope) -> ir.Value:
    """The float32 scale of the calling lane's latent columns 16 * lane to 16 * lane + 15 of a row."""
    lanes = scope.fmt.scale_tile // CHUNK_BYTES  # that share a scale
    index = _div(lane.lane, lanes)
    if scope.scale_record == 0:
        return arith.bitcast(ir.F32Type.get(), _shuffle(word, _add(index, 4 * row)))
    word = _shuffle(word, _add(_mul(_div(lane.lane, 16), 16), row))
    byte = arith.andi(arith.shrui(word, _mul(_rem(index, 4), 8)), _int(255, _i32()))
    return _e8m0(byte)


def _sync_warp() -> None:
    asm("bar.warp.sync 0xffffffff;")


# -- the two tables ----------------------------------------------------------------------------------------------


class SparseHardware(mgpu.Hardware):
    """Gather, dequantisation and masked stores, as they are on a GPU."""

    def init_gather(self, rows) -> None:
        """Prepares the mbarriers of bulk copies; called by the gathering warpgroup, which alone uses them."""

        @plgpu.inline_mgpu(arg_types=(REF,))
        def init(_, rows):
            lane = _Lane()
            barriers = _add(_smem(rows), _barrier_offset(lane))
            for k in range(GROUPS_PER_WARP):
                asm(f"@$0 mbarrier.init.shared::cta.b64 [$1+{8 * k}], 1;", "b,r", _equal(lane.lane, 0), barriers)
            asm("fence.mbarrier_init.release.cluster;")
            asm("fence.proxy.async.shared::cta;")
            _sync_warp()

        init(rows)

    def load_slots(self, indices, item, block, length, scope: Scope) -> jax.Array:
        """int32 [64] in BLOCK_ROW layout: the block's slots, -1 from `length` on."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SPLAT, SPLAT, SPLAT),
            return_type=plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.int32, BLOCK_ROW),
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

    def load_ahead(self, data, slots, scope: Scope, ahead: int) -> tuple[jax.Array, ...]:
        """Loads what may come before a block's stage is free: the first groups' raw rows, and all scales."""
        if not scope.fmt.is_quantized:
            return ()
        raw = plgpu.ShapeDtypeStruct((4 * GROUP_ROWS, 16 * scope.chunks_per_lane), jnp.int32, RAW_ROWS)
        words = plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.int32, BLOCK_ROW)

        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW), return_type=(*(raw,) * ahead, words))
        def load(_, data, slots):
            lane = _Lane()
            groups, words = [], []
            for k, slot in enumerate(_row_values(slots)):
                key = _is_key(slot, scope)
                row, scales = _row_address(data, slot, scope)
                rows = _Rows(row, key)
                words.append(_load_scale_word(lane, rows, scales, key, scope))
                if k < ahead:
                    chunks = []
                    for which, chunk in _row_chunks(lane, scope):
                        address, exists = rows[which]
                        chunks.append(_load16_global(exists, _add(address, _wide(_mul(chunk, CHUNK_BYTES)))))
                    groups.append(_raw_array(chunks))
            return (*groups, _row_array(words))

        return tuple(load(data, slots))

    def prefetch(self, data, slots, scope: Scope, ahead: int) -> None:
        """Asks L2 for the rows that `start_block` will copy."""
        if not scope.fmt.is_quantized:
            return

        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW))
        def run(_, data, slots):
            lane = _Lane()
            for slot in _row_values(slots)[ahead:]:
                row, _ = _row_address(data, slot, scope)
                go = arith.andi(_is_key(slot, scope), _less(lane.lane, GROUP_ROWS))
                asm(f"@$0 cp.async.bulk.prefetch.L2.global [$1], {scope.row_bytes};", "b,l", go, row)

        run(data, slots)

    def start_block(self, data, slots, kv, rows, stage, scope: Scope, ahead: int) -> None:
        """Begins to copy a block's rows to a free stage: all that `load_ahead` does not load."""
        d_qk = scope.fmt.d_qk

        @plgpu.inline_mgpu(arg_types=(REF, BLOCK_ROW, TILES, REF, SPLAT))
        def start(_, data, slots, kv, rows, stage):
            lane = _Lane()
            for k, slot in enumerate(_row_values(slots)):
                if k < ahead and scope.fmt.is_quantized:
                    continue
                key = _is_key(slot, scope)
                row, _ = _row_address(data, slot, scope)
                group = lane.group(kv, _scalar(stage), k, d_qk)
                if scope.fmt.is_quantized:
                    barrier = _add(_smem(rows), _add(_barrier_offset(lane), 8 * k))
                    _copy_raw(lane, group, row, key, barrier, scope)
                else:
                    _copy_plain(lane, group, _Rows(row, key), _gmem(data), scope)

        start(data, slots, kv, rows, stage)

    def finish_block(self, slots, loaded, kv, rows, stage, parity, scope: Scope, ahead: int) -> None:
        """Waits for the rows, dequantises them, writes the mask, makes it all visible to wgmma."""
        d_qk = scope.fmt.d_qk
        layouts = ((RAW_ROWS,) * ahead + (BLOCK_ROW,)) if scope.fmt.is_quantized else ()

        @plgpu.inline_mgpu(arg_types=(BLOCK_ROW, layouts, TILES, REF, SPLAT, SPLAT))
        def finish(_, slots, loaded, kv, rows, stage, parity):
            lane = _Lane()
            keys = [_is_key(slot, scope) for slot in _row_values(slots)]
            bias = _add(_smem(rows), _add(_mul(_scalar(stage), 4 * BLOCK_TOKENS), 4 * BLOCK_TOKENS * BIAS_ROW))
            bias = _add(bias, _mul(_add(_mul(lane.warp, GROUP_ROWS), lane.row), 4))
            for k, key in enumerate(keys):
                mask = arith.select(key, _int(0, _i32()), _int(MINUS_INFINITY, _i32()))
                asm(f"st.shared.b32 [$0+{128 * k}], $1;", "r,r", bias, mask)
            if scope.fmt.is_quantized:
                words = _row_values(loaded[-1])
                for k, key in enumerate(keys):
                    group = lane.group(kv, _scalar(stage), k, d_qk)
                    if k < ahead:
                        chunks = _raw_chunks(loaded[k])
                    else:
                        _wait(_add(_smem(rows), _add(_barrier_offset(lane), 8 * k)), _scalar(parity))
                        chunks = _read_raw(lane, group, key, scope)
                    _dequantize_group(lane, group, chunks, words[k], scope)
            else:
                asm("cp.async.wait_all;")
            asm("fence.proxy.async.shared::cta;")

        finish(slots, tuple(loaded), kv, rows, stage, parity)

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


def _barrier_offset(lane: _Lane) -> ir.Value:
    return _add(_mul(lane.warp, 8 * GROUPS_PER_WARP), 4 * BLOCK_TOKENS * BARRIER_ROW)


def _copy_plain(lane, group, rows, fallback, scope) -> None:
    """bf16 rows, straight to their swizzled places. Keys that do not count arrive as zeros, read from nowhere."""
    per_row, rest = divmod(scope.row_chunks, mgpu.WARP)
    work: list[tuple[ir.Value | int, ir.Value]] = [
        (row, _add(lane.lane, mgpu.WARP * n)) for row in range(GROUP_ROWS) for n in range(per_row)
    ]
    if rest:
        each = mgpu.WARP // rest  # rows a pass
        work += [
            (_add(_div(lane.lane, rest), each * n), _add(_rem(lane.lane, rest), mgpu.WARP * per_row))
            for n in range(GROUP_ROWS // each)
        ]
    for row, chunk in work:
        address, exists = rows[row]
        source = _add(arith.select(exists, address, fallback), _wide(_mul(chunk, CHUNK_BYTES)))
        size = arith.select(exists, _int(CHUNK_BYTES, _i32()), _int(0, _i32()))
        target = _place(group, _div(chunk, 8), row, _rem(chunk, 8))
        asm("cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;", "r,l,r", target, source, size)


def _copy_raw(lane, group, row, key, barrier, scope) -> None:
    """Raw rows, one bulk copy each, issued by the first 8 lanes."""
    go = arith.andi(key, _less(lane.lane, GROUP_ROWS))
    text = f"{{ vote.sync.ballot.b32 $0, $1, 0xffffffff; popc.b32 $0, $0; mul.lo.u32 $0, $0, {scope.row_bytes}; }}"
    num_bytes = asm(text, "=r,b", go, result="i32")
    text = "@$0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;"
    asm(text, "b,r,r", _equal(lane.lane, 0), barrier, num_bytes)
    text = (
        "@$0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$1], [$2], {scope.row_bytes}, [$3];"
    )
    asm(text, "b,r,l,r", go, _add(group, _mul(lane.row, scope.row_bytes)), row, barrier)


def _wait(barrier: ir.Value, parity: ir.Value) -> None:
    asm(
        "{ .reg .pred p; AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
        "@p bra DONE_${:uid}; bra AGAIN_${:uid}; DONE_${:uid}: }",
        "r,r",
        barrier,
        parity,
    )


def _read_raw(lane, group, key, scope) -> list[list[ir.Value]]:
    """The lane's chunks of a group that `_copy_raw` has brought, zeros for keys that do not count."""
    missing = arith.xori(key, _int(1, ir.IntegerType.get_signless(1)))
    column = _div(lane.lane, GROUP_ROWS)
    own_row = _add(group, _add(_mul(lane.row, scope.row_bytes), _mul(column, CHUNK_BYTES)))
    for first in range(0, scope.row_chunks, 4):
        inside = arith.andi(missing, _less(_add(column, first), scope.row_chunks))
        text = f"@$0 st.shared.v4.b32 [$1+{CHUNK_BYTES * first}], {{$2, $2, $2, $2}};"
        asm(text, "b,r,r", inside, own_row, _int(0, _i32()))
    _sync_warp()
    chunks = []
    for row, chunk in _row_chunks(lane, scope):
        start = _mul(row, scope.row_bytes) if isinstance(row, ir.Value) else row * scope.row_bytes
        chunks.append(_load16(_add(_add(group, _mul(chunk, CHUNK_BYTES)), start)))
    _sync_warp()  # every lane holds its raw bytes: they may be overwritten
    return chunks


def _dequantize_group(lane, group, chunks, scale_word, scope) -> None:
    """The lane's chunks of 8 raw rows -> 8 rows of bf16."""
    latent_tiles = scope.fmt.d_nope // COLUMN_TILE
    tile, quarter = _div(lane.lane, 4), _rem(lane.lane, 4)
    # 16 latent values are two chunks of a tile. Lanes of odd tiles write the second first: eight lanes, eight places.
    odd = _equal(_rem(tile, 2), 1)
    chunk = _add(_mul(quarter, 2), _rem(tile, 2))
    is_latent = _less(tile, latent_tiles)
    mixed = latent_tiles * 4 < mgpu.WARP  # MODEL1: the last lanes of a row hold RoPE, as it is
    if mixed:
        chunk = arith.select(is_latent, chunk, quarter)
    for row in range(GROUP_ROWS):
        words = chunks[row]
        scale = _scale_of_row(lane, scale_word, row, scope)
        pairs = [_dequantize(word, scale) for word in words]
        halves = pairs[0] + pairs[1], pairs[2] + pairs[3]
        first = [arith.select(odd, y, x) for x, y in zip(*halves, strict=True)]
        second = [arith.select(odd, x, y) for x, y in zip(*halves, strict=True)]
        if mixed:
            first = [arith.select(is_latent, x, word) for x, word in zip(first, words, strict=True)]
        place = _place(group, tile, row, chunk)
        _store16(place, first)
        _store16(arith.xori(place, _int(CHUNK_BYTES, _i32())), second, is_latent if mixed else None)
    for (row, raw_chunk), words in zip(_row_chunks(lane, scope)[GROUP_ROWS:], chunks[GROUP_ROWS:], strict=True):
        first_chunk = scope.rope_offset_bytes // CHUNK_BYTES
        _store16(_place(group, latent_tiles, row, _add(raw_chunk, -first_chunk)), words)


class SparseInterpreted(mgpu.Interpreted):
    """The same in plain jax.numpy."""

    def init_gather(self, rows) -> None:
        pass

    def load_slots(self, indices, item, block, length, scope):
        place = block * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)  # [64]
        slots = jnp.take(indices[item], jnp.minimum(place, scope.topk - 1))  # [64]
        return jnp.where(place < length, slots, -1)

    def load_ahead(self, data, slots, scope, ahead):
        return (_interpreted_rows(data[...], slots, scope),)

    def prefetch(self, data, slots, scope, ahead) -> None:
        pass

    def start_block(self, data, slots, kv, rows, stage, scope, ahead) -> None:
        # The stage holds neither the old keys nor the new ones from here on.
        kv[stage] = jnp.full((BLOCK_TOKENS, scope.fmt.d_qk), jnp.nan, jnp.bfloat16)

    def finish_block(self, slots, loaded, kv, rows, stage, parity, scope, ahead) -> None:
        kv[stage] = loaded[0]
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
