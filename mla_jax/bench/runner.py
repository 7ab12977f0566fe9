"""Measures workloads one after the other: ours, interleaved with the peer where there is one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench import ceilings, timer
from mla_jax.bench.inputs import Inputs, build, num_sets
from mla_jax.bench.report import Result, Run
from mla_jax.bench.workloads import Append, Dense, Plan, Sparse, Workload

MAX_DISAGREEMENT = 1e-4  # 1 - cosine; two correct bf16 kernels stay under 1e-5
XLA_CALLS = 4  # the baseline takes milliseconds a call, and its chain is slow to compile


def describe_run(command: str, peer: str | None) -> Run:
    """The run's header: device, versions, and the ceilings, which this measures."""
    device = timer.require_gpu()
    limits = ceilings.measure()
    return Run(
        device=device.device_kind,
        jax=jax.__version__,
        command=command,
        dram_gb_s=limits.dram_gb_s,
        matmul_tflop_s=limits.matmul_tflop_s,
        peer=_peer_version() if peer else None,
    )


def _peer_version() -> str:
    for package in ("sgl-flash-mla", "flash-mla"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "flash_mla, version unknown"


def compile_chain(
    workload: Workload,
    *,
    implementation: str | None = None,
    config: Any = None,
    calls: int | None = None,
    regime: str = "graph",
) -> timer.CompiledChain:
    """Compiles what `measure` times in a regime, with as many calls and input sets as the timing rule asks for."""
    sets = num_sets(workload, timer.l2_bytes())
    is_baseline = implementation == "xla" and isinstance(workload, Dense | Sparse)
    if regime == "isolated":
        calls = sets = 1  # the L2 is flushed between calls
    elif is_baseline:
        calls = calls or XLA_CALLS
        sets = min(sets, calls)
    options: dict[str, Any] = dict(implementation=implementation, config=config)
    return timer.compile_chain(workload, sets=sets, calls=calls or timer.MIN_CALLS, **options)


def compile_all(
    workloads: Sequence[Workload],
    configs: Sequence[Any] | None = None,
    *,
    jobs: int = 1,
    on_compiled: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[timer.CompiledChain | str]:
    """Compiles each workload's chain, in `jobs` processes if above 1: tracing a kernel takes seconds of Python.

    Returns the chains, or for one that failed the reason. `configs` has one for each workload; `on_compiled` is called
    with how many are done, in order, and how many there are; `options` are the others of `compile_chain`.
    """
    configs = [None] * len(workloads) if configs is None else configs
    if jobs > 1:
        # New processes, not forks: CUDA does not survive those. They end before anything is timed.
        try:
            with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                done = []
                for chain in pool.map(functools.partial(_compile_elsewhere, **options), workloads, configs):
                    done.append(chain)
                    on_compiled(len(done), len(workloads))
            return [
                found if isinstance(found, str) else timer.deserialize_chain(workload, found)
                for workload, found in zip(workloads, done, strict=True)
            ]
        except Exception as error:  # a worker died, or this jax cannot load what another process compiled
            warnings.warn(f"compiling in one process instead of {jobs}: {_text(error)}", stacklevel=2)
    chains: list[timer.CompiledChain | str] = []
    for workload, config in zip(workloads, configs, strict=True):
        try:
            chains.append(compile_chain(workload, config=config, **options))
        except Exception as error:  # whatever a kernel raises: it belongs into the report
            chains.append(_text(error))
        on_compiled(len(chains), len(workloads))
    return chains


def _compile_elsewhere(workload: Workload, config: Any, **options: Any) -> bytes | str:
    try:
        return compile_chain(workload, config=config, **options).serialize()
    except Exception as error:
        return _text(error)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def measure(
    compiled: timer.CompiledChain,
    *,
    label: str = "best",
    regime: str = "graph",
    peer: str | None = None,
    rounds: int = 5,
    inputs: Inputs | None = None,
) -> Result:
    """Measures one workload.

    Args:
      compiled: from `compile_chain`.
      label: what the result calls the implementation.
      regime: "graph" or "isolated" (mla_jax.bench.timer).
      peer: "flash_mla" to run it in the same process, interleaved.
      rounds: ours, peer, ours, peer, ...: this many times each; medians are reported.
      inputs: from `inputs.build` with as many sets, where a caller measures several configs on the same arrays.

    Raises:
      TimingError: the kernels that ran do not fit the timing rule; whatever the op raises.
    """
    workload = compiled.workload
    if inputs is None:
        inputs = build(workload, sets=compiled.sets)
    chain = timer.Chain(compiled, inputs)
    theirs = _peer_for(inputs, max(chain.calls, timer.MIN_CALLS)) if peer else None
    common: dict[str, Any] = dict(
        workload=workload.name, regime=regime, implementation=label, calls=chain.calls, sets=len(inputs.sets),
        flop=workload.flop, bytes_moved=workload.bytes_moved,
    )  # fmt: skip
    if theirs is not None and isinstance(workload, Dense | Sparse):
        common["disagreement"] = _disagreement(chain, theirs)
    if regime == "isolated":
        ours = chain.isolated()
        peer_us = None if theirs is None else theirs.isolated().us
        ratio = None if peer_us is None else peer_us / ours.us
        return Result(
            **common, us=ours.us, busy_us=ours.busy_us, kernels=ours.kernels, peer_us=peer_us, ratio=ratio
        )
    samples, peer_times = [], []
    for _ in range(rounds):
        samples.append(chain.measure())
        if theirs is not None:
            peer_times.append(theirs.measure())
    return Result(
        **common,
        us=statistics.median(s.us for s in samples),
        busy_us=statistics.median(s.busy_us for s in samples),
        wall_us=chain.wall_us(),
        kernels=samples[0].kernels,
        in_graph=samples[0].in_graph,
        peer_us=statistics.median(peer_times) if peer_times else None,
        ratio=statistics.median(t / s.us for t, s in zip(peer_times, samples, strict=True)) if peer_times else None,
    )


def _peer_for(inputs: Inputs, calls: int) -> Any:
    """The peer on these inputs, or None where it has no such call."""
    from mla_jax.bench import peer

    peer.load("flash_mla")
    if isinstance(inputs.workload, Append) or (
        isinstance(inputs.workload, Plan) and not isinstance(inputs.workload.of, Dense)
    ):
        return None
    return peer.FlashMLA(inputs, calls=calls)


def _disagreement(chain: timer.Chain, theirs: Any) -> float:
    """1 - cosine of the outputs of the chain's last call: 0 when both sides computed the same."""
    out, _lse = chain.run()[-2:]
    ours = np.asarray(out.astype(jnp.float32), np.float64).ravel()
    other = np.asarray(theirs.out(chain.last_set), np.float64).ravel()
    return float(1 - 2 * (ours @ other) / max(ours @ ours + other @ other, np.finfo(np.float64).tiny))


def measure_all(
    workloads: Sequence[Workload],
    *,
    implementation: str | None = None,
    calls: int | None = None,
    regime: str = "graph",
    jobs: int = 1,
    on_start: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Iterator[Result]:
    """Compiles every workload's chain in `jobs` processes, then measures one after the other, nothing else running.

    A workload that fails gives a result that says why, and the others still run. `options` are those of `measure`;
    `on_start` is called with a line on what begins.
    """
    label = implementation or "best"
    on_start(f"compiling {len(workloads)}")
    chains = compile_all(workloads, jobs=jobs, implementation=implementation, calls=calls, regime=regime)
    for workload, chain in zip(workloads, chains, strict=True):
        on_start(workload.name)
        failed = Result(workload.name, regime, label)
        try:
            if isinstance(chain, str):
                result = dataclasses.replace(failed, error=chain)
            else:
                result = measure(chain, label=label, regime=regime, **options)
        except Exception as error:
            result = dataclasses.replace(failed, error=_text(error))
        if result.disagreement is not None and not result.disagreement <= MAX_DISAGREEMENT:
            text = f"outputs differ from the peer's: 1 - cosine = {result.disagreement:.1e}"
            result = dataclasses.replace(result, error=text)
        yield result
