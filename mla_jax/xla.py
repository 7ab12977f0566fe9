"""The "xla" implementation of both ops: plain JAX, any platform, any format.

Keys are gathered and dequantised a chunk at a time (never the pool) and folded into an online softmax, so memory does
not grow with context, top-k or batch. Requests are taken in groups whose working set stays under `GROUP_BYTES`; beyond
that the op holds its output, its index arrays and one more copy of q at most. A group runs as many chunks as its
longest row needs. On GPUs products are taken in the cache's compute dtype with float32 accumulation, as the kernels do;
elsewhere in float32, which CPUs compute as fast and which keeps softmax weights exact.

XLA picks how to compute a product by its shape, batch included: where results must not depend on the batch, every item
is a group of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import spmd
from mla_jax.cache import PagedKVCache, gather_rows
from mla_jax.lse import sink_factor
from pallas_kernels.formats import KVFormat

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32

GROUP_BYTES = 48 * 2**20
CHUNK_TOKENS = 256  # at least, where there are as many

# (keys [g, c, d_qk], valid [g, m, c]) of one chunk
Fetch = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _product(equation: str, x: Float[Array, "..."], keys: Float[Array, "g c d"]) -> Float32[Array, "..."]:
    """einsum with float32 accumulation."""

    def exact(x, keys):
        x, keys = x.astype(jnp.float32), keys.astype(jnp.float32)
        return jnp.einsum(equation, x, keys, precision=lax.Precision.HIGHEST)

    def mixed(x, keys):
        return jnp.einsum(equation, x.astype(keys.dtype), keys, preferred_element_type=jnp.float32)

    if keys.dtype == jnp.float32:
        return exact(x, keys)
    return lax.platform_dependent(x, keys, cuda=mixed, rocm=mixed, default=exact)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Running:
    """Online softmax of g items with m rows of h heads each."""

    top: Float32[Array, "g m h"]
    total: Float32[Array, "g m h"]
    acc: Float32[Array, "g m h d_v"]

    @classmethod
    def empty(cls, g: int, m: int, h: int, d_v: int, axes: tuple[str, ...]) -> _Running:
        """No keys yet. `axes`: the mesh axes of a surrounding shard_map over which the result will vary."""
        empty = cls(
            jnp.full((g, m, h), -jnp.inf, jnp.float32),
            jnp.zeros((g, m, h), jnp.float32),
            jnp.zeros((g, m, h, d_v), jnp.float32),
        )
        return jax.tree.map(lambda x: spmd.vary(x, axes), empty)

    def add(
        self, q: Float[Array, "g m h d"], keys: Float[Array, "g c d"], valid: Bool[Array, "g m c"], sm_scale: jax.Array
    ) -> _Running:
        scores = _product("gmhd,gcd->gmhc", q, keys) * sm_scale
        scores = jnp.where(valid[:, :, None, :], scores, -jnp.inf)  # [g, m, h, c]
        # Or XLA may fuse the scale's product with the difference below, which rounds it but once: for scores of 1e9 the
        # largest key's exp(0) would be exp(-128), and whether it is fused may depend on the batch.
        scores = lax.optimization_barrier(scores)
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        base = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(self.top - base)
        values = keys[..., : self.acc.shape[-1]]
        update = _product("gmhc,gcd->gmhd", weights, values)
        total = self.total * decay + jnp.sum(weights, axis=-1)
        return _Running(top, total, self.acc * decay[..., None] + update)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        some = jnp.where(self.total == 0, 1, self.total)
        lse = jnp.where(self.total == 0, -jnp.inf, self.top + jnp.log(some))
        return self.acc / some[..., None], lse


def _accumulate(
    state: _Running, q, sm_scale, length: Int32[Array, "g"], longest: int, chunk: int, fetch: Fetch
) -> _Running:
    """Adds chunks 0, 1, ... of `chunk` keys until the longest of the group's items is done; none exceeds `longest`."""
    if longest <= chunk:
        return state.add(q, *fetch(jnp.int32(0)), sm_scale)
    num_chunks = lax.div(jnp.max(length, initial=0) + (chunk - 1), jnp.int32(chunk))

    def step(i, state):
        keys, valid = fetch(i)
        return state.add(q, keys, valid, sm_scale)

    return lax.fori_loop(0, num_chunks, step, state)


