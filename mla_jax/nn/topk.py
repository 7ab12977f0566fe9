"""Top-k as a set: which k columns of a row of scores are the largest, in no particular order.

`lax.top_k` sorts, and on a GPU a k of 2048 over 32k columns compiles to a full sort of every row. Attention needs
the set alone, so `select_topk` finds the k-th largest value instead and then collects the columns that reach it. The
methods give the same set where scores are distinct (ties: `select_topk`); they differ in speed (us on an H200: 64 rows
of 32,768 columns with k 2048, and of 8,192 columns with k 1024):

* "sort":    `lax.top_k` over the row. 218 and 48 us.
* "chunked": `lax.top_k` over pieces of the row, then over the pieces' winners. Exact, since a winner of the row wins
             its piece. 263 and 65 us.
* "radix":   k-th largest key by radix search, 4 bits at a time: eight passes that only count. 401 and 73 us.
* "kernel":  the same idea in one kernel that keeps the row in registers (`pallas_kernels.indexer.topk`). NVIDIA GPUs
             only. 43 and 14 us.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer import topk as kernel

Method = Literal["sort", "chunked", "radix", "kernel"]

_BLOCK = 128  # columns that the collecting step treats as one; its counts are exact in bf16 up to 256


def select_topk(scores: jax.Array, visible: jax.Array, k: int, *, method: Method | None = None) -> jax.Array:
    """Columns of the k largest visible scores of each row, unordered.

    Args:
      scores: float32 `[..., n]`. A column at or past `visible` is ignored, whatever it holds (NaN included).
      visible: int32 `[...]`: the row's first `visible` columns take part; clamped to [0, n].
      k: how many columns to choose, at least 1.
      method: see the module's docstring; default: "kernel" when compiled for CUDA, else "radix".

    Returns:
      int32 `[..., k]`: column numbers, each once, and -1 for the k - visible that are missing. Among equal scores at
      the boundary the lowest columns win; the choice depends on the row alone. +0 counts as larger than -0.

    Raises:
      ValueError: `k < 1`, `visible` of another shape than the rows, or an unknown method.
    """
    if k < 1:
        raise ValueError(f"k={k}; accepted: at least 1")
    if visible.shape != scores.shape[:-1]:
        raise ValueError(f"visible has shape {visible.shape}; accepted: {scores.shape[:-1]}, the rows of scores")
    if method not in (None, *get_args(Method)):
        raise ValueError(f"method={method!r}; accepted: {', '.join(get_args(Method))}")
    return _select(scores, visible, k, method)


@functools.partial(jax.jit, static_argnames=("k", "method"))
def _select(scores: jax.Array, visible: jax.Array, k: int, method: Method | None) -> jax.Array:
    n = scores.shape[-1]
    if method is None and k <= kernel.MAX_COLUMNS // 2:
        branch = functools.partial(_select, k=k, method="kernel")
        return lax.platform_dependent(
            scores, visible, cuda=branch, default=functools.partial(_select, k=k, method="radix")
        )
    if method == "kernel":
        rows = kernel.topk(scores.reshape(-1, n), visible.reshape(-1), k)  # [r, k]
        return rows.reshape(*visible.shape, k)
    keys = _sortable(scores, _visible(scores, visible))  # [..., n]
    rows = keys.reshape(-1, n)  # [r, n]
    choose = {"sort": _by_sort, "chunked": _by_chunks}.get(method or "radix", _by_radix)
    columns = choose(rows, min(k, n))  # [r, min(k, n)]
    columns = columns.reshape(*scores.shape[:-1], -1)  # [..., min(k, n)]
    missing = jnp.full((*scores.shape[:-1], k - columns.shape[-1]), -1, jnp.int32)  # [..., k - min(k, n)]
    return jnp.concatenate([columns, missing], axis=-1)  # [..., k]


def among_best(scores: jax.Array, positions: jax.Array, k: int, axis_name: str) -> jax.Array:
    """Which of this rank's candidates are among the k best of all ranks of a mesh axis, inside `jax.shard_map`.

    Ranks send their candidates and nothing else, in two all-gathers. A rank's own k best suffice as candidates.

    Args:
      scores: float32 `[..., c]`.
      positions: int32 `[..., c]`, distinct among all ranks; -1 for no candidate.
      k: how many to choose.
      axis_name: of the mesh axis.

    Returns:
      bool `[..., c]`. Among equal scores at the boundary the lowest positions win: over all ranks that is the set that
      `select_topk` chooses from a row that has every score at its position.
    """
    taking_part = positions >= 0  # [..., c]
    keys = _sortable(scores, taking_part).reshape(-1, scores.shape[-1])  # [r, c]
    nearness = jnp.where(taking_part, ~positions.astype(jnp.uint32), 0).reshape(keys.shape)  # [r, c]
    gather = functools.partial(lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
    all_keys, all_nearness = gather(keys), gather(nearness)  # [r, ranks * c] each
    lowest = kth_largest(all_keys, k)[:, None]  # [r, 1]; 0 where there are fewer than k
    missing = k - jnp.sum(all_keys > lowest, axis=1, keepdims=True, dtype=jnp.int32)  # [r, 1]: at least 1
    last = kth_largest(jnp.where(all_keys == lowest, all_nearness, 0), missing)[:, None]  # [r, 1]
    wins = (keys > lowest) | ((keys == lowest) & (nearness >= last))  # [r, c]
    return (wins & (keys > 0)).reshape(positions.shape)


def _visible(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Which columns take part: bool `[..., n]`."""
    column = jnp.arange(scores.shape[-1], dtype=jnp.int32).reshape((1,) * visible.ndim + (-1,))  # [..., n]
    return column < visible[..., None]  # [..., n]


