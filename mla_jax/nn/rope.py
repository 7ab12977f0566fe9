"""Rotary position embedding as DeepSeek uses it: YaRN frequencies, two ways to pair the dims, and the inverse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.nn.layers import along_last

if TYPE_CHECKING:
    from mla_jax.nn.config import RopeConfig


def frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians per position of each pair of dims: float32 `[dim / 2]`.

    Plain RoPE: theta^(-2i/dim). YaRN (arXiv 2309.00071, section 3.2): pairs that turn more than `beta_fast` times over
    the original context keep their frequency, those that turn less than `beta_slow` times have it divided by
    `factor`, a linear ramp in between; the ramp's ends are rounded outwards to whole pairs.
    """
    half = rope.dim // 2
    freq = rope.theta ** (-np.arange(half, dtype=np.float64) / half)  # [dim/2]
    if rope.factor > 1.0:

        def pair_that_turns(rotations: float) -> float:
            wavelength_positions = rope.original_positions / rotations
            return half * math.log(wavelength_positions / (2 * math.pi)) / math.log(rope.theta)

        low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(rope.beta_slow)), rope.dim - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)  # [dim/2], 0 keeps, 1 divides
        freq = freq * (1.0 - ramp) + freq / rope.factor * ramp  # [dim/2]
    return freq.astype(np.float32)


def cos_sin(positions: jax.Array, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles: positions int `[...]` -> two float32 `[..., dim / 2]`."""
    radians = along_last(jnp.asarray(frequencies(rope)), positions.ndim + 1)  # [..., dim/2]
    angle = positions[..., None].astype(jnp.float32) * radians  # [..., dim/2]
    return jnp.cos(angle), jnp.sin(angle)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Interleaved RoPE: dims (2i, 2i+1) are a pair. x `[..., dim]`, cos and sin broadcast against `[..., dim / 2]`.

    Computes in float32, returns x's dtype. With `-sin` it is the inverse rotation.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [..., dim/2, 2]
    a, b = pairs[..., 0], pairs[..., 1]  # [..., dim/2] each
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)  # [..., dim/2, 2]
    return turned.reshape(x.shape).astype(x.dtype)  # [..., dim]


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split RoPE: dims (i, i + dim/2) are a pair. Shapes and dtypes as in `rotate_pairs`."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [..., dim/2] each
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)  # [..., dim]


def rotate_tail(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate_pairs` on the last dims of x, as many as cos has angles for; the rest stay. x `[..., d]` -> the same."""
    dim = 2 * cos.shape[-1]
    return jnp.concatenate([x[..., :-dim], rotate_pairs(x[..., -dim:], cos, sin)], axis=-1)  # [..., d]


def rotate_head(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate_halves` on the first dims of x, as many as cos has angles for. x `[..., d]` -> the same."""
    dim = 2 * cos.shape[-1]
    return jnp.concatenate([rotate_halves(x[..., :dim], cos, sin), x[..., dim:]], axis=-1)  # [..., d]
