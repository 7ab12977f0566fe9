"""A small random language model over paged caches: embedding, N layers of attention and MLP, sampling.

Projections, norms and RoPE are those of `mla_jax.nn`; what a query reads is simplified so that a system prompt can be
shared by all requests. The prompt's keys are cached once, in a second pool, and every request reads them from there:

* "v3": dense decode over the request's own tokens, and a second call over the prompt; `merge_partials` joins both.
* "v32": sparse decode, the request's latest tokens (no indexer) and, as the extra scope, the prompt.
* "model1": the same over a sliding window, with a sink.

Everything is written once, for any mesh: an op comes from a `DecodeSharding`, which on a mesh of one device is the op
itself, and XLA spreads the projections as the parameters are placed (Auto axes).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mla_jax.cache import PagedKVCache
from mla_jax.lse import merge_partials
from mla_jax.nn import model1, rope, v32, weights
from mla_jax.nn.config import Model1Config, V32Config
from mla_jax.nn.layers import project, rms_norm
from mla_jax.nn.weights import HEAD_AXIS
from mla_jax.sharding import DecodeSharding

Kind = Literal["v3", "v32", "model1"]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model and of its caches.

    Attributes:
      kind: which attention, see the module's docstring.
      num_layers, hidden_size, num_heads, mlp_size, vocab_size: of the model.
      window: own tokens that a query of "v32" and "model1" reads, the latest ones.
      page_size: tokens a page, in both pools.
      max_pages: pages a request may have: the width of the block table.
      prompt_pages: pages of the shared prompt's pool, for one layer.
      exact: float32 weights, activations and ("v3") caches, for tests.
    """

    kind: Kind = "v32"
    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 8
    mlp_size: int = 128
    vocab_size: int = 256
    window: int = 64
    page_size: int = 16
    max_pages: int = 8
    prompt_pages: int = 4
    exact: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("v3", "v32", "model1"):
            raise ValueError(f"kind={self.kind!r}; accepted: 'v3', 'v32' or 'model1'")

    @functools.cached_property
    def attention(self) -> V32Config | Model1Config:
        sizes = dict(hidden_size=self.hidden_size, num_heads=self.num_heads)
        precision: Any = "f32" if self.exact else "bf16"
        if self.kind == "model1":
            return Model1Config.small(ratios=(0,), precision=precision, **sizes)
        if self.kind == "v3":
            return V32Config.small(index_topk=0, cache="f32" if self.exact else "bf16", precision=precision, **sizes)
        return V32Config.small(precision=precision, **sizes)

    @property
    def max_tokens(self) -> int:
        """Tokens that a block table has room for."""
        return self.max_pages * self.page_size


