"""Attention of DeepSeek-V3.2 (and, without an indexer, of the V3 family) as pure functions on explicit pytrees.

A layer is its parameters (`weights.init_params`, `weights.load_layer`) and its place in a `V32Cache`. Every function
appends tokens and attends in one go; `prefill` and `decode` differ in how they are told where the tokens go. All are
legal under jit with the cache donated; shapes never depend on lengths.

Attention runs *absorbed*: W_UK is applied to the query and W_UV to the output, so that keys and values are the cached
latent itself. What is cached is the normed latent and the rotated key part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mla_jax.cache import PagedKVCache, slots_from_positions
from mla_jax.context import ContextAxis
from mla_jax.decode import mla_decode, sparse_mla_decode
from mla_jax.nn import indexer, rope, steps
from mla_jax.nn.config import V32Config
from mla_jax.nn.layers import einsum, layer_norm, project, rms_norm
from mla_jax.nn.paging import layer_table
from mla_jax.nn.steps import Step
from pallas_kernels.schedule import SplitPlan, plan_decode, plan_sparse_decode

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from mla_jax.nn.weights import Params


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("kv", "index"), meta_fields=("num_layers",)
)
@dataclasses.dataclass(frozen=True)
class V32Cache:
    """What every layer of a model remembers. One pool per kind of row, layer l's pages being the l-th equal part.

    Attributes:
      kv: latent and rotated key of every token.
      index: the indexer's keys, page for page beside `kv`; None for dense attention.
      num_layers: layers that share the pools; static.
    """

    kv: PagedKVCache
    index: PagedKVCache | None
    num_layers: int

    @property
    def pages_per_layer(self) -> int:
        return self.kv.num_pages // self.num_layers


def init_cache(config: V32Config, num_pages: int, page_size: int = 64, *, sharding=None) -> V32Cache:
    """Empty caches of all layers: `num_pages` pages of `page_size` tokens for each layer."""
    pool = functools.partial(
        PagedKVCache.zeros, num_pages=config.num_layers * num_pages, page_size=page_size, sharding=sharding
    )
    index = pool(config.index_format) if config.is_sparse else None
    return V32Cache(pool(config.kv_format), index, config.num_layers)


def check_cache(config: V32Config, cache: V32Cache) -> None:
    """Raises ValueError unless the cache's formats, page sizes and layers are those of the config."""
    if not isinstance(cache, V32Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: a V32Cache, see init_cache")
    steps.check_pool("cache.kv", cache.kv, config.kv_format, config.num_layers)
    if cache.num_layers != config.num_layers:
        raise ValueError(f"cache.num_layers={cache.num_layers}; accepted: {config.num_layers}, the config's")
    if (cache.index is not None) != config.is_sparse:
        raise ValueError(f"cache.index is {cache.index!r}; accepted: {'a cache' if config.is_sparse else 'None'}")
    if cache.index is not None:
        steps.check_pool(
            *("cache.index", cache.index, config.index_format, config.num_layers),
            page_size=cache.kv.page_size,
            num_pages=cache.kv.num_pages,
        )


def plan(
    config: V32Config,
    cache: V32Cache,
    block_table: Int32[Array, "b columns"],
    cache_seqlens: Int32[Array, "b"],
    s_q: int,
    *,
    context: ContextAxis | None = None,
) -> SplitPlan:
    """The split plan of one decode step, for all layers: make it once a step and hand it to every `decode`."""
    page_size, columns = cache.kv.page_size, block_table.shape[1]
    if not config.is_sparse:
        if context is not None:
            cache_seqlens = context.own_tokens(jnp.maximum(cache_seqlens, 0), page_size)
        return plan_decode(cache_seqlens, s_q=s_q, num_heads=config.num_heads, page_size=page_size)
    step = steps.decode_step(cache_seqlens, s_q)
    chosen = _num_chosen(config, columns * page_size)
    length = jnp.minimum(step.visible, chosen)  # [b, s_q]
    if context is not None:
        chosen = min(chosen, context.num_own(columns) * page_size)
        length = jnp.minimum(context.share(length), chosen)  # [b, s_q]
    return plan_sparse_decode(
        chosen, batch=cache_seqlens.shape[0], s_q=s_q, num_heads=config.num_heads, topk_length=length
    )


def prefill(
    params: Params,
    config: V32Config,
    cache: V32Cache,
    x: Float[Array, "b s hidden"],
    block_table: Int32[Array, "b columns"],
    lengths: Int32[Array, "b"],
    start: Int32[Array, "b"] | None = None,
    *,
    layer: int | jax.Array = 0,
    chunk: int | None = None,
    context: ContextAxis | None = None,
) -> tuple[jax.Array, V32Cache]:
    """Appends a prompt, or the next part of one, and attends from every token of it.

    Args:
      params: the layer's parameters.
      config: sizes; static.
      cache: every layer's caches. Donate them.
      x: hidden states after the input norm, in the config's dtype. Row r holds `lengths[r]` tokens, then padding.
      block_table: each request's pages, counted within a layer; out of range means no page.
      lengths: tokens of each request in `x`, 0 to s. A request of length 0 is left alone.
      start: tokens that each request already has in the cache; default none.
      layer: which layer's part of the pools; may be traced (`lax.scan` over layers).
      chunk: attend from at most this many tokens at a time, which bounds memory; default all at once.
      context: the mesh axis that the pools' pages are spread over, inside `jax.shard_map`: what
        `mla_jax.sharding.ModuleSharding` passes. `block_table` then has all columns, each with the page's number on the
        rank that holds it (`mla_jax.context`).

    Returns:
      out `[b, s, hidden]` and the caches. out is 0 in padding, and NaN for tokens that have no place: their page is not
      there, or they lie past the table. Those are not written.

    Raises:
      ValueError: shapes, dtypes or caches that do not fit the config, or (outside jit) a token without a place.
    """
    begin = jnp.zeros(x.shape[0], jnp.int32) if start is None else start
    steps.check_call(config, params, config.param_specs(), x, block_table, lengths=lengths, start=begin)
    check_cache(config, cache)
    attend = functools.partial(
        _attend, params, config, block_table=block_table, layer=layer, plan=None, context=context
    )
    steps.check_places(
        "block_table", block_table, cache.kv.page_size, cache.pages_per_layer, begin, lengths, x.shape[1]
    )
    return steps.in_chunks(attend, cache, x, begin, lengths, chunk)


def decode(
    params: Params,
    config: V32Config,
    cache: V32Cache,
    x: Float[Array, "b s_q hidden"],
    block_table: Int32[Array, "b columns"],
    cache_seqlens: Int32[Array, "b"],
    *,
    layer: int | jax.Array = 0,
    plan: SplitPlan | None = None,
    context: ContextAxis | None = None,
) -> tuple[jax.Array, V32Cache]:
    """One decode step of s_q tokens a request (more than one: multi-token prediction).

    Args:
      cache_seqlens: tokens of each request, the s_q new ones included; 0 for a padded row. To take rejected tokens
        back, pass the smaller length the next time.
      plan: what `plan` returned for these lengths; default: every layer makes its own.
      For the others, and for what comes back, see `prefill`.
    """
    steps.check_call(config, params, config.param_specs(), x, block_table, cache_seqlens=cache_seqlens)
    check_cache(config, cache)
    step = steps.decode_step(cache_seqlens, x.shape[1])
    steps.check_places(
        "block_table", block_table, cache.kv.page_size, cache.pages_per_layer, step.start, step.count, x.shape[1]
    )
    return _attend(params, config, cache, x, step, block_table=block_table, layer=layer, plan=plan, context=context)


def _num_chosen(config: V32Config, capacity: int) -> int:
    return min(config.index_topk, capacity)


def _attend(
    params: Params,
    config: V32Config,
    cache: V32Cache,
    x: jax.Array,  # [b, s, hidden]
    step: Step,
    *,
    block_table: jax.Array,  # [b, columns]
    layer: int | jax.Array,
    plan: SplitPlan | None,
    context: ContextAxis | None,
) -> tuple[jax.Array, V32Cache]:
    page_size = cache.kv.page_size
    table = layer_table(block_table, layer, cache.pages_per_layer)  # [b, columns]
    slots = slots_from_positions(step.positions, table, page_size)  # [b, s]
    placed = slots >= 0  # [b, s]: on some rank
    if context is not None:
        slots = slots_from_positions(step.positions, context.only_own(table), page_size)  # [b, s]
    cos, sin = rope.cos_sin(jnp.maximum(step.positions, 0), config.rope)  # [b, s, rope / 2] each

    q_latent = rms_norm(project(x, params["wq_a"]), params["q_norm"], config.norm_eps)  # [b, s, q_lora]
    q = absorbed_query(params, config, q_latent, cos, sin)  # [b, s, h, d_qk]
    q = q.astype(config.kv_format.compute_dtype)
    kv = steps.append_rows(cache.kv, latent_row(params, config, x, cos, sin), slots, config.scale_rule)
    options: dict[str, Any] = dict(sm_scale=config.sm_scale, plan=plan, implementation=config.implementation)
    index = None
    if cache.index is not None:
        index = steps.append_rows(cache.index, index_key(params, config, x, cos, sin), slots, indexer.SCALE_RULE)
        rotate = functools.partial(rope.rotate_head, cos=cos[:, :, None], sin=sin[:, :, None])
        k, visible = _num_chosen(config, table.shape[1] * page_size), step.visible
        if context is not None:
            table, visible = context.own_columns(table), context.own_tokens(visible, page_size)
        chosen = indexer.choose(params, config, index, x, q_latent, rotate, table, visible, k, context)  # [b, s, k]
        keys = slots_from_positions(chosen, table, page_size)  # [b, s, k]
        if context is None:
            o = sparse_mla_decode(q, kv, keys, topk_length=jnp.minimum(visible, k), **options)  # [b, s, h, latent]
        else:
            o = context.sparse_mla_decode(q, kv, keys, **options)  # [b, s, h, latent]
    else:
        # The op's rows end with the request's last key: a row's tokens move behind its padding, and back.
        spare = (x.shape[1] - step.count)[:, None]  # [b, 1]
        seqlens = jnp.where(step.count > 0, step.start + step.count, 0)  # [b]
        attend = mla_decode if context is None else context.mla_decode
        o = attend(steps.roll(q, spare), kv, table, seqlens, is_causal=True, **options)  # [b, s, h, latent]
        o = steps.roll(o, -spare)  # [b, s, h, latent]
    out = output(params, o.astype(config.dtype))  # [b, s, hidden]
    out = steps.mark(out, step, placed)  # [b, s, hidden]
    return out, V32Cache(kv, index, cache.num_layers)


# -- the parts of a layer, in the order of a step ----------------------------------------------------------------------


def absorbed_query(params: Params, config: V32Config, q_latent: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Query rows as the cache is read: q_latent `[b, s, q_lora]` -> `[b, s, h, d_qk]`, [q_nope W_UK | rotated]."""
    b, s, _ = q_latent.shape
    q = project(q_latent, params["wq_b"]).reshape(b, s, config.num_heads, -1)  # [b, s, h, nope + rope]
    q_nope, q_pe = q[..., : config.qk_nope_dim], q[..., config.qk_nope_dim :]
    q_pe = rope.rotate_pairs(q_pe, cos[:, :, None], sin[:, :, None])  # [b, s, h, rope]
    q_nope = einsum("bshn,hnc->bshc", q_nope, params["w_uk"])  # [b, s, h, latent]
    return jnp.concatenate([q_nope, q_pe], axis=-1)


def latent_row(params: Params, config: V32Config, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """What is cached of each token: x `[b, s, hidden]` -> `[b, s, d_qk]`, [normed latent | rotated key part]."""
    kv = project(x, params["wkv_a"])  # [b, s, latent + rope]
    latent = rms_norm(kv[..., : config.kv_lora_rank], params["kv_norm"], config.norm_eps)  # [b, s, latent]
    k_pe = rope.rotate_pairs(kv[..., config.kv_lora_rank :], cos, sin)  # [b, s, rope]
    return jnp.concatenate([latent, k_pe], axis=-1)


def index_key(params: Params, config: V32Config, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The indexer's key of each token: x `[b, s, hidden]` -> `[b, s, index_dim]`. RoPE half-split, first dims."""
    key = project(x, params["index_wk"])  # [b, s, index_dim]
    key = layer_norm(key, params["index_k_norm_weight"], params["index_k_norm_bias"], config.norm_eps)
    return indexer.hadamard(rope.rotate_head(key, cos, sin))


def output(params: Params, o: jax.Array) -> jax.Array:
    """o `[b, s, h, latent]` -> `[b, s, hidden]`: W_UV, then the output projection."""
    o = einsum("bshc,hvc->bshv", o, params["w_uv"])  # [b, s, h, v]
    return project(o.reshape(*o.shape[:2], -1), params["wo"])
