"""Which implementation of an op runs where: one table an op, one loop that picks.

An implementation is a name, a `check` and a `run`. `check` looks at the static description of a call and at a target
(platform, compute capability) and raises NotImplementedError with the reason when the call is legal but this
implementation cannot serve it there. `implementation=None` is resolved per *lowering* platform, so that exporting for
CUDA from a machine without a GPU embeds the kernel, and for the compute capability of the device that is compiled for.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mla_jax import checks, spmd

logger = logging.getLogger("mla_jax")

TESTED_JAX = ((0, 11, 2), (0, 13))  # the kernels' tests ran with versions from the first up to, not including, the last
ASSUMED_CAPABILITY = (9, 0)  # what Mosaic GPU assumes as well when it lowers for CUDA without a device


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for. `capability` is the CUDA compute capability, None on other platforms."""

    platform: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return (
            self.platform if self.capability is None else f"{self.platform} {self.capability[0]}.{self.capability[1]}"
        )


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `check(call, target, config)` may refuse; `run(call, target, config, operands)` computes.
    """

    name: str
    check: Callable[[Any, Target, Any], None]
    run: Callable[[Any, Target, Any, Any], Any]
    is_kernel: bool = False  # lowers for CUDA alone
    is_exportable: bool = True  # jax.export vouches for what it lowers to
    proven_on: tuple[int, ...] | None = None  # major compute capabilities on which its tests have run; None: any
    loses_registers_from_jax: tuple[int, ...] | None = None  # the first jax that does that on SM90 (docs/versions.md)

    def loses_registers_on(self, target: Target) -> bool:
        """Whether a jax like this one compiles it without the registers that it asks for, which makes it slow."""
        first = self.loses_registers_from_jax
        on_sm90 = target.capability is not None and target.capability[0] == 9
        return on_sm90 and first is not None and jax.__version_info__[: len(first)] >= first

    def is_proven_on(self, target: Target) -> bool:
        return self.proven_on is None or target.capability is None or target.capability[0] in self.proven_on


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome of picking for one target: the implementation, and why better ones were passed over.

    `exported` takes its place in modules of jax.export, if there is such a candidate; else it is `implementation`.
    """

    target: Target
    implementation: Implementation | None
    refusals: tuple[tuple[str, str], ...]
    exported: Implementation | None = None

    def refusal_text(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.refusals)


def check_tested_jax() -> None:
    """Raises NotImplementedError for a jax that the kernels were not tested with."""
    first, last = TESTED_JAX
    version = jax.__version_info__
    if not first <= version[: len(first)] or not version[: len(last)] < last:
        raise NotImplementedError(
            f"the GPU kernels were tested with jax >= {'.'.join(map(str, first))}, < {'.'.join(map(str, last))}; "
            f"this is jax {jax.__version__}"
        )


def check_cuda(target: Target) -> None:
    if target.platform != "cuda":
        raise NotImplementedError(f"needs an NVIDIA GPU, and this is platform {target.platform!r}")


def cuda_target() -> Target:
    """The CUDA device that is compiled for: jax's default device if it is one, else a local one, else assumed."""
    device = jax.config.jax_default_device
    if getattr(device, "platform", None) in ("gpu", "cuda") and hasattr(device, "compute_capability"):
        return Target("cuda", _capability(device))
    local = _local_cuda_device()
    return Target("cuda", _capability(local) if local is not None else ASSUMED_CAPABILITY)


def _capability(device: Any) -> tuple[int, int]:
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)


def _local_cuda_device() -> Any:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # no such backend here
        return None


def order(implementation: Any, table: Sequence[Implementation]) -> tuple[Implementation, ...]:
    """The implementations to try, in order, for the public argument of that name."""
    if implementation is None:
        return tuple(table)
    names = (implementation,) if isinstance(implementation, str) else implementation
    by_name = {i.name: i for i in table}
    known = f"accepted: None, {', '.join(map(repr, by_name))}, or a sequence of these names"
    if isinstance(names, (jax.core.Tracer, jax.Array)) or not isinstance(names, Iterable):
        checks.static(names, "implementation", (str, Sequence))
    names = tuple(names)
    if not names:
        raise ValueError(f"implementation is an empty sequence; {known}")
    for name in names:
        if name not in by_name:
            raise ValueError(f"implementation is {name!r}; {known}")
    return tuple(by_name[name] for name in names)


