"""The two tables of implementations, best first. To add a kernel, add a row.

The kernels are imported where they are used: loading Mosaic GPU takes longer than all the rest of `import mla_jax`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import xla
from mla_jax.calls import DenseCall, DenseOperands, Scope, SparseCall, SparseOperands
from mla_jax.dispatch import Implementation, Target, check_cuda, check_tested_jax
from pallas_kernels.schedule import SplitPlan, num_sms, plan_decode, plan_sparse_decode


def _check_xla(call: DenseCall | SparseCall, target: Target, config: Any) -> None:
    # A kernel's config is no mistake: the call may name one for where the kernel runs, and run elsewhere too.
    if config is not None and not type(config).__module__.startswith("pallas_kernels."):
        raise ValueError(f"config is {config!r}; implementation 'xla' has nothing to configure, accepted: None")


def _xla_options(call: DenseCall | SparseCall) -> dict[str, Any]:
    return dict(batch_invariant=call.batch_invariant, out_dtype=call.out_dtype)


def _check_dense_mosaic(call: DenseCall, target: Target, config: Any) -> None:
    check_tested_jax()
    check_cuda(target)
    assert target.capability is not None
    from pallas_kernels import dense_decode as dense_kernel

    dense_kernel.check_supported(
        q_dtype=call.fmt.compute_dtype, kv_dtype=call.fmt.storage_dtype, d_qk=call.fmt.d_qk, d_v=call.fmt.d_v,
        capability=target.capability,
    )  # fmt: skip
    _check_config(config, dense_kernel.config_type(target.capability), f"'mosaic' on {target}")


def _check_config(config: Any, accepted: type, by: str) -> None:
    if config is not None and not isinstance(config, accepted):
        raise ValueError(
            f"config is {config!r}; accepted by {by}: None or a {accepted.__name__}"
        )


def _dense_plan(call: DenseCall, target: Target, x: DenseOperands) -> SplitPlan:
    if x.plan is not None:
        return x.plan
    assert target.capability is not None
    return plan_decode(
        x.cache_seqlens, s_q=call.s_q, num_heads=call.h, page_size=call.page_size,
        batch_invariant=call.batch_invariant, num_sms=num_sms(target.capability),
    )  # fmt: skip


def _dense_mosaic(call: DenseCall, target: Target, config: Any, x: DenseOperands):
    assert target.capability is not None
    from pallas_kernels import dense_decode as dense_kernel

    return dense_kernel.dense_decode(
        x.q, x.cache.data, x.block_table, x.cache_seqlens, _dense_plan(call, target, x), x.sm_scale,
        is_causal=call.is_causal, d_v=call.fmt.d_v, out_dtype=call.out_dtype, config=config,
        capability=target.capability,
    )  # fmt: skip


def _dense_xla(call: DenseCall, target: Target, config: Any, x: DenseOperands):
    return xla.dense(
        x.q, x.cache, x.block_table, x.cache_seqlens, x.sm_scale, is_causal=call.is_causal, **_xla_options(call)
    )


def _sparse_xla(call: SparseCall, target: Target, config: Any, x: SparseOperands):
    def scope(s: Scope):
        length = s.length
        if length is None:
            length = jnp.full(s.indices.shape[:2], s.indices.shape[2], jnp.int32)
        return s.cache, s.indices, length

    scopes = tuple(scope(s) for s in (x.main, x.extra) if s is not None)
    return xla.sparse(x.q, scopes, x.sm_scale, x.attn_sink, **_xla_options(call))


def _check_sparse_mosaic(call: SparseCall, target: Target, config: Any) -> None:
    check_tested_jax()
    check_cuda(target)
    assert target.capability is not None
    from pallas_kernels import sparse_decode as sparse_kernel

    sparse_kernel.check(call.fmt, call.extra_fmt, target.capability)
    _check_config(config, sparse_kernel.config_type(target.capability), f"'mosaic' on {target}")


def _sparse_arguments(call: SparseCall, target: Target, x: SparseOperands) -> tuple[Scope, SplitPlan, dict[str, Any]]:
    """The main scope, the plan, and keyword arguments of the extra scope, as the kernels take them."""
    assert target.capability is not None
    # A scope that can hold no keys, by its shapes, never reaches the kernel.
    main, *rest = [scope for scope in (x.main, x.extra) if scope is not None and not scope.names_no_keys]
    extra = rest[0] if rest else None
    plan = x.plan
    if plan is None or (main, extra) != (x.main, x.extra):
        plan = plan_sparse_decode(
            main.indices.shape[-1],
            batch=call.b,
            s_q=call.s_q,
            num_heads=call.h,
            topk_length=main.length,
            extra_topk=0 if extra is None else extra.indices.shape[-1],
            extra_topk_length=None if extra is None else extra.length,
            batch_invariant=call.batch_invariant,
            num_sms=num_sms(target.capability),
        )
    more: dict[str, Any] = {}
    if extra is not None:
        more = dict(
            extra_data=extra.cache.data,
            extra_fmt=extra.cache.format,
            extra_page_size=extra.cache.page_size,
            extra_indices=extra.indices,
            extra_topk_length=extra.length,
        )
    return main, plan, more


def _sparse_mosaic(call: SparseCall, target: Target, config: Any, x: SparseOperands):
    assert target.capability is not None
    main, plan, more = _sparse_arguments(call, target, x)
    from pallas_kernels import sparse_decode as sparse_kernel

    return sparse_kernel.sparse_decode(
        x.q, main.cache.data, main.cache.format, main.cache.page_size, main.indices, plan, x.sm_scale,
        topk_length=main.length, attn_sink=x.attn_sink, out_dtype=call.out_dtype, config=config,
        capability=target.capability, **more,
    )  # fmt: skip


def _portable() -> Any:
    """The Triton-lowered kernels. JAX has deprecated that lowering: a version without it falls through here."""
    try:
        from pallas_kernels import portable
    except ImportError as error:
        raise NotImplementedError(f"jax {jax.__version__} has no Triton lowering for Pallas: {error}") from error
    return portable


def _check_triton(call: DenseCall | SparseCall, target: Target, config: Any) -> None:
    check_tested_jax()
    check_cuda(target)
    portable = _portable()
    portable.check(call.fmt, call.page_size, target.capability)
    if isinstance(call, SparseCall) and call.extra_fmt is not None:
        portable.check(call.extra_fmt, call.extra_page_size, target.capability)
    _check_config(config, portable.PortableConfig, "'triton'")


def _dense_triton(call: DenseCall, target: Target, config: Any, x: DenseOperands):
    return _portable().dense_decode(
        x.q, x.cache.data, call.fmt, call.page_size, x.block_table, x.cache_seqlens, _dense_plan(call, target, x),
        x.sm_scale, is_causal=call.is_causal, out_dtype=call.out_dtype, config=config, capability=target.capability,
    )  # fmt: skip


def _sparse_triton(call: SparseCall, target: Target, config: Any, x: SparseOperands):
    main, plan, more = _sparse_arguments(call, target, x)
    return _portable().sparse_decode(
        x.q, main.cache.data, main.cache.format, main.cache.page_size, main.indices, plan, x.sm_scale,
        topk_length=main.length, attn_sink=x.attn_sink, out_dtype=call.out_dtype, config=config,
        capability=target.capability, **more,
    )  # fmt: skip


DENSE = (
    Implementation(
        "mosaic", _check_dense_mosaic, _dense_mosaic, is_kernel=True, proven_on=(9,), loses_registers_from_jax=(0, 12)
    ),
    Implementation("triton", _check_triton, _dense_triton, is_kernel=True, is_exportable=False, proven_on=(9,)),
    Implementation("xla", _check_xla, _dense_xla),
)

SPARSE = (
    Implementation(
        "mosaic", _check_sparse_mosaic, _sparse_mosaic, is_kernel=True, proven_on=(9,), loses_registers_from_jax=(0, 12)
    ),
    Implementation("triton", _check_triton, _sparse_triton, is_kernel=True, is_exportable=False, proven_on=(9,)),
    Implementation("xla", _check_xla, _sparse_xla),
)
