"""The context axis of a mesh as a rank sees it inside `jax.shard_map`: which keys are here, and the ops over all keys.

Column j of a block table stands for tokens that rank j % C holds. Tables here have the pages' local numbers, and what
other ranks' columns hold does not matter. Every rank attends to its own keys, and `merge` joins the partial results
with two collectives the size of the output, an all-to-all (each rank gets all partials of some rows) and an all-gather.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import decode
from mla_jax.lse import merge_partials

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

    from mla_jax.cache import PagedKVCache


@dataclasses.dataclass(frozen=True)
class ContextAxis:
    """A manual mesh axis of `size` ranks that share the keys of every request. `size` is C in what follows."""

    name: str
    size: int

    @property
    def rank(self) -> jax.Array:
        """int32 []."""
        return lax.axis_index(self.name)

    # -- which keys are here -------------------------------------------------------------------------------------------

    def num_own(self, columns: int) -> int:
        """Columns of `own_columns`."""
        return -(-columns // self.size)

    def own_columns(self, table: Int32[Array, "b columns"]) -> jax.Array:
        """[b, ceil(columns / C)]: this rank's columns, which are rank, rank + C, ..."""
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % self.size)), constant_values=-1)
        table = table.reshape(table.shape[0], -1, self.size)  # [b, columns / C, C]
        return lax.dynamic_index_in_dim(table, self.rank, axis=2, keepdims=False)

    def only_own(self, table: Int32[Array, "b columns"]) -> jax.Array:
        """[b, columns]: the table with -1 in the columns of other ranks."""
        column = lax.broadcasted_iota(jnp.int32, table.shape, 1)
        return jnp.where(lax.rem(column, jnp.int32(self.size)) == self.rank, table, -1)

    def own_tokens(self, lengths: Int32[Array, "*n"], page_size: int) -> jax.Array:
        """How many of each request's first tokens lie in this rank's columns; they are the first ones there."""
        whole, rest = lax.div(lengths, jnp.int32(page_size)), lax.rem(lengths, jnp.int32(page_size))
        own = lax.div(whole + (self.size - 1) - self.rank, jnp.int32(self.size))  # whole pages
        return own * page_size + jnp.where(lax.rem(whole, jnp.int32(self.size)) == self.rank, rest, 0)

    def positions(self, own: Int32[Array, "*n"], page_size: int) -> jax.Array:
        """Positions in `own_columns` -> positions in the request; -1 stays -1."""
        page, offset = lax.div(own, jnp.int32(page_size)), lax.rem(own, jnp.int32(page_size))
        return jnp.where(own < 0, -1, (page * self.size + self.rank) * page_size + offset)

    def share(self, count: Int32[Array, "*n"]) -> jax.Array:
        """`count` keys / C, rounded up: what a plan assumes of keys that may lie anywhere."""
        return lax.div(count, jnp.int32(self.size)) + jnp.minimum(lax.rem(count, jnp.int32(self.size)), 1)

    # -- the ops over the keys of all ranks ----------------------------------------------------------------------------

    def mla_decode(
        self,
        q: jax.Array,
        cache: PagedKVCache,
        block_table: Int32[Array, "b columns"],
        cache_seqlens: Int32[Array, "b"],
        *,
        is_causal: bool = False,
        plan: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        """`mla_jax.mla_decode`; the table has all ranks' columns. `plan`: of `own_tokens(cache_seqlens)`."""
        attend = functools.partial(decode.partial_results, decode.mla_decode, **options)
        b, s_q, h, d = q.shape
        page_size, columns = cache.page_size, block_table.shape[1]
        lengths = jnp.clip(cache_seqlens, 0, min(columns * page_size, 2**31 - 1 - page_size))  # [b]
        own_table = self.own_columns(block_table)  # [b, columns / C]
        if not is_causal or s_q == 1:
            out, lse = attend(q, cache, own_table, self.own_tokens(lengths, page_size), plan=plan)
            return self._joined(out, lse, None, q.dtype, return_lse)
        # The rows' ends differ by less than s_q tokens, which may lie on different ranks: no one length a rank says
        # that. So: whole pages that every row sees, and then the few tokens behind them, each row as a request of its
        # own.
        whole = lax.div(jnp.maximum(lengths - (s_q - 1), 0), jnp.int32(page_size))  # [b] pages
        seen_by_all = attend(q, cache, own_table, self.own_tokens(whole * page_size, page_size), plan=plan)
        num_tail = -(-(page_size + s_q - 2) // page_size)  # pages that can hold the rest
        column = whole[:, None] + jnp.arange(num_tail, dtype=jnp.int32)[None]  # [b, num_tail]
        rows = lax.broadcasted_iota(jnp.int32, column.shape, 0)
        page = self.only_own(block_table).at[rows, column].get(mode="fill", fill_value=-1)  # [b, num_tail]
        end = lengths[:, None] - jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)[None]  # [b, s_q]
        tail = jnp.maximum(end - whole[:, None] * page_size, 0)  # [b, s_q]
        out, lse = attend(q.reshape(b * s_q, 1, h, d), cache, jnp.repeat(page, s_q, axis=0), tail.reshape(-1))
        few = out.reshape(b, s_q, h, -1), lse.reshape(b, s_q, h)
        outs, lses = (jnp.stack(parts) for parts in zip(seen_by_all, few, strict=True))  # [2, b, s_q, h, ...]
        out, lse = merge_partials(outs, lses)
        return self._joined(out, lse, None, q.dtype, return_lse)

    def sparse_mla_decode(
        self,
        q: jax.Array,
        cache: PagedKVCache,
        indices: Int32[Array, "b s_q topk"],
        *,
        topk_length: Any = None,
        attn_sink: Float32[Array, "h"] | None = None,
        extra_indices: Any = None,
        extra_topk_length: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        """`mla_jax.sparse_mla_decode`; indices are this rank's slots, -1 for those of others, in any order."""
        indices, topk_length = _to_front(indices, topk_length)
        if extra_indices is not None:
            extra_indices, extra_topk_length = _to_front(extra_indices, extra_topk_length)
        out, lse = decode.partial_results(
            decode.sparse_mla_decode, q, cache, indices, topk_length=topk_length, extra_indices=extra_indices,
            extra_topk_length=extra_topk_length, **options,
        )  # fmt: skip
        return self._joined(out, lse, attn_sink, q.dtype, return_lse)

    def _joined(self, out, lse, attn_sink, dtype, return_lse: bool) -> Any:
        out, lse = self.merge(out, lse, attn_sink, dtype)
        return (out, lse) if return_lse else out

    def merge(
        self,
        out: Float32[Array, "b s_q h d_v"],
        lse: Float32[Array, "b s_q h"],
        attn_sink: Float32[Array, "h"] | None,
        dtype: Any,
    ) -> tuple[Float[Array, "b s_q h d_v"], jax.Array]:
        """Joins the ranks' partial results; all get the result, in `dtype`. The sink counts once."""
        ranks = self.size
        rows = lse.size
        each = -(-rows // ranks)  # rows that a rank merges

        def split(x, fill):  # [rows, ...] -> [ranks, each, ...]
            fill = jnp.asarray(fill, x.dtype)
            x = jnp.pad(x, [(0, ranks * each - rows)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
            return x.reshape(ranks, each, *x.shape[1:])

        outs = lax.all_to_all(split(out.reshape(rows, -1), 0), self.name, 0, 0)  # [ranks, each, d_v]: of rows, all
        lses = lax.all_to_all(split(lse.reshape(rows), -jnp.inf), self.name, 0, 0)  # [ranks, each]
        if attn_sink is not None:
            sinks = split(jnp.broadcast_to(attn_sink[None], (rows // attn_sink.size, attn_sink.size)).reshape(rows), 0)
            attn_sink = lax.dynamic_index_in_dim(sinks, self.rank, keepdims=False)  # [each]
        merged, merged_lse = merge_partials(outs, lses, attn_sink=attn_sink)  # [each, d_v], [each]
        gather = functools.partial(lax.all_gather, axis_name=self.name, tiled=True)
        return gather(merged.astype(dtype))[:rows].reshape(out.shape), gather(merged_lse)[:rows].reshape(lse.shape)


def _to_front(indices: jax.Array, length: Any) -> tuple[jax.Array, jax.Array]:
    """Indices that are not -1 moved to the front, and how many they are: a rank works on its own keys only, and not on
    the gaps that the others leave. `length`: how many of the leftmost count, or None."""
    if length is not None:
        length = length.reshape(length.shape + (1,) * (indices.ndim - length.ndim))  # broadcasts to [b, s_q, topk]
        indices = jnp.where(lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1) < length, indices, -1)
    there = indices >= 0
    place = jnp.cumsum(there, axis=-1, dtype=jnp.int32) - 1
    place = jnp.where(there, place, indices.shape[-1])  # out of range: dropped

    def compact(own, place):  # [topk] each
        return jnp.full_like(own, -1).at[place].set(own, mode="drop", unique_indices=False)

    flat = indices.reshape(-1, indices.shape[-1]), place.reshape(-1, indices.shape[-1])
    count = jnp.sum(there, axis=-1, dtype=jnp.int32)  # [b, s_q], or [b]
    return jax.vmap(compact)(*flat).reshape(indices.shape), count
