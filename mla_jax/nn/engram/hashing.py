"""From token ids to table rows: exact 63-bit integers in 32-bit arithmetic, so it runs without jax's x64 mode.

A token's *window* is the compressed ids of itself and the N - 1 tokens before it. Order n's hash is the XOR of its
first n entries, each times its multiplier; a head's row is that hash modulo the head's prime. Rows depend on token ids
alone: a step computes those of all layers before its first layer.

What a request must remember is its last N - 1 token ids, its *history*. The same functions serve prefill, chunked
prefill, decode and speculative verification: look up a block of tokens after a history, then `advance` the history by
as many of them as are kept. Every function is pure; a step that verifies drafts advances only once it knows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import checks
from mla_jax.nn.engram.config import EngramConfig
from mla_jax.nn.engram.table import take_rows

_U32 = jnp.uint32


def check_token_map(config: EngramConfig, token_map: Any, name: str = "token_map") -> None:
    """Raises ValueError unless `token_map` is int32 `[vocab_size]` and, where its values are at hand, runs from 0 to
    `compressed_vocab_size` - 1 without a gap."""
    checks.array(token_map, name, (config.vocab_size,), np.int32, "vocab_size of the EngramConfig")
    if not _has_values(token_map):
        return
    found = np.unique(np.asarray(token_map))  # [compressed ids], ascending
    if len(found) != config.compressed_vocab_size or found[0] != 0 or found[-1] != len(found) - 1:
        raise ValueError(
            f"{name} has {len(found)} compressed ids, {found[0]} to {found[-1]}; accepted: all of 0 to "
            f"{config.compressed_vocab_size - 1} (compressed_vocab_size of the EngramConfig)"
        )


def check_tokens(config: EngramConfig, tokens: Any, name: str = "tokens") -> None:
    """Raises ValueError where values are at hand and one is no token id; -1 stands for no token."""
    if _has_values(tokens):
        values = np.asarray(tokens)
        bad = values[(values < -1) | (values >= config.vocab_size)]
        if bad.size:
            raise ValueError(
                f"{name} has {bad.size} ids that are none, the first {bad.flat[0]}; accepted: 0 to "
                f"{config.vocab_size - 1} (vocab_size of the EngramConfig), and -1 for no token"
            )


def init_history(config: EngramConfig, batch: int) -> jax.Array:
    """History of `batch` requests that have no token yet: int32 `[batch, max_ngram - 1]`, oldest first."""
    return jnp.zeros((batch, config.max_ngram - 1), jnp.int32)


def token_windows(
    config: EngramConfig,
    token_map: jax.Array,
    tokens: jax.Array,
    history: jax.Array | None = None,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Windows of a block of tokens, and which tokens take an update.

    Looking back stops for good at the request's start, at an image token, and at an id outside the vocabulary (-1 is
    the usual one for "no token"); what lies behind is padding. If the token itself is one of these, or beyond
    `lengths`, the whole window is padding.

    Args:
      config: sizes.
      token_map: int32 `[vocab_size]`, token id to compressed id.
      tokens: int32 `[b, s]`.
      history: int32 `[b, max_ngram - 1]`, the token ids before the block, oldest first. None: nothing before it.
      positions: int32 `[b]`, how many tokens the request has before the block; history entries older than that are not
        read. None: 0.
      lengths: int32 `[b]`, tokens of the block in use; the rest is padding. None: all.

    Returns:
      windows: int32 `[b, s, max_ngram]` compressed ids, the token itself first.
      keep: bool `[b, s]`, false for image tokens and padding, whose residual streams stay as they are.

    Raises:
      ValueError: an array of another shape or dtype; outside `jit`, also a token id outside [-1, vocab_size) or a
        `token_map` that is not onto [0, compressed_vocab_size).
    """
    check_token_map(config, token_map)
    check_tokens(config, tokens)
    if history is not None:
        check_tokens(config, history, "history")
    token_map = jnp.asarray(token_map)
    tokens = _int32(tokens, "tokens", ("b", "s"))
    b, s = tokens.shape
    back = config.max_ngram - 1
    history = init_history(config, b) if history is None else _int32(history, "history", (b, back))
    positions = jnp.zeros((b,), jnp.int32) if positions is None else _int32(positions, "positions", (b,))
    lengths = jnp.full((b,), s, jnp.int32) if lengths is None else _int32(lengths, "lengths", (b,))
    return _look_back(config, token_map, tokens, history, positions, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _look_back(
    config: EngramConfig,
    token_map: jax.Array,
    tokens: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    b, s = tokens.shape
    back = config.max_ngram - 1

    # 1. every token with its history, and what must not be read ........................
    ids = jnp.concatenate([history, tokens], axis=1)  # [b, back + s]
    place = jnp.arange(-back, s, dtype=jnp.int32)[None]  # [1, back + s], in the block
    unread = (ids < 0) | (ids >= config.vocab_size)  # [b, back + s]
    if config.image_token_id is not None:
        unread |= ids == config.image_token_id
    unread |= (place + positions[:, None] < 0) | (place >= lengths[:, None])
    compressed = take_rows(token_map, jnp.clip(ids, 0, config.vocab_size - 1))  # [b, back + s]
    pad = token_map[config.pad_token_id]  # []

    # 2. look back, entry by entry .......................................................
    blocked = jnp.zeros((b, s), bool)
    window = []
    for shift in range(config.max_ngram):
        here = slice(back - shift, back - shift + s)
        blocked |= unread[:, here]  # [b, s]
        window.append(jnp.where(blocked, pad, compressed[:, here]))
    return jnp.stack(window, axis=-1), ~unread[:, back:]


def hash_windows(config: EngramConfig, windows: jax.Array) -> jax.Array:
    """Rows of every layer's table for windows of compressed ids.

    Args:
      config: sizes.
      windows: int32 `[*n, max_ngram]`, the token itself first, all in [0, compressed_vocab_size).

    Returns:
      int32 `[*n, layers, columns]`; columns are ordered by order, then head.

    Raises:
      ValueError: another dtype or last axis, or, outside `jit`, an id outside the compressed vocabulary.
    """
    if not hasattr(windows, "ndim") or windows.ndim < 1:
        raise ValueError(f"windows is {checks.describe(windows)}; accepted: int32[*n, {config.max_ngram}]")
    windows = _int32(windows, "windows", (*windows.shape[:-1], config.max_ngram))
    if _has_values(windows) and windows.size:
        low, high = int(np.min(np.asarray(windows))), int(np.max(np.asarray(windows)))
        if low < 0 or high >= config.compressed_vocab_size:
            raise ValueError(
                f"windows has ids from {low} to {high}; accepted: compressed ids, 0 to "
                f"{config.compressed_vocab_size - 1}"
            )
    return _hash(config, windows)


@functools.partial(jax.jit, static_argnums=0)
def _hash(config: EngramConfig, windows: jax.Array) -> jax.Array:
    lead = (1,) * (windows.ndim - 1)
    multipliers = config.hash_multipliers.reshape(*lead, -1, config.max_ngram)  # [*1, layers, max_ngram]
    high, low = _product(windows.astype(_U32)[..., None, :], multipliers)  # both [*n, layers, max_ngram]
    high, low = (lax.associative_scan(jnp.bitwise_xor, x, axis=-1) for x in (high, low))  # the same
    primes = config.primes.reshape(*lead, *config.primes.shape)  # [*1, layers, orders, heads]
    rows = _remainder(high[..., 1:, None], low[..., 1:, None], primes)  # [*n, layers, orders, heads]
    rows = rows.astype(jnp.int32).reshape(*windows.shape[:-1], len(config.layer_ids), config.columns)
    return rows + config.offsets.astype(np.int32).reshape(*lead, *config.offsets.shape)  # [*n, layers, columns]


def hash_tokens(
    config: EngramConfig,
    token_map: jax.Array,
    tokens: jax.Array,
    history: jax.Array | None = None,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_windows`, hashed: rows int32 `[b, s, layers, columns]`, and keep bool `[b, s]`."""
    windows, keep = token_windows(config, token_map, tokens, history, positions, lengths)
    return hash_windows(config, windows), keep


@jax.jit
def advance(history: jax.Array, block: jax.Array, lengths: jax.Array) -> jax.Array:
    """A history after the first `lengths` entries of a block have followed it.

    Prefill and decode advance by the block's tokens; after speculative verification, by those that were accepted (the
    last token of the model, not yet fed back, is no part of the block). 0 leaves a history as it is.

    Args:
      history: `[b, k, ...]`, oldest first.
      block: `[b, s, ...]`, of the same dtype.
      lengths: int32 `[b]`, in [0, s]; clipped.

    Returns:
      `[b, k, ...]`: the last k of history and kept block.
    """
    b, k = history.shape[:2]
    checks.array(block, "block", (b, "s", *history.shape[2:]), history.dtype, "the history's dtype and trailing axes")
    lengths = jnp.clip(_int32(lengths, "lengths", (b,)), 0, block.shape[1])  # [b]
    joined = jnp.concatenate([history, block], axis=1)  # [b, k + s, ...]
    last = lengths[:, None] + jnp.arange(k, dtype=jnp.int32)[None]  # [b, k]
    return jax.vmap(lambda rows, index: rows[index])(joined, last)  # [b, k, ...]


def _has_values(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _int32(x: Any, name: str, shape: checks.Shape) -> jax.Array:
    """`checks.int32`, with numpy's wider integers narrowed first: jax would narrow them unasked, and warn."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.dtype != np.int32:
        x = np.where((x >= -(2**31)) & (x < 2**31), x, -1).astype(np.int32)
    return jnp.asarray(checks.int32(x, name, shape))


def _product(x: jax.Array, multipliers: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The low 64 bits of x times a multiplier, as uint32 (high, low). x uint32, multipliers uint64, broadcast."""
    m_low = jnp.asarray((multipliers & 0xFFFFFFFF).astype(np.uint32))
    m_high = jnp.asarray((multipliers >> np.uint64(32)).astype(np.uint32))
    half = _U32(16)
    mask = _U32(0xFFFF)
    x0, x1, m0, m1 = x & mask, x >> half, m_low & mask, m_low >> half
    corner, cross, cross_, top = x0 * m0, x0 * m1, x1 * m0, x1 * m1  # of 32 bits each: halves are below 2^16
    middle = (corner >> half) + (cross & mask) + (cross_ & mask)  # below 3 * 2^16
    low = (middle << half) | (corner & mask)
    high = top + (cross >> half) + (cross_ >> half) + (middle >> half) + x * m_high
    return high, low


def _remainder(high: jax.Array, low: jax.Array, primes: np.ndarray) -> jax.Array:
    """(high 2^32 + low) mod primes, by long division: remainder and next digit of `low` together fit 32 bits."""
    bits = 32 - int(primes.max()).bit_length()  # what a remainder leaves free
    digit = next(width for width in (8, 4, 2, 1) if width <= bits)
    p = jnp.asarray(primes.astype(np.uint32))
    rest = high % p
    for shift in range(32 - digit, -1, -digit):
        rest = ((rest << _U32(digit)) | ((low >> _U32(shift)) & _U32((1 << digit) - 1))) % p
    return rest
