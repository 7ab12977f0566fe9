"""The lightning indexer: a small attention that scores every cached key, so that the real one reads only the best.

    I[t, s] = sum over heads h of relu(q[t, h] . k[s]) * w[t, h]

Keys are cached on their own, 128 e4m3 values and one float32 scale each (`INDEX_FP8`), under the block table of the
rows that they speak for. Queries and keys pass a Hadamard transform first: it is orthogonal, so scores stay what they
are, but it spreads outliers over all dims before e4m3 rounds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax.cache import PagedKVCache
from mla_jax.context import ContextAxis
from mla_jax.nn import topk
from mla_jax.nn.layers import einsum, project
from mla_jax.quantize import ScaleRule
from pallas_kernels.formats import KVFormat
from pallas_kernels.indexer import scores as kernel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

    from mla_jax.nn.config import Model1Config, V32Config
    from mla_jax.nn.weights import Params

SCALE_RULE: ScaleRule = "pow2_low"  # how index keys are quantised, see mla_jax.quantize

Implementation = Literal["kernel", "xla"]

SCORE_BYTES = 32 * 2**20
"""Upper bound for the per-head scores that exist at a time; about what stays in a GPU's L2 cache."""


@functools.cache
def hadamard_matrix(d: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of order d, a power of two, entries +-1: int8 `[d, d]`."""
    if d < 1 or d & (d - 1):
        raise ValueError(f"d={d}; accepted: a power of two")
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard(x: Float[Array, "*n d"]) -> jax.Array:
    """x times the orthogonal Hadamard matrix: `[..., d]`, x's dtype."""
    d = x.shape[-1]
    spread = einsum("...i,ij->...j", x, jnp.asarray(hadamard_matrix(d), x.dtype), dtype=jnp.float32)  # [..., d]
    return (spread * d**-0.5).astype(x.dtype)


def scores(
    q: Float[Array, "b s heads d"],
    weights: Float32[Array, "b s heads"],
    cache: PagedKVCache,
    block_table: Int32[Array, "b columns"],
    visible: Int32[Array, "b s"],
    *,
    implementation: Implementation | None = None,
) -> Float32[Array, "b s n"]:
    """Scores of every position that a block table spans, n = columns * page_size.

    Positions whose page does not exist score -inf. Positions at or past `visible` hold anything, NaN included: the
    caller masks them (`topk.select_topk`).

    Args:
      q: queries after RoPE and Hadamard, rounded to bfloat16 unless the cache is `INDEX_F32`.
      weights: the heads' weights, every constant factor included.
      cache: index keys.
      block_table: pages of each request; entries out of range are no pages.
      visible: how many positions each query may see.
      implementation: "kernel" (`pallas_kernels.indexer.scores`, NVIDIA GPUs) or "xla"; default: the first where it is
        compiled for CUDA and takes the shapes.

    Raises:
      NotImplementedError: "kernel" for shapes or a format that it does not take.
    """
    plain = functools.partial(_scores_xla, page_size=cache.page_size, fmt=cache.format)
    if implementation == "xla":
        return plain(q, weights, cache.data, block_table, visible)
    try:
        kernel.check(cache.format, cache.page_size, q.shape[2], q.shape[1])
    except NotImplementedError:
        if implementation == "kernel":
            raise
        return plain(q, weights, cache.data, block_table, visible)
    fused = functools.partial(kernel.scores, page_size=cache.page_size)
    arguments = q.astype(jnp.bfloat16), weights, cache.data, block_table, visible
    if implementation == "kernel":
        return fused(*arguments)
    return lax.platform_dependent(*arguments, cuda=fused, default=plain)


def _scores_xla(q, weights, data, block_table, visible, *, page_size: int, fmt: KVFormat) -> jax.Array:
    """Works through the table some columns at a time, as far as the longest request reaches, and no page past it."""
    cache = PagedKVCache(data, fmt, page_size)
    q = q.astype(cache.format.compute_dtype)
    b, s, heads, _ = q.shape
    columns = block_table.shape[1]
    step = max(1, min(columns, SCORE_BYTES // max(1, b * s * heads * page_size * 4)))  # columns at a time
    steps = -(-columns // step)
    table = jnp.pad(block_table, ((0, 0), (0, steps * step - columns)), constant_values=-1)  # [b, steps * step]
    needed = lax.div(jnp.max(visible, initial=0) + (step * page_size - 1), jnp.int32(step * page_size))

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        pages = lax.dynamic_slice_in_dim(table, i * step, step, axis=1)  # [b, step]
        exists = (pages >= 0) & (pages < cache.num_pages)  # [b, step]
        keys, scales = _read_pages(cache, jnp.where(exists, pages, 0))  # [b, c, d] and [b, c], c = step * page_size
        per_head = jnp.maximum(einsum("bshd,bcd->bshc", q, keys, dtype=jnp.float32), 0)  # [b, s, heads, c]
        score = jnp.sum(per_head * weights[..., None], axis=2)  # [b, s, c]
        if scales is not None:
            score = score * scales[:, None, :]  # scales are positive: relu lets them through
        score = jnp.where(jnp.repeat(exists, page_size, axis=1)[:, None, :], score, -jnp.inf)
        return lax.dynamic_update_slice_in_dim(out, score, i * step * page_size, axis=2)

    empty = jnp.full((b, s, steps * step * page_size), -jnp.inf, jnp.float32)
    return lax.fori_loop(0, jnp.minimum(needed, steps), one, empty)[..., : columns * page_size]


def _read_pages(cache: PagedKVCache, pages: Int32[Array, "b m"]) -> tuple[jax.Array, jax.Array | None]:
    """Keys `[b, m * page_size, d]` as q's dtype holds them exactly, and their scales `[b, m * page_size]`."""
    b, m = pages.shape
    fmt, page_size = cache.format, cache.page_size
    tokens = m * page_size
    data = cache.data.at[pages].get(mode="promise_in_bounds")  # [b, m, *page]
    if not fmt.is_quantized:
        return data.reshape(b, tokens, fmt.d_qk), None
    where = {role: fmt.locate(role) for role in ("nope", "scale")}
    out = {}
    for role, (record, _, field) in where.items():
        first = fmt.area_offset_bytes(record, page_size)
        area = data[..., first : first + page_size * field.num_bytes]  # [b, m, bytes]
        area = area.reshape(b, tokens, field.count, field.dtype.itemsize)
        if field.dtype.itemsize == 1:
            area = area[..., 0]
        out[role] = lax.bitcast_convert_type(area, field.dtype)  # [b, tokens, count]
    return out["nope"].astype(fmt.compute_dtype), out["scale"][..., 0]


def head_weights(x: Float[Array, "b s hidden"], projection: Float[Array, "heads hidden"], d: int) -> jax.Array:
    """Weight of every head's scores, float32 `[b, s, heads]`: the projection times heads^-0.5 d^-0.5."""
    return project(x, projection, dtype=jnp.float32) * (projection.shape[0] * d) ** -0.5


def choose(
    params: Params,
    config: V32Config | Model1Config,
    cache: PagedKVCache,
    x: Float[Array, "b s hidden"],
    q_latent: Float[Array, "b s q_lora"],
    rotate: Callable[[jax.Array], jax.Array],
    block_table: Int32[Array, "b columns"],
    visible: Int32[Array, "b s"],
    k: int,
    context: ContextAxis | None = None,
) -> Int32[Array, "b s k"]:
    """The positions that each query attends to, unordered, -1 for none (those come last).

    With a context axis: those of the k positions that this rank holds, as positions in its own columns, -1 anywhere.

    Args:
      params, config: of the layer.
      cache: index keys of all layers; `block_table` is this layer's (of this rank's columns).
      x, q_latent: the layer's input and its query latent.
      rotate: RoPE of queries `[b, s, heads, d]` at their positions.
      visible: how many positions (of this rank's columns) each query may see.
      k: how many to choose.
      context: the mesh axis that the keys are spread over, if any.
    """
    b, s, _ = x.shape
    q = project(q_latent, params["index_wq_b"]).reshape(b, s, config.index_heads, -1)  # [b, s, heads, d]
    q = hadamard(rotate(q))  # [b, s, heads, d]
    weights = head_weights(x, params["index_weights"], config.index_dim)  # [b, s, heads]
    plain = config.implementation == "xla"
    ranked = scores(q, weights, cache, block_table, visible, implementation="xla" if plain else None)  # [b, s, n]
    method: topk.Method | None = "radix" if plain else None
    if context is None:
        return topk.select_topk(ranked, visible, k, method=method)
    best = topk.select_topk(ranked, visible, min(k, ranked.shape[-1]), method=method)  # [b, s, c]
    best_scores = jnp.take_along_axis(ranked, jnp.maximum(best, 0), axis=-1)  # [b, s, c]
    positions = context.positions(best, cache.page_size)  # [b, s, c]
    return jnp.where(topk.among_best(best_scores, positions, k, context.name), best, -1)  # [b, s, c]
