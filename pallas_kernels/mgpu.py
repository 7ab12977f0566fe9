"""The few Mosaic GPU helpers that kernels share: what Pallas itself does not offer.

`HARDWARE` is what runs on a GPU. The CPU interpreter knows neither named barriers nor PTX, so tests run the same kernel
functions on `INTERPRETED`. The two classes are the whole table of differences between the kernel that ships and the
kernel that is proved:

| operation | on the GPU | interpreted |
|---|---|---|
| `barriers` | named barriers (`bar.arrive`, `bar.sync`), no memory | one `plgpu.Barrier` each |
| `publish_smem` | proxy fence, ordered by the named barrier that follows | `plgpu.commit_smem` (fence and barrier) |
| `producer_warp` | one warp of the warpgroup | the warpgroup as one thread |
| `gather_rows` | `cp.async`, 16 bytes each | one plain copy a row |
| `store_rows`, `store_row_values` | predicated stores from registers | plain stores of the rows that exist |
| `any_positive` | a vote of the warpgroup (`bar.red.or`) | a plain reduction |
| `any_below_one` | a vote of each warp (`vote.any`) | a plain reduction |
| `scale_rows` | one multiplication a value | a plain product |

Tensor memory, tcgen05 and their barriers, which SM90 does not have, need no substitution. The interpreter lacks wgmma
with an operand or an initial accumulator in registers; tests/kernels/interpreter.py teaches it those, and race-checks
what wgmma reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

WARPGROUP = 128  # threads
WARP = 32  # threads

# 65536 registers a SM over 128 threads is 512, but ptxas gives each of 384 threads 168 before the warpgroups
# redistribute them. Asking for more than 3 * 168 in all hangs at setmaxnreg without a word.
MAX_REGISTERS = 504
MAX_SMEM_BYTES = 232448  # what one CTA of an SM90 or SM100 GPU may ask for
SMEM_ALIGN_BYTES = 1024  # Mosaic pads every scratch buffer to this
CHUNK_BYTES = 16  # what `gather_rows` copies at a time

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)
"""Layouts of a wgmma accumulator and of one value per row of it."""


def tile(shape: tuple[int, ...], dtype=jnp.bfloat16, swizzle_bytes: int = 128) -> Any:
    """A shared-memory buffer in the layout that wgmma and TMA read and write (8 rows by `swizzle_bytes`)."""
    columns = swizzle_bytes // jnp.dtype(dtype).itemsize
    # mypy takes the transforms for abstract: their protocol has a method without a body.
    tiling = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(swizzle_bytes)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def smem_bytes(scratch: Any) -> int:
    """What Mosaic allocates for a pytree of scratch types: each buffer padded, 8 bytes a barrier."""
    total = 0
    for ref in jax.tree.leaves(scratch):
        if isinstance(ref, plgpu.Barrier):
            total += 8 * math.prod(ref.get_ref_aval().shape)
        else:
            num_bytes = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
            total += -(-num_bytes // SMEM_ALIGN_BYTES) * SMEM_ALIGN_BYTES
    return total


def asm(text: str, operands: str = "", *values: ir.Value, result: str = "!llvm.void") -> ir.Value:
    """Inline PTX that the compiler neither drops nor moves. Only inside `plgpu.inline_mgpu` functions."""
    return llvm.inline_asm(ir.Type.parse(result), list(values), text, operands, has_side_effects=True)


def opaque_zero(i: jax.Array) -> jax.Array:
    """0 that the compiler cannot prove to be 0 or loop-invariant; `i` is a loop counter below 2^29.

    Added to the index of a buffer that wgmma reads. ptxas otherwise hoists some 60 wgmma descriptors out of the loop,
    spills them, and reloads them before every product: 13 % of the time at R=128, 20 % at R=256 on an H100.
    """
    return lax.shift_right_logical(i, jnp.int32(29))


def rows_to_tile(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[rows] -> [rows, columns], the same value along a row."""
    return lax.broadcast_in_dim(x, shape, [0])


def check_rescale_above(powers: float) -> None:
    """Raises ValueError if a config's `rescale_above` is not one that `raised` can have."""
    # 2^16 times a row's sum of values leaves float32 and bf16 all the room they need.
    if not 0 <= powers <= 16:
        raise ValueError(f"rescale_above must lie in [0, 16], got {powers}")


