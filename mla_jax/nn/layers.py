"""Norms and projections that both modules are made of. All pure; each computes in float32 and returns x's dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """`[d]` as float32 `[1, ..., 1, d]` of `ndim` axes (works under jax_numpy_rank_promotion="raise")."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + vector.shape)


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, times weight `[d]` unless None. x `[..., d]` -> the same."""
    y = x.astype(jnp.float32)  # [..., d]
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)  # [..., d]
    if weight is not None:
        y = y * along_last(weight, y.ndim)  # [..., d]
    return y.astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. x `[..., d]`, weight and bias `[d]`."""
    y = x.astype(jnp.float32)  # [..., d]
    y = y - jnp.mean(y, axis=-1, keepdims=True)  # [..., d]
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)  # [..., d]
    return (y * along_last(weight, y.ndim) + along_last(bias, y.ndim)).astype(x.dtype)


def einsum(equation: str, a: jax.Array, b: jax.Array, *, dtype=None) -> jax.Array:
    """A contraction accumulated in float32, returned in `dtype` (a's by default).

    float32 operands are multiplied as float32: without `HIGHEST` a GPU would round them to TF32 first.
    """
    contract = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if a.dtype == jnp.float32:
        out = contract(a, b, precision=lax.Precision.HIGHEST)
    else:
        # XLA's CPU backend lacks some bfloat16 contractions. Products of bfloat16 are exact in float32.
        widened = lambda a, b: contract(a.astype(jnp.float32), b.astype(jnp.float32))  # noqa: E731
        out = lax.platform_dependent(a, b, cpu=widened, default=contract)
    return out.astype(dtype or a.dtype)


def project(x: jax.Array, weight: jax.Array, *, dtype=None) -> jax.Array:
    """x `[..., i]` times a checkpoint-style weight `[o, i]` -> `[..., o]`."""
    return einsum("...i,oi->...o", x, weight, dtype=dtype)
