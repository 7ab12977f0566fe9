"""The two ops: `mla_decode` over a block table, `sparse_mla_decode` over indices. Checks, then dispatch.

Both are pure functions of their arguments, legal under jit, vmap, shard_map and jax.export, and for inference only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks, dispatch, implementations, vmap
from mla_jax.cache import PagedKVCache
from mla_jax.calls import DenseCall, DenseOperands, Scope, SparseCall, SparseOperands
from pallas_kernels.schedule import SplitPlan, plan_decode, plan_sparse_decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, BFloat16, Float32, Int32

__all__ = ["explain", "mla_decode", "plan_decode", "plan_sparse_decode", "sparse_mla_decode"]


def mla_decode(
    q: BFloat16[Array, "b s_q h d_qk"],
    cache: PagedKVCache,
    block_table: Int32[Array, "b max_pages"] | None,
    cache_seqlens: Int32[Array, "b"],
    *,
    sm_scale: float | Float32[Array, ""],
    is_causal: bool = False,
    plan: SplitPlan | None = None,
    config: Any = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
):
    """Attention of s_q new tokens a request over its paged cache, multi-head latent form (one KV head, V inside K).

        out = softmax(sm_scale * q @ K^T) @ K[:, :d_v]

    Args:
      q: bfloat16 [b, s_q, h, d_qk] (float32 with F32_* caches); absorbed queries, latent part first, then RoPE.
      cache: the pages, of any format with the same d_qk.
      block_table: int32 [b, max_pages], page ids of each request in order. None: page i is request i's whole cache.
      cache_seqlens: int32 [b], tokens of each request, the s_q new ones included; clamped to what the table holds.
      sm_scale: softmax scale; required, since d_qk^-0.5 is wrong for absorbed MLA (V3: 192^-0.5 * mscale^2). A Python
        float or a float32 scalar, traced or not; changing it does not recompile.
      is_causal: row j attends to keys below cache_seqlens - (s_q - 1 - j). Static.
      plan: from `plan_decode` with these shapes; made on the spot when None. A plan for other lengths is legal.
      config: a kernel configuration; None picks one. Static.
      implementation: "mosaic", "triton", "xla", a sequence of these to try in order, or None for the best that runs on
        the platform compiled for. A single name runs or raises. Static.
      return_lse: whether to return the log-sum-exp as well. Static.

    Returns:
      out [b, s_q, h, d_v] in q's dtype; with `return_lse` also lse float32 [b, s_q, h], natural log of the sum of
      exp(scores). Rows without keys: 0 and -inf.

      Integer arguments are data: pages outside [0, num_pages) are no keys, and what cache bytes no key names hold, NaN
      included, does not matter.

    Raises:
      ValueError: an argument is wrong; the message names it, what came and what is accepted.
      NotImplementedError: a named implementation cannot serve this call here; or the op is differentiated.
    """
    call, operands = _dense(q, cache, block_table, cache_seqlens, sm_scale, is_causal, plan)
    checks.static(return_lse, "return_lse", (bool, np.bool_))
    cuda, other = _choices(implementation, implementations.DENSE, call, config)
    out, lse = _run(operands, cuda, other, call, config)
    return (out, lse) if return_lse else out


def sparse_mla_decode(
    q: BFloat16[Array, "b s_q h d_qk"],
    cache: PagedKVCache,
    indices: Int32[Array, "b s_q topk"],
    *,
    sm_scale: float | Float32[Array, ""],
    topk_length: Int32[Array, "b *s_q"] | None = None,
    attn_sink: Float32[Array, "h"] | None = None,
    extra_cache: PagedKVCache | None = None,
    extra_indices: Int32[Array, "b s_q extra_topk"] | None = None,
    extra_topk_length: Int32[Array, "b *s_q"] | None = None,
    plan: SplitPlan | None = None,
    config: Any = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
):
    """Attention of every query row over the tokens that its indices name, in one or two caches under one softmax.

    Args:
      q: bfloat16 [b, s_q, h, d_qk] (float32 with F32_* caches).
      cache: the pages, of any format with the same d_qk.
      indices: int32 [b, s_q, topk] slots (page * page_size + offset); [b, topk] is accepted when s_q == 1. -1 means no
        key and may stand anywhere; so does any other value outside [0, num_pages * page_size).
      sm_scale: softmax scale, required; a Python float or a float32 scalar.
      topk_length: int32 [b] or [b, s_q]: only that many leftmost indices count; clamped to [0, topk].
      attn_sink: float32 [h]: out *= exp(lse) / (exp(lse) + exp(sink)). -inf: none; +inf: out is 0. Not in the lse.
      extra_cache, extra_indices, extra_topk_length: a second scope with its own format (same d_qk and d_v), page size,
        top-k and lengths, in the same softmax.
      plan: from `plan_sparse_decode` with these shapes; made on the spot when None. A plan for other lengths is legal.
      config, implementation, return_lse: as in `mla_decode`.

    Returns:
      out [b, s_q, h, d_v] in q's dtype; with `return_lse` also lse float32 [b, s_q, h]. Rows without keys: 0 and -inf.

    Raises:
      ValueError, NotImplementedError: as `mla_decode`.
    """
    call, operands = _sparse(
        q, cache, indices, sm_scale, topk_length, attn_sink, extra_cache, extra_indices, extra_topk_length, plan
    )
    checks.static(return_lse, "return_lse", (bool, np.bool_))
    cuda, other = _choices(implementation, implementations.SPARSE, call, config)
    out, lse = _run(operands, cuda, other, call, config)
    return (out, lse) if return_lse else out


def partial_results(op, *args: Any, config: Any = None, implementation: Any = None, **kwargs: Any):
    """`op` (one of the two above) for results that will be merged: (out float32 [b, s_q, h, d_v], lse [b, s_q, h]).

    Rounding `out` to q's dtype once more than one device does would cost about 2.5e-3 relative.
    """
    make, table = (_dense, implementations.DENSE) if op is mla_decode else (_sparse, implementations.SPARSE)
    call, operands = make(*args, **kwargs)
    call = dataclasses.replace(call, wide_out=True)
    cuda, other = _choices(implementation, table, call, config)
    return _run(operands, cuda, other, call, config)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: `implementation` would run on `target`; `refusals` says why each better one would not."""

    op: str
    target: str
    implementation: str | None
    refusals: dict[str, str]

    def __str__(self) -> str:
        head = f"{self.op} on {self.target}: "
        head += f"runs {self.implementation!r}" if self.implementation else "no implementation can run"
        return "\n".join([head, *(f"  not {name!r}: {reason}" for name, reason in self.refusals.items())])