def raised(maximum: jax.Array, candidate: jax.Array, rescale_above: float) -> jax.Array:
    """[rows]: what to scale scores by from now on: the maximum so far, unless a row grew by more than `rescale_above`.

    All are base-2 logarithms. Weights are then at most 2 ** rescale_above, which changes the last bits of float32 sums
    and nothing else; and accumulators need no scaling anew in most steps.
    """
    return jnp.where(candidate > maximum + rescale_above, candidate, maximum)


def rescale(accs: tuple[jax.Array, ...], factor: jax.Array, ops: Hardware) -> tuple[jax.Array, ...]:
    """Accumulators [64, n] in WGMMA layout, each row times its factor in [0, 1], float32 [64] in WGMMA_ROW layout.

    Warps all of whose factors are 1 skip it.
    """

    def scale():
        return tuple(acc * rows_to_tile(factor, acc.shape) for acc in accs)

    return lax.cond(ops.any_below_one(factor), scale, lambda: accs)


@dataclasses.dataclass(frozen=True)
class Handoff:
    """A barrier at which `arrive_threads` threads hand something to `wait_threads` others."""

    arrive_threads: int
    wait_threads: int


class Barriers:
    """Handoffs as named barriers. Mosaic uses the ids up to the number of warpgroups; ours begin at 4."""

    FIRST_ID = 4
    NUM_IDS = 15
    VOTE_ID = 15  # of `Hardware.any_positive`

    def __init__(self, handoffs: Mapping[str, Handoff]):
        if self.FIRST_ID + len(handoffs) > self.NUM_IDS:
            raise ValueError(f"{len(handoffs)} handoffs, but {self.NUM_IDS - self.FIRST_ID} named barriers")
        self._text = {
            name: f"{self.FIRST_ID + i}, {handoff.arrive_threads + handoff.wait_threads};"
            for i, (name, handoff) in enumerate(handoffs.items())
        }

    def arrive(self, name: str) -> None:
        """The calling threads' part is done. Does not block."""
        _run_asm(f"bar.arrive {self._text[name]}")

    def wait(self, name: str) -> None:
        """Blocks until everyone who should has arrived."""
        _run_asm(f"bar.sync {self._text[name]}")

    def meet(self, name: str) -> None:
        """Arrives and waits: for barriers at which every side does both (`wait_threads` is 0)."""
        _run_asm(f"bar.sync {self._text[name]}")


def _run_asm(text: str) -> None:
    @plgpu.inline_mgpu()
    def run(_):
        asm(text)

    run()


@dataclasses.dataclass(frozen=True)
class GatherRows:
    """Rows for `gather_rows`: tokens `first_token`.. of request `item`, from `first_column` on. Traced int32 `[]`s."""

    item: jax.Array
    first_token: jax.Array
    end_token: jax.Array  # exclusive
    first_column: jax.Array | int
    swizzle_bytes: int = 128  # of the tile that they go to


