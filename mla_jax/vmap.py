"""vmap of the ops: a mapped axis is folded into the batch.

Folding n calls of b requests gives one call of n * b requests. Caches that are mapped too become one pool of n times
the pages, with page ids and slots offset to match. The kernels thus need no batching rule of their own, and the plan is
made anew for the folded lengths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from mla_jax import dispatch
from mla_jax.cache import PagedKVCache
from mla_jax.calls import DenseCall, DenseOperands, Scope, SparseCall, SparseOperands
from pallas_kernels.schedule import plan_decode, plan_sparse_decode


def batchable(cuda: dispatch.Choice, other: dispatch.Choice, call: Any, config: Any):
    """operands -> (out, lse), with a batching rule."""

    @custom_vmap
    def op(operands):
        if 0 in operands.q.shape or operands.names_no_keys:
            out = jnp.zeros((*operands.q.shape[:-1], call.fmt.d_v), call.out_dtype)
            return out, jnp.full(operands.q.shape[:-1], -jnp.inf, jnp.float32)
        return dispatch.run(cuda, other, call, operands, config)

    @op.def_vmap
    def rule(axis_size: int, in_batched: Any, operands: Any):
        (batched,) = in_batched
        if not _can_fold(operands, batched, axis_size):
            return _one_by_one(op, operands, batched), (True, True)
        fold = _fold_dense if isinstance(call, DenseCall) else _fold_sparse
        folded_call, folded = fold(call, operands, batched, axis_size)
        out, lse = batchable(cuda, other, folded_call, config)(folded)
        out, lse = (x.reshape(axis_size, call.b, *x.shape[1:]) for x in (out, lse))
        return (out, lse), (True, True)

    return op


def _scopes(operands: SparseOperands) -> list[Scope]:
    return [s for s in (operands.main, operands.extra) if s is not None]


def _can_fold(operands: Any, batched: Any, n: int) -> bool:
    """One scale and one sink for all is what the kernels take, and slots of a folded pool must fit int32."""
    if batched.sm_scale:
        return False
    if isinstance(operands, DenseOperands):
        return True
    if operands.attn_sink is not None and batched.attn_sink:
        return False
    pairs = zip(_scopes(operands), _scopes(batched), strict=True)
    # A mapped cache still carries the mapped axis here: its pages are the second one.
    return not any(
        flags.cache.data and n * scope.cache.data.shape[1] * scope.cache.page_size >= 2**31 for scope, flags in pairs
    )


def _one_by_one(op: Any, operands: Any, batched: Any) -> Any:
    """The mapped calls one after the other."""
    leaves, treedef = jax.tree.flatten(operands)
    flags = jax.tree.leaves(batched)

    def one(mapped):
        rest = iter(mapped)
        return op(jax.tree.unflatten(treedef, [next(rest) if f else x for x, f in zip(leaves, flags, strict=True)]))

    return jax.lax.map(one, [x for x, f in zip(leaves, flags, strict=True) if f])


def _rows(x: Any, is_batched: bool, n: int) -> Any:
    """[n, b, ...] or, repeated for every mapped call, [b, ...] -> [n * b, ...]."""
    if x is None:
        return None
    if not is_batched:
        x = jnp.broadcast_to(x[None], (n, *x.shape))
    return x.reshape(n * x.shape[1], *x.shape[2:])


def _pool(cache: PagedKVCache, is_batched: bool) -> tuple[PagedKVCache, int]:
    """The folded cache, and how many pages one mapped call's cache has (0: all share one)."""
    if not is_batched:
        return cache, 0
    n, pages = cache.data.shape[:2]
    return cache.replace(cache.data.reshape(n * pages, *cache.data.shape[2:])), pages


def _offset(ids: jax.Array, n: int, each: int) -> jax.Array:
    """[n * b, ...] ids below `each` -> ids in a pool of n * each; -1 for ids that name nothing."""
    b = ids.shape[0] // n
    first = jnp.repeat(jnp.arange(n, dtype=jnp.int32) * each, b, total_repeat_length=n * b)
    first = first.reshape(-1, *([1] * (ids.ndim - 1)))
    valid = (ids >= 0) & (ids < each)
    return jnp.where(valid, jnp.where(valid, ids, 0) + first, -1)


def _fold_dense(call: DenseCall, x: DenseOperands, batched: Any, n: int) -> tuple[DenseCall, DenseOperands]:
    cache, pages = _pool(x.cache, batched.cache.data)
    if x.block_table is not None:
        table = _rows(x.block_table, batched.block_table, n)
        table = _offset(table, n, pages) if pages else table
    elif pages:
        table = None  # page i * b + r belongs to request i * b + r
    else:
        table = jnp.tile(jnp.arange(call.b, dtype=jnp.int32), n)[:, None]
    seqlens = _rows(x.cache_seqlens, batched.cache_seqlens, n)
    plan = x.plan
    if plan is not None:
        plan = plan_decode(
            seqlens, s_q=call.s_q, num_heads=call.h, page_size=call.page_size, batch_invariant=call.batch_invariant
        )
    q = _rows(x.q, batched.q, n)
    return dataclasses.replace(call, b=n * call.b), DenseOperands(q, cache, table, seqlens, x.sm_scale, plan)


def _fold_sparse(call: SparseCall, x: SparseOperands, batched: Any, n: int) -> tuple[SparseCall, SparseOperands]:
    def fold(scope: Scope, flags: Any) -> Scope:
        cache, pages = _pool(scope.cache, flags.cache.data)
        indices = _rows(scope.indices, flags.indices, n)
        if pages:
            indices = _offset(indices, n, pages * cache.page_size)
        return Scope(cache, indices, _rows(scope.length, flags.length, n))

    main = fold(x.main, batched.main)
    extra = fold(x.extra, batched.extra) if x.extra is not None else None
    plan = x.plan
    if plan is not None:
        plan = plan_sparse_decode(
            call.topk,
            batch=n * call.b,
            s_q=call.s_q,
            num_heads=call.h,
            topk_length=main.length,
            extra_topk=call.extra_topk,
            extra_topk_length=extra.length if extra is not None else None,
            batch_invariant=call.batch_invariant,
        )
    q = _rows(x.q, batched.q, n)
    return dataclasses.replace(call, b=n * call.b), SparseOperands(q, main, extra, x.sm_scale, x.attn_sink, plan)