def _sortable(scores: jax.Array, taking_part: jax.Array) -> jax.Array:
    """Keys that order as the scores do: uint32 `[..., n]`, 0 for columns that take no part and only for those."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)  # [..., n]
    sign = jnp.uint32(1 << 31)
    keys = jnp.where(bits >= sign, ~bits, bits | sign)  # [..., n]: negative floats reversed, below the positive ones
    return jnp.where(taking_part, jnp.maximum(keys, 1), 0)  # [..., n]


def _by_sort(keys: jax.Array, k: int) -> jax.Array:
    values, columns = lax.top_k(keys, k)  # [r, k] each
    return jnp.where(values > 0, columns, -1)  # [r, k]


def _by_chunks(keys: jax.Array, k: int) -> jax.Array:
    r, n = keys.shape
    piece = max(2 * k, 1024)  # longer pieces sort more, shorter ones leave more to the second round
    count = -(-n // piece)
    if count < 2:
        return _by_sort(keys, k)
    padded = jnp.pad(keys, ((0, 0), (0, count * piece - n)))  # [r, count * piece]
    values, columns = lax.top_k(padded.reshape(r, count, piece), k)  # [r, count, k] each
    columns = columns + piece * jnp.arange(count, dtype=jnp.int32)[None, :, None]  # [r, count, k]
    values, winners = lax.top_k(values.reshape(r, -1), k)  # [r, k] each
    return jnp.where(values > 0, jnp.take_along_axis(columns.reshape(r, -1), winners, axis=1), -1)  # [r, k]


def kth_largest(keys: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th largest of each row: keys uint32 `[r, n]` -> uint32 `[r]`; 0 where fewer than k keys are above 0.

    `k` may differ by row: int32 `[r, 1]`.
    """
    digits = jnp.arange(1, 16, dtype=jnp.uint32)  # [15]

    def narrow(step: jax.Array, found: jax.Array) -> jax.Array:
        shift = (28 - 4 * step).astype(jnp.uint32)
        candidates = found[:, None] | (digits << shift)[None]  # [r, 15]
        reach = jnp.sum(keys[:, None, :] >= candidates[:, :, None], axis=-1, dtype=jnp.int32)  # [r, 15]
        digit = jnp.sum(reach >= k, axis=-1, dtype=jnp.uint32)  # [r]: reach falls as the digit grows
        return found | (digit << shift)  # [r]

    return lax.fori_loop(0, 8, narrow, jnp.zeros(keys.shape[0], jnp.uint32), unroll=True)


def _by_radix(keys: jax.Array, k: int) -> jax.Array:
    """Columns above the k-th largest key, then as many equal to it as are missing."""
    threshold = kth_largest(keys, k)[:, None]  # [r, 1]
    above = keys > threshold  # [r, n]
    equal = (keys == threshold) & (keys > 0)  # [r, n]
    found = nth_set(jnp.concatenate([above, equal], axis=1), k)  # [r, k], -1 for none
    return jnp.where(found >= 0, found % keys.shape[1], -1)  # [r, k]


def nth_set(mask: jax.Array, k: int) -> jax.Array:
    """Positions of the first k set entries of each row, in order: bool `[r, n]` -> int32 `[r, k]`, -1 for none.

    Gathers instead of scattering: entry j first finds its block by the blocks' running counts, then its place inside.
    """
    r, n = mask.shape
    num_blocks = -(-n // _BLOCK)
    blocks = jnp.pad(mask, ((0, 0), (0, num_blocks * _BLOCK - n))).reshape(r, num_blocks, _BLOCK)
    ones = jnp.triu(jnp.ones((_BLOCK, _BLOCK), jnp.bfloat16))  # [block, block]
    running = jnp.einsum("rmi,ij->rmj", blocks.astype(jnp.bfloat16), ones)  # [r, m, block]: set up to and with j
    running = running.astype(jnp.int32)
    ends = jnp.cumsum(running[..., -1], axis=1, dtype=jnp.int32)  # [r, m]: set up to the block's end
    wanted = jnp.arange(k, dtype=jnp.int32)  # [k]
    block = jnp.sum(ends[:, None, :] <= wanted[None, :, None], axis=-1, dtype=jnp.int32)  # [r, k]; num_blocks: none
    exists = block < num_blocks  # [r, k]
    block = jnp.minimum(block, num_blocks - 1)  # [r, k]
    before = jnp.take_along_axis(ends - running[..., -1], block, axis=1)  # [r, k]
    inside = jnp.take_along_axis(running.astype(jnp.uint8), block[..., None], axis=1)  # [r, k, block]
    place = jnp.sum(inside <= (wanted[None] - before).astype(jnp.uint8)[..., None], axis=-1, dtype=jnp.int32)  # [r, k]
    return jnp.where(exists, block * _BLOCK + place, -1)  # [r, k]