class Hardware:
    """Operations that are not plain Pallas, as they are on a GPU."""

    def barrier_scratch(self, handoffs: Mapping[str, Handoff]) -> dict[str, Any]:
        """Scratch types that `barriers` needs."""
        del handoffs
        return {}

    def barriers(self, handoffs: Mapping[str, Handoff], scratch: Mapping[str, Any]) -> Barriers:
        del scratch
        return Barriers(handoffs)

    def publish_smem(self) -> None:
        """Makes this thread's shared-memory writes visible to wgmma and TMA, once a barrier has ordered them."""

        @plgpu.inline_mgpu()
        def fence(_):
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        fence()

    def gather_rows(self, source: Any, table: Any, dst: Any, absent: Any, rows: GatherRows) -> None:
        """Copies one row per token from anywhere into a tile: for pages too small or odd for TMA.

        Called by a whole warpgroup; returns when the rows lie in shared memory, visible to wgmma. Rows of tokens from
        `rows.end_token` on, and of pages outside [0, pages), become zeros and are not read.

        Args:
          source: bf16 `[pages, page_size, d]` in GMEM.
          table: int32 `[b, max_pages]` in GMEM, or None: token t of item i is row t of page i.
          dst: bf16 `[64, columns]`, a `tile` in SMEM.
          absent: int32 `[64]` in SMEM, or None: becomes 0 for the rows that were copied and 1 for the zeros.
          rows: which ones.
        """
        _gather_rows(source, table, dst, absent, rows)

    def store_rows(self, x: jax.Array, *, out: Any, index: Any, tile: Any, column: int, num_rows: int) -> None:
        """x [64, n] -> out[index, 64 * tile + row, column:column + n], rows from `num_rows` on left out.

        Args:
          x: float32, WGMMA layout; converted to out's dtype.
          out: float32 or bf16 `[items, num_rows, columns]` in GMEM.
          index, tile: traced int32 `[]`s.
          column: the first.
          num_rows: rows that exist.
        """
        _store_rows(x.astype(out.dtype), out, index, tile, column, num_rows)

    def store_row_values(self, x: jax.Array, *, out: Any, index: Any, tile: Any, num_rows: int) -> None:
        """The same of one float32 a row: x `[64]` in WGMMA_ROW layout, out `[items, num_rows]`."""
        _store_row_values(x, out, index, tile, num_rows)

    def any_positive(self, x: jax.Array, layout: Any) -> jax.Array:
        """Whether any value is above 0: bool `[]`, the same for all threads. One warpgroup of a CTA may call this.

        Args:
          x: float32 `[rows]`.
          layout: of x.
        """

        @plgpu.inline_mgpu(
            arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT)
        )
        def vote(_, x):
            i32 = ir.IntegerType.get_signless(32)
            zero = arith.ConstantOp(x.mlir_dtype, ir.FloatAttr.get(x.mlir_dtype, 0.0)).result  # type: ignore
            flag = first = arith.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result  # type: ignore
            for register in x.registers.flat:
                value = llvm.extractelement(register, first)
                flag = arith.ori(flag, arith.extui(i32, arith.cmpf(arith.CmpFPredicate.OGT, value, zero)))
            text = (
                "{ .reg .pred p; setp.ne.s32 p, $1, 0; "
                f"bar.red.or.pred p, {Barriers.VOTE_ID}, {WARPGROUP}, p; selp.s32 $0, 1, 0, p; }}"
            )
            found = asm(text, "=r,r", flag, result="i32")
            return mosaic.FragmentedArray.splat(found, (), is_signed=True)

        return vote(x) != 0

    def any_below_one(self, x: jax.Array) -> jax.Array:
        """Whether a value of the calling warp's rows is below 1: bool `[]`. Each warp has an answer of its own, so what
        it decides must need no other warp.

        Args:
          x: float32 `[64]` in WGMMA_ROW layout.
        """

        @plgpu.inline_mgpu(
            arg_types=(WGMMA_ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT)
        )
        def vote(_, x):
            values = [vector.extract(v, dynamic_position=[], static_position=[0]) for v in x.registers.flat]
            text = (
                "{ .reg .pred p; .reg .f32 least; min.f32 least, $1, $2; setp.lt.f32 p, least, 0f3F800000; "
                "vote.sync.any.pred p, p, -1; selp.s32 $0, 1, 0, p; }"
            )
            found = asm(text, "=r,f,f", *values, result="i32")
            return mosaic.FragmentedArray.splat(found, (), is_signed=True)

        return vote(x) != 0

    def scale_rows(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        """x float32 [64, n] in WGMMA layout, each row times its value of factor float32 [64], in WGMMA_ROW layout.

        The plain product becomes multiplications of pairs, for whose results ptxas takes registers beside those of x:
        twice as many for what goes from tensor memory to tensor memory.
        """

        @plgpu.inline_mgpu(
            arg_types=(WGMMA, WGMMA_ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), WGMMA)
        )
        def scale(_, x, factor):
            f32 = ir.F32Type.get()
            # Register n of x: two columns of the thread's first row, or, if n is odd, of the row 8 below it.
            factors = [vector.extract(v, dynamic_position=[], static_position=[0]) for v in factor.registers.flat]
            scaled = np.empty(x.registers.shape, object)
            for n, pair in enumerate(x.registers.flat):
                for k in range(2):
                    value = vector.extract(pair, dynamic_position=[], static_position=[k])
                    value = llvm.inline_asm(f32, [value, factors[n % 2]], "mul.rn.f32 $0, $1, $2;", "=f,f,f")
                    pair = vector.insert(value, pair, dynamic_position=[], static_position=[k])
                scaled.flat[n] = pair
            return mosaic.FragmentedArray(_registers=scaled, _layout=x.layout, _is_signed=None)

        return scale(x, factor)

    def producer_warp(self, run: Callable[[], None]) -> None:
        """Runs `run` on the first warp of the calling warpgroup."""

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(run)


