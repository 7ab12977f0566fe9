"""Chooses configurations by measuring: every candidate of a workload on the same arrays, interleaved.

A bucket takes another config than the default only if it gains more than `MIN_GAIN` on average over the bucket's
workloads and loses more than `MAX_LOSS` on none. Candidates that fail to compile or give other results are out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mla_jax import tuning
from mla_jax.bench import runner, timer
from mla_jax.bench.inputs import build
from mla_jax.bench.workloads import Dense, Sparse, Workload
from pallas_kernels import dense_decode, sparse_decode
from pallas_kernels.sparse_decode.config import FEW_HEADS, heuristic

MIN_GAIN, MAX_LOSS = 0.02, 0.02  # of the default's time; repeated medians agree within about 1 %


def tunable(workloads: Sequence[Workload]) -> list[Dense | Sparse]:
    """Those whose op takes a config."""
    return [w for w in workloads if isinstance(w, Dense | Sparse)]


def bucket_of(workload: Dense | Sparse) -> tuning.Bucket:
    """Where a workload's config goes: the bucket that the op's arguments will look up."""
    rows = workload.s_q * workload.h
    if isinstance(workload, Dense):
        keys = -(-workload.s_k // workload.page_size) * workload.page_size
        return tuning.Bucket.of(
            "dense", workload.fmt.name, workload.page_size, batch=workload.b, rows=rows, keys=keys
        )
    main, extra = workload.main, workload.extra
    return tuning.Bucket.of(
        "sparse", main.fmt.name, main.page_size, batch=workload.b, rows=rows,
        keys=main.topk + (extra.topk if extra else 0), extra_fmt=extra.fmt.name if extra else "",
    )  # fmt: skip


def candidates(workload: Dense | Sparse, capability: tuple[int, int] = (9, 0)) -> list[Any]:
    """Configs to try on such a GPU, the default first. Raises NotImplementedError where no kernel can be configured."""
    if isinstance(workload, Dense):
        base: Any = dense_decode.choose_config(workload.page_size, contiguous=False)
        if dense_decode.config_type(capability) is not type(base):
            base = dense_decode.choose_sm100_config(workload.s_q * workload.h)
        changes: list[dict[str, Any]] = [dict(combine_rows=n) for n in (1, 2, 4, 8)]
    else:
        sparse_decode.config_type(capability)
        base = heuristic(workload.fmt, workload.h, workload.extra.fmt if workload.extra else None)
        changes = [
            dict(share_copies=False),
            dict(rescale_above=8.0),
            dict(rescale_above=None),
            dict(softmax_registers=200, gather_registers=96),
        ]
        if workload.h <= FEW_HEADS:  # the kernel that takes those has no registers to choose
            changes = [dict(few_heads=False)]
    known = {field.name for field in dataclasses.fields(base)}
    changed = [dataclasses.replace(base, **change) for change in changes if known >= change.keys()]
    return list(dict.fromkeys([base, *changed]))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One workload: median time of each candidate that works, the default first. Microseconds."""

    workload: Dense | Sparse
    us: dict[Any, float]
    failed: dict[Any, str]


Candidates = Mapping[Any, "timer.CompiledChain | str"]
"""A workload's configs, the default first, each compiled or the reason why it is not."""


def compile_candidates(
    workloads: Sequence[Dense | Sparse], capability: tuple[int, int] = (9, 0), **options: Any
) -> Sequence[Candidates]:
    """Of each workload. `options`: `jobs` and `on_compiled` of `runner.compile_all`."""
    pairs = [(workload, config) for workload in workloads for config in candidates(workload, capability)]
    chains = runner.compile_all(*zip(*pairs, strict=True), implementation="mosaic", **options)
    found: list[dict[Any, timer.CompiledChain | str]] = [{} for _ in workloads]
    of = {id(workload): configs for workload, configs in zip(workloads, found, strict=True)}
    for (workload, config), chain in zip(pairs, chains, strict=True):
        of[id(workload)][config] = chain
    return found


def measure(workload: Dense | Sparse, compiled: Candidates, *, rounds: int = 5) -> Measured:
    """Times the candidates in turn, `rounds` times. Raises RuntimeError if the default, the first, did not compile."""
    chains: dict[Any, timer.Chain] = {}
    failed: dict[Any, str] = {}
    inputs = right = None
    for config, candidate in compiled.items():
        try:
            if isinstance(candidate, str):
                raise RuntimeError(candidate)
            inputs = build(workload, sets=candidate.sets) if inputs is None else inputs
            chain = timer.Chain(candidate, inputs)
            out = np.asarray(chain.run()[-2].astype(jnp.float32), np.float64).ravel()
        except Exception as error:  # a config that does not compile or launch is no candidate
            if not chains:
                raise
            failed[config] = f"{type(error).__name__}: {error}"[:300]
            continue
        right = out if right is None else right
        difference = 1 - 2 * (out @ right) / max(float(out @ out + right @ right), 1e-300)
        if not difference <= runner.MAX_DISAGREEMENT:
            failed[config] = f"gives other results than the default: 1 - cosine = {difference:.1e}"
            continue
        chains[config] = chain
    samples: dict[Any, list[float]] = {config: [] for config in chains}
    for _ in range(rounds):
        for config, chain in chains.items():
            samples[config].append(chain.measure().us)
    return Measured(workload, {config: statistics.median(us) for config, us in samples.items()}, failed)


def choose(measured: Sequence[Measured]) -> Any:
    """The config for workloads of one bucket, by the rule in the module's docstring."""
    default = next(iter(measured[0].us))
    best, best_mean = default, 1 - MIN_GAIN
    for config in measured[0].us:
        ratios = [m.us[config] / next(iter(m.us.values())) for m in measured if config in m.us]
        complete = len(ratios) == len(measured)
        if complete and max(ratios) <= 1 + MAX_LOSS and statistics.fmean(ratios) < best_mean:
            best, best_mean = config, statistics.fmean(ratios)
    return best


def tune(
    workloads: Sequence[Dense | Sparse],
    *,
    device: str,
    capability: tuple[int, int],
    jax_version: str,
    rounds: int = 5,
    on_done: Callable[[Measured], None] = lambda _: None,
    **options: Any,
) -> tuning.Table:
    """Measures every workload's candidates; a table with an entry a bucket, the default's where nothing is better.

    All are compiled before anything is measured: `options` are those of `compile_candidates`.
    """
    buckets: dict[tuning.Bucket, list[Measured]] = {}
    for workload, compiled in zip(workloads, compile_candidates(workloads, capability, **options), strict=True):
        result = measure(workload, compiled, rounds=rounds)
        buckets.setdefault(bucket_of(workload), []).append(result)
        on_done(result)
    entries = {}
    for bucket, results in buckets.items():
        config = choose(results)
        us = {m.workload.name: (m.us[config], next(iter(m.us.values()))) for m in results}
        entries[bucket] = tuning.Entry(bucket, config, us)
    return tuning.Table(device, tuning.package_version(), jax_version, entries)
