"""DeepSeek-V4's compressor: one cached entry for every `ratio` tokens.

Each token is projected to values and gates; an entry is, channel by channel, the softmax-weighted mean of its tokens'
values. Ratio 128 averages the window's own 128 tokens. Ratio 4 projects twice as wide, [a | b], and averages a of the
four tokens of the window before with b of this window's four; before the first window there is nothing.

Tokens whose window is not complete yet live in a *ring*: the last tokens of each request, token t in row t % ring. It
holds projections, not running sums, so a step may take tokens back (rejected drafts) by writing over them, and a
request that joins needs no reset: it reads only what it wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.nn.config import num_parts

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32


def ring_tokens(ratio: int, rollback_tokens: int) -> int:
    """Rows of a ring from which any step can complete its windows after taking back up to `rollback_tokens` tokens."""
    return num_parts(ratio) * ratio + rollback_tokens


def max_entries(s: int, ratio: int) -> int:
    """Most windows that a chunk of s tokens touches."""
    return (s + ratio - 2) // ratio + 1


def compress(
    values: Float32[Array, "b s width"],
    gates: Float32[Array, "b s width"],
    rings: Float32[Array, "rows ring 2 width"],
    row: Int32[Array, "b"],
    start: Int32[Array, "b"],
    count: Int32[Array, "b"],
    *,
    ratio: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Completes the windows that a chunk ends, and keeps the rest.

    Args:
      values, gates: projections of the chunk's tokens, position bias included; width is d, or 2 d for ratio 4.
      rings: every request's ring, [.., 0, :] values and [.., 1, :] gates.
      row: each request's ring; out of range: its tokens are not kept (and must not be counted).
      start: position of each request's first token.
      count: how many of its tokens are there; positions below 0 are not.
      ratio: 4 or 128.

    Returns:
      entries float32 `[b, w, d]` before norm and RoPE, their numbers int32 `[b, w]` (-1 for windows that the chunk does
      not complete), and the rings.
    """
    b, s, width = values.shape
    parts, w, ring = num_parts(ratio), max_entries(s, ratio), rings.shape[1]
    d = width // parts
    chunk = jnp.stack([values, gates], axis=2)  # [b, s, 2, width]
    exists = (row >= 0) & (row < rings.shape[0])  # [b]
    row = jnp.where(exists, row, rings.shape[0])  # [b]: past the end, where writes are dropped

    first = jnp.floor_divide(start, ratio)  # [b]: window of the first token
    number = first[:, None] + jnp.arange(w, dtype=jnp.int32)[None]  # [b, w]
    complete = (number >= 0) & ((number + 1) * ratio <= (start + count)[:, None])  # [b, w]

    begin = (first - (parts - 1)) * ratio  # [b]
    position = begin[:, None] + jnp.arange((w + parts - 1) * ratio, dtype=jnp.int32)[None]  # [b, l]
    place = position - start[:, None]  # [b, l]: in the chunk, negative for tokens before it
    new = jnp.take_along_axis(chunk, jnp.clip(place, 0, s - 1)[:, :, None, None], axis=1)  # [b, l, 2, width]
    old = rings.at[row[:, None], jnp.remainder(position, ring)].get(mode="fill", fill_value=0)  # [b, l, 2, width]
    token = jnp.where((place >= 0)[:, :, None, None], new, old)  # [b, l, 2, width]
    token = token.reshape(b, w + parts - 1, ratio, 2, width)  # by window
    there = (position >= 0).reshape(b, w + parts - 1, ratio, 1)
    if parts == 2:
        token = jnp.concatenate([token[:, :-1, ..., :d], token[:, 1:, ..., d:]], axis=2)  # [b, w, 2 ratio, 2, d]
        there = jnp.concatenate([there[:, :-1], there[:, 1:]], axis=2)  # [b, w, 2 ratio, 1]
    gate = jnp.where(there, token[..., 1, :], -jnp.inf)  # [b, w, parts * ratio, d]
    weight = jnp.exp(gate - jnp.max(gate, axis=2, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    total = jnp.sum(weight, axis=2)  # [b, w, d]; 0 only before the first window
    entry = jnp.sum(weight * jnp.where(there, token[..., 0, :], 0), axis=2) / jnp.where(total == 0, 1, total)

    i = jnp.arange(s, dtype=jnp.int32)[None]  # [1, s]
    position = start[:, None] + i  # [b, s]
    kept = (i < count[:, None]) & (i >= count[:, None] - ring) & (position >= 0)  # [b, s]: no row is written twice
    to_row = jnp.where(kept, row[:, None], rings.shape[0])  # [b, s]
    rings = rings.at[to_row, lax.rem(jnp.maximum(position, 0), jnp.int32(ring))].set(chunk, mode="drop")
    return entry, jnp.where(complete, number, -1), rings