def explain(q, cache, *args, platform: str | None = None, **kwargs) -> Explanation:
    """Which implementation a call would run, and why the better ones would not.

    Takes the arguments of `mla_decode` or of `sparse_mla_decode` (told apart by `indices`; `jax.ShapeDtypeStruct`s
    serve as arrays). `platform` is "cuda" or "cpu"; None means the platform of jax's default device.

    Returns:
      An `Explanation` with `.implementation`, `.refusals` (name -> reason), `.target`; printing it reads as text.
    """
    implementation, config = kwargs.pop("implementation", None), kwargs.pop("config", None)
    kwargs.pop("return_lse", None)
    is_dense = len(args) == 2 or "cache_seqlens" in kwargs
    make, names, table = (
        (_dense, ("block_table", "cache_seqlens"), implementations.DENSE)
        if is_dense
        else (_sparse, ("indices",), implementations.SPARSE)
    )
    arguments = dict(zip(names, args, strict=False)) | kwargs
    arguments.setdefault("sm_scale", 1.0)
    calls: list[Any] = []

    def describe(arrays):
        call, _ = make(q=arrays["q"], cache=arrays["cache"], **(arguments | arrays["rest"]))
        calls.append(call)
        return ()

    rest = {k: v for k, v in arguments.items() if k != "is_causal" and v is not None}
    jax.eval_shape(describe, {"q": q, "cache": cache, "rest": rest})
    if platform is None:
        device = jax.config.jax_default_device
        name = device if isinstance(device, str) else getattr(device, "platform", None) or jax.default_backend()
        platform = "cuda" if name in ("gpu", "cuda") else name
    target = dispatch.cuda_target() if platform == "cuda" else dispatch.Target(platform)
    choice = dispatch.choose(dispatch.order(implementation, table), calls[0], target, config)
    chosen = choice.implementation.name if choice.implementation else None
    return Explanation(calls[0].op, str(target), chosen, dict(choice.refusals))


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_q(q: Any, cache: PagedKVCache) -> None:
    fmt = cache.format
    checks.array(q, "q", ("b", "s_q", "h", fmt.d_qk), fmt.compute_dtype, f"for a cache of format {fmt.name}")
    if q.shape[2] < 1:
        raise ValueError(f"q is {checks.describe(q)}; accepted: at least one head")


def _check_scale(sm_scale: Any) -> Any:
    if isinstance(sm_scale, (bool, np.bool_)) or not (
        isinstance(sm_scale, (int, float, np.floating, np.integer))
        or (getattr(sm_scale, "shape", None) == () and jnp.issubdtype(sm_scale.dtype, jnp.floating))
    ):
        raise ValueError(f"sm_scale is {checks.describe(sm_scale)}; accepted: a float or a floating-point scalar")
    if hasattr(sm_scale, "astype"):
        return sm_scale.astype(jnp.float32)
    return np.float32(sm_scale)


def _check_plan(plan: Any, **shapes: int | str) -> None:
    if plan is None:
        return
    if not isinstance(plan, SplitPlan):
        raise ValueError(f"plan is {checks.describe(plan)}; accepted: None, or what plan_{shapes['op']}... returned")
    plan.check(**shapes)


