"""What the dense kernels of all architectures share: a call's static facts, a piece of work, masks, the host's side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mgpu, schedule
from pallas_kernels.combine import combine
from pallas_kernels.dense_decode.config import TMA_MIN_ROWS, chunk_rows
from pallas_kernels.formats import BF16_576
from pallas_kernels.mgpu import WGMMA

BLOCK = schedule.BLOCK_TOKENS  # tokens of a block
D_V = BF16_576.d_v


class Shape:
    """Static facts of a call."""

    def __init__(self, q_shape, kv_shape, table_width, is_causal, tile_rows):
        self.batch, self.s_q, self.heads, self.d_qk = q_shape
        self.num_pages, self.page_size, _ = kv_shape
        self.contiguous = table_width is None
        self.table_width = 1 if table_width is None else table_width
        self.is_causal = is_causal
        self.rows = self.s_q * self.heads
        # TMA wants a multiple of its tile's rows, or fewer.
        self.tma_rows = self.rows if self.rows < 8 else -(-self.rows // 8) * 8
        self.tile_rows = tile_rows
        self.tiles = -(-self.rows // tile_rows)
        self.capacity = self.table_width * self.page_size  # tokens a request can have
        self.chunk = chunk_rows(self.page_size, self.contiguous)  # tokens of a block in one page
        self.uses_tma = self.chunk >= TMA_MIN_ROWS
        self.producer_threads = mgpu.WARP if self.uses_tma else mgpu.WARPGROUP
        self.has_rope = self.d_qk > D_V
        # The last row of a causal call sees every token, the first this many fewer.
        self.causal_span = self.s_q - 1 if is_causal else 0

    @property
    def is_empty(self) -> bool:
        """Whether no request can have a key."""
        return self.batch == 0 or self.num_pages == 0 or self.capacity == 0


class Work:
    """One piece of the plan.

    Attributes, int32 or bool `[]`:
      piece: its number.
      item: the request.
      first_block, end_block: of the item's blocks.
      is_split: whether the item has other pieces, so that this one's result is partial.
      tokens: of the item.
    """

    RECORD = 8  # int32s that `write` fills, rounded up; two records lie side by side, of even and odd pieces

    def __init__(self, shape, table, piece, item, first_block, end_block, is_split, tokens):
        self.shape, self.table, self.piece, self.item = shape, table, piece, item
        self.first_block, self.end_block, self.is_split, self.tokens = first_block, end_block, is_split, tokens
        # At least one block and pair, even of an empty piece: they are absent, and the result comes out empty.
        self.num_blocks = jnp.maximum(end_block - first_block, 1)
        self.num_pairs = jnp.maximum(lax.div(end_block - first_block + 1, jnp.int32(2)), 1)

    @classmethod
    def of_plan(cls, shape, piece, pieces, seqlens, table):
        """From the plan's arrays in GMEM: three reads, one after the other."""
        item = pieces[piece, 0]
        tokens = jnp.clip(seqlens[item], 0, shape.capacity)
        end_block = jnp.minimum(pieces[piece, 2], lax.div(tokens + (BLOCK - 1), jnp.int32(BLOCK)))
        return cls(shape, table, piece, item, pieces[piece, 1], end_block, pieces[piece, 3] > 1, tokens)

    def write(self, records):
        """Into `records`, int32 in SMEM, for warps that should not wait for GMEM."""
        fields = (self.piece, self.item, self.first_block, self.end_block, jnp.int32(self.is_split), self.tokens)
        for i, field in enumerate(fields):
            records[lax.rem(self.piece, 2) * self.RECORD + i] = field

    @classmethod
    def read(cls, shape, table, records, piece):
        """What `write` wrote."""
        first = lax.rem(piece, 2) * cls.RECORD
        piece, item, first_block, end_block, is_split, tokens = (records[first + i] for i in range(6))
        return cls(shape, table, piece, item, first_block, end_block, is_split != 0, tokens)

    def pages(self, block):
        """[(page, first token in it)] of a block's chunks. A page that must not be read is `num_pages`: zeros come.

        Of a cache of one page, Mosaic leaves the page out of TMA's coordinates, and nothing would check it: there the
        token lies outside as well.
        """
        shape = self.shape
        exists = block < self.end_block

        def place(is_real, page, token):
            if shape.num_pages == 1:
                token = jnp.where(is_real, token, -(-shape.page_size // BLOCK) * BLOCK)
            return jnp.where(is_real, page, shape.num_pages), token

        if shape.contiguous:
            return [place(exists, self.item, block * BLOCK)]
        pages = []
        for chunk in range(BLOCK // shape.chunk):
            token = block * BLOCK + chunk * shape.chunk
            slot = jnp.minimum(lax.div(token, jnp.int32(shape.page_size)), shape.table_width - 1)
            page = self.table[self.item, slot]
            is_real = exists & (page >= 0) & (page < shape.num_pages)
            pages.append(place(is_real, page, lax.rem(token, jnp.int32(shape.page_size))))
        return pages

    def room(self, block, pages=None):
        """Tokens from the block's start to the request's end, or 0 if some page of the block must not be read.

        `pages`: of the block, where they have been read already.

        A block is free of masking if this is at least `BLOCK` and, in causal calls, `s_q - 1` more.
        """
        if not self.shape.uses_tma:
            return jnp.int32(0)  # the producer knows, and says so in `absent`
        room = self.tokens - block * BLOCK
        for page, _ in pages or self.pages(block):
            room = jnp.where(page < self.shape.num_pages, room, 0)
        return room

    def mask(self, scores, block, room, tile_index, absent, dyn, layout=WGMMA):
        """-inf for keys that a row must not see. scores f32 [tile_rows, BLOCK], absent int32 [BLOCK] in SMEM.

        `layout` is that of the scores. `dyn` (`opaque_zero`) keeps the column and row numbers from being computed once
        and spilled.
        """
        shape, tile = self.shape, scores.shape

        def apply():
            column = plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=layout) + dyn  # [tile_rows, BLOCK]
            none = jnp.full_like(scores, -jnp.inf)  # [tile_rows, BLOCK]
            visible = room
            masked = scores
            if not shape.uses_tma:
                is_absent = plgpu.load(absent, layout=layout.reduce(0)) != 0  # [BLOCK]
                masked = jnp.where(lax.broadcast_in_dim(is_absent, masked.shape, [1]), none, masked)
                visible = self.tokens - block * BLOCK
            elif shape.chunk < BLOCK:
                # Some chunks of the block may be readable and others not.
                visible = jnp.where(block < self.end_block, self.tokens - block * BLOCK, 0)
                for index, (page, _) in enumerate(self.pages(block)):
                    end = (index + 1) * shape.chunk
                    begin = jnp.where(page < shape.num_pages, end, index * shape.chunk)
                    masked = jnp.where(column < begin, masked, jnp.where(column < end, none, masked))
            if shape.causal_span:
                row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=layout) + (tile_index * shape.tile_rows + dyn)
                position = jnp.minimum(lax.div(row, jnp.int32(shape.heads)), shape.s_q - 1)  # [tile_rows, BLOCK]
                return jnp.where(column < position + (visible - (shape.s_q - 1)), masked, none)
            return jnp.where(column < visible, masked, none)

        return lax.cond(room < BLOCK + shape.causal_span, apply, lambda: scores)


def zero_rows(buffer, work, block, dyn=0):
    """Zeroes a V tile's rows behind the request's end, where the cache may hold anything: 0 * NaN is NaN.

    `dyn` (`opaque_zero`) keeps the row numbers from being computed once, outside of a loop, and spilled.
    """
    room = work.tokens - block * BLOCK

    @pl.when((room > 0) & (room < BLOCK))
    def _():
        # 64 columns at a time, to live beside the accumulator.
        for column in range(0, buffer.shape[1], BLOCK):
            part = buffer.at[:, pl.ds(column, BLOCK)]
            values = plgpu.load(part, layout=WGMMA)  # bf16 [BLOCK, 64]
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0, layout=WGMMA) + dyn  # [BLOCK, 64]
            part[...] = jnp.where(row < room, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def for_each_piece(part, parts, run, carry=None):
    """`carry = run(piece, carry)` for each piece of the part; `run(piece)` without a carry."""
    if carry is None:
        pl.loop(parts[part], parts[part + 1])(run)
        return None
    return lax.fori_loop(parts[part], parts[part + 1], run, carry)


# ------------------------------------------------------------------------------------------------ host


def no_keys(q, d_v: int, out_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The results of a call whose shape `is_empty`."""
    out = jnp.zeros((*q.shape[:3], d_v), out_dtype)  # [b, s_q, h, d_v]
    return out, jnp.full(q.shape[:3], -jnp.inf, jnp.float32)  # [b, s_q, h]


def launch(
    body: Callable, q, kv, block_table, cache_seqlens, plan: schedule.SplitPlan, sm_scale, *,
    shape: Shape, d_v: int, out_dtype: Any, q_rows: int, result_rows: int, grid: dict[str, int], smem: dict,
    tmem: dict | None = None, config, interpret: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs a dense kernel of three warpgroups on the arguments of `sm90.dense_decode`, and merges its partial results.

    Args:
      body: the kernel, `body(inputs, outs, **scratch)`, with references by name:
        inputs q `[b, q_rows, d_qk]`, kv, parts, pieces, seqlens, sm_scale `[1]`, and table, or None in its place;
        outs out `[b, shape.tma_rows, d_v]` (float32: `[b, result_rows, d_v]`), lse `[b, result_rows]`, partial_out
        `[pieces, result_rows, d_v]`, partial_lse2 `[pieces, result_rows]`.
      shape: of the call.
      out_dtype: of out, bfloat16 or float32; all other results are float32.
      q_rows, result_rows: rows of a request in the arrays above, at least `shape.rows`.
      grid: CTAs along axes beyond "part" and "tile", by name.
      smem, tmem: scratch types by name; `smem` must fit in the shared memory.
      config: its `combine_rows` is used.

    Raises:
      ValueError: `smem` does not fit.
    """
    if (needed := mgpu.smem_bytes(smem)) > mgpu.MAX_SMEM_BYTES:
        raise ValueError(f"the dense kernel needs {needed} bytes of shared memory of {mgpu.MAX_SMEM_BYTES}")
    rows = q.reshape(shape.batch, shape.rows, shape.d_qk)  # [b, s_q * h, d_qk]
    if q_rows > shape.rows:
        rows = jnp.pad(rows, ((0, 0), (0, q_rows - shape.rows), (0, 0)))  # [b, q_rows, d_qk]
    operands = {
        "q": rows, "kv": kv, "parts": plan.parts, "pieces": plan.pieces, "seqlens": cache_seqlens,
        "sm_scale": jnp.asarray(sm_scale, jnp.float32).reshape(1),
    }  # fmt: skip
    if block_table is not None:
        operands["table"] = block_table
    out_rows = result_rows if out_dtype == jnp.float32 else shape.tma_rows  # bfloat16 goes by TMA
    results = {
        "out": jax.ShapeDtypeStruct((shape.batch, out_rows, d_v), out_dtype),
        "lse": jax.ShapeDtypeStruct((shape.batch, result_rows), jnp.float32),
        "partial_out": jax.ShapeDtypeStruct((plan.max_pieces, result_rows, d_v), jnp.float32),
        "partial_lse2": jax.ShapeDtypeStruct((plan.max_pieces, result_rows), jnp.float32),
    }

    def with_names(*refs, **scratch):
        inputs = {"table": None} | dict(zip(operands, refs, strict=False))
        body(inputs, dict(zip(results, refs[len(operands) :], strict=True)), **scratch)

    grid = {"part": plan.num_parts, "tile": shape.tiles} | grid
    out, lse, partial_out, partial_lse2 = plgpu.kernel(
        with_names,
        out_type=tuple(results.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=smem | (tmem or {}),
        kernel_name="mla_dense_decode",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    if plan.max_pieces > shape.batch:
        out, lse = combine(
            out, lse, partial_out, partial_lse2, plan.splits, rows_per_cta=config.combine_rows, interpret=interpret
        )
    return out[:, : shape.rows].reshape(*q.shape[:3], d_v), lse[:, : shape.rows].reshape(q.shape[:3])
