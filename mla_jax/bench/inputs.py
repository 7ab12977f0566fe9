"""Arrays for a workload, and the call that is measured.

`build` gives what one measurement needs: the `caches` that every call reads and `sets` of per-call arguments. Where one
call touches less than the L2 cache holds, several sets point at disjoint pages of the same pool, and calls rotate over
them: otherwise the second call would find its rows in the L2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax.bench.workloads import Append, Dense, Plan, Scope, Sparse, Workload
from pallas_kernels.formats import KVFormat

MAX_SETS = 128
_CHUNK_BYTES = 1 << 28  # rows drawn at a time while a pool is filled
APPEND_PAGES_PER_REQUEST = 16


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["caches", "sets", "carry"], meta_fields=["workload"]
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one workload; a pytree.

    Attributes:
      workload: what they are for.
      caches: read by every call, by argument name.
      sets: the other arguments of call i are `sets[i % len(sets)]`, by name.
      carry: what a call takes over from the one before and gives to the next, donated: the cache that is appended to.
    """

    workload: Workload
    caches: dict[str, Any]
    sets: tuple[dict[str, Any], ...]
    carry: Any = None


def num_sets(workload: Workload, l2_bytes: int) -> int:
    """Disjoint input sets that together touch at least twice the L2; 1 when a single call does."""
    if isinstance(workload, Plan | Append) or workload.bytes_moved >= 2 * l2_bytes:
        return 1
    return min(MAX_SETS, math.ceil(2 * l2_bytes / workload.bytes_moved))


def sm_scale(fmt: KVFormat) -> float:
    """Any scale serves for timing; this one keeps scores of unit-variance rows at unit variance."""
    return fmt.d_qk**-0.5


def build(workload: Workload, *, sets: int = 1, seed: int = 0) -> Inputs:
    """Makes the arrays of a workload on the default device, from seeded random numbers, pages in shuffled order."""
    rng = np.random.default_rng(seed)
    match workload:
        case Dense():
            return _build_dense(workload, sets, rng)
        case Sparse():
            return _build_sparse(workload, sets, rng)
        case Plan():
            return Inputs(workload, {}, ({"lengths": _plan_lengths(workload.of)},))
        case Append():
            return _build_append(workload, rng)
        case _:
            raise TypeError(f"no inputs for {type(workload).__name__}")


def abstract(workload: Workload, *, sets: int = 1) -> Inputs:
    """The same with `jax.ShapeDtypeStruct`s for arrays: enough to compile for."""
    return jax.eval_shape(lambda: build(workload, sets=sets))


def call(
    workload: Workload, caches: dict, args: dict, *, implementation: str | None = None, config: Any = None
) -> Any:
    """The measured call. Attention returns (out, lse), as the peer does; a plan its pytree; append the cache."""
    match workload:
        case Dense():
            return mla_jax.mla_decode(
                **caches, **args, sm_scale=sm_scale(workload.fmt), is_causal=workload.is_causal,
                implementation=implementation, config=config, return_lse=True,
            )  # fmt: skip
        case Sparse():
            return mla_jax.sparse_mla_decode(
                **caches, **args, sm_scale=sm_scale(workload.fmt), implementation=implementation, config=config,
                return_lse=True,
            )  # fmt: skip
        case Plan():
            return make_plan(workload.of, args["lengths"])
        case Append():
            return mla_jax.append_kv(args["carry"], args["kv"], args["slots"])
        case _:
            raise TypeError(f"no call for {type(workload).__name__}")


def make_plan(workload: Dense | Sparse, lengths: jax.Array) -> Any:
    """The split plan of a workload. `lengths` int32 [b]: its cache lengths, or its last scope's top-k lengths."""
    if isinstance(workload, Dense):
        return mla_jax.plan_decode(lengths, s_q=workload.s_q, num_heads=workload.h, page_size=workload.page_size)
    main, extra = workload.main, workload.extra
    return mla_jax.plan_sparse_decode(
        main.topk, batch=workload.b, s_q=workload.s_q, num_heads=workload.h,
        topk_length=lengths if extra is None and main.varlen else None,
        extra_topk=0 if extra is None else extra.topk,
        extra_topk_length=lengths if extra is not None and extra.varlen else None,
    )  # fmt: skip


def _plan_lengths(workload: Dense | Sparse) -> jax.Array:
    if isinstance(workload, Dense):
        return jnp.full(workload.b, workload.s_k, jnp.int32)  # [b]
    return jnp.asarray((workload.extra or workload.main).lengths(workload.b))  # [b]


