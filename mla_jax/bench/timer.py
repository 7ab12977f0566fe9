"""Device time of a jitted call, by the rule that every number in docs/results follows.

Two regimes, always named:

  graph     (end of the last kernel - start of the first) / N over one jitted chain of N calls in stream order, from
            CUPTI timestamps: all kernels of the op and all gaps between them are in. `busy_us` beside it is the sum
            of the kernels' own times. The peer's number is CUDA events around N replays of a CUDA graph, over N.
  isolated  one call at a time on an idle GPU with a cold L2: first kernel's start to last kernel's end.

The chain's calls take their arguments, caches aside, from distinct parameters and return all their results, so that XLA
can neither merge nor drop one. XLA runs them from a CUDA graph (its default), told to keep them in order: left alone it
would run calls that do not depend on each other side by side. That every kernel ran N times, and the main one never two
at a time, is checked on every measurement. Calls made of XLA ops alone, which XLA could mix with each other, are linked
instead: each waits for the last one, by data or, where that one's result is a pool to update in place, by a barrier.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import pickle
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

from mla_jax.bench import cupti
from mla_jax.bench.inputs import Inputs, abstract, call
from mla_jax.bench.workloads import Append, Plan, Workload
from pallas_kernels import load_runtime

MIN_CALLS = 20
_FLUSH_BYTES = 1 << 30  # written between isolated calls: far more than any L2
_FALLBACK_L2_BYTES = 50 << 20  # H100
_MAX_OVERLAP = 0.1  # a kernel launched early (programmatic dependent launch) overlaps its predecessor's end
_MAX_STRAY = 0.01  # share of the time that kernels may take which did not run once a call: constants, made once


class TimingError(RuntimeError):
    """The kernels that ran are not what the timing rule assumes."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Device time of one call, in microseconds."""

    us: float
    busy_us: float
    kernels: tuple[str, ...]  # of one call (each name once, where calls are linked)
    in_graph: bool  # whether XLA ran them from a CUDA graph


def require_gpu() -> jax.Device:
    """The GPU to measure on. Raises RuntimeError where there is none: host time says nothing about kernels."""
    with contextlib.suppress(RuntimeError):
        return jax.devices("cuda")[0]
    raise RuntimeError(
        "the benchmark times kernels on an NVIDIA GPU, and jax sees none here "
        f"(platforms: {jax.default_backend()}); install 'mla-jax[cuda13]' on a machine with one"
    )


def l2_bytes() -> int:
    """Size of GPU 0's L2 cache."""
    value = ctypes.c_int(0)
    l2_cache_size = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetAttribute(ctypes.byref(value), l2_cache_size, 0) == 0:
            return value.value
    return _FALLBACK_L2_BYTES


@dataclasses.dataclass(frozen=True)
class CompiledChain:
    """N calls of a workload as one executable.

    Attributes:
      workload, calls, sets: what was compiled.
      linked: whether calls are chained by data or a barrier, not by the stream alone.
      executable: (leaves of caches and of each call's arguments, leaves of the carry) -> leaves of the results, those
        of the last call at the end. The carry is donated.
    """

    workload: Workload
    calls: int
    sets: int
    linked: bool
    executable: jax.stages.Compiled

    def serialize(self) -> bytes:
        """Everything but the workload, for `deserialize_chain` in another process on the same kind of GPU."""
        fields = (self.calls, self.sets, self.linked)
        return pickle.dumps((fields, serialize_executable.serialize(self.executable)))


def deserialize_chain(workload: Workload, serialized: bytes) -> CompiledChain:
    """A chain that another process compiled for this workload."""
    load_runtime()
    (calls, sets, linked), (payload, in_tree, out_tree) = pickle.loads(serialized)
    loaded = serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=jax.devices()[:1]
    )
    return CompiledChain(workload, calls, sets, linked, loaded)


