"""Merges the partial results of items that were cut into several pieces.

    out = sum_i exp(lse_i) out_i / sum_i exp(lse_i),   lse = log sum_i exp(lse_i)

in base 2, over the pieces i of an item. An attention sink s (a logit without a value) multiplies out by
1 / (1 + exp(s - lse)). Items of one piece have been written by the decode kernel already, sink included, and are left
alone. Used by the dense op (items: requests; rows: s_q * h) and by the sparse op (items: query rows; rows: h).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mgpu

# Vectors that a CTA loads before it waits for the first: rows * pieces. 16 vectors of 4 floats a thread are 64
# registers, and hide the latency of one.
VECTORS_IN_FLIGHT = 16
# (rows of all items, rows of a CTA) from there on. With few rows one CTA a row fills the GPU; with many, CTAs cost more
# than they do: on an H100 11 us against 2.7 us for 16384 rows, 8 a CTA. The limits are measured (docs/log.md).
ROWS_PER_CTA = ((2048, 8), (1024, 2), (0, 1))

NEVER = -1e30  # stands in for a maximum of -inf: exp2(-inf - NEVER) is 0, exp2(-inf + inf) is not


def combine(
    out: jax.Array,
    lse: jax.Array,
    partial_out: jax.Array,
    partial_lse2: jax.Array,
    splits: jax.Array,
    attn_sink: jax.Array | None = None,
    *,
    rows_per_cta: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Fills in the rows of items with several pieces; all other rows stay as they are.

    Args:
      out: bf16 or float32 `[items, rows, d_v]`. Rows may be padded in any of the arrays; those count that all four
        have.
      lse: float32 `[items, rows]`, natural logarithm.
      partial_out: float32 `[max_pieces, rows, d_v]`, each normalised by its own sum; 0 for a piece without keys.
      partial_lse2: float32 `[max_pieces, rows]`, base-2 logarithm; -inf for a piece without keys.
      splits: int32 `[items + 1]`, as in `SplitPlan`.
      attn_sink: float32 `[heads]`, natural units; row r belongs to head r % heads.
      rows_per_cta: rows that one CTA merges; None chooses.
      interpret: Pallas' GPU interpreter parameters, for tests.

    Returns:
      `(out, lse)`. LSE does not include the sink. A row without any key: out 0, lse -inf.
    """
    items, rows = len(out), min(x.shape[1] for x in (out, lse, partial_out, partial_lse2))
    if rows_per_cta is None:
        rows_per_cta = next(each for least, each in ROWS_PER_CTA if items * rows >= least)
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    operands = (partial_out, partial_lse2, splits) + (() if attn_sink is None else (attn_sink,))

    def body(*refs):
        _merge_rows(*refs, out_ref=out_ref, lse_ref=lse_ref, num_rows=rows, rows_per_cta=rows_per_cta)

    plgpu.kernel(
        body,
        out_type=(),
        grid=(items, -(-rows // rows_per_cta)),
        grid_names=("item", "rows"),
        kernel_name="mla_combine",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _merge_rows(
    partial_out,  # f32 [max_pieces, rows or more, d_v]
    partial_lse2,  # f32 [max_pieces, rows or more]
    splits,  # i32 [items + 1]
    attn_sink=None,  # f32 [heads]
    *,
    out_ref,  # bf16 or f32 [items, rows or more, d_v]
    lse_ref,  # f32 [items, rows or more]
    num_rows,
    rows_per_cta,
):
    """One CTA: `rows_per_cta` rows of one item, all pieces."""
    d_v = partial_out.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((d_v,), vec_size=4)
    in_flight = max(1, VECTORS_IN_FLIGHT // rows_per_cta)
    item = lax.axis_index("item")
    first_row = lax.axis_index("rows") * rows_per_cta
    # Behind the last row there is padding to read, but nothing to write.
    rows = [jnp.minimum(first_row + r, num_rows - 1) for r in range(rows_per_cta)]
    first, behind = splits[item], splits[item + 1]

    @pl.when(behind - first > 1)
    def _():
        def merge(step, carry):
            piece = first + step * in_flight
            pieces = [jnp.minimum(piece + j, behind - 1) for j in range(in_flight)]
            # Loads first, all of them, then arithmetic: [d_v] and [] per row and piece.
            values = [[plgpu.load(partial_out.at[p, row], layout=layout) for p in pieces] for row in rows]
            lses = [[partial_lse2[p, row] for p in pieces] for row in rows]
            merged = []
            for (acc, total, top), row_values, row_lses in zip(carry, values, lses, strict=True):
                row_lses = [
                    jnp.where(piece + j < behind, row_lse, -jnp.inf) for j, row_lse in enumerate(row_lses)
                ]
                new_top = top
                for row_lse in row_lses:
                    new_top = jnp.maximum(new_top, row_lse)
                rescale = jnp.exp2(top - new_top)
                acc, total = acc * rescale, total * rescale
                for value, row_lse in zip(row_values, row_lses, strict=True):
                    weight = jnp.exp2(row_lse - new_top)
                    acc, total = acc + value * weight, total + weight
                merged.append((acc, total, new_top))
            return tuple(merged)

        zero = plgpu.layout_cast(jnp.zeros((d_v,), jnp.float32), layout)  # [d_v]
        start = tuple((zero, jnp.float32(0), jnp.float32(NEVER)) for _ in rows)
        steps = lax.div(behind - first + (in_flight - 1), jnp.int32(in_flight))
        merged = lax.fori_loop(0, steps, merge, start)
        for r, (acc, total, top) in enumerate(merged):

            @pl.when(first_row + r < num_rows)
            def _(row=rows[r], acc=acc, total=total, top=top):
                has_keys = total != 0  # NaN counts as a key
                factor = jnp.where(has_keys, 1.0 / total, 0.0)
                lse2 = jnp.where(has_keys, top + jnp.log2(total), -jnp.inf)
                if attn_sink is not None:
                    sink2 = attn_sink[lax.rem(row, jnp.int32(attn_sink.shape[0]))] * mgpu.LOG2_E
                    factor = jnp.where(has_keys, factor / (1.0 + jnp.exp2(sink2 - lse2)), 0.0)
                out_ref[item, row] = (acc * factor).astype(out_ref.dtype)
                lse_ref[item, row] = lse2 * mgpu.LN_2