def _gather_rows(source: Any, table: Any, dst: Any, absent: Any, rows: GatherRows) -> None:
    """`Hardware.gather_rows`: two threads a row, 16 bytes a copy, shared-memory addresses swizzled by hand."""
    num_pages, page_size, d = source.shape
    num_rows, columns = dst.shape
    if num_rows * 2 != WARPGROUP:
        raise ValueError(f"gather_rows wants a tile of {WARPGROUP // 2} rows, got {num_rows}")
    chunk_bytes, row_bytes = CHUNK_BYTES, rows.swizzle_bytes  # of a copy, of a row of a tile
    atom_bytes = 8 * row_bytes  # of that tile, which has 8 rows
    row_chunks = row_bytes // chunk_bytes
    tiling = plgpu.TilingTransform((8, row_bytes // 2))  # type: ignore[abstract]
    tile_type = plgpu.RefType((tiling, plgpu.SwizzleTransform(row_bytes)))  # type: ignore[abstract]
    scalar = plgpu.Layout.WG_SPLAT
    optional = [ref for ref in (table, absent) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(tile_type, *[scalar] * 4, *[plgpu.RefType()] * (1 + len(optional))))
    def copy(_, dst, item, first_token, end_token, first_column, source, *optional_refs):
        table_ref = optional_refs[:1] if table is not None else ()
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

        def c(value, kind=i32):
            return arith.ConstantOp(kind, ir.IntegerAttr.get(kind, value)).result  # type: ignore

        def wide(value):
            return arith.extsi(i64, value)

        item, first_token, end_token, first_column = (
            x.registers[()] for x in (item, first_token, end_token, first_column)
        )
        thread = arith.remui(mosaic_utils.thread_idx(), c(WARPGROUP))
        row, odd = arith.divui(thread, c(2)), arith.remui(thread, c(2))
        token = arith.addi(first_token, row)
        is_real = arith.cmpi(arith.CmpIPredicate.slt, token, end_token)
        if table_ref:
            width = table.shape[1]
            slot = arith.minui(arith.divui(token, c(page_size)), c(width - 1))
            entry = arith.addi(arith.muli(wide(item), c(width, i64)), wide(slot))
            address = arith.addi(
                llvm.ptrtoint(i64, mosaic_utils.memref_ptr(table_ref[0])), arith.muli(entry, c(4, i64))
            )
            page = asm("ld.global.s32 $0, [$1];", "=r,l", address, result="i32")
            offset = arith.remui(token, c(page_size))
        else:
            page, offset = item, token
        # One unsigned comparison: a negative page is a large one.
        is_real = arith.andi(is_real, arith.cmpi(arith.CmpIPredicate.ult, page, c(num_pages)))
        index = arith.addi(arith.muli(wide(page), c(page_size, i64)), wide(offset))
        index = arith.select(is_real, index, c(0, i64))
        size = arith.select(is_real, c(chunk_bytes), c(0))  # the copy fills up with zeros
        base = arith.addi(
            llvm.ptrtoint(i64, mosaic_utils.memref_ptr(source)),
            arith.addi(arith.muli(index, c(2 * d, i64)), arith.muli(wide(first_column), c(2, i64))),
        )
        in_tile = arith.remui(row, c(8))
        tile_row = arith.addi(
            arith.muli(arith.divui(row, c(8)), c(columns * 2 // row_bytes * atom_bytes)),
            arith.muli(in_tile, c(row_bytes)),
        )
        target = arith.addi(llvm.ptrtoint(i32, mosaic_utils.memref_ptr(dst)), tile_row)
        # Chunk k of row r lies at place k ^ s, where s counts the 128-byte lines before the row.
        swizzle = arith.divui(in_tile, c(128 // row_bytes))
        for step in range(columns * 2 // chunk_bytes // 2):
            # The two threads of a row take neighbouring chunks.
            tile_column, chunk = divmod(2 * step, row_chunks)
            place = arith.xori(arith.ori(c(chunk), odd), swizzle)
            to = arith.addi(target, arith.addi(c(tile_column * atom_bytes), arith.muli(place, c(chunk_bytes))))
            at = arith.addi(base, wide(arith.addi(c(2 * step * chunk_bytes), arith.muli(odd, c(chunk_bytes)))))
            asm(f"cp.async.cg.shared.global [$0], [$1], {chunk_bytes}, $2;", "r,l,r", to, at, size)
        if absent is not None:
            at = arith.addi(llvm.ptrtoint(i32, mosaic_utils.memref_ptr(optional_refs[-1])), arith.muli(row, c(4)))
            asm("st.shared.b32 [$0], $1;", "r,r", at, arith.select(is_real, c(0), c(1)))
        asm("cp.async.wait_all;")

    copy(dst, rows.item, rows.first_token, rows.end_token, jnp.int32(rows.first_column), source, *optional)
    plgpu.commit_smem()


def _accumulator_row(index: Any, tile: Any, num_rows: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Of the calling thread's first accumulator row, the second being 8 below it: its number among all tiles' rows, its
    number in `out` [items, num_rows, ...], 64 bits; and the thread's place among the four that share a row."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    thread = arith.remui(mosaic_utils.thread_idx(), mosaic_utils.c(WARPGROUP, i32))
    warp, lane = (op(thread, mosaic_utils.c(WARP, i32)) for op in (arith.divui, arith.remui))
    row = arith.addi(arith.muli(tile.registers[()], mosaic_utils.c(64, i32)), arith.muli(warp, mosaic_utils.c(16, i32)))
    row = arith.addi(row, arith.divui(lane, mosaic_utils.c(4, i32)))
    item = arith.muli(arith.extui(i64, index.registers[()]), mosaic_utils.c(num_rows, i64))
    return row, arith.addi(item, arith.extui(i64, row)), arith.remui(lane, mosaic_utils.c(4, i32))


def _exists(row: ir.Value, half: int, num_rows: int) -> ir.Value:
    """Whether the row (half 0), or the one 8 below it (half 1), is one of `num_rows`."""
    below = arith.addi(row, mosaic_utils.c(8 * half, row.type))
    return arith.cmpi(arith.CmpIPredicate.ult, below, mosaic_utils.c(num_rows, row.type))


def _store_rows(x, out, index, tile, column: int, num_rows: int) -> None:
    width, size = out.shape[-1], jnp.dtype(out.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def store(_, x, out, index, tile):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        row, place, quad = _accumulator_row(index, tile, num_rows)
        odd = arith.remui(quad, mosaic_utils.c(2, i32))
        offset = arith.addi(arith.muli(quad, mosaic_utils.c(2 * size, i32)), mosaic_utils.c(column * size, i32))
        if size == 4:  # of what the lane stores: see below
            offset = arith.addi(offset, arith.muli(odd, mosaic_utils.c(6 * size, i32)))
        address = llvm.ptrtoint(i64, mosaic_utils.memref_ptr(out))
        address = arith.addi(address, arith.muli(place, mosaic_utils.c(width * size, i64)))
        address = arith.addi(address, arith.extui(i64, offset))
        flat = x.registers.reshape(-1)  # register 2 * j + half: columns 8 * j + 2 * (lane % 4), row + 8 * half

        def floats(j, half):
            pair = flat[2 * j + half]
            return [vector.extract(pair, dynamic_position=[], static_position=[e]) for e in range(2)]

        for half in range(2):
            exists = _exists(row, half, num_rows)
            for j in range(0, flat.size // 2, 1 if size == 2 else 2):
                at = 8 * j * size + 8 * half * width * size
                if size == 2:
                    word = mosaic.utils.bitcast(flat[2 * j + half], i32)
                    asm(f"@$0 st.global.b32 [$1+{at}], $2;", "b,l,r", exists, address, word)
                    continue
                # Neighbouring lanes trade two columns, so that each stores four in a row: of j's the even lane, of
                # j + 1's the odd one. Half as many stores, each of which costs a cycle a row.
                asm(
                    "{ .reg .pred o; .reg .f32 s0, s1, v0, v1, v2, v3; setp.ne.s32 o, $2, 0; "
                    "selp.f32 s0, $3, $5, o; selp.f32 s1, $4, $6, o; "
                    "shfl.sync.bfly.b32 s0, s0, 1, 31, -1; shfl.sync.bfly.b32 s1, s1, 1, 31, -1; "
                    "selp.f32 v0, s0, $3, o; selp.f32 v1, s1, $4, o; selp.f32 v2, $5, s0, o; selp.f32 v3, $6, s1, o; "
                    f"@$0 st.global.v4.f32 [$1+{at}], {{v0, v1, v2, v3}}; }}",
                    "b,l,r,f,f,f,f", exists, address, odd, *floats(j, half), *floats(j + 1, half),
                )  # fmt: skip

    store(x, out, index, tile)


def _store_row_values(x, out, index, tile, num_rows: int) -> None:
    @plgpu.inline_mgpu(arg_types=(WGMMA_ROW, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def store(_, x, out, index, tile):
        i64 = ir.IntegerType.get_signless(64)
        row, place, quad = _accumulator_row(index, tile, num_rows)
        address = llvm.ptrtoint(i64, mosaic_utils.memref_ptr(out))
        address = arith.addi(address, arith.muli(place, mosaic_utils.c(4, i64)))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, quad, mosaic_utils.c(0, quad.type))
        for half, value in enumerate(x.registers.reshape(-1)):
            if isinstance(value.type, ir.VectorType):
                value = vector.extract(value, dynamic_position=[], static_position=[0])
            exists = arith.andi(is_first, _exists(row, half, num_rows))
            asm(f"@$0 st.global.f32 [$1+{32 * half}], $2;", "b,l,f", exists, address, value)

    store(x, out, index, tile)


class _InterpretedBarriers(Barriers):
    def __init__(self, handoffs: Mapping[str, Handoff], refs: Mapping[str, Any]):
        super().__init__(handoffs)
        self._refs = refs

    def arrive(self, name: str) -> None:
        plgpu.barrier_arrive(self._refs[name])

    def wait(self, name: str) -> None:
        plgpu.barrier_wait(self._refs[name])

    def meet(self, name: str) -> None:
        self.arrive(name)
        self.wait(name)


class Interpreted(Hardware):
    """The same operations in the terms that Pallas' GPU interpreter knows."""

    def barrier_scratch(self, handoffs):
        # The interpreter counts a warpgroup as one thread.
        return {
            name: plgpu.Barrier(num_arrivals=max(1, handoff.arrive_threads // WARPGROUP))
            for name, handoff in handoffs.items()
        }

    def barriers(self, handoffs, scratch):
        return _InterpretedBarriers(handoffs, scratch)

    def publish_smem(self):
        plgpu.commit_smem()

    def gather_rows(self, source, table, dst, absent, rows):
        num_pages, page_size, _ = source.shape
        for row in range(dst.shape[0]):
            token = rows.first_token + row
            if table is None:
                page, offset = rows.item, jnp.minimum(token, page_size - 1)
            else:
                slot = jnp.minimum(lax.div(token, jnp.int32(page_size)), table.shape[1] - 1)
                page, offset = table[rows.item, slot], lax.rem(token, jnp.int32(page_size))
            is_real = (token < rows.end_token) & (page >= 0) & (page < num_pages)

            def copy(row=row, page=page, offset=offset):
                dst[row, :] = source[page, offset, pl.ds(rows.first_column, dst.shape[1])]
                if absent is not None:
                    absent[row] = jnp.int32(0)

            def clear(row=row):
                dst[row, :] = jnp.zeros((dst.shape[1],), dst.dtype)
                if absent is not None:
                    absent[row] = jnp.int32(1)

            lax.cond(is_real, copy, clear)
        plgpu.commit_smem()

    def store_rows(self, x, *, out, index, tile, column, num_rows):
        def store(first, count):
            out[index, pl.ds(first, count), pl.ds(column, x.shape[1])] = x[:count].astype(out.dtype)

        _store_tile(store, tile, num_rows)

    def store_row_values(self, x, *, out, index, tile, num_rows):
        def store(first, count):
            out[index, pl.ds(first, count)] = x[:count]

        _store_tile(store, tile, num_rows)

    def any_positive(self, x, layout):
        return jnp.max(x) > 0

    def any_below_one(self, x):
        return jnp.min(x) < 1

    def scale_rows(self, x, factor):
        return x * rows_to_tile(factor, x.shape)

    def producer_warp(self, run):
        run()


def _store_tile(store: Callable[[Any, int], None], tile: Any, num_rows: int) -> None:
    """store(first row, how many) for the rows of a tile of 64 that exist."""
    whole, rest = divmod(num_rows, 64)
    pl.when(tile < whole)(lambda: store(tile * 64, 64))
    if rest:
        pl.when(tile == whole)(lambda: store(whole * 64, rest))


HARDWARE = Hardware()
INTERPRETED = Interpreted()


def operations(interpret: Any) -> Hardware:
    """The table that goes with the `interpret` argument of `plgpu.kernel`."""
    return HARDWARE if interpret is None else INTERPRETED