def compile_chain(
    workload: Workload, *, sets: int = 1, calls: int = MIN_CALLS, implementation: str | None = None, config: Any = None
) -> CompiledChain:
    """A chain of at least `calls` calls, a multiple of `sets`. Needs no arrays.

    Raises whatever the op raises for this workload, implementation and config.
    """
    calls = -(-max(calls, sets) // sets) * sets
    shapes = abstract(workload, sets=sets)
    op = jax.jit(lambda caches, args: call(workload, caches, args, implementation=implementation, config=config))
    linked = isinstance(workload, Plan | Append) or implementation == "xla"
    if isinstance(workload, Append):
        chain = _carry_chain(op)
    elif linked:
        chain = _data_chain(op)
    else:
        chain = _stream_chain(op)
    leaves, tree = jax.tree.flatten(_arguments(shapes, calls))
    carry_leaves, carry_tree = jax.tree.flatten(shapes.carry)

    def flat_chain(leaves: list, carry_leaves: list) -> list:
        caches, args = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(chain(caches, args, jax.tree.unflatten(carry_tree, carry_leaves)))

    lowered = jax.jit(flat_chain, donate_argnums=1).lower(leaves, carry_leaves)
    executable = lowered.compile(compiler_options={"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"})
    return CompiledChain(workload, calls, sets, linked, executable)


def _arguments(inputs: Inputs, calls: int) -> tuple[dict, tuple[dict, ...]]:
    return inputs.caches, tuple(inputs.sets[i % len(inputs.sets)] for i in range(calls))


class Chain:
    """A compiled chain and its arrays, ready to be timed again and again."""

    def __init__(self, compiled: CompiledChain, inputs: Inputs):
        self.calls = compiled.calls
        self.last_set = (compiled.calls - 1) % len(inputs.sets)  # the input set of the last call
        self._compiled = compiled
        self._leaves = jax.tree.leaves(_arguments(inputs, compiled.calls))
        self._carry = jax.tree.leaves(inputs.carry)
        self.run()

    def run(self) -> list[jax.Array]:
        """One pass over the chain; waits for it. Returns the leaves of the results, those of the last call last."""
        return jax.block_until_ready(self._launch())

    def _launch(self) -> list[jax.Array]:
        out = self._compiled.executable(self._leaves, self._carry)
        if self._carry:
            self._carry = out
        return out

    def measure(self) -> Sample:
        """The `graph` regime: one pass, timed by CUPTI.

        Raises:
          TimingError: the chain did not run as N equal, ordered runs of kernels.
        """
        with cupti.trace() as activities:
            self.run()
        activities = [a._replace(name=_plain_name(a.name)) for a in activities]
        kernels = tuple(dict.fromkeys(a.name for a in activities))
        if not self._compiled.linked:
            kernels = kernels_of_a_call(activities, self.calls)
        return Sample(
            us=cupti.span_us(activities) / self.calls,
            busy_us=cupti.busy_us(activities) / self.calls,
            kernels=kernels,
            in_graph=all(a.in_graph for a in activities),
        )

    def wall_us(self, passes: int = 3) -> float:
        """The same time from the host's clock, free of CUPTI: what `passes` further passes add to one, per call."""

        def seconds(n: int) -> float:
            start = time.perf_counter()
            for _ in range(n):
                out = self._launch()
            jax.block_until_ready(out)
            return time.perf_counter() - start

        more = statistics.median(seconds(1 + passes) for _ in range(3))
        one = statistics.median(seconds(1) for _ in range(3))
        return (more - one) / passes / self.calls * 1e6

    def isolated(self, repeats: int = 10) -> Sample:
        """The `isolated` regime: the median of single passes, the L2 flushed and the GPU idle before each.

        Raises TimingError for a chain of several calls.
        """
        if self.calls != 1:
            raise TimingError(f"the isolated regime times one call at a time; this chain has {self.calls}")
        return isolated(lambda _: self.run(), repeats)


def isolated(one: Callable[[int], object], repeats: int) -> Sample:
    """Median span of `one(i)`, which launches work and waits for it, over `repeats` calls on an idle, cold GPU."""
    fill = jax.jit(lambda x: jnp.full(_FLUSH_BYTES // 4, x, jnp.int32))

    def flush(i: int) -> None:
        jax.block_until_ready(fill(i))
        time.sleep(1e-3)

    flush(0)
    with cupti.trace() as activities:
        flush(0)
    between = len(activities)
    with cupti.trace() as activities:  # one for all: the first launch after it begins takes a millisecond
        for i in range(repeats):
            flush(i)
            one(i)
    size = len(activities) // repeats
    if len(activities) % repeats or size <= between:
        raise TimingError(f"{len(activities)} kernels ran in {repeats} isolated calls, {between} to flush the L2 each")
    calls = [activities[i + between : i + size] for i in range(0, len(activities), size)]
    return Sample(
        us=statistics.median(map(cupti.span_us, calls)),
        busy_us=statistics.median(map(cupti.busy_us, calls)),
        kernels=tuple(_plain_name(a.name) for a in calls[0]),
        in_graph=all(a.in_graph for a in calls[0]),
    )


def kernels_of_a_call(activities: list[cupti.Activity], calls: int) -> tuple[str, ...]:
    """Names of the kernels of one call, given those of a whole chain in order of start.

    Raises TimingError unless every kernel of any weight ran `calls` times (or a multiple), and the one that takes most
    of the time never twice at once: otherwise calls were merged, dropped or overlapped.
    """
    counts = collections.Counter(a.name for a in activities)
    durations: collections.Counter[str] = collections.Counter()
    for a in activities:
        durations[a.name] += a.end_ns - a.start_ns
    stray_ns = sum(durations[name] for name, count in counts.items() if count % calls)
    if not counts or stray_ns > _MAX_STRAY * durations.total():
        raise TimingError(f"in a chain of {calls} calls some were merged or dropped: kernels ran {dict(counts)} times")
    main = durations.most_common(1)[0][0]
    runs = [a for a in activities if a.name == main]
    overlap_ns = sum(max(0, a.end_ns - b.start_ns) for a, b in itertools.pairwise(runs))
    if overlap_ns > _MAX_OVERLAP * durations[main]:
        share = overlap_ns / durations[main]
        raise TimingError(f"calls overlapped: {main} ran beside itself for {share:.0%} of its time")
    return tuple(name for name, count in counts.items() for _ in range(count // calls))


def _plain_name(name: str) -> str:
    """A kernel's name without the number that XLA appends to tell copies apart."""
    return re.sub(r"(_\d+)+$", "", name)


def _stream_chain(op: Callable) -> Callable:
    """Independent parameters, all results returned: the calls run one after the other on JAX's compute stream."""
    return lambda caches, args, _carry: tuple(op(caches, a) for a in args)


def _data_chain(op: Callable) -> Callable:
    """Each call's first argument takes a zero from the last call's result."""

    def chain(caches, args, _carry):
        result = None
        for arg in args:
            result = op(caches, arg if result is None else linked(arg, result))
        return result

    return chain


def _carry_chain(op: Callable) -> Callable:
    """The carry, donated, goes through every call, and each call's arguments wait for it at a barrier.

    Without the barrier XLA may hoist or merge what depends on arguments alone. A link by data, as in `_data_chain`,
    would read the carry in the kernel that updates it, and for that XLA copies the whole pool.
    """

    def chain(caches, args, carry):
        for arg in args:
            arg, carry = jax.lax.optimization_barrier((arg, carry))
            carry = op(caches, arg | {"carry": carry})
        return carry

    return chain


def linked(args: dict, result: Any) -> dict:
    """`args` with a zero made from `result` added to the first of them, which XLA cannot see through."""
    name, x = next(iter(args.items()))
    leaf = jax.tree.leaves(result)[0].ravel()[0]
    if jnp.issubdtype(x.dtype, jnp.integer):
        return args | {name: x + jnp.minimum(leaf, 0).astype(x.dtype)}  # a plan's numbers are not negative
    return args | {name: x + (leaf.astype(jnp.float32) * 0).astype(x.dtype)}  # not folded: 0 * inf would be NaN
