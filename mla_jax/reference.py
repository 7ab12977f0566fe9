"""The oracle: both decode ops in plain float32, as the formulas read.

    s[r, j, h, t] = sm_scale * q[r, j, h, :] . k[t, :]        over the valid keys t of row (r, j)
    lse           = log(sum_t exp(s))                         natural log, -inf without keys
    out           = sum_t exp(s - lse) * k[t, :d_v]           0 without keys
    with a sink:    out *= exp(lse) / (exp(lse) + exp(sink))

Keys are what the cache unpacks to: value * scale rounded to bfloat16 once. Everything is materialised and nothing is
fast; the tests of the library compare with this and with nothing else. Arguments and conventions are those of
`mla_jax.mla_decode` and `mla_jax.sparse_mla_decode`, except that `out` stays float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.cache import PagedKVCache, gather_rows
from mla_jax.lse import sink_factor

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32


def _attend(
    q: Float[Array, "b s_q h d_qk"],
    keys: Float[Array, "b s_q n d_qk"],
    valid: Bool[Array, "b s_q n"],
    sm_scale: Float32[Array, ""],
    d_v: int,
    attn_sink: Float32[Array, "h"] | None,
) -> tuple[Float32[Array, "b s_q h d_v"], Float32[Array, "b s_q h"]]:
    # The scale goes onto q: XLA may fuse a product of scores and scale with `- top`, which rounds it but once, and then
    # scores of 1e9 leave not even the largest key a weight.
    q = q.astype(jnp.float32) * sm_scale
    keys = jnp.where(valid[..., None], keys, 0).astype(jnp.float32)  # garbage in an invalid row: 0 * NaN is NaN
    scores = jnp.einsum("bshd,bsnd->bshn", q, keys, precision=lax.Precision.HIGHEST)
    scores = jnp.where(valid[:, :, None, :], scores, -jnp.inf)  # [b, s_q, h, n]
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)  # [b, s_q, h]
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top[..., None])  # [b, s_q, h, n]
    total = jnp.sum(weights, axis=-1)  # [b, s_q, h]
    some = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))  # [b, s_q, h]
    values = keys[..., :d_v]  # [b, s_q, n, d_v]
    out = jnp.einsum("bshn,bsnd->bshd", weights / some[..., None], values, precision=lax.Precision.HIGHEST)
    if attn_sink is not None:
        out = out * sink_factor(lse, attn_sink)[..., None]
    return out, lse


@functools.partial(jax.jit, static_argnames=("is_causal",))
def mla_decode(
    q: Float[Array, "b s_q h d_qk"],
    cache: PagedKVCache,
    block_table: Int32[Array, "b max_pages"] | None,
    cache_seqlens: Int32[Array, "b"],
    *,
    sm_scale: float,
    is_causal: bool = False,
) -> tuple[Float32[Array, "b s_q h d_v"], Float32[Array, "b s_q h"]]:
    """Dense decode over a paged cache; see the module's docstring."""
    b, s_q, _, _ = q.shape
    page_size = cache.page_size
    if block_table is None:
        block_table = jnp.arange(b, dtype=jnp.int32)[:, None]  # [b, 1]: page i belongs to request i
    n = block_table.shape[1] * page_size  # keys the table can hold
    position = jnp.arange(n, dtype=jnp.int32)  # [n]
    page = jnp.repeat(block_table, page_size, axis=1)  # [b, n]
    known = (page >= 0) & (page < cache.num_pages)
    slot = jnp.where(known, jnp.where(known, page, 0) * page_size + position[None] % page_size, -1)  # [b, n]

    seqlen = jnp.clip(cache_seqlens, 0, n)  # [b]
    row = jnp.arange(s_q, dtype=jnp.int32)  # [s_q]
    short = s_q - 1 - row if is_causal else jnp.zeros_like(row)
    end = seqlen[:, None] - short[None]  # [b, s_q]: keys below `end` count
    valid = known[:, None, :] & (position[None, None] < end[..., None])  # [b, s_q, n]

    keys = gather_rows(cache, slot)[:, None]  # [b, 1, n, d_qk]
    keys = jnp.broadcast_to(keys, (b, s_q, *keys.shape[2:]))  # [b, s_q, n, d_qk]
    return _attend(q, keys, valid, jnp.float32(sm_scale), cache.format.d_v, None)


def _scope(
    cache: PagedKVCache, indices: Int32[Array, "b s_q n"], topk_length: Int32[Array, "b s_q"] | None
) -> tuple[Float[Array, "b s_q n d_qk"], Bool[Array, "b s_q n"]]:
    """Keys that `indices` names in one cache, and which of them count."""
    n = indices.shape[-1]
    valid = (indices >= 0) & (indices < cache.num_slots)  # [b, s_q, n]
    if topk_length is not None:
        valid &= jnp.arange(n, dtype=jnp.int32)[None, None] < topk_length[..., None]
    return gather_rows(cache, jnp.where(valid, indices, -1)), valid


@jax.jit
def sparse_mla_decode(
    q: Float[Array, "b s_q h d_qk"],
    cache: PagedKVCache,
    indices: Int32[Array, "b s_q topk"],
    *,
    sm_scale: float,
    topk_length: Int32[Array, "b *s_q"] | None = None,
    attn_sink: Float32[Array, "h"] | None = None,
    extra_cache: PagedKVCache | None = None,
    extra_indices: Int32[Array, "b s_q extra_topk"] | None = None,
    extra_topk_length: Int32[Array, "b *s_q"] | None = None,
) -> tuple[Float32[Array, "b s_q h d_v"], Float32[Array, "b s_q h"]]:
    """Sparse decode over one or two caches; see the module's docstring."""
    b, s_q, _, _ = q.shape

    def by_row(length):  # [b] or [b, s_q] -> [b, s_q]
        return length if length is None or length.ndim == 2 else jnp.broadcast_to(length[:, None], (b, s_q))

    keys, valid = _scope(cache, indices.reshape(b, s_q, indices.shape[-1]), by_row(topk_length))
    if extra_cache is not None and extra_indices is not None:
        extra_indices = extra_indices.reshape(b, s_q, extra_indices.shape[-1])
        more_keys, more_valid = _scope(extra_cache, extra_indices, by_row(extra_topk_length))
        keys = jnp.concatenate([keys, more_keys], axis=2)  # [b, s_q, topk + extra_topk, d_qk]
        valid = jnp.concatenate([valid, more_valid], axis=2)
    return _attend(q, keys, valid, jnp.float32(sm_scale), cache.format.d_v, attn_sink)
