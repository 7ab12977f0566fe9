"""Sharded decode against one device: equality, step time, and the merge's collectives apart. Two devices or more.

    python -m mla_jax.bench.sharded [--small] [--implementation mosaic]

Times are the host's, of `REPEATS` steps launched one after the other, per step: with several GPUs there is no one
clock, and a decode loop waits for the slowest. Leave NVLink multicast off (NCCL_NVLS_ENABLE=0).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mla_jax
from mla_jax.cli.table import print_table
from mla_jax.sharding import DecodeSharding, ops

REPEATS = 30
PAGE_SIZE, SM_SCALE = 64, 0.1352338
AXES = ("data", "heads", "context")
# (requests, tokens of each), b and context of the context-parallel case last
CASES = ((128, 16_384), (4, 262_144))


def seconds(step: Callable[[], jax.Array]) -> float:
    """Per step, after one that compiles."""
    jax.block_until_ready(step())
    start = time.perf_counter()
    for _ in range(REPEATS):
        out = step()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / REPEATS


def measure(
    axis: str | None, b: int, tokens: int, h: int, implementation: str | None
) -> tuple[float, float, np.ndarray]:
    """(seconds a step, seconds of the merge alone, out) of a dense step over all devices along `axis`, or over one."""
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
    run = jax.jit(
        lambda q, cache, table, lengths: ds.mla_decode(
            q, cache, table, lengths, sm_scale=SM_SCALE, implementation=implementation
        )
    )
    out = run(q, cache, table, lengths)
    step_s = seconds(lambda: run(q, cache, table, lengths))
    merge_s = 0.0
    if axis == "context" and count > 1:
        partial = jax.device_put(jnp.ones((b, 1, h, fmt.d_v), jnp.float32), ds.sharding(P()))
        body = lambda out, lse: ops._merge(ds, out, lse, None, jnp.bfloat16)[0]  # noqa: E731
        merge = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
        partial_lse = jax.block_until_ready(partial[..., 0])
        merge_s = seconds(lambda: merge(partial, partial_lse))
    return step_s, merge_s, np.asarray(out, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default=None, help="mosaic, triton or xla (default: the best here)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    table, records = [], []
    for b, tokens in ((4, 256),) if args.small else CASES:
        h = 16 if args.small else 128
        one_s, _, want = alone = measure(None, b, tokens, h, args.implementation)
        for axis in (None, *AXES):
            step_s, merge_s, out = measure(axis, b, tokens, h, args.implementation) if axis else alone
            error = float(np.linalg.norm(out - want) / np.linalg.norm(want))
            efficiency = one_s / step_s / (len(jax.devices()) if axis else 1)
            numbers = dict(step_us=step_s * 1e6, merge_us=merge_s * 1e6, efficiency=efficiency, error=error)
            records.append(dict(b=b, tokens=tokens, h=h, axis=axis) | numbers)
            table.append([f"{b} x {tokens}", axis or "one device", *(f"{x:.4g}" for x in numbers.values())])
    columns = ("requests x tokens", "cut over", "step us", "merge us", "efficiency", "error")
    print_table(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, BF16_576", columns, table, left=2)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