@functools.partial(jax.tree_util.register_dataclass, data_fields=("own", "prompt"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Caches:
    """Both pools, of all layers. `own`: the requests' tokens; `prompt`: the system prompt's, shared by all groups."""

    own: PagedKVCache
    prompt: PagedKVCache


def init_caches(config: ModelConfig, ds: DecodeSharding, num_pages: int) -> Caches:
    """Empty pools on the mesh; `num_pages` of the requests' pool, all layers together."""
    fmt = config.attention.kv_format
    each = -(-config.prompt_pages // ds.num_context)  # pages of a layer on a rank
    prompt_pages = each * ds.num_context * config.num_layers
    return Caches(
        PagedKVCache.zeros(fmt, num_pages, config.page_size, sharding=ds.cache_sharding()),
        PagedKVCache.zeros(fmt, prompt_pages, config.page_size, sharding=ds.cache_sharding(shared=True)),
    )


def init_params(config: ModelConfig, ds: DecodeSharding, seed: int = 0) -> Params:
    """Random parameters, layers stacked on axis 0, heads over the heads axis of the mesh."""
    dtype, hidden = config.attention.dtype, config.hidden_size
    keys = jax.random.split(jax.random.key(seed), config.num_layers + 3)

    def normal(key, *shape):
        return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)

    layers = [weights.init_params(config.attention, 0, key) for key in keys[3:]]
    attention = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    attention = {name: w for name, w in attention.items() if not name.startswith("index_")}  # there is no indexer
    params = {
        "embed": normal(keys[0], config.vocab_size, hidden) * jnp.asarray(hidden**0.5, dtype),
        "layers": attention
        | {
            "norm": jnp.ones((config.num_layers, hidden)),
            "mlp_norm": jnp.ones((config.num_layers, hidden)),
            "up": normal(keys[1], config.num_layers, config.mlp_size, hidden),
            "down": normal(keys[2], config.num_layers, hidden, config.mlp_size),
        },
        "norm": jnp.ones(hidden),
    }
    if ds.num_heads > 1 and config.num_heads % ds.num_heads:
        raise ValueError(f"num_heads={config.num_heads}; accepted: a multiple of {ds.num_heads}, the heads axis")
    placed = {
        name: ds.sharding(P(*[None] * (HEAD_AXIS[name] + 1), ds.heads)) if name in HEAD_AXIS else ds.sharding(P())
        for name in params["layers"]
    }
    whole = dict(embed=ds.sharding(P()), norm=ds.sharding(P()))
    return jax.device_put(params, whole | {"layers": placed})


def prompt_slots(config: ModelConfig, ds: DecodeSharding) -> jax.Array:
    """int32 [prompt tokens]: where layer 0 keeps each token of the prompt. Its pages go to the ranks in turn."""
    each = -(-config.prompt_pages // ds.num_context)
    position = jnp.arange(config.prompt_pages * config.page_size, dtype=jnp.int32)
    column, offset = position // config.page_size, position % config.page_size
    page = column % ds.num_context * (each * config.num_layers) + column // ds.num_context
    return page * config.page_size + offset


@functools.partial(jax.jit, static_argnames=("config", "ds", "into_prompt"), donate_argnames="caches")
def step(
    params: Params,
    config: ModelConfig,
    ds: DecodeSharding,
    caches: Caches,
    tokens: jax.Array,  # int32 [b]
    lengths: jax.Array,  # int32 [b]: own tokens before this one; -1 where there is no request
    table: jax.Array,  # int32 [b, max_pages]
    prompt_length: jax.Array,  # int32 []
    *,
    into_prompt: bool = False,
) -> tuple[jax.Array, Caches]:
    """Appends one token a request and returns what comes after it: logits float32 [b, vocab], and the caches.

    With `into_prompt` the token (the same in every row) is the prompt's next one and goes to the prompt's pool.
    """
    attention, page_size = config.attention, config.page_size
    active = lengths >= 0  # [b]
    if into_prompt:  # no tokens of their own yet
        before, own = jnp.zeros_like(lengths), jnp.zeros_like(lengths)  # [b]
    else:
        before, own = jnp.maximum(lengths, 0), jnp.maximum(lengths + 1, 0)  # [b] without and with this token
    seen_prompt = jnp.where(active, prompt_length + int(into_prompt), 0)  # [b]
    positions = (prompt_length + before)[:, None]  # [b, 1]
    cos, sin = rope.cos_sin(positions, attention.rope)  # [b, 1, rope / 2]
    recent = own[:, None] - 1 - jnp.arange(min(config.window, config.max_tokens), dtype=jnp.int32)[None]  # [b, window]
    own_stride = caches.own.num_pages // ds.num_parts // config.num_layers
    prompt_stride = caches.prompt.num_pages // ds.num_context // config.num_layers
    prompt = prompt_slots(config, ds)  # [prompt tokens]

    def layer(carry, inputs):
        x, caches = carry  # [b, 1, hidden]
        number, p = inputs
        h = rms_norm(x, p["norm"], 1e-6)  # [b, 1, hidden]
        q, row = _project(p, attention, h, cos, sin)  # [b, 1, h, d_qk], [b, d_qk]
        own_table = jnp.where(table >= 0, table + number * own_stride, -1)  # [b, max_pages]
        here = prompt + number * prompt_stride * page_size  # [prompt tokens]
        if into_prompt:
            slot = jnp.where(active[0], here[prompt_length], -1)[None]  # [1]
            caches = Caches(caches.own, ds.append_kv(caches.prompt, row[:1], slot, shared=True))
        else:
            slot = ds.slots_from_positions(jnp.where(active, lengths, -1)[:, None], own_table, page_size)[:, 0]  # [b]
            caches = Caches(ds.append_kv(caches.own, row, slot), caches.prompt)
        shared: dict[str, Any] = dict(
            extra_cache=caches.prompt,
            extra_indices=jnp.broadcast_to(here[None, None], (x.shape[0], 1, here.size)),
            extra_topk_length=seen_prompt,
            extra_shared=True,
            sm_scale=attention.sm_scale,
        )
        if config.kind == "v3":
            parts = (
                ds.mla_decode(q, caches.own, own_table, own, sm_scale=attention.sm_scale, return_lse=True),
                ds.sparse_mla_decode(
                    q, caches.own, jnp.zeros((x.shape[0], 1, 0), jnp.int32), **shared, return_lse=True
                ),
            )
            o, _ = merge_partials(*(jnp.stack(part) for part in zip(*parts, strict=True)))  # [b, 1, h, d_v]
        else:
            indices = ds.slots_from_positions(recent, own_table, page_size)[:, None]  # [b, 1, window]
            o = ds.sparse_mla_decode(q, caches.own, indices, attn_sink=p.get("sink"), **shared)  # [b, 1, h, d_v]
        x = x + _output(p, attention, o, cos, sin)
        h = project(rms_norm(x, p["mlp_norm"], 1e-6), p["up"])  # [b, 1, mlp]
        return (x + project(jax.nn.silu(h), p["down"]), caches), None

    x = params["embed"][tokens][:, None]  # [b, 1, hidden]
    numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x, caches), _ = lax.scan(layer, (x, caches), (numbers, params["layers"]))
    x = rms_norm(x, params["norm"], 1e-6)[:, 0]  # [b, hidden]
    return project(x, params["embed"], dtype=jnp.float32), caches  # [b, vocab]


def _project(p: Params, config: V32Config | Model1Config, x: jax.Array, cos, sin) -> tuple[jax.Array, jax.Array]:
    """x [b, 1, hidden] -> query rows [b, 1, h, d_qk] and the row to cache [b, d_qk], both as the cache's dtype."""
    q_latent = rms_norm(project(x, p["wq_a"]), p["q_norm"], config.norm_eps)  # [b, 1, q_lora]
    if isinstance(config, Model1Config):
        q, row = model1.query(p, config, q_latent, cos, sin), model1.window_row(p, config, x, cos, sin)
    else:
        q, row = v32.absorbed_query(p, config, q_latent, cos, sin), v32.latent_row(p, config, x, cos, sin)
    dtype = config.kv_format.compute_dtype
    return q.astype(dtype), row[:, 0].astype(dtype)


def _output(p: Params, config: V32Config | Model1Config, o: jax.Array, cos, sin) -> jax.Array:
    """o [b, 1, h, d_v] -> [b, 1, hidden]."""
    o = o.astype(config.dtype)
    return model1.output(p, config, o, cos, sin) if isinstance(config, Model1Config) else v32.output(p, o)


@jax.jit
def sample(logits: jax.Array, request: jax.Array, position: jax.Array, temperature: jax.Array) -> jax.Array:
    """The next token of each row, int32 [b]. The draw depends on the request and its position alone, not on the batch.

    Args:
      logits: float32 [b, vocab].
      request, position: int32 [b].
      temperature: float32 []; 0 takes the most likely token.
    """

    def one(logits, request, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), request), position)
        return jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))

    drawn = jax.vmap(one)(logits, request, position)  # [b]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