def _build_dense(w: Dense, sets: int, rng: np.random.Generator) -> Inputs:
    pages_per_request = -(-w.s_k // w.page_size)
    pages = sets * w.b * pages_per_request
    tables = rng.permutation(pages).astype(np.int32).reshape(sets, w.b, pages_per_request)
    lengths = _plan_lengths(w)
    plan = jax.jit(functools.partial(make_plan, w))(lengths)
    per_set = tuple(
        {"q": _query(w, rng), "block_table": jnp.asarray(table), "cache_seqlens": lengths, "plan": plan}
        for table in tables
    )
    cache = random_cache(w.fmt, pages, w.page_size, seed=int(rng.integers(1 << 30)))
    return Inputs(w, {"cache": cache}, per_set)


def _build_sparse(w: Sparse, sets: int, rng: np.random.Generator) -> Inputs:
    common: dict[str, Any] = {"plan": jax.jit(functools.partial(make_plan, w))(_plan_lengths(w))}
    if w.extra is not None and w.extra.varlen:
        common["extra_topk_length"] = jnp.asarray(w.extra.lengths(w.b))  # [b]
    if w.main.varlen:
        common["topk_length"] = jnp.asarray(w.main.lengths(w.b))  # [b]
    caches: dict[str, Any] = {}
    per_set: list[dict[str, Any]] = [{"q": _query(w, rng)} | common for _ in range(sets)]
    for prefix, scope in (("", w.main), ("extra_", w.extra)):
        if scope is None:
            continue
        pages_per_request = -(-scope.s_kv // scope.page_size)
        pages = sets * w.b * pages_per_request
        tables = rng.permutation(pages).astype(np.int32).reshape(sets, w.b, pages_per_request)
        caches[f"{prefix}cache"] = random_cache(scope.fmt, pages, scope.page_size, seed=int(rng.integers(1 << 30)))
        for args, table in zip(per_set, tables, strict=True):
            args[f"{prefix}indices"] = jnp.asarray(_random_slots(scope, table, w.s_q, rng))
    return Inputs(w, caches, tuple(per_set))


def _build_append(w: Append, rng: np.random.Generator) -> Inputs:
    pages = w.b * APPEND_PAGES_PER_REQUEST
    cache = mla_jax.PagedKVCache.zeros(w.fmt, pages, w.page_size)
    kv = jnp.asarray(rng.standard_normal((w.b, w.fmt.d_qk), np.float32), w.fmt.compute_dtype)  # [b, d_qk]
    slots = rng.permutation(pages * w.page_size)[: w.b].astype(np.int32)  # [b]
    return Inputs(w, {}, ({"kv": kv, "slots": jnp.asarray(slots)},), carry=cache)


def _query(w: Dense | Sparse, rng: np.random.Generator) -> jax.Array:
    key = jax.random.key(int(rng.integers(1 << 30)))
    return jax.random.normal(key, (w.b, w.s_q, w.h, w.fmt.d_qk), w.fmt.compute_dtype)  # [b, s_q, h, d_qk]


def _random_slots(scope: Scope, table: np.ndarray, s_q: int, rng: np.random.Generator) -> np.ndarray:
    """`topk` different slots for each query, in random order: int32 [b, s_q, topk]. `table` [b, pages a request]."""
    b = table.shape[0]
    order = np.argpartition(rng.random((b * s_q, scope.s_kv), np.float32), scope.topk - 1)  # [b*s_q, s_kv]
    positions = rng.permuted(order[:, : scope.topk], axis=1).reshape(b, s_q, scope.topk)
    page = np.take_along_axis(table[:, None, :], positions // scope.page_size, axis=2)  # [b, s_q, topk]
    return (page * scope.page_size + positions % scope.page_size).astype(np.int32)


def random_cache(fmt: KVFormat, pages: int, page_size: int, *, seed: int = 0) -> mla_jax.PagedKVCache:
    """A pool of at least `pages` pages of normally distributed rows, filled piece by piece to bound temporaries."""
    chunk_pages = min(pages, max(1, _CHUNK_BYTES // (page_size * fmt.d_qk * 4)))
    chunks = -(-pages // chunk_pages)
    data = jnp.zeros((chunks * chunk_pages, *fmt.page_shape(page_size)), fmt.storage_dtype)
    # The generator that is fast on a GPU: pools run to gigabytes.
    for i, key in enumerate(jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), chunks)):
        data = _write(data, _random_pages(key, fmt, chunk_pages, page_size), jnp.int32(i * chunk_pages))
    return mla_jax.PagedKVCache(data, fmt, page_size)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random_pages(key: jax.Array, fmt: KVFormat, pages: int, page_size: int) -> jax.Array:
    kv = jax.random.normal(key, (pages, page_size, fmt.d_qk), fmt.compute_dtype)
    return mla_jax.pack_kv(kv, fmt).data  # [pages, ...]


@functools.partial(jax.jit, donate_argnums=0)
def _write(data: jax.Array, pages: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(data, pages, start, 0)
