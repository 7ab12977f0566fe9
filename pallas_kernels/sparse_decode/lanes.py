"""Address arithmetic of one lane, inside `plgpu.inline_mgpu` functions: what gathering and dequantising are written in.

A block of 64 keys is eight *groups* of 8 rows. Warp w works on groups w and w + 4; lane l of it on row l % 8 and on
16-byte chunks l // 8, l // 8 + 4, ... of that row.
"""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import formats, mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import asm
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    CHUNK_BYTES,
    COLUMN_TILE,
    COLUMN_TILE_BYTES,
    GROUP_ROWS,
    Scope,
)

GROUPS_PER_WARP = 2  # 4 warps, 64 rows
LANE_CHUNKS = 4  # lanes that share a row
STAGED_BYTES = LANE_CHUNKS * CHUNK_BYTES  # what the lanes of a row cover with one instruction
MINUS_INFINITY = 0xFF800000 - 2**32  # the bits of a float32, seen as int32

# One value a row of a block: row = 32 * register + 8 * warp + lane % 8.
BLOCK_ROW = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 64), (8, 16), (8,))), warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1
).reduce(1)
SPLAT = plgpu.Layout.WG_SPLAT
REF = plgpu.RefType()


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def const(value: int, like: ir.Type) -> ir.Value:
    return mosaic.utils.c(value, like)


def add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, const(y, x.type) if isinstance(y, int) else y)


def mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, const(y, x.type))


def wide(x: ir.Value) -> ir.Value:
    return arith.extui(i64(), x)


def less(x: ir.Value, y: ir.Value | int) -> ir.Value:
    """Unsigned: a negative x is not less than any length or number of slots."""
    return arith.cmpi(arith.CmpIPredicate.ult, x, const(y, x.type) if isinstance(y, int) else y)


def equal(x: ir.Value, y: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, x, const(y, x.type))


def smem(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), mosaic.utils.memref_ptr(ref))


def gmem(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i64(), mosaic.utils.memref_ptr(ref))


def scalar(array) -> ir.Value:
    return array.registers[()]


def fields(struct: ir.Value, types: list[ir.Type]) -> list[ir.Value]:
    return [llvm.extractvalue(t, struct, [k]) for k, t in enumerate(types)]


def row_values(array) -> list[ir.Value]:
    """The calling lane's two values of an array in BLOCK_ROW layout."""
    return [vector.extract(v, dynamic_position=[], static_position=[0]) for v in array.registers.reshape(-1)]


def row_array(values: list[ir.Value]):
    layout = BLOCK_ROW.to_mgpu()
    registers = np.empty(layout.registers_shape((BLOCK_TOKENS,)), object)
    flat = registers.reshape(-1)
    for k, value in enumerate(values):
        flat[k] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


class Lane:
    """Where the calling lane stands."""

    def __init__(self) -> None:
        thread = mosaic.utils.thread_idx()
        self.lane = arith.remui(thread, const(mgpu.WARP, i32()))
        self.warp = arith.remui(arith.divui(thread, const(mgpu.WARP, i32())), const(4, i32()))
        self.row = arith.remui(self.lane, const(GROUP_ROWS, i32()))  # of a group
        self.chunk = arith.divui(self.lane, const(GROUP_ROWS, i32()))  # of LANE_CHUNKS

    def group(self, kv: ir.Value, stage: ir.Value, k: int, columns: int) -> ir.Value:
        """Shared-memory address of the warp's k-th group in `kv[stage]`, bf16 [64, columns]."""
        return self.group_at(add(smem(kv), mul(stage, BLOCK_TOKENS * columns * 2)), k, columns)

    def group_at(self, keys: ir.Value, k: int, columns: int) -> ir.Value:
        """The same in keys that begin at an address."""
        return add(keys, mul(add(self.warp, 4 * k), GROUP_ROWS * columns * 2))

    def swizzled(self, group: ir.Value, chunk: ir.Value) -> ir.Value:
        """Address of the lane's row's 16-byte chunk (0 to 7) in the first column tile of a group."""
        place = arith.xori(chunk, self.row)
        return add(group, add(mul(self.row, 2 * COLUMN_TILE), mul(place, CHUNK_BYTES)))


