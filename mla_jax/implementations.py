"""The two tables of implementations, best first. To add a kernel, add a row (docs/add-a-kernel.md)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mla_jax import xla
from mla_jax.calls import DenseCall, DenseOperands, Scope, SparseCall, SparseOperands
from mla_jax.dispatch import Implementation, Target, check_cuda, check_tested_jax
from pallas_kernels import sparse_decode as sparse_kernel
from pallas_kernels.schedule import plan_sparse_decode


def _not_in_this_version(kind: str):
    def check(call: Any, target: Target, config: Any) -> None:
        raise NotImplementedError(f"this version has no {kind} kernel for {call.op}")

    def run(call: Any, config: Any, operands: Any) -> Any:
        check(call, Target("cuda"), config)

    return check, run


def _check_xla(call: DenseCall | SparseCall, target: Target, config: Any) -> None:
    if config is not None:
        raise ValueError(f"config is {config!r}; implementation 'xla' has nothing to configure, accepted: None")


def _dense_xla(call: DenseCall, config: Any, x: DenseOperands):
    return xla.dense(x.q, x.cache, x.block_table, x.cache_seqlens, x.sm_scale, is_causal=call.is_causal)


def _sparse_xla(call: SparseCall, config: Any, x: SparseOperands):
    def scope(s: Scope):
        length = s.length
        if length is None:
            length = jnp.full(s.indices.shape[:2], s.indices.shape[2], jnp.int32)
        return s.cache, s.indices, length

    scopes = tuple(scope(s) for s in (x.main, x.extra) if s is not None)
    return xla.sparse(x.q, scopes, x.sm_scale, x.attn_sink)


def _check_sparse_mosaic(call: SparseCall, target: Target, config: Any) -> None:
    check_tested_jax()
    check_cuda(target)
    assert target.capability is not None
    sparse_kernel.check(call.fmt, call.extra_fmt, target.capability)
    if config is not None and not isinstance(config, sparse_kernel.SparseConfig):
        raise ValueError(f"config is {config!r}; accepted by 'mosaic': None or a SparseConfig")


def _sparse_mosaic(call: SparseCall, config: Any, x: SparseOperands):
    plan = x.plan
    if plan is None:
        plan = plan_sparse_decode(
            call.topk,
            batch=call.b,
            s_q=call.s_q,
            num_heads=call.h,
            topk_length=x.main.length,
            extra_topk=call.extra_topk,
            extra_topk_length=None if x.extra is None else x.extra.length,
        )
    extra: dict[str, Any] = {}
    if x.extra is not None:
        extra = dict(
            extra_data=x.extra.cache.data,
            extra_fmt=call.extra_fmt,
            extra_page_size=call.extra_page_size,
            extra_indices=x.extra.indices,
            extra_topk_length=x.extra.length,
        )
    return sparse_kernel.sparse_decode(
        x.q, x.main.cache.data, call.fmt, call.page_size, x.main.indices, plan, x.sm_scale,
        topk_length=x.main.length, attn_sink=x.attn_sink, config=config, **extra,
    )  # fmt: skip


DENSE = (
    Implementation("mosaic", *_not_in_this_version("Mosaic GPU")),
    Implementation("triton", *_not_in_this_version("Triton-lowered")),
    Implementation("xla", _check_xla, _dense_xla),
)

SPARSE = (
    Implementation("mosaic", _check_sparse_mosaic, _sparse_mosaic),
    Implementation("triton", *_not_in_this_version("Triton-lowered")),
    Implementation("xla", _check_xla, _sparse_xla),
)
