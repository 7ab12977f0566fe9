"""Thousands of decode steps with joins, leaves and cancellations: is memory flat, are results what they were at first?

`run` drives an `Engine` whose pool is too small for its requests and takes a `Sample` now and then. Two comparisons
look for drift: the op against `mla_jax.reference` over the pools as they are by then, and a request that has finished
against the same request fed alone to an engine that has seen no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import reference
from mla_jax.serve import model
from mla_jax.serve.engine import Engine, Request
from mla_jax.serve.model import Kind, ModelConfig
from mla_jax.sharding import DecodeSharding
from pallas_kernels.formats import BF16

BATCH, PAGES = 4, 8  # four requests may want 24 pages: preemption is part of every run
OP_TOLERANCE = {True: 4e-3, False: 1e-5}  # by whether the cache computes in bfloat16; of out, relative
# Largest difference of a request's logits over the largest logit: a cached row whose last bit rounds the other way in
# another batch moves them. Rows of somebody else's move them by about 1.
REPLAY_TOLERANCE = 0.1
_SYSTEM_PROMPT = (5, 3, 60, 7, 1)
_MAX_HOST_GROWTH_BYTES = 64 * 2**20  # allocators keep some; ten thousand leaked steps would exceed it


@dataclasses.dataclass(frozen=True)
class Sample:
    """The state after some steps.

    Attributes:
      step, finished, preempted: steps so far, requests done, requests that had to give their pages back.
      live_arrays, live_bytes: jax arrays alive in the process.
      device_bytes: in use by the allocator of the device; None where it does not say (CPUs).
      host_bytes: resident memory of the process; None where the system does not say.
      compiled: versions of the decode step that were compiled.
      op_error: relative error of the op against the reference, on these pools.
      replay_error: of the request replayed last; NaN before the first.
    """

    step: int
    finished: int
    preempted: int
    live_arrays: int
    live_bytes: int
    device_bytes: int | None
    host_bytes: int | None
    compiled: int
    op_error: float
    replay_error: float


def run(
    steps: int,
    *,
    kind: Kind = "v3",
    seed: int = 0,
    interval: int = 250,
    on_step: Callable[[int], None] = lambda _: None,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Runs `steps` decode steps and samples every `interval` of them.

    Args:
      steps: how many.
      kind: of the attention, see `mla_jax.serve.model`.
      seed: of the requests.
      interval: steps between samples; each replays the request that finished last.
      on_step, on_sample: called after every step and sample.
    """
    config = ModelConfig(
        kind, num_layers=2, num_heads=4, vocab_size=64, page_size=4, max_pages=6, prompt_pages=2, window=9
    )
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    ds = DecodeSharding(mesh, "d")
    params = model.init_params(config, ds)
    logits: dict[int, dict[int, np.ndarray]] = {}  # of running requests, by position

    def engine(pages: int, on_logits: Any) -> Engine:
        return Engine(
            config, ds, params, batch=BATCH, num_pages=pages * config.num_layers, system_prompt=_SYSTEM_PROMPT,
            on_logits=on_logits,
        )  # fmt: skip

    def record(request: Request, position: int, row: np.ndarray) -> None:
        logits.setdefault(request.id, {})[position] = row.copy()  # the row shares memory with a jax array

    busy = engine(PAGES, record)
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    finished, replay_error, last = 0, float("nan"), None
    asked: set[int] = set()  # ids that run or wait
    for step in range(1, steps + 1):
        if rng.random() < 0.3 and len(busy.waiting) < BATCH:
            prompt = rng.integers(0, config.vocab_size, int(rng.integers(1, 6))).tolist()
            asked.add(busy.submit(prompt, int(rng.integers(7, config.max_tokens + 1))))
        if rng.random() < 0.02 and asked:
            gone = int(rng.choice(sorted(asked)))
            busy.cancel(gone)
            asked.remove(gone)
            logits.pop(gone, None)
        busy.step()
        busy.pages.check()
        for id in list(busy.finished):
            last = busy.finished.pop(id), logits.pop(id)
            asked.remove(id)
            finished += 1
        on_step(step)
        if step % interval == 0 or step == steps:
            if last is not None:
                replay_error = _replay(engine, *last)
                last = None
            op_error = _op_error(config, busy, seed + step)
            samples.append(_sample(step, finished, busy, op_error, replay_error))
            on_sample(samples[-1])
    return samples


