"""The two tables of implementations, best first. To add a kernel, add a row (docs/add-a-kernel.md)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mla_jax import xla
from mla_jax.calls import DenseCall, DenseOperands, Scope, SparseCall, SparseOperands
from mla_jax.dispatch import Implementation, Target


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


DENSE = (
    Implementation("mosaic", *_not_in_this_version("Mosaic GPU")),
    Implementation("triton", *_not_in_this_version("Triton-lowered")),
    Implementation("xla", _check_xla, _dense_xla),
)

SPARSE = (
    Implementation("mosaic", *_not_in_this_version("Mosaic GPU")),
    Implementation("triton", *_not_in_this_version("Triton-lowered")),
    Implementation("xla", _check_xla, _sparse_xla),
)
