"""Log-sum-exp algebra: how attention over parts of the keys becomes attention over all of them.

A partial result is (out, lse): out = softmax(s) @ V over its own keys, lse = log(sum(exp(s))), natural log, without
the sink. A partial without keys is (0, -inf), the identity of merging. Used by split-KV, by two-scope sparse attention
and by context parallel decoding alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mla_jax import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def sink_factor(lse: Float[Array, "*n h"], attn_sink: Float[Array, "h"]) -> jax.Array:
    """exp(lse) / (exp(lse) + exp(attn_sink)), [*n, h]: what a sink leaves of `out`.

    The sink is an extra key with score `attn_sink` and a value of zero: -inf changes nothing, +inf leaves 0, and a row
    without keys stays 0.
    """
    empty = lse == -jnp.inf  # [*n, h]
    sink = jnp.broadcast_to(attn_sink.astype(lse.dtype), lse.shape)
    gap = sink - jnp.where(empty, jnp.zeros_like(lse), lse)
    return jnp.where(empty, jnp.zeros_like(lse), 1 / (1 + jnp.exp(gap)))


def merge(
    outs: Float[Array, "parts *n h d"], lses: Float[Array, "parts *n h"], attn_sink: Float[Array, "h"] | None
) -> tuple[jax.Array, jax.Array]:
    """`merge_partials` without its checks; arithmetic in float32 (float64 for float64 partials)."""
    dtype = jnp.promote_types(lses.dtype, jnp.float32)
    lses_ = lses.astype(dtype)
    top = jnp.max(lses_, axis=0)  # [*n, h]
    finite_top = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
    weights = jnp.exp(lses_ - finite_top[None])  # [parts, *n, h]
    total = jnp.sum(weights, axis=0)
    lse = jnp.where(total == 0, -jnp.inf, finite_top + jnp.log(jnp.where(total == 0, 1, total)))
    share = (weights / jnp.where(total == 0, 1, total)[None])[..., None]  # [parts, *n, h, 1]
    # A partial without keys counts for nothing, whatever its `out` holds.
    out = jnp.sum(jnp.where(share == 0, jnp.zeros_like(share), outs.astype(dtype) * share), axis=0)
    if attn_sink is not None:
        out = out * sink_factor(lse, attn_sink)[..., None]
    return out.astype(outs.dtype), lse.astype(lses.dtype)


_merge = jax.jit(merge)


def merge_partials(
    outs: Float[Array, "parts *n h d"],
    lses: Float[Array, "parts *n h"],
    *,
    attn_sink: Float[Array, "h"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges attention results over disjoint sets of keys into the result over their union.

        lse = log(sum_i exp(lse_i)),  out = sum_i exp(lse_i - lse) * out_i

    Args:
      outs: [parts, ..., h, d], stacked on axis 0; any float dtype.
      lses: [parts, ..., h], natural log, -inf for a part without keys (its `out` is then ignored).
      attn_sink: float32 [h]: applied once, to the merged result. Give it here and not to the ops that made the parts.

    Returns:
      (out [..., h, d], lse [..., h]) in the partials' dtypes; lse without the sink. Rows that no part has keys for:
      0 and -inf.

    Raises:
      ValueError: shapes that do not go together, or no float dtype.
    """
    for x, name in ((outs, "outs"), (lses, "lses")):
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {checks.describe(x)}; accepted: a floating-point array stacked on axis 0")
    if outs.ndim < 3 or outs.shape[0] < 1:
        raise ValueError(f"outs is {checks.describe(outs)}; accepted: [parts, ..., h, d] with at least one part")
    if lses.shape != outs.shape[:-1]:
        raise ValueError(
            f"lses is {checks.describe(lses)}; accepted: {list(outs.shape[:-1])}, the shape of outs "
            f"({checks.describe(outs)}) without its last axis"
        )
    if attn_sink is not None:
        checks.array(attn_sink, "attn_sink", (outs.shape[-2],), jnp.float32, "one value a head")
    return _merge(outs, lses, attn_sink)
