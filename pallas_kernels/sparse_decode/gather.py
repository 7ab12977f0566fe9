"""Rows of the cache -> bf16 keys in shared memory on SM100, by index: TMA gather, then dequantise in place.

A stage of 64 keys is two buffers in the tiles that tcgen05 reads: `latent`, bf16 [64, d_nope], and `rope`, bf16
[64, 64]. TMA gathers four rows an instruction (gather4); a row number of -1 gives zeros, which is
what a key that does not count gets: nothing is read for it, and nothing but zeros ever meets a product.

* bf16 caches: straight to `latent` and `rope`.
* Quantised caches: e4m3 bytes go to the end of `latent`, which `raw` names as bytes (there is no room for a
  buffer of their own), and are dequantised in place: for each half of the block's rows, all warps read their raw bytes,
  meet, and write the bf16 values. RoPE values go to `rope`, which `raw_rope` names as bytes, in plain rows (TMA
  gathers into tiles only from columns that are multiples of them), and each warp brings its own rows into tiles.

        latent  | rows 0-31 as bf16       | rows 32-63 as bf16      |
        raw                       | rows 0-31   | rows 32-63   |        bytes, right-aligned

  The first half's values never reach the second half's bytes (`check_in_place`).

Scales are loaded a block ahead, straight to registers. `value = bf16(e4m3 * scale)`, product in float32, one rounding.

`GatherHardware` is what runs on a GPU; `GatherInterpreted` says the same in plain jax.numpy for the CPU interpreter:

| operation | on the GPU | interpreted |
|---|---|---|
| `copy_indices`, `load_slots` | predicated loads, for TMA and for a lane's rows | plain loads |
| `load_scales` | predicated loads in the layout of a lane's rows | plain loads |
| `finish_keys` | `raw` to `latent`, `raw_rope` to `rope`, and the mask, by PTX | jax.numpy |
| `any_row` | `barrier.red.or` of the warpgroup | `jnp.max` |
| `any_positive` | a vote of the warpgroup (mgpu.py) | `jnp.max` |
| `store_rows`, `store_row_values` | as on SM90 (mgpu.py); of 128 rows, 16 bytes a thread | plain stores |

The gathers themselves (`start_gather`), all barriers, products and tensor memory are the same on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import formats, mgpu
from pallas_kernels.formats import KVFormat
from pallas_kernels.mgpu import asm
from pallas_kernels.sparse_decode import dequant, lanes
from pallas_kernels.sparse_decode.config import (
    BLOCK_TOKENS,
    CHUNK_BYTES,
    COLUMN_TILE,
    GROUP_ROWS,
    MAX_REGISTERS,
    PAIR_HEADS,
    STAGES,
    TILE_HEADS,
    Scope,
)
from pallas_kernels.sparse_decode.lanes import REF, SPLAT, Lane, add, const, i32, mul

# Swizzled tiles, in bytes of a row: 64 for keys (the product of 64 heads with 64 keys takes no wider ones), 128 for raw
# bytes, so that 8 rows' 16-byte chunks lie in 8 different bank groups.
KEY_TILE_BYTES = 64
RAW_TILE_BYTES = 128
GATHER_ROWS = 4  # rows of one TMA instruction
VOTE_BARRIER = 8  # a named barrier that Mosaic does not use
MASKED = -float("inf")

INDICES = plgpu.Layout.TMA_INDICES
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # one row of 128 a thread
KEY_TILES = plgpu.RefType(mgpu.tile((GROUP_ROWS, KEY_TILE_BYTES // 2), swizzle_bytes=KEY_TILE_BYTES).transforms)
RAW_TILES = plgpu.RefType(mgpu.tile((GROUP_ROWS, RAW_TILE_BYTES), jnp.uint8, RAW_TILE_BYTES).transforms)


# -- where things lie --------------------------------------------------------------------------------------------


def raw_row_bytes(fmt: KVFormat) -> int:
    """What is gathered of a row's latent bytes: whole tiles."""
    return -(-fmt.d_nope // RAW_TILE_BYTES) * RAW_TILE_BYTES


def raw_rows(fmt: KVFormat) -> int:
    """Rows of `raw`: as many as `latent` has room for. The last 64 are used."""
    return BLOCK_TOKENS * fmt.d_nope * 2 // raw_row_bytes(fmt)


def check_in_place(fmt: KVFormat) -> None:
    """Raises ValueError if the first half's values would overwrite the second half's bytes."""
    half_bytes, stage_bytes = BLOCK_TOKENS // 2 * raw_row_bytes(fmt), BLOCK_TOKENS * fmt.d_nope * 2
    whole_tiles = (raw_rows(fmt) - BLOCK_TOKENS) % GROUP_ROWS == 0 and stage_bytes % raw_row_bytes(fmt) == 0
    if stage_bytes // 2 > stage_bytes - half_bytes or not whole_tiles:
        raise ValueError(f"{fmt.name}: raw bytes do not fit where their dequantised values go")


class Stage(NamedTuple):
    """Shared memory of a stage's keys, and (`raw`, `raw_rope`) the same memory as bytes."""

    latent: Any  # bf16 [64, d_nope]
    raw: Any  # uint8 [raw_rows, raw_row_bytes]
    rope: Any  # bf16 [64, d_rope]
    raw_rope: Any  # uint8 [64, 2 * d_rope]


def stage_types(fmt: KVFormat) -> list[tuple[plgpu.RefUnion, plgpu.RefUnion]]:
    """Scratch types of all stages; `stages` gives their references names."""
    check_in_place(fmt)
    latent = mgpu.tile((BLOCK_TOKENS, fmt.d_nope), swizzle_bytes=KEY_TILE_BYTES)
    raw = mgpu.tile((raw_rows(fmt), raw_row_bytes(fmt)), jnp.uint8, RAW_TILE_BYTES)
    rope = mgpu.tile((BLOCK_TOKENS, fmt.d_rope), swizzle_bytes=KEY_TILE_BYTES)
    raw_rope = plgpu.SMEM((BLOCK_TOKENS, 2 * fmt.d_rope), jnp.uint8)
    return [(plgpu.RefUnion(latent, raw), plgpu.RefUnion(rope, raw_rope)) for _ in range(STAGES)]


def stages(refs) -> list[Stage]:
    """The references that `stage_types` became."""
    return [Stage(*latents, *ropes) for latents, ropes in refs]


def for_stage(number: jax.Array, stages: list[Stage], run: Callable[[Stage], None]) -> None:
    """run(stages[number]). Stages are buffers of their own, whose places are thus known when the kernel is compiled."""
    for n, stage in enumerate(stages):
        pl.when(number == n)(functools.partial(run, stage))


def row_view(pages: jax.Array, scope: Scope) -> jax.Array:
    """A cache array as rows for one TMA descriptor: [rows, bytes or values of a row]."""
    width = scope.row_bytes if scope.fmt.is_quantized else scope.fmt.d_qk
    return pages.reshape(-1, width)


def rows_of(slots: jax.Array, scope: Scope) -> jax.Array:
    """int32 [64] slots -> uint32 [64] rows of `row_view`; 2^32 - 1, to TMA -1, for slots that are no keys."""
    rows = slots
    if not scope.is_row_major:
        size = jnp.full_like(slots, scope.page_size)
        page = lax.div(slots, size)
        rows = page * (scope.page_bytes // scope.row_bytes) + (slots - page * scope.page_size)
    is_row = (slots >= 0) & (slots < min(scope.num_slots, 2**31 - 1))
    return jnp.where(is_row, rows, jnp.full_like(rows, -1)).astype(jnp.uint32)


def set_registers(count: int) -> None:
    """Registers a thread of the calling warpgroup, of four."""
    launched = MAX_REGISTERS // 4
    if count != launched:  # the wrong direction is an illegal instruction
        plgpu.set_max_registers(count, action="increase" if count > launched else "decrease")


# -- the two tables ----------------------------------------------------------------------------------------------


class Gather:
    """What both tables share."""

    def start_gather(self, data, slots, stage: Stage, landed, scope: Scope) -> None:
        """Begins to gather a block's rows into a free stage; `landed` completes when they are there.

        Args:
          data: what `row_view` made.
          slots: int32 [64] from `copy_indices`.
        """
        fmt = scope.fmt
        rows = rows_of(slots, scope)  # [64]
        if fmt.is_quantized:
            first = raw_rows(fmt) - BLOCK_TOKENS
            copies = (
                (pl.ds(0, raw_row_bytes(fmt)), stage.raw.at[pl.ds(first, BLOCK_TOKENS)]),
                (pl.ds(scope.rope_offset_bytes, 2 * fmt.d_rope), stage.raw_rope),
            )
        else:
            copies = ((pl.ds(0, fmt.d_nope), stage.latent), (pl.ds(fmt.d_nope, fmt.d_rope), stage.rope))
        for columns, target in copies:
            plgpu.copy_gmem_to_smem(data.at[rows, columns], target, landed)


class GatherHardware(Gather, dequant.SparseHardware):
    """As it is on a GPU."""

    def copy_indices(self, indices, item, block, length, scope: Scope) -> jax.Array:
        """int32 [64] in the layout of TMA indices: the block's slots, -1 from `length` on."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SPLAT, SPLAT, SPLAT),
            return_type=plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.dtype(jnp.int32), INDICES),
        )
        def load(_, indices, item, block, length):
            lane = Lane()
            layout = INDICES.to_mgpu()
            registers = np.empty(layout.registers_shape((BLOCK_TOKENS,)), object)
            flat = registers.reshape(-1)  # register n of warp w: rows 16 * n + 4 * w + (0, 1, 2, 3)
            first = add(mul(lanes.scalar(block), BLOCK_TOKENS), mul(lane.warp, GATHER_ROWS))
            row = add(lanes.gmem(indices), mul(lanes.wide(lanes.scalar(item)), 4 * scope.topk))
            address = add(row, mul(lanes.wide(first), 4))
            stride = BLOCK_TOKENS // flat.size
            for n in range(flat.size):
                quad = None
                for k in range(GATHER_ROWS):
                    counts = lanes.less(add(first, stride * n + k), lanes.scalar(length))
                    text = f"{{ mov.b32 $0, -1; @$1 ld.global.nc.b32 $0, [$2+{4 * (stride * n + k)}]; }}"
                    slot = asm(text, "=&r,b,l", counts, address, result="i32")
                    if quad is None:
                        quad = vector.broadcast(ir.VectorType.get((GATHER_ROWS,), i32()), slot)
                    else:
                        quad = vector.insert(slot, quad, dynamic_position=[], static_position=[k])
                flat[n] = quad
            return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

        return load(indices, item, block, length)

    def load_scales(self, data, slots, scope: Scope) -> tuple[jax.Array, ...]:
        """A row's scales as int32 [64] words in `lanes.BLOCK_ROW` layout: two words of e8m0, or four of float32."""
        if not scope.fmt.is_quantized:
            return ()
        word = plgpu.ShapeDtypeStruct((BLOCK_TOKENS,), jnp.dtype(jnp.int32), lanes.BLOCK_ROW)
        count = scope.scale_record_bytes // 4 if scope.has_scales_apart else scope.fmt.num_scales

        @plgpu.inline_mgpu(arg_types=(REF, lanes.BLOCK_ROW), return_type=(word,) * count)
        def load(_, data, slots):
            words = []
            for slot in lanes.row_values(slots):
                row, scales = lanes.row_address(data, slot, scope)
                address = scales if scope.has_scales_apart else add(row, scope.scale_offset_bytes)
                names = [f"${n}" for n in range(count)]
                text = "{ " + " ".join(f"mov.b32 {name}, 0;" for name in names)
                text += f" @${count} ld.global.nc.v{count}.b32 {{{', '.join(names)}}}, [${count + 1}]; }}"
                struct = f"!llvm.struct<({', '.join(['i32'] * count)})>"
                loaded = asm(text, "=&r," * count + "b,l", lanes.is_key(slot, scope), address, result=struct)
                words.append(lanes.fields(loaded, [i32()] * count))
            return tuple(lanes.row_array([w[k] for w in words]) for k in range(count))

        return tuple(load(data, slots))

    def finish_keys(self, slots, scales, stages: list[Stage], number, rows, scope: Scope) -> None:
        """Once a block's rows have landed in stage `number`: keys and mask, visible to tcgen05 after a barrier.

        Args:
          slots, scales: in `lanes.BLOCK_ROW` layout, of `load_slots` and `load_scales`.
          rows: float32 `[STAGES, 64]` in shared memory: the mask.
        """
        fmt = scope.fmt
        buffers = [(stage.latent, stage.raw, stage.rope) for stage in stages]

        @plgpu.inline_mgpu(
            arg_types=(
                lanes.BLOCK_ROW,
                (lanes.BLOCK_ROW,) * len(scales),
                [(KEY_TILES, RAW_TILES, KEY_TILES)] * len(stages),
                REF,
                SPLAT,
            )
        )
        def finish(_, slots, scales, buffers, rows, number):
            lane = Lane()
            number = lanes.scalar(number)
            bias = add(lanes.smem(rows), mul(number, 4 * BLOCK_TOKENS))
            bias = add(bias, mul(add(mul(lane.warp, GROUP_ROWS), lane.row), 4))
            for k, slot in enumerate(lanes.row_values(slots)):
                mask = arith.select(lanes.is_key(slot, scope), const(0, i32()), const(lanes.MINUS_INFINITY, i32()))
                asm(f"st.shared.b32 [$0+{128 * k}], $1;", "r,r", bias, mask)
            if fmt.is_quantized:
                latent, raw, rope = self._addresses(buffers, number)
                words = [lanes.row_values(s) for s in scales]
                self._arrange_rope(lane, rope, fmt)
                for k in range(lanes.GROUPS_PER_WARP):
                    chunks = self._read_raw(lane, raw, k, fmt)
                    mosaic.utils.warpgroup_barrier()  # all warps hold the half's bytes: they may be overwritten
                    even = self._key_address(lane, lane.group_at(latent, k, fmt.d_nope))
                    lanes.dequantize_latent(even, chunks, lanes.scale_values([w[k] for w in words], fmt), fmt)
            asm("fence.proxy.async.shared::cta;")

        finish(slots, tuple(scales), buffers, rows, number)

    def _addresses(self, buffers, number):
        """Shared-memory addresses of the buffers of stage `number`."""
        found = [lanes.smem(ref) for ref in buffers[0]]
        for n, refs in enumerate(buffers[1:], 1):
            here = lanes.equal(number, n)
            found = [arith.select(here, lanes.smem(ref), other) for ref, other in zip(refs, found, strict=True)]
        return found

    def _arrange_rope(self, lane, rope, fmt):
        """RoPE rows of the warp's groups, as plain bytes, to tiles in the same memory. A lane a chunk."""
        row_bytes = 2 * fmt.d_rope
        lanes_of_a_row = const(row_bytes // CHUNK_BYTES, i32())
        row, chunk = arith.divui(lane.lane, lanes_of_a_row), arith.remui(lane.lane, lanes_of_a_row)
        groups = [lane.group_at(rope, k, fmt.d_rope) for k in range(lanes.GROUPS_PER_WARP)]
        rows_at_once = mgpu.WARP * CHUNK_BYTES // row_bytes
        source = add(mul(row, row_bytes), mul(chunk, CHUNK_BYTES))
        steps = range(GROUP_ROWS // rows_at_once)
        words = [[lanes.load16(add(g, source), n * rows_at_once * row_bytes) for n in steps] for g in groups]
        lanes.sync_warp()  # every lane holds its bytes: they may be overwritten
        tile_chunks = KEY_TILE_BYTES // CHUNK_BYTES
        tile, within = arith.divui(chunk, const(tile_chunks, i32())), arith.remui(chunk, const(tile_chunks, i32()))
        for group, group_words in zip(groups, words, strict=True):
            for n in steps:
                group_row = add(row, n * rows_at_once)
                place = arith.xori(within, arith.divui(group_row, const(2, i32())))
                at = add(mul(tile, GROUP_ROWS * KEY_TILE_BYTES), mul(group_row, KEY_TILE_BYTES))
                lanes.store16(add(group, add(at, mul(place, CHUNK_BYTES))), 0, group_words[n])

    def _read_raw(self, lane, raw, k, fmt):
        """The lane's chunks of its row of the warp's k-th group: one of each 64 latent columns."""
        width = raw_row_bytes(fmt)
        group = add(raw, mul(add(lane.warp, 4 * k), GROUP_ROWS * width))
        group = add(group, (raw_rows(fmt) - BLOCK_TOKENS) * width)
        places = [lane.swizzled(group, add(lane.chunk, lanes.LANE_CHUNKS * half)) for half in range(2)]
        tile_bytes = GROUP_ROWS * RAW_TILE_BYTES
        return [lanes.load16(places[n % 2], tile_bytes * (n // 2)) for n in range(fmt.d_nope // COLUMN_TILE)]

    def _key_address(self, lane, group):
        """Where the bf16 values of the lane's first chunk go: columns 16 * chunk.. of the group, in tiles of 32."""
        tile_bytes = GROUP_ROWS * KEY_TILE_BYTES
        tile = arith.divui(lane.chunk, const(2, i32()))
        place = mul(arith.remui(lane.chunk, const(2, i32())), 2)  # of 4 chunks in the tile's row
        place = arith.xori(place, arith.divui(lane.row, const(2, i32())))
        inside = add(mul(lane.row, KEY_TILE_BYTES), mul(place, CHUNK_BYTES))
        return add(group, add(mul(tile, tile_bytes), inside))

    def any_row(self, flags) -> jax.Array:
        """int32 [64] of 0 and 1, one a row of an accumulator -> int32 []: whether any is 1. The warpgroup meets."""

        @plgpu.inline_mgpu(
            arg_types=(mgpu.WGMMA_ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT)
        )
        def vote(_, flags):
            values = [vector.extract(v, dynamic_position=[], static_position=[0]) for v in flags.registers.reshape(-1)]
            mine = values[0]
            for value in values[1:]:
                mine = arith.ori(mine, value)
            flag = arith.xori(lanes.equal(mine, 0), const(1, ir.IntegerType.get_signless(1)))
            text = f"barrier.red.or.pred p, {VOTE_BARRIER}, {mgpu.WARPGROUP}, $1; selp.b32 $0, 1, 0, p;"
            any_flag = asm(f"{{ .reg .pred p; {text} }}", "=r,b", flag, result="i32")
            return mosaic.FragmentedArray.splat(any_flag, (), is_signed=True)

        return vote(flags)


    def store_rows(self, x, *, out, index, tile, column, num_rows: int) -> None:
        """As on SM90; of 128 rows, a row a thread (NATIVE layout), `column` may be traced."""
        if x.shape[0] == TILE_HEADS:
            super().store_rows(x, out=out, index=index, tile=tile, column=column, num_rows=num_rows)
            return
        width, size = out.shape[-1], jnp.dtype(out.dtype).itemsize

        @plgpu.inline_mgpu(arg_types=(NATIVE, REF, SPLAT, SPLAT, SPLAT))
        def store(_, x, out, index, tile, column):
            place, exists = _native_row(index, tile, num_rows)
            address = add(add(lanes.gmem(out), mul(place, width * size)), lanes.wide(mul(lanes.scalar(column), size)))
            words = []  # of 4 bytes; a register of x is two columns
            for register in x.registers.reshape(-1):
                pair = mosaic.utils.bitcast(register, ir.VectorType.get((size // 2,), i32()))
                words += [vector.extract(pair, dynamic_position=[], static_position=[k]) for k in range(size // 2)]
            for n in range(0, len(words), 4):
                text = f"@$0 st.global.v4.b32 [$1+{4 * n}], {{$2, $3, $4, $5}};"
                asm(text, "b,l,r,r,r,r", exists, address, *words[n : n + 4])

        store(x.astype(out.dtype), out, index, tile, jnp.asarray(column, jnp.int32))

    def store_row_values(self, x, *, out, index, tile, num_rows: int) -> None:
        """The same of one float32 a row."""
        if x.shape[0] == TILE_HEADS:
            super().store_row_values(x, out=out, index=index, tile=tile, num_rows=num_rows)
            return

        @plgpu.inline_mgpu(arg_types=(NATIVE.reduce(1), REF, SPLAT, SPLAT))
        def store(_, x, out, index, tile):
            place, exists = _native_row(index, tile, num_rows)
            (value,) = x.registers.reshape(-1)
            value = vector.extract(value, dynamic_position=[], static_position=[0])
            asm("@$0 st.global.f32 [$1], $2;", "b,l,f", exists, add(lanes.gmem(out), mul(place, 4)), value)

        store(x, out, index, tile)


def _native_row(index, tile, num_rows: int) -> tuple[ir.Value, ir.Value]:
    """The calling thread's row of a tile of 128, in all rows of all items, 64 bits; and whether there is such a row."""
    lane = Lane()
    row = add(mul(lanes.scalar(tile), PAIR_HEADS), add(mul(lane.warp, mgpu.WARP), lane.lane))
    return add(mul(lanes.wide(lanes.scalar(index)), num_rows), lanes.wide(row)), lanes.less(row, num_rows)


class GatherInterpreted(Gather, dequant.SparseInterpreted):
    """The same in plain jax.numpy."""

    def store_rows(self, x, *, out, index, tile, column, num_rows):
        def store(first, count):
            out[index, pl.ds(first, count), pl.ds(column, x.shape[1])] = x[:count].astype(out.dtype)

        _store_tile(store, x.shape[0], tile, num_rows)

    def store_row_values(self, x, *, out, index, tile, num_rows):
        def store(first, count):
            out[index, pl.ds(first, count)] = x[:count]

        _store_tile(store, x.shape[0], tile, num_rows)

    def copy_indices(self, indices, item, block, length, scope):
        return self.load_slots(indices, item, block, length, scope)

    def load_scales(self, data, slots, scope):
        """float32 [64, scales]; zeros for slots that are no keys."""
        fmt = scope.fmt
        if not fmt.is_quantized:
            return ()
        key = (slots >= 0) & (slots < scope.num_slots)  # [64]
        slot = jnp.where(key, slots, 0)  # [64]
        page, offset = lax.div(slot, jnp.int32(scope.page_size)), lax.rem(slot, jnp.int32(scope.page_size))
        index, start, what = fmt.locate("scale")
        at = page * scope.page_bytes + fmt.area_offset_bytes(index, scope.page_size)
        at = at + offset * fmt.record_bytes[index] + start  # [64]
        raw = data[...].reshape(-1)[at[:, None] + jnp.arange(what.num_bytes)[None, :]]  # [64, bytes]
        if what.dtype == formats.E8M0:
            bits = jnp.where(raw == 255, jnp.int32(0x7FC00000), raw.astype(jnp.int32) << 23)
        else:
            bits = lax.bitcast_convert_type(raw.reshape(BLOCK_TOKENS, what.count, 4), jnp.int32)
        return (jnp.where(key[:, None], lax.bitcast_convert_type(bits, jnp.float32), 0.0),)

    def finish_keys(self, slots, scales, stages, number, rows, scope):
        fmt = scope.fmt
        key = (slots >= 0) & (slots < scope.num_slots)  # [64]
        rows[number] = jnp.where(key, 0.0, MASKED).astype(jnp.float32)

        def finish(stage):
            values = stage.raw[raw_rows(fmt) - BLOCK_TOKENS :, : fmt.d_nope]  # [64, d_nope]
            rotary = stage.raw_rope[...].reshape(BLOCK_TOKENS, fmt.d_rope, 2)
            values = lax.bitcast_convert_type(values, fmt.locate("nope")[2].dtype).astype(jnp.float32)
            values = values * jnp.repeat(scales[0], fmt.scale_tile, axis=1)  # [64, d_nope]
            stage.latent[...] = values.astype(jnp.bfloat16)
            stage.rope[...] = lax.bitcast_convert_type(rotary, jnp.bfloat16)

        if fmt.is_quantized:
            for_stage(number, stages, finish)
        self.publish_smem()

    def any_row(self, flags):
        return jnp.max(flags)


def _store_tile(store: Callable[[Any, int], None], tile_rows: int, tile: Any, num_rows: int) -> None:
    """store(first row, how many) for the rows of a tile that exist."""
    whole, rest = divmod(num_rows, tile_rows)
    pl.when(tile < whole)(lambda: store(tile * tile_rows, tile_rows))
    if rest:
        pl.when(tile == whole)(lambda: store(whole * tile_rows, rest))


GATHER_HARDWARE = GatherHardware()
GATHER_INTERPRETED = GatherInterpreted()


def operations(interpret) -> GatherHardware | GatherInterpreted:
    """The table that goes with the `interpret` argument of `plgpu.kernel`."""
    return GATHER_HARDWARE if interpret is None else GATHER_INTERPRETED
