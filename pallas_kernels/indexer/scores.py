"""The lightning indexer's scores in one kernel: every index key is read once, as e4m3, straight from its page.

    I[t, s] = scale[s] * sum over heads of relu(q[t, head] . k[s]) * w[t, head]

Per-head scores never leave the registers: in plain XLA they are 64 times the output, written and read again.

Keys become float16, not bfloat16: e4m3 is exact in both, and a GPU converts it to float16 directly (123 us against
149 us on an H200: b 64, 64 heads, 32k tokens; reading the keys takes 58 us at 4.8 TB/s). float16 has
a small range, so queries are first divided by a power of two that brings each head's largest value to [1, 2); relu lets
it through, and it goes into the weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats import E4M3, INDEX_FP8, KVFormat
from pallas_kernels.wide_offsets import with_wide_offsets

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float32, Int32, UInt8

# Measured on an H200 at b 64 and 512 pages: 4 warps 123-125 us, 8 warps 237 us, 2 warps 219 us (bfloat16).
NUM_WARPS = 4
NUM_STAGES = 3
MAX_PAGES_PER_PROGRAM = 32  # the queries are loaded once for so many pages: 135 us with 8, 125 with 16, 123 with 32
# The kernel holds the code of a step's queries one after the other: 16 of them compile in some 20 s, 64 in minutes.
MAX_QUERIES = 16
MIN_PROGRAMS = 1024  # about 8 for each SM; below that, programs take fewer pages


def check(fmt: KVFormat, page_size: int, num_heads: int, num_queries: int) -> None:
    """Raises NotImplementedError for what the kernel does not take. `num_queries` is a request's, in one step."""
    if fmt != INDEX_FP8:
        raise NotImplementedError(f"format {fmt.name}; this kernel reads {INDEX_FP8.name}")
    if num_queries > MAX_QUERIES:
        raise NotImplementedError(f"num_queries={num_queries}; this kernel takes at most {MAX_QUERIES} a request")
    for name, value in (("page_size", page_size), ("num_heads", num_heads)):
        if value < 16 or value & (value - 1):
            raise NotImplementedError(f"{name}={value}; this kernel takes powers of two of at least 16")


def scores(
    q: BFloat16[Array, "b s heads d"],
    weights: Float32[Array, "b s heads"],
    data: UInt8[Array, "pages page_bytes"],
    block_table: Int32[Array, "b columns"],
    visible: Int32[Array, "b s"],
    *,
    page_size: int,
    interpret: bool = False,
) -> Float32[Array, "b s n"]:
    """Scores of every position that a block table spans, n = columns * page_size; -inf where there is no page.

    Positions at or past the greatest `visible` of a request are not written: they hold anything.
    """
    b, s, heads, d = q.shape
    columns = block_table.shape[1]
    check(INDEX_FP8, page_size, heads, s)
    reach = jnp.max(visible, axis=1)  # [b]
    num_pages = data.shape[0]
    each = min(MAX_PAGES_PER_PROGRAM, max(1, b * columns // MIN_PROGRAMS))  # pages of a program
    q, weights = _normalized(q, weights)
    if not interpret:
        data = with_wide_offsets(data)
    static = dict(each=each, page_size=page_size, s=s, heads=heads, d=d, columns=columns, pages=num_pages)
    return pl.pallas_call(
        functools.partial(_kernel, **static),
        out_shape=jax.ShapeDtypeStruct((b, s, columns * page_size), jnp.float32),
        grid=(b, pl.cdiv(columns, each)),
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=interpret,
        name="index_scores",
    )(q, weights, data, block_table, reach)


def _normalized(q: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q as float16 `[b, s, heads, d]` with each head's largest value in [1, 2), weights `[b, s, heads]` to match."""
    largest = jnp.max(jnp.abs(q.astype(jnp.float32)), axis=-1)  # [b, s, heads]
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), 23)  # biased by 127
    exponent = jnp.clip(exponent, 1, 253)  # [b, s, heads]
    up, down = (lax.bitcast_convert_type(lax.shift_left(e, 23), jnp.float32) for e in (exponent, 254 - exponent))
    return (q.astype(jnp.float32) * down[..., None]).astype(jnp.float16), weights * up


def _kernel(q_ref, w_ref, data_ref, table_ref, reach_ref, out_ref, *, each, page_size, s, heads, d, columns, pages):
    r, first = pl.program_id(0), pl.program_id(1) * each
    end = jnp.minimum(jnp.minimum(first + each, columns), pl.cdiv(reach_ref[r], page_size))
    token = jnp.arange(page_size, dtype=jnp.int32)  # [page_size]
    within = token[:, None] * d + jnp.arange(d, dtype=jnp.int32)[None, :]  # [page_size, d]: bytes of the values
    scale_at = page_size * d + 4 * token  # [page_size]: first bytes of the scales

    for j in range(s):
        q = q_ref[r, j].T  # [d, heads]
        w = w_ref[r, j]  # [heads]

        def one_page(column, carry, j=j, q=q, w=w):
            page = table_ref[r, column]
            exists = (page >= 0) & (page < pages)
            page = jnp.where(exists, page, 0)
            key = lax.bitcast_convert_type(data_ref[page, within], E4M3).astype(jnp.float16)  # [page_size, d]
            dot = jnp.dot(key, q, preferred_element_type=jnp.float32)  # [page_size, heads]: summed within a warp
            score = jnp.sum(jnp.maximum(dot, 0.0) * w[None, :], axis=1)  # [page_size]
            score = jnp.where(exists, score * _scales(data_ref, page, scale_at), -jnp.inf)  # [page_size]
            out_ref[r, j, pl.ds(column * page_size, page_size)] = score
            return carry

        lax.fori_loop(first, end, one_page, 0)


def _scales(data_ref, page, at):
    """float32 `[page_size]` from their little-endian bytes: a wider view of the pool would be a copy of it."""
    byte = [data_ref[page, at + i].astype(jnp.int32) for i in range(4)]
    bits = byte[0] | (byte[1] << 8) | (byte[2] << 16) | (byte[3] << 24)
    return lax.bitcast_convert_type(bits, jnp.float32)