def choose(candidates: Sequence[Implementation], call: Any, target: Target, config: Any) -> Choice:
    """The first candidate that can serve the call on the target."""
    refusals = []
    first = None
    for candidate in candidates:
        try:
            candidate.check(call, target, config if first is None else None)  # the config is for the first
        except NotImplementedError as reason:
            if first is None:
                refusals.append((candidate.name, str(reason)))
            continue
        first = first or candidate
        if candidate.is_exportable:
            return Choice(target, first, tuple(refusals), candidate)
    return Choice(target, first, tuple(refusals), first)


def choices(implementation: Any, table: Sequence[Implementation], call: Any, config: Any) -> tuple[Choice, Choice]:
    """What runs on CUDA and what runs elsewhere. Raises NotImplementedError if nothing runs anywhere."""
    candidates = order(implementation, table)
    cuda = choose(candidates, call, cuda_target(), config)
    other = choose(candidates, call, Target("cpu"), config)
    if cuda.implementation is None and other.implementation is None:
        raise NotImplementedError(f"{call.op}: no implementation can serve this call. {cuda.refusal_text()}")
    if implementation is None and cuda.implementation and cuda.refusals and _local_cuda_device() is not None:
        _log_once(f"{call.op} on {cuda.target} runs {cuda.implementation.name!r}. {cuda.refusal_text()}")
    if (
        implementation is None
        and cuda.implementation
        and not cuda.implementation.is_proven_on(cuda.target)
        and _local_cuda_device() is not None
    ):
        _log_once(
            f"{call.op} on {cuda.target} runs {cuda.implementation.name!r}, which was compiled for such a GPU and "
            "interpreted, but has not been run on one; check it with `mla-jax verify`, or name implementation='xla'"
        )
    if (
        implementation is None
        and cuda.implementation
        and cuda.implementation.loses_registers_on(cuda.target)
        and _local_cuda_device() is not None
    ):
        version = ".".join(map(str, cuda.implementation.loses_registers_from_jax or ()))
        _log_once(
            f"{call.op} runs {cuda.implementation.name!r}, which jax {version} compiles without the registers that it "
            f"asks for: it is right, but up to 3 times as slow as with jax < {version} (docs/versions.md)"
        )
    return cuda, other


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)


def run(cuda: Choice, other: Choice, call: Any, operands: Any, config: Any) -> Any:
    """Computes the op with the implementation that fits the platform it is lowered for."""

    def branch(choice: Choice):
        assert choice.implementation is not None
        fn = functools.partial(choice.implementation.run, call, choice.target, config)
        if choice.implementation.is_kernel:
            exported = fn
            if choice.exported is not None and choice.exported is not choice.implementation:
                exported = functools.partial(choice.exported.run, call, choice.target, None)
            fn = functools.partial(_kernel, fn, exported, call.out_dtype)
        return functools.partial(_widened, fn) if call.wide_out else fn

    if cuda.implementation is other.implementation:
        return branch(cuda)(operands)
    if other.implementation is None:  # a named one: it runs or raises
        return branch(cuda)(guard(operands, call.op, ("cuda",), other.refusal_text()))
    if cuda.implementation is None:
        return branch(other)(guard(operands, call.op, ("cpu", "rocm", "tpu"), cuda.refusal_text()))
    return lax.platform_dependent(operands, cuda=branch(cuda), default=branch(other))


def _widened(run: Callable[[Any], Any], operands: Any) -> Any:
    out, lse = run(operands)
    return out.astype(jnp.float32), lse


# -- kernel: a call that is traced when it is lowered for CUDA, and only then -----------------------------------------