def row_address(data: ir.Value, slot: ir.Value, scope: Scope) -> tuple[ir.Value, ir.Value]:
    """64-bit addresses of a slot's first record and, for formats that keep scales apart, of its scale record."""
    base = gmem(data)
    if scope.is_row_major:
        row = add(base, mul(wide(slot), scope.row_bytes))
        return row, row
    page = arith.divui(slot, const(scope.page_size, i32()))
    offset = arith.subi(slot, mul(page, scope.page_size))
    page_base = add(base, mul(wide(page), scope.page_bytes))
    row = add(page_base, wide(mul(offset, scope.row_bytes)))
    if not scope.fmt.is_quantized:
        return row, row
    scales = add(page_base, scope.scale_area_bytes + scope.scale_offset_bytes)
    return row, add(scales, wide(mul(offset, scope.scale_record_bytes)))


def row_number(slot: ir.Value, scope: Scope) -> ir.Value:
    """Where a slot's first record lies in a quantised cache, in records: pages are a whole number of them."""
    if scope.is_row_major:
        return slot
    page = arith.divui(slot, const(scope.page_size, i32()))
    return add(slot, mul(page, scope.page_bytes // scope.row_bytes - scope.page_size))


def is_key(slot: ir.Value, scope: Scope) -> ir.Value:
    return less(slot, min(scope.num_slots, 2**31 - 1))


WORDS = "!llvm.struct<(i32, i32, i32, i32)>"


def load16(address: ir.Value, offset_bytes: int) -> list[ir.Value]:
    """16 bytes of shared memory as four registers."""
    text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset_bytes}];"
    return fields(asm(text, "=r,=r,=r,=r,r", address, result=WORDS), [i32()] * 4)


def load8(address: ir.Value, offset_bytes: int) -> list[ir.Value]:
    """8 bytes of shared memory as two registers."""
    text = f"ld.shared.v2.b32 {{$0, $1}}, [$2+{offset_bytes}];"
    return fields(asm(text, "=r,=r,r", address, result="!llvm.struct<(i32, i32)>"), [i32()] * 2)


def store16(address: ir.Value, offset_bytes: int, words: list[ir.Value]) -> None:
    asm(f"st.shared.v4.b32 [$0+{offset_bytes}], {{$1, $2, $3, $4}};", "r,r,r,r,r", address, *words)


def dequantize(word: ir.Value, scale: ir.Value) -> list[ir.Value]:
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
    return fields(pair, [i32()] * 2)


def e8m0(word: ir.Value, byte: int) -> ir.Value:
    """A byte of a register as the float32 2^(byte - 127): 0 for byte 0 (2^-127 is subnormal), NaN for 255."""
    text = f"""{{
      .reg .b32 x; .reg .pred p;
      bfe.u32 x, $1, {8 * byte}, 8;
      setp.eq.u32 p, x, 255;
      shl.b32 x, x, 23;
      @p mov.b32 x, 0x7fc00000;
      mov.b32 $0, x; }}"""
    return llvm.inline_asm(ir.F32Type.get(), [word], text, "=f,r")


def scale_values(words: list[ir.Value], fmt: KVFormat) -> list[ir.Value]:
    """A row's scales as float32, from the 32-bit words that hold them."""
    if fmt.locate("scale")[2].dtype == formats.E8M0:
        return [e8m0(words[n // 4], n % 4) for n in range(fmt.num_scales)]
    return [arith.bitcast(ir.F32Type.get(), word) for word in words]


def dequantize_latent(
    even: ir.Value, chunks: list[list[ir.Value]], scales: list[ir.Value], fmt: KVFormat, first_tile: int = 0
) -> None:
    """Stores the lane's raw chunks, one of each 64 latent columns, as bf16.

    Args:
      even: where the first half of the lane's first chunk goes, as bf16; the other half goes to the neighbour in memory
        that differs in bit 4 of the address, as swizzling leaves it. Each 64 columns are `COLUMN_TILE_BYTES` apart.
      chunks: four words each.
      scales: float32, one per `fmt.scale_tile` columns.
      first_tile: number of the first chunk's 64 columns.
    """
    odd = arith.xori(even, const(CHUNK_BYTES, i32()))
    for n, words in enumerate(chunks, start=first_tile):
        scale = scales[n * COLUMN_TILE // fmt.scale_tile]
        pairs = [dequantize(word, scale) for word in words]
        store16(even, COLUMN_TILE_BYTES * n, pairs[0] + pairs[1])
        store16(odd, COLUMN_TILE_BYTES * n, pairs[2] + pairs[3])


def sync_warp() -> None:
    asm("bar.warp.sync 0xffffffff;")
