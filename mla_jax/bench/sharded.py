"""Sharded decode against one device: equality, step time, and what of it is NCCL's. Two devices or more.

    python -m mla_jax.bench.sharded [--small] [--implementation mosaic]

One line of JSON a measurement, as it comes, and a table at the end; docs/sharding.md says what the columns mean. Leave
NVLink multicast off (NCCL_NVLS_ENABLE=0).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mla_jax
from mla_jax.bench import cupti
from mla_jax.bench.timer import TimingError
from mla_jax.cli.table import print_table
from mla_jax.context import ContextAxis
from mla_jax.sharding import DecodeSharding

STEPS = 30  # launched one after the other
MERGES = 10  # in one program: one alone is shorter than its launch
PAGE_SIZE, SM_SCALE = 64, 0.1352338
AXES = ("data", "heads", "context")
# (requests, tokens of each), b and context of the context-parallel case last
CASES = ((128, 16_384), (4, 262_144))
TIMES = ("step_us", "device_us", "attention_us", "nccl_us", "nccl_wait_us", "other_us", "merge_us")
RATIOS = ("efficiency", "device_efficiency", "error")


def host_us(run: Callable[[], Any], repeats: int = STEPS) -> float:
    """Microseconds a call of `run`, which has run before, by the host's clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats * 1e6


