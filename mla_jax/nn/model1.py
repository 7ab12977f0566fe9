"""Attention of DeepSeek-V4 ("MODEL1" in FlashMLA) as pure functions on explicit pytrees.

Every layer attends to a sliding window of plain rows. A compressed layer (ratio 4 or 128) also attends to one entry
for every `ratio` tokens of the whole context: to all of them at ratio 128, to those its indexer picks at ratio 4. K and
V are the same row, rotated part included; the output's rotated part is therefore rotated back at the query's position.

Three tables say where a request lives, whatever the layer:

* `window`: its pages in the window pool, used as a ring: position t stands in column (t // page_size) % columns.
* `context`: column i stands for tokens [i, i + 1) * page_tokens; in a pool of compressed entries a page holds the
  `page_tokens / ratio` entries of those tokens, so that one table serves both ratios and the indexer's keys.
* `row`: its ring of tokens that no entry holds yet (`compressor`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache, slots_from_positions
from mla_jax.context import ContextAxis
from mla_jax.decode import sparse_mla_decode
from mla_jax.nn import compressor, indexer, rope, steps
from mla_jax.nn.config import Model1Config, Model1Layer
from mla_jax.nn.layers import einsum, project, rms_norm
from mla_jax.nn.paging import layer_table
from mla_jax.nn.steps import Step
from mla_jax.quantize import ScaleRule
from pallas_kernels.schedule import SplitPlan, plan_sparse_decode

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from mla_jax.nn.weights import Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=("window", "context", "row"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Model1Tables:
    """Where each request lives; see the module's docstring. Anything out of range means no place.

    Attributes:
      window: int32 `[b, window columns]`, pages counted within a layer.
      context: int32 `[b, context columns]`, pages counted within a layer. Not read by ratio-0 layers.
      row: int32 `[b]`, counted within a layer. Not read by ratio-0 layers.
    """

    window: jax.Array
    context: jax.Array
    row: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("entries", "rings", "index", "index_rings"),
    meta_fields=("num_layers",),
)
@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """What the compressed layers of one ratio remember, one pool of each kind for all of them.

    Attributes:
      entries: compressed rows.
      rings: float32 `[layers * rows, ring, 2, width]`, tokens that no entry holds yet (`compressor`).
      index, index_rings: the same for the indexer; None for ratio 128.
      num_layers: layers of this ratio; static.
    """

    entries: PagedKVCache
    rings: jax.Array
    index: PagedKVCache | None
    index_rings: jax.Array | None
    num_layers: int

    @property
    def pages_per_layer(self) -> int:
        return self.entries.num_pages // self.num_layers

    @property
    def rows_per_layer(self) -> int:
        return self.rings.shape[0] // self.num_layers


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("window", "ratio4", "ratio128"), meta_fields=("num_layers",)
)
@dataclasses.dataclass(frozen=True)
class Model1Cache:
    """What every layer of a model remembers.

    Attributes:
      window: rows of the sliding windows of all layers.
      ratio4, ratio128: caches of the compressed layers; None where the config has none.
      num_layers: all layers; static.
    """

    window: PagedKVCache
    ratio4: CompressedCache | None
    ratio128: CompressedCache | None
    num_layers: int

    def of(self, ratio: int) -> CompressedCache | None:
        return {0: None, 4: self.ratio4, 128: self.ratio128}[ratio]

    @property
    def pages_per_layer(self) -> int:
        """Of the window pool."""
        return self.window.num_pages // self.num_layers


def init_cache(
    config: Model1Config,
    *,
    window_pages: int,
    context_pages: int,
    rows: int,
    window_page_size: int = 64,
    sharding=None,
    window_sharding=None,
) -> Model1Cache:
    """Empty caches of all layers.

    Args:
      config: sizes.
      window_pages: pages of `window_page_size` tokens for each layer. A request needs
        `ceil((window + s - 1) / window_page_size)` of them, s being the most tokens of a step (`window_columns`).
      context_pages: pages for each layer, each standing for `config.page_tokens` tokens of context.
      rows: requests at a time.
      sharding: places every pool.
      window_sharding: places windows and rings, where those are to lie elsewhere.
    """
    window_sharding = sharding if window_sharding is None else window_sharding

    def zeros(fmt, pages: int, page_size: int, sharding=sharding) -> PagedKVCache:
        return PagedKVCache.zeros(fmt, pages, page_size, sharding=sharding)

    def rings(layers: int, ratio: int, prefix: str) -> jax.Array:
        width = config.param_specs(ratio)[f"{prefix}_ape"].shape[1]
        ring = compressor.ring_tokens(ratio, config.rollback_tokens)
        return jnp.zeros((layers * rows, ring, 2, width), jnp.float32, device=window_sharding)

    def compressed(ratio: int) -> CompressedCache | None:
        layers, page_size = config.ratios.count(ratio), config.page_tokens // ratio
        if layers == 0:
            return None
        pages = layers * context_pages
        return CompressedCache(
            zeros(config.kv_format, pages, page_size),
            rings(layers, ratio, "compress"),
            zeros(config.index_format, pages, page_size) if ratio == 4 else None,
            rings(layers, ratio, "index_compress") if ratio == 4 else None,
            layers,
        )

    window = zeros(config.kv_format, config.num_layers * window_pages, window_page_size, window_sharding)
    return Model1Cache(window, compressed(4), compressed(128), config.num_layers)


def window_columns(config: Model1Config, window_page_size: int, step_tokens: int) -> int:
    """Columns that a window table needs for steps (and prefill chunks) of up to `step_tokens` tokens."""
    return -(-(config.window + step_tokens - 1) // window_page_size)


def check_cache(config: Model1Config, cache: Model1Cache) -> None:
    """Raises ValueError unless the cache's formats, page sizes and layers are those of the config."""
    if not isinstance(cache, Model1Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; accepted: a Model1Cache, see init_cache")
    if cache.num_layers != config.num_layers:
        raise ValueError(f"cache.num_layers={cache.num_layers}; accepted: {config.num_layers}, the config's")
    steps.check_pool("cache.window", cache.window, config.kv_format, config.num_layers)
    for ratio in (4, 128):
        name, part, layers = f"cache.ratio{ratio}", cache.of(ratio), config.ratios.count(ratio)
        if (part is not None) != (layers > 0):
            accepted = "a CompressedCache" if layers else "None"
            raise ValueError(f"{name} is {part!r}; accepted: {accepted}, by the config")
        if part is None:
            continue
        if part.num_layers != layers:
            raise ValueError(f"{name}.num_layers={part.num_layers}; accepted: {layers}, by the config")
        page_size = config.page_tokens // ratio
        steps.check_pool(f"{name}.entries", part.entries, config.kv_format, layers, page_size=page_size)
        specs, ring = config.param_specs(ratio), compressor.ring_tokens(ratio, config.rollback_tokens)
        shape: tuple[int | str, ...] = ("layers * rows", ring, 2, specs["compress_ape"].shape[1])
        checks.array(part.rings, f"{name}.rings", shape, jnp.float32)
        if part.rings.shape[0] % layers:
            raise ValueError(f"{name}.rings has {part.rings.shape[0]} rows; accepted: a multiple of {layers} layers")
        if ratio == 4:
            steps.check_pool(
                *(f"{name}.index", part.index, config.index_format, layers),
                page_size=page_size,
                num_pages=part.entries.num_pages,
            )
            shape = (part.rings.shape[0], ring, 2, specs["index_compress_ape"].shape[1])
            checks.array(part.index_rings, f"{name}.index_rings", shape, jnp.float32)


def plan(
    config: Model1Config,
    cache: Model1Cache,
    tables: Model1Tables,
    cache_seqlens: Int32[Array, "b"],
    s_q: int,
    *,
    context: ContextAxis | None = None,
) -> dict[int, SplitPlan]:
    """The split plans of one decode step, by compress ratio: make them once a step and hand them to every `decode`."""
    visible = steps.decode_step(cache_seqlens, s_q).visible  # [b, s_q]
    share = (lambda length: length) if context is None else context.share
    plans = {}
    for ratio in set(config.ratios):
        columns = tables.context.shape[1]
        extra, own_extra = _num_extra(config, ratio, columns), 0
        if ratio:
            own_columns = columns if context is None else context.num_own(columns)
            own_extra = min(extra, own_columns * (config.page_tokens // ratio))
        plans[ratio] = plan_sparse_decode(
            _own_window(config, context),
            batch=cache_seqlens.shape[0],
            s_q=s_q,
            num_heads=config.num_heads,
            topk_length=share(jnp.minimum(visible, config.window)),
            extra_topk=own_extra,
            extra_topk_length=jnp.minimum(share(jnp.minimum(visible // ratio, extra)), own_extra) if ratio else None,
        )
    return plans


def prefill(
    params: Params,
    config: Model1Config,
    cache: Model1Cache,
    x: Float[Array, "b s hidden"],
    tables: Model1Tables,
    lengths: Int32[Array, "b"],
    start: Int32[Array, "b"] | None = None,
    *,
    layer: Model1Layer | None = None,
    chunk: int | None = None,
    context: ContextAxis | None = None,
) -> tuple[jax.Array, Model1Cache]:
    """Appends a prompt, or the next part of one, and attends from every token of it.

    Args:
      params: the layer's parameters.
      config: sizes; static.
      cache: every layer's caches. Donate them.
      x: hidden states after the input norm, in the config's dtype. Row r holds `lengths[r]` tokens, then padding.
      tables: where the requests live. The window table must have the columns that `window_columns` says for s (or
        `chunk`) tokens.
      lengths: tokens of each request in `x`, 0 to s. A request of length 0 is left alone.
      start: tokens that each request already has in the cache; default none.
      layer: `config.layers[i]`; default the first. Its `layer` and `rank` may be traced (`lax.scan` over layers).
      chunk: attend from at most this many tokens at a time, which bounds memory and window; default all at once.
      context: the mesh axis that the pages of compressed entries are spread over, inside `jax.shard_map`: what
        `mla_jax.sharding.ModuleSharding` passes. Windows and rings are then the same on every rank, and
        `tables.context` has all columns, each with the page's number on the rank that holds it (`mla_jax.context`).

    Returns:
      out `[b, s, hidden]` and the caches. out is 0 in padding, and NaN for tokens that have no place: their page or
      row is not there, or they lie past the table. Those are not written.

    Raises:
      ValueError: shapes, dtypes or caches that do not fit the config, or (outside jit) a token without a place.
    """
    layer = config.layers[0] if layer is None else layer
    begin = jnp.zeros(x.shape[0], jnp.int32) if start is None else start
    step_tokens = x.shape[1] if chunk is None else min(chunk, x.shape[1])
    _check_call(config, params, cache, x, tables, layer, step_tokens, lengths=lengths, start=begin)
    _check_places(config, cache, tables, layer, begin, lengths, x.shape[1])
    attend = functools.partial(_attend, params, config, tables=tables, layer=layer, plan=None, context=context)
    return steps.in_chunks(attend, cache, x, begin, lengths, chunk)


def decode(
    params: Params,
    config: Model1Config,
    cache: Model1Cache,
    x: Float[Array, "b s_q hidden"],
    tables: Model1Tables,
    cache_seqlens: Int32[Array, "b"],
    *,
    layer: Model1Layer | None = None,
    plan: dict[int, SplitPlan] | None = None,
    context: ContextAxis | None = None,
) -> tuple[jax.Array, Model1Cache]:
    """One decode step of s_q tokens a request (more than one: multi-token prediction).

    Args:
      cache_seqlens: tokens of each request, the s_q new ones included; 0 for a padded row. To take up to
        `config.rollback_tokens` rejected tokens back, pass the smaller length the next time.
      plan: what `plan` returned for these lengths; default: every layer makes its own.
      For the others, and for what comes back, see `prefill`.
    """
    layer = config.layers[0] if layer is None else layer
    _check_call(config, params, cache, x, tables, layer, x.shape[1], cache_seqlens=cache_seqlens)
    step = steps.decode_step(cache_seqlens, x.shape[1])
    _check_places(config, cache, tables, layer, step.start, step.count, x.shape[1])
    chosen_plan = None if plan is None else plan[layer.ratio]
    return _attend(params, config, cache, x, step, tables=tables, layer=layer, plan=chosen_plan, context=context)


def _check_call(config, params, cache, x, tables, layer, step_tokens: int, **per_row) -> None:
    if not isinstance(tables, Model1Tables):
        raise ValueError(f"tables is a {type(tables).__name__}; accepted: Model1Tables")
    if layer.ratio not in config.ratios:
        raise ValueError(f"layer.ratio={layer.ratio}; accepted: {sorted(set(config.ratios))}, by the config")
    steps.check_call(config, params, config.param_specs(layer.ratio), x, tables.window, **per_row)
    check_cache(config, cache)
    need = window_columns(config, cache.window.page_size, step_tokens)
    if tables.window.shape[1] < need:
        raise ValueError(
            f"tables.window has {tables.window.shape[1]} columns of {cache.window.page_size} tokens; accepted: {need} "
            f"or more, for a window of {config.window} and {step_tokens} tokens a step"
        )
    if layer.ratio:
        steps.check_table("tables.context", tables.context, x.shape[0])
        checks.array(tables.row, "tables.row", (x.shape[0],), jnp.int32)


def _check_places(config, cache, tables, layer, start, count, s: int) -> None:
    steps.check_places(
        *("tables.window", tables.window, cache.window.page_size, cache.pages_per_layer, start, count, s), ring=True
    )
    if layer.ratio:
        part = cache.of(layer.ratio)
        steps.check_places(
            "tables.context", tables.context, config.page_tokens, part.pages_per_layer, start, count, s
        )
        if steps.is_concrete(tables.row, count):
            row, busy = np.asarray(tables.row), np.asarray(count) > 0
            if (busy & ((row < 0) | (row >= part.rows_per_layer))).any():
                raise ValueError(f"tables.row={row.tolist()}; accepted: 0 to {part.rows_per_layer - 1}")


def _num_extra(config: Model1Config, ratio: int, context_columns: int) -> int:
    """Entries that the op is given for each query."""
    if ratio == 0:
        return 0
    capacity = context_columns * (config.page_tokens // ratio)
    return min(config.index_topk, capacity) if ratio == 4 else capacity


def _own_window(config: Model1Config, context: ContextAxis | None) -> int:
    """Keys of the window that this rank attends to."""
    return config.window if context is None else -(-config.window // context.size)


def _attend(
    params: Params,
    config: Model1Config,
    cache: Model1Cache,
    x: jax.Array,  # [b, s, hidden]
    step: Step,
    *,
    tables: Model1Tables,
    layer: Model1Layer,
    plan: SplitPlan | None,
    context: ContextAxis | None,
) -> tuple[jax.Array, Model1Cache]:
    ratio, page_size = layer.ratio, cache.window.page_size
    cos, sin = rope.cos_sin(jnp.maximum(step.positions, 0), config.rope_of(ratio))  # [b, s, rope / 2] each

    q_latent = rms_norm(project(x, params["wq_a"]), params["q_norm"], config.norm_eps)  # [b, s, q_lora]
    q = query(params, config, q_latent, cos, sin)  # [b, s, h, d]
    table = layer_table(tables.window, layer.layer, cache.pages_per_layer)  # [b, columns]
    slots = _ring_slots(step.positions, table, page_size)  # [b, s]
    window = steps.append_rows(cache.window, window_row(params, config, x, cos, sin), slots, config.scale_rule)
    back = jnp.arange(_own_window(config, context), dtype=jnp.int32)[None, None]  # [1, 1, w]: newest first, no gaps
    if context is not None:  # every rank has the window, and takes every C-th key of it
        back = back * context.size + context.rank
    position = jnp.where(back < config.window, step.positions[..., None] - back, -1)  # [b, s, w]
    seen = _ring_slots(position, table, page_size)  # [b, s, w]

    part, placed = cache.of(ratio), slots >= 0
    extra: dict[str, Any] = {}
    if part is not None:
        part, extra, there = _compressed(params, config, part, x, q_latent, cos, sin, step, tables, layer, context)
        placed = placed & there  # [b, s]
    attend = sparse_mla_decode if context is None else context.sparse_mla_decode
    o = attend(
        q.astype(config.kv_format.compute_dtype),
        window,
        seen,
        sm_scale=config.sm_scale,
        topk_length=jnp.minimum(step.visible, config.window) if context is None else None,
        attn_sink=params["sink"],
        plan=plan,
        implementation=config.implementation,
        **extra,
    )  # [b, s, h, d]
    out = steps.mark(output(params, config, o.astype(config.dtype), cos, sin), step, placed)  # [b, s, hidden]
    ratio4 = part if ratio == 4 else cache.ratio4
    ratio128 = part if ratio == 128 else cache.ratio128
    return out, Model1Cache(window, ratio4, ratio128, cache.num_layers)


def _ring_slots(positions: jax.Array, table: jax.Array, page_size: int) -> jax.Array:
    """Slots of positions `[b, ...]` in a window table used as a ring; -1 for negative positions."""
    capacity = table.shape[1] * page_size
    inside = jnp.where(positions >= 0, positions % capacity, -1)  # [b, ...]
    return slots_from_positions(inside, table, page_size)


def _compressed(
    params: Params,
    config: Model1Config,
    part: CompressedCache,
    x: jax.Array,  # [b, s, hidden]
    q_latent: jax.Array,  # [b, s, q_lora]
    cos: jax.Array,  # [b, s, rope / 2]
    sin: jax.Array,  # [b, s, rope / 2]
    step: Step,
    tables: Model1Tables,
    layer: Model1Layer,
    context: ContextAxis | None,
) -> tuple[CompressedCache, dict[str, Any], jax.Array]:
    """Appends the entries that this step completes; returns the caches, the op's extra scope, and which tokens of the
    step found a place `[b, s]`."""
    ratio, page_size = layer.ratio, part.entries.page_size
    table = layer_table(tables.context, layer.rank, part.pages_per_layer)  # [b, columns]
    exists = (tables.row >= 0) & (tables.row < part.rows_per_layer)  # [b]
    row = jnp.where(exists, tables.row + layer.rank * part.rows_per_layer, -1)  # [b]
    visible = step.visible // ratio  # [b, s]: entries that each query sees
    own, keys = table, table  # where entries are written, and where they are read: [b, columns] each
    k = _num_extra(config, ratio, table.shape[1])
    if context is not None:
        own, keys = context.only_own(table), context.own_columns(table)
        visible = context.own_tokens(visible, page_size)  # [b, s]

    def append(prefix: str, pool: PagedKVCache, rings: jax.Array, transform, scale_rule: ScaleRule):
        entry, number, rings = _new_entries(params, config, prefix, x, rings, row, step, ratio)  # [b, w, d], [b, w]
        slots = slots_from_positions(number, own, page_size)  # [b, w]
        return steps.append_rows(pool, transform(entry), slots, scale_rule), rings

    entries, rings = append("compress", part.entries, part.rings, lambda e: e, config.scale_rule)
    index, index_rings = part.index, part.index_rings
    if index is not None and index_rings is not None:
        index, index_rings = append("index_compress", index, index_rings, indexer.hadamard, indexer.SCALE_RULE)
        rotate = functools.partial(rope.rotate_tail, cos=cos[:, :, None], sin=sin[:, :, None])
        chosen = indexer.choose(params, config, index, x, q_latent, rotate, keys, visible, k, context)  # [b, s, k]
    else:
        capacity = keys.shape[1] * page_size
        chosen = jnp.arange(capacity, dtype=jnp.int32)[None, None]  # [1, 1, entries]
        chosen = jnp.where(chosen < visible[..., None], chosen, -1)  # [b, s, entries]
    extra = dict(
        extra_cache=entries,
        extra_indices=slots_from_positions(chosen, keys, page_size),  # [b, s, k]
        extra_topk_length=jnp.minimum(visible, chosen.shape[-1]) if context is None else None,  # [b, s]
    )
    # A token's page must be there even while its entry is not complete: the entry will have to go somewhere.
    page_of = slots_from_positions(step.positions, table, config.page_tokens)  # [b, s]
    placed = (page_of >= 0) & exists[:, None]
    return CompressedCache(entries, rings, index, index_rings, part.num_layers), extra, placed


def _new_entries(
    params: Params, config: Model1Config, prefix: str, x: jax.Array, rings: jax.Array, row: jax.Array, step: Step, ratio
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Entries that a step completes, normed and rotated: `[b, w, d]`, their numbers `[b, w]` (-1: none), the rings."""
    bias = params[f"{prefix}_ape"][jnp.maximum(step.positions, 0) % ratio]  # [b, s, width]
    values = project(x, params[f"{prefix}_wkv"], dtype=jnp.float32)  # [b, s, width]
    gates = project(x, params[f"{prefix}_wgate"], dtype=jnp.float32) + bias  # [b, s, width]
    entry, number, rings = compressor.compress(values, gates, rings, row, step.start, step.count, ratio=ratio)
    entry = rms_norm(entry, params[f"{prefix}_norm"], config.norm_eps)  # [b, w, d]
    cos, sin = rope.cos_sin(jnp.maximum(number, 0) * ratio, config.compressed_rope)  # [b, w, rope / 2] each
    return rope.rotate_tail(entry, cos, sin).astype(config.dtype), number, rings


# -- the parts of a layer, in the order of a step ----------------------------------------------------------------------


def query(params: Params, config: Model1Config, q_latent: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """q_latent `[b, s, q_lora]` -> query rows `[b, s, h, d]`: normed without weight, tail rotated."""
    q = project(q_latent, params["wq_b"]).reshape(*q_latent.shape[:2], config.num_heads, -1)  # [b, s, h, d]
    return rope.rotate_tail(rms_norm(q, None, config.norm_eps), cos[:, :, None], sin[:, :, None])


def window_row(params: Params, config: Model1Config, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """What the window caches of each token: x `[b, s, hidden]` -> `[b, s, d]`, normed, tail rotated."""
    return rope.rotate_tail(rms_norm(project(x, params["wkv"]), params["kv_norm"], config.norm_eps), cos, sin)


def output(params: Params, config: Model1Config, o: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """o `[b, s, h, d]` -> `[b, s, hidden]`: the tail rotated back, then the grouped projection, then the last one."""
    b, s = o.shape[:2]
    o = rope.rotate_tail(o, cos[:, :, None], -sin[:, :, None])  # [b, s, h, d]
    o = o.reshape(b, s, config.o_groups, -1)  # [b, s, groups, heads of a group * d]
    o = einsum("bsgi,goi->bsgo", o, params["wo_a"])  # [b, s, groups, o_lora]
    return project(o.reshape(b, s, -1), params["wo_b"])
