"""What an Engram layer does with the rows it looked up: a gated value added to every residual stream.

    key_j, value = wkv e (+ bias)                      j: residual stream; one value for all
    dot_j = <norm(x_j) q_j, norm(key_j) k_j> / sqrt(d)
    gate_j = sigmoid(sign(dot_j) sqrt(|dot_j|))
    v41:    x_j + gate_j value
    paper:  x_j + u_j + silu(conv(norm(u_j)))          u_j = gate_j value; depthwise, causal, dilated

Pure functions of a layer's parameters (`EngramConfig.param_specs`); the gate is float32 throughout. It stands before
attention, on the residual streams the layer before left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import checks
from mla_jax.nn.engram.config import EngramConfig
from mla_jax.nn.layers import project, rms_norm

Params = dict[str, jax.Array]

_SMALLEST_DOT = 1e-6  # DeepSeek-V4.1: |dot| is clamped to this before the square root


def gate(
    params: Params, config: EngramConfig, x: jax.Array, embeddings: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much of the value each stream takes, and the value.

    Args:
      params: of one layer.
      config: sizes.
      x: `[*n, hc, d]`, residual streams.
      embeddings: `[*n, embedding_dim]`, from `lookup`, in x's dtype.

    Returns:
      gates float32 `[*n, hc]`, in (0, 1), and value `[*n, d]` in x's dtype.

    Raises:
      ValueError: an array of another shape or dtype.
    """
    hc, d = config.hc_mult, config.hidden_size
    if not hasattr(x, "ndim") or x.ndim < 2:
        raise ValueError(f"x is {checks.describe(x)}; accepted: {config.dtype}[*n, {hc}, {d}]")
    lead = x.shape[:-2]
    checks.array(x, "x", (*lead, hc, d), config.dtype, "hc_mult and hidden_size of the EngramConfig")
    checks.array(embeddings, "embeddings", (*lead, config.embedding_dim), config.dtype, "embedding_dim, x's dtype")

    kv = project(embeddings, params["wkv"])  # [*n, (hc + 1) * d]
    if config.form == "paper":
        kv = kv + params["wkv_bias"].reshape((1,) * len(lead) + (-1,))  # [*n, (hc + 1) * d]
    kv = kv.reshape(*lead, hc + 1, d)  # [*n, hc + 1, d]
    key, value = kv[..., :hc, :], kv[..., hc, :]  # [*n, hc, d], [*n, d]

    x32, key32 = x.astype(jnp.float32), key.astype(jnp.float32)  # [*n, hc, d]
    weight = params["q_weight"].astype(jnp.float32) * params["k_weight"].astype(jnp.float32)  # [hc, d]
    dot = jnp.sum(x32 * key32 * weight.reshape((1,) * len(lead) + (hc, d)), axis=-1)  # [*n, hc]
    dot *= lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + config.norm_eps)  # [*n, hc]
    dot *= lax.rsqrt(jnp.mean(key32 * key32, axis=-1) + config.norm_eps) * d**-0.5  # [*n, hc]
    root = jnp.sqrt(jnp.maximum(jnp.abs(dot), _SMALLEST_DOT))  # [*n, hc]
    if config.form == "paper":
        signed = jnp.sign(dot) * root  # [*n, hc]; 0 stays 0
    else:
        signed = jnp.where(dot < 0, -root, root)  # [*n, hc]; 0 counts as positive
    return jax.nn.sigmoid(signed), value


def forward(
    params: Params, config: EngramConfig, x: jax.Array, embeddings: jax.Array, keep: jax.Array | None = None
) -> jax.Array:
    """The residual streams after an Engram layer of the v41 form.

    Args:
      params, config, x, embeddings: see `gate`.
      keep: bool `[*n]`, from `hash_tokens`; where false the streams stay as they are. None: all true.

    Returns:
      `[*n, hc, d]` in x's dtype, rounded once.
    """
    if config.form != "v41":
        raise ValueError(f"config.form is {config.form!r}; accepted: 'v41' (`forward_conv` is for the paper form)")
    gates, value = gate(params, config, x, embeddings)
    update = gates[..., None] * value[..., None, :].astype(jnp.float32)  # [*n, hc, d]
    out = (x.astype(jnp.float32) + update).astype(x.dtype)  # [*n, hc, d]
    return _where(keep, out, x)


def init_conv(config: EngramConfig, batch: int) -> jax.Array:
    """What the convolution remembers of `batch` requests that have no token yet: `[batch, conv_rows, hc, d]`."""
    return jnp.zeros((batch, config.conv_rows, config.hc_mult, config.hidden_size), config.dtype)


def forward_conv(
    params: Params,
    config: EngramConfig,
    x: jax.Array,
    embeddings: jax.Array,
    past: jax.Array,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residual streams after an Engram layer of the paper form, for a block of each request's tokens.

    Args:
      params, config: see `gate`.
      x: `[b, s, hc, d]`.
      embeddings: `[b, s, embedding_dim]`.
      past: `[b, conv_rows, hc, d]`, the rows before the block, oldest first (`init_conv`).
      keep: bool `[b, s]`; see `forward`.

    Returns:
      `[b, s, hc, d]` in x's dtype, and the block's own rows `[b, s, hc, d]`: `advance(past, rows, lengths)` is the next
      `past`, once it is known how many tokens of the block stay.
    """
    if config.form != "paper":
        raise ValueError(f"config.form is {config.form!r}; accepted: 'paper' (`forward` is for the v41 form)")
    gates, value = gate(params, config, x, embeddings)
    b, s, hc, d = x.shape
    checks.array(past, "past", (b, config.conv_rows, hc, d), x.dtype, "conv_rows of the EngramConfig")
    u = gates[..., None] * value[..., None, :].astype(jnp.float32)  # [b, s, hc, d]
    rows = rms_norm(u, None, config.conv_eps) * params["conv_norm"].astype(jnp.float32)[None, None]  # [b, s, hc, d]
    rows = rows.astype(x.dtype)  # [b, s, hc, d]
    joined = jnp.concatenate([past, rows], axis=1).astype(jnp.float32)  # [b, conv_rows + s, hc, d]
    taps = params["conv_weight"].astype(jnp.float32)  # [hc, d, conv_width], the last one for the token itself
    conv = jnp.zeros_like(u)
    for tap in range(config.conv_width):
        first = tap * config.max_ngram  # the dilation is the longest N-gram
        conv += joined[:, first : first + s] * taps[..., tap][None, None]  # [b, s, hc, d]
    out = (x.astype(jnp.float32) + u + jax.nn.silu(conv)).astype(x.dtype)  # [b, s, hc, d]
    return _where(keep, out, x), rows


def _where(keep: jax.Array | None, out: jax.Array, x: jax.Array) -> jax.Array:
    if keep is None:
        return out
    checks.array(keep, "keep", x.shape[:-2], bool)
    return jnp.where(keep[..., None, None], out, x)