def _tiling(items: int, rows: int, fmt: KVFormat, longest: int) -> tuple[int, int]:
    """(items of a group, keys of a chunk): what fits `GROUP_BYTES`, batch before chunk length."""
    key_bytes = rows * 2 * 4 + fmt.d_qk * (fmt.compute_dtype.itemsize + 4)  # scores, weights; the key, widened too
    item_bytes = rows * 3 * fmt.d_qk * 4  # q, the accumulator and its update
    chunk = CHUNK_TOKENS
    groups = -(-items // max(1, GROUP_BYTES // (item_bytes + chunk * key_bytes)))
    size = -(-items // groups)
    while chunk < longest and size * (item_bytes + 2 * chunk * key_bytes) <= GROUP_BYTES:
        chunk *= 2
    return size, min(chunk, longest)


def _in_groups(fn, arrays, size: int):
    """Maps `fn` over groups of `size` items (axis 0 of every array); the last group is padded with zeros."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    groups = -(-n // size)
    if groups == 1:
        return fn(arrays)

    def split(x):
        pad = [(0, groups * size - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(groups, size, *x.shape[1:])

    out = lax.map(fn, jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:])[:n], out)


def dense(
    q: Float[Array, "b s_q h d_qk"],
    cache: PagedKVCache,
    block_table: Int32[Array, "b max_pages"] | None,
    cache_seqlens: Int32[Array, "b"],
    sm_scale: Float32[Array, ""],
    *,
    is_causal: bool,
    batch_invariant: bool = False,
    out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Dense decode: (out [b, s_q, h, d_v] in q's dtype or `out_dtype`, lse float32 [b, s_q, h])."""
    b, s_q, h, _ = q.shape
    axes = spmd.varying_axes(q, cache, block_table, cache_seqlens, sm_scale)
    page_size = cache.page_size
    if block_table is None:
        block_table = jnp.arange(b, dtype=jnp.int32)[:, None]  # [b, 1]
    capacity = min(block_table.shape[1] * page_size, 2**31 - 1)
    size, chunk = _tiling(1 if batch_invariant else b, s_q * h, cache.format, capacity)
    seqlens = jnp.clip(cache_seqlens, 0, capacity)
    row = jnp.arange(s_q, dtype=jnp.int32)
    reach = (s_q - 1 - row) if is_causal else jnp.zeros_like(row)  # [s_q]: how many keys short of the end row j stops

    def group(args):
        q, table, length = args  # [g, s_q, h, d], [g, max_pages], [g]

        def fetch(i):
            position = i * chunk + jnp.arange(chunk, dtype=jnp.int32)  # [c]
            column = lax.div(position, jnp.int32(page_size))
            page = table.at[:, column].get(mode="fill", fill_value=-1)  # [g, c]
            known = (page >= 0) & (page < cache.num_pages) & (position[None] < length[:, None])
            offset = position - column * page_size
            slot = jnp.where(known, jnp.where(known, page, 0) * page_size + offset[None], -1)
            end = length[:, None] - reach[None]  # [g, s_q]
            valid = known[:, None, :] & (position[None, None] < end[..., None])
            return gather_rows(cache, slot), valid

        state = _Running.empty(q.shape[0], s_q, h, cache.format.d_v, axes)
        out, lse = _accumulate(state, q, sm_scale, length, capacity, chunk, fetch).finish()
        return out.astype(out_dtype or q.dtype), lse

    return _in_groups(group, (q, block_table, seqlens), size)


def sparse(
    q: Float[Array, "b s_q h d_qk"],
    scopes: tuple[tuple[PagedKVCache, Int32[Array, "b s_q topk"], Int32[Array, "b s_q"]], ...],
    sm_scale: Float32[Array, ""],
    attn_sink: Float32[Array, "h"] | None,
    *,
    batch_invariant: bool = False,
    out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Sparse decode over scopes (cache, indices, lengths): out and lse as `dense`, the sink in `out` only."""
    b, s_q, h, d = q.shape
    axes = spmd.varying_axes(q, scopes, sm_scale)
    items = b * s_q
    caches = [cache for cache, _, _ in scopes]
    fmt = caches[0].format
    widest = max(indices.shape[-1] for _, indices, _ in scopes)
    size, chunk = _tiling(1 if batch_invariant else items, h, fmt, widest)

    def flatten(indices, length):
        topk = indices.shape[-1]
        pad = -topk % min(chunk, max(topk, 1))
        indices = jnp.pad(indices.reshape(items, topk), [(0, 0), (0, pad)], constant_values=-1)
        return indices, jnp.clip(length.reshape(items), 0, topk)

    def group(args):
        q, lists = args  # [g, 1, h, d], per scope ([g, padded topk], [g])
        state = _Running.empty(q.shape[0], 1, h, fmt.d_v, axes)
        for cache, (indices, length) in zip(caches, lists, strict=True):
            longest = indices.shape[1]
            if longest == 0:
                continue
            width = min(chunk, longest)

            def fetch(i, cache=cache, indices=indices, length=length, width=width):
                slot = lax.dynamic_slice_in_dim(indices, i * width, width, axis=1)  # [g, c]
                entry = i * width + jnp.arange(width, dtype=jnp.int32)
                valid = (slot >= 0) & (slot < min(cache.num_slots, 2**31 - 1)) & (entry[None] < length[:, None])
                return gather_rows(cache, jnp.where(valid, slot, -1)), valid[:, None]

            state = _accumulate(state, q, sm_scale, length, longest, width, fetch)
        out, lse = state.finish()
        if attn_sink is not None:
            out = out * sink_factor(lse, attn_sink)[..., None]
        return out.astype(out_dtype or q.dtype), lse

    lists = tuple(flatten(indices, length) for _, indices, length in scopes)
    out, lse = _in_groups(group, (q.reshape(items, 1, h, d), lists), size)
    return out.reshape(b, s_q, h, -1), lse.reshape(b, s_q, h)