def device_times(run: Callable[[], Any]) -> dict[str, float]:
    """`times_of_steps` of `run`, by CUPTI; nothing where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    with cupti.trace() as activities:
        jax.block_until_ready(run())  # the first launch of a trace takes a millisecond
        for _ in range(STEPS):
            out = run()
        jax.block_until_ready(out)
    return times_of_steps(activities, STEPS)


def times_of_steps(activities: list[cupti.Activity], steps: int) -> dict[str, float]:
    """Microseconds a step, on the device where that takes longest, of `steps` equal steps behind one that is left out.

    A collective's kernel waits for the other ranks. Their kernels are paired in order, and the shortest of each pair,
    that of the rank which came last, counts as the time that NCCL takes.

    Returns:
      device_us: from the first start to the last end, gaps included.
      attention_us: kernels of this library: plan, decode, combine.
      nccl_us: collectives, once all ranks are there.
      nccl_wait_us: what they take longer than that.
      other_us: XLA's own kernels and copies.

    Raises:
      TimingError: the steps, or the devices' collectives, are not equal.
    """
    spans, own, collectives, other = [], [], [], []
    for device in sorted({a.device for a in activities}):
        ran = [a for a in activities if a.device == device]
        each, rest = divmod(len(ran), steps + 1)
        if rest:
            raise TimingError(f"{len(ran)} kernels and copies ran on device {device} in {steps + 1} equal steps")
        ran = ran[each:]
        spans.append(cupti.span_us(ran))
        collectives.append([(a.end_ns - a.start_ns) / 1e3 for a in ran if "nccl" in a.name.lower()])
        own.append(cupti.busy_us([a for a in ran if a.name.startswith("mla_")]))
        other.append(cupti.busy_us(ran) - own[-1] - sum(collectives[-1]))
    if len({len(some) for some in collectives}) > 1:
        raise TimingError(f"the devices ran {[len(some) for some in collectives]} collectives")
    nccl = sum(map(min, zip(*collectives, strict=True)))
    times = dict(
        device_us=max(spans), attention_us=max(own), nccl_us=nccl, nccl_wait_us=max(map(sum, collectives)) - nccl,
        other_us=max(other),
    )  # fmt: skip
    return {name: us / steps for name, us in times.items()}


def merge_us(ds: DecodeSharding, b: int, h: int, d_v: int) -> float:
    """Microseconds of the merge of context ranks, collectives and arithmetic, by the host's clock.

    `MERGES` of them, each on the last one's result, in one program.
    """

    def chain(out):  # float32 [b, 1, h, d_v]
        for _ in range(MERGES):
            # As in a step, whose log-sum-exps nobody asked for: they are sent, and not gathered.
            merged, _ = ContextAxis("context", ds.num_context).merge(out, out[..., 0], None, jnp.bfloat16)
            out = merged.astype(jnp.float32)
        return out

    run = jax.jit(jax.shard_map(chain, mesh=ds.mesh, in_specs=P(), out_specs=P(), check_vma=False))
    partial = jax.device_put(jnp.ones((b, 1, h, d_v), jnp.float32), ds.sharding(P()))
    jax.block_until_ready(run(partial))
    return host_us(lambda: run(partial)) / MERGES


def measure(
    axis: str | None, b: int, tokens: int, h: int, implementation: str | None
) -> tuple[dict[str, float], np.ndarray]:
    """Times (of `TIMES`, those that can be had here) and the result of a dense step over all devices along `axis`, or
    over one device."""
    count = 1 if axis is None else len(jax.devices())
    sizes = tuple(count if name == axis else 1 for name in AXES)
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])
    ds = DecodeSharding(mesh, *AXES)
    fmt, columns = mla_jax.BF16_576, tokens // PAGE_SIZE
    num_pages = b * columns
    lengths = np.full(b, tokens, np.int32)
    table = ds.make_table(lengths, num_pages=num_pages, page_size=PAGE_SIZE)
    key = jax.random.key(0)

    @jax.jit
    def rows(table):  # page ids differ between shardings: what a page holds follows its place in the request
        flat = jnp.zeros(num_pages, jnp.int32).at[table.reshape(-1)].set(jnp.arange(num_pages, dtype=jnp.int32))
        make = lambda i: jax.random.normal(jax.random.fold_in(key, i), (PAGE_SIZE, fmt.d_qk), jnp.bfloat16)  # noqa: E731
        return jax.lax.with_sharding_constraint(jax.lax.map(make, flat, batch_size=256), ds.cache_sharding())

    cache = mla_jax.PagedKVCache(rows(table), fmt, PAGE_SIZE)
    q = jax.device_put(jax.random.normal(jax.random.key(1), (b, 1, h, fmt.d_qk), jnp.bfloat16), ds.q_sharding())
    table, lengths = jax.device_put((table, lengths), ds.row_sharding())
    step = jax.jit(functools.partial(ds.mla_decode, sm_scale=SM_SCALE, implementation=implementation))
    run = functools.partial(step, q, cache, table, lengths)
    out = jax.block_until_ready(run())
    times = {"step_us": host_us(run)}
    try:
        times |= device_times(run)
    except (cupti.CuptiError, TimingError) as error:
        print(f"no device times: {error}", flush=True)
    if axis == "context" and count > 1:
        times["merge_us"] = merge_us(ds, b, h, fmt.d_v)
    return times, np.asarray(out, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default=None, help="mosaic, triton or xla (default: the best here)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    table = []
    for b, tokens in ((4, 256),) if args.small else CASES:
        h = 16 if args.small else 128
        for axis in (None, *AXES):
            times, out = measure(axis, b, tokens, h, args.implementation)
            if axis is None:
                one, want = times, out
            devices = len(jax.devices()) if axis else 1
            found = dict(
                efficiency=one["step_us"] / times["step_us"] / devices,
                error=float(np.linalg.norm(out - want) / np.linalg.norm(want)),
            )
            if "device_us" in times and "device_us" in one:
                found["device_efficiency"] = one["device_us"] / times["device_us"] / devices
            print(json.dumps(dict(b=b, tokens=tokens, h=h, axis=axis) | times | found), flush=True)
            numbers = (times | found).get
            cells = (numbers(name) for name in (*TIMES, *RATIOS))
            row = [f"{b} x {tokens}", axis or "one device", *("" if x is None else f"{x:.4g}" for x in cells)]
            table.append(row)
    columns = [name.replace("_", " ") for name in ("requests x tokens", "cut over", *TIMES, *RATIOS)]
    print_table(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, BF16_576", columns, table, left=2)


if __name__ == "__main__":
    main()