def _replay(engine: Any, request: Request, before: dict[int, np.ndarray]) -> float:
    """Feeds the request's tokens alone to a fresh engine: the largest difference of its logits, relative."""
    alone: dict[int, np.ndarray] = {}
    fresh = engine(PAGES, lambda _, position, row: alone.update({position: row.copy()}))
    # All its tokens as the prompt, so that a draw that falls the other way cannot change what is compared.
    fresh.submit(request.tokens[:-1], len(request.tokens), id=request.id)
    fresh.run()
    error = 0.0
    for position, row in before.items():
        error = max(error, float(np.abs(row - alone[position]).max() / np.abs(alone[position]).max()))
    return error


def _op_error(config: ModelConfig, engine: Engine, seed: int) -> float:
    """The op as it runs here against the reference, both over the engine's pool and tables."""
    cache, fmt = engine._caches.own, config.attention.kv_format
    shape = len(engine.rows), 1, config.num_heads, fmt.d_qk
    q = jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(fmt.compute_dtype)
    table, lengths = jnp.asarray(engine.pages.table), jnp.asarray(engine.pages.tokens)
    if config.kind == "v3":
        out = mla_jax.mla_decode(q, cache, table, lengths, sm_scale=0.1)
        want, _ = reference.mla_decode(q, cache, table, lengths, sm_scale=0.1)
    else:
        position = jnp.broadcast_to(jnp.arange(config.max_tokens, dtype=jnp.int32), (shape[0], config.max_tokens))
        indices = mla_jax.slots_from_positions(position, table, config.page_size)[:, None]  # [b, 1, max_tokens]
        out = mla_jax.sparse_mla_decode(q, cache, indices, topk_length=lengths, sm_scale=0.1)
        want, _ = reference.sparse_mla_decode(q, cache, indices, topk_length=lengths, sm_scale=0.1)
    got, right = np.asarray(out).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(got - right) / max(float(np.linalg.norm(right)), 1e-30))


def _sample(step: int, finished: int, engine: Engine, op_error: float, replay_error: float) -> Sample:
    gc.collect()
    arrays = jax.live_arrays()
    stats = jax.devices()[0].memory_stats() or {}
    return Sample(
        step=step,
        finished=finished,
        preempted=engine.num_preempted,
        live_arrays=len(arrays),
        live_bytes=sum(x.nbytes for x in arrays),
        device_bytes=stats.get("bytes_in_use"),
        host_bytes=_resident_bytes(),
        compiled=model.step._cache_size(),  # type: ignore[attr-defined]
        op_error=op_error,
        replay_error=replay_error,
    )


def _resident_bytes() -> int | None:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


def problems(samples: list[Sample], kind: Kind) -> list[str]:
    """What is wrong with a run: memory that grows after the first sample, compilation, or results that are off."""
    found = []
    first, last = samples[0], samples[-1]
    if last.live_arrays > first.live_arrays or last.live_bytes > first.live_bytes:
        found.append(
            f"live arrays grew from {first.live_arrays} ({first.live_bytes} bytes) to {last.live_arrays} "
            f"({last.live_bytes} bytes)"
        )
    if first.device_bytes is not None and last.device_bytes is not None and last.device_bytes > first.device_bytes:
        found.append(f"device memory grew from {first.device_bytes} to {last.device_bytes} bytes")
    if first.host_bytes is not None and last.host_bytes is not None:
        grown = last.host_bytes - first.host_bytes
        if grown > _MAX_HOST_GROWTH_BYTES:
            found.append(f"the process grew by {grown >> 20} MiB")
    if last.compiled > first.compiled:
        found.append(f"the decode step was compiled again: {first.compiled} versions, then {last.compiled}")
    fmt = ModelConfig(kind).attention.kv_format
    tolerance = OP_TOLERANCE[fmt.compute_dtype == BF16]
    for s in samples:
        if not s.op_error <= tolerance:
            found.append(f"step {s.step}: the op is off by {s.op_error:.1e} from the reference, bound {tolerance:.0e}")
        if s.replay_error > REPLAY_TOLERANCE:
            found.append(f"step {s.step}: a request alone gives other logits, by {s.replay_error:.1e}")
    if np.isnan([s.replay_error for s in samples]).all():
        found.append("no request finished, so none was replayed; run for longer")
    return found