def _dense(q, cache, block_table, cache_seqlens, sm_scale, is_causal=False, plan=None):
    checks.cache(cache, "cache")
    _check_q(q, cache)
    b, s_q, h, _ = q.shape
    if block_table is not None:
        block_table = checks.int32(block_table, "block_table", (b, "max_pages"))
    elif cache.num_pages != b:
        raise ValueError(
            f"block_table is None, so cache must hold one page a request; accepted: {b} pages (q is "
            f"{checks.describe(q)}), and cache.data is {checks.describe(cache.data)}"
        )
    cache_seqlens = checks.int32(cache_seqlens, "cache_seqlens", (b,))
    checks.static(is_causal, "is_causal", (bool, np.bool_))
    _check_plan(plan, op="dense", batch=b, s_q=s_q, num_heads=h, page_size=cache.page_size)
    sm_scale = _check_scale(sm_scale)
    for x, name in (
        (q, "q"), (cache.data, "cache.data"), (block_table, "block_table"), (cache_seqlens, "cache_seqlens")
    ):  # fmt: skip
        if x is not None:
            checks.not_partitioned(x, name)
    invariant = plan is not None and plan.batch_invariant
    call = DenseCall(b, s_q, h, cache.format, cache.page_size, bool(is_causal), invariant)
    return call, DenseOperands(q, cache, block_table, cache_seqlens, sm_scale, plan)


def _check_scope(prefix: str, cache: Any, indices: Any, length: Any, b: int, s_q: int) -> Scope:
    name = f"{prefix}indices"
    if s_q == 1 and getattr(indices, "ndim", 0) == 2:
        indices = checks.int32(indices, name, (b, f"{prefix}topk"))[:, None, :]
    else:
        indices = checks.int32(indices, name, (b, s_q, f"{prefix}topk"))
    if length is not None:
        shape = (b, s_q) if getattr(length, "ndim", 0) == 2 else (b,)
        length = checks.int32(length, f"{prefix}topk_length", shape)
        if length.ndim == 1:
            length = jnp.broadcast_to(length[:, None], (b, s_q))
    for x, what in ((cache.data, f"{prefix}cache.data"), (indices, name), (length, f"{prefix}topk_length")):
        if x is not None:
            checks.not_partitioned(x, what)
    return Scope(cache, indices, length)


def _sparse(
    q, cache, indices, sm_scale, topk_length=None, attn_sink=None, extra_cache=None, extra_indices=None,
    extra_topk_length=None, plan=None,
):  # fmt: skip
    checks.cache(cache, "cache")
    _check_q(q, cache)
    b, s_q, h, _ = q.shape
    checks.not_partitioned(q, "q")
    main = _check_scope("", cache, indices, topk_length, b, s_q)
    extra = None
    if extra_cache is not None:
        checks.cache(extra_cache, "extra_cache")
        fmt, more = cache.format, extra_cache.format
        if (fmt.d_qk, fmt.d_v, fmt.compute_dtype) != (more.d_qk, more.d_v, more.compute_dtype):
            raise ValueError(
                f"extra_cache has format {more!r}, cache has {fmt!r}; accepted: formats of equal d_qk, d_v and dtype"
            )
        if extra_indices is None:
            raise ValueError("extra_cache is given without extra_indices; accepted: both or neither")
        extra = _check_scope("extra_", extra_cache, extra_indices, extra_topk_length, b, s_q)
    else:
        for x, name in ((extra_indices, "extra_indices"), (extra_topk_length, "extra_topk_length")):
            if x is not None:
                raise ValueError(f"{name} is given without extra_cache; accepted: both or neither")
    if attn_sink is not None:
        checks.array(attn_sink, "attn_sink", (h,), jnp.float32, "one value a head")
        checks.not_partitioned(attn_sink, "attn_sink")
    topk = main.indices.shape[-1]
    extra_topk = extra.indices.shape[-1] if extra else 0
    _check_plan(plan, op="sparse", batch=b, s_q=s_q, num_heads=h, topk=topk, extra_topk=extra_topk)
    call = SparseCall(
        b, s_q, h, cache.format, cache.page_size, topk,
        extra.cache.format if extra else None, extra.cache.page_size if extra else 0, extra_topk,
        plan is not None and plan.batch_invariant,
    )  # fmt: skip
    return call, SparseOperands(q, main, extra, _check_scale(sm_scale), attn_sink, plan)


def _choices(implementation, table, call, config):
    if isinstance(config, (jax.core.Tracer, jax.Array)):
        checks.static(config, "config", ())
    return dispatch.choices(implementation, table, call, config)


# -- run ---------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("cuda", "other", "call", "config"))
def _jitted(operands, cuda, other, call, config):
    with jax.named_scope(call.op):
        operands = jax.tree.map(
            lambda x: dispatch.guard(x, call.op) if jnp.issubdtype(x.dtype, jnp.floating) else x, operands
        )
        return vmap.batchable(cuda, other, call, config)(operands)


def _run(operands, cuda, other, call, config):
    # A Python number goes to the device explicitly: with jax.transfer_guard("disallow") an implicit transfer raises.
    leaves = jax.tree.leaves(operands)
    if isinstance(operands.sm_scale, np.float32) and not any(isinstance(x, jax.core.Tracer) for x in leaves):
        operands = dataclasses.replace(operands, sm_scale=jax.device_put(operands.sm_scale))
    return _jitted(operands, cuda, other, call, config)