_kernel_p = Primitive("mla_jax_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(lambda *_, out_avals, **__: out_avals)


def _kernel(
    fn: Callable[[Any], tuple[Any, Any]], exported: Callable[[Any], tuple[Any, Any]], out_dtype: Any, operands: Any
) -> tuple[Any, Any]:
    """`fn(operands)` -> (out, lse) of the op; in a module of jax.export `exported(operands)`.

    Whoever runs on a CPU thus pays nothing for the kernels, and a module exported for several platforms can hold one:
    Pallas refuses to lower for more than one platform at a time.
    """
    leaves, treedef = jax.tree.flatten(operands)

    def types(q):  # with q's sharding and the mesh axes of all operands
        q = spmd.vary(q, spmd.varying_axes(operands))
        out = jnp.broadcast_to(q[..., :1], (*q.shape[:-1], operands.d_v))
        return out.astype(out_dtype), q[..., 0].astype(jnp.float32)

    out_avals = tuple(jax.make_jaxpr(types)(operands.q).out_avals)
    out, lse = _kernel_p.bind(*leaves, fn=fn, exported=exported, treedef=treedef, out_avals=out_avals)
    return out, lse


def _lower_kernel(ctx, *leaves, fn, exported, treedef, out_avals):
    compute = exported if ctx.module_context.lowering_parameters.for_export else fn

    def results(*xs):
        return [x.astype(a.dtype) for x, a in zip(compute(jax.tree.unflatten(treedef, xs)), out_avals, strict=True)]

    call = mlir.lower_fun(results, multiple_results=True)
    with warnings.catch_warnings():
        # The portable kernels need it, and their user can do nothing about that; with a jax that has removed it,
        # dispatch takes the next implementation.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return call(ctx.replace(platforms=("cuda",)), *leaves)


def _lower_elsewhere(ctx, *leaves, out_avals, **_):
    platforms = ctx.module_context.platforms
    if "cuda" not in platforms:
        raise NotImplementedError(f"a CUDA kernel cannot be lowered for {', '.join(platforms)}")
    # A module for several platforms: JAX lowers the CUDA branch for each of them, but none else runs it.
    return mlir.lower_fun(lambda *_: [jnp.full(a.shape, jnp.nan, a.dtype) for a in out_avals])(ctx, *leaves)


mlir.register_lowering(_kernel_p, _lower_kernel, platform="cuda")
mlir.register_lowering(_kernel_p, _lower_elsewhere)


# -- guard: the identity, except that it refuses platforms and derivatives -------------------------------------------

_guard_p = Primitive("mla_jax_guard")
_guard_p.def_impl(lambda x, **_: x)
_guard_p.def_abstract_eval(lambda x, **_: x)


def guard(tree: Any, op: str, platforms: tuple[str, ...] | None = None, reason: str = "") -> Any:
    """Returns `tree` unchanged. Lowering it for a platform not in `platforms` raises NotImplementedError with `reason`;
    differentiating it raises NotImplementedError, since the ops are for inference."""
    return jax.tree.map(lambda x: _guard_p.bind(x, op=op, platforms=platforms, reason=reason), tree)


def _lower_guard(ctx, x, *, op, platforms, reason):
    lowering_for = ctx.platforms or ctx.module_context.platforms
    wrong = [p for p in lowering_for if platforms is not None and p not in platforms]
    if wrong:
        raise NotImplementedError(
            f"{op} was asked for an implementation that cannot run on {', '.join(wrong)}. {reason}"
        )
    return [x]


def _refuse_derivative(primals, tangents, *, op, **_):
    raise NotImplementedError(
        f"{op} is for inference and has no derivative; mla_jax.reference computes the same in plain differentiable JAX"
    )


mlir.register_lowering(_guard_p, _lower_guard)
ad.primitive_jvps[_guard_p] = _refuse_derivative
batching.primitive_batchers[_guard_p] = lambda args, dims, **params: (_guard_p.bind(*args, **params), dims[0])
