"""`mla-jax demo`: decode steps of every kind on whatever machine this is, checked against the reference."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax.cli.table import print_table

BATCH, HEADS, PAGE_SIZE = 4, 16, 64
CONTEXT_TOKENS = (1024, 700, 129, 1)  # of each request, the token appended by the step included
PROMPT_TOKENS = 256  # of the system prompt that all requests share
TOPK = 512
WINDOW_TOKENS = 128  # DeepSeek-V4's sliding window
REPEATS = 5

# DeepSeek-V3's softmax scale, (128 + 64)^-0.5 times YaRN's mscale squared, and DeepSeek-V4's: neither is d_qk^-0.5 of
# an absorbed V3 query.
V3_SCALE = 192**-0.5 * (0.1 * np.log(40) + 1) ** 2
V4_SCALE = 512**-0.5

# FlashMLA's own tolerance on attention output, per element.
ABS_TOLERANCE, REL_TOLERANCE = 1e-3, 2.01 / 128


@dataclasses.dataclass(frozen=True)
class Step:
    """One jitted decode step: append a token to the cache, attend.

    Attributes:
      title: what the table calls it.
      cache: the cache before the step; donated to it.
      attend: (cache, q, **arrays) -> (out, lse), through the library.
      reference: the same through mla_jax.reference.
      arrays: the remaining arguments of both.
      keys: keys read by all queries together, for the bandwidth.
      shapes: what the table says about sizes.
    """

    title: str
    cache: mla_jax.PagedKVCache
    attend: Callable[..., Any]
    reference: Callable[..., Any]
    arrays: dict[str, Any]
    keys: int
    shapes: str


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="run decode steps on this machine and check them",
        description="Builds caches of both model types from seeded data, appends a token, runs dense and sparse decode "
        "steps under jit and compares them with the reference. Takes seconds on a CPU.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random data (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = jax.devices()[0]
    print(f"device  {device.device_kind} ({device.platform}), {len(jax.devices())} of them")
    print(f"jax     {jax.__version__}")
    print(f"plugin  {cuda_plugin() or 'none: jax runs on the CPU'}")
    if hint := missing_extra(device.platform):
        print(f"\n{hint}")
    print()
    rows, wrong = [], []
    for step in steps(np.random.default_rng(args.seed)):
        row, correct = measure(step)
        rows.append(row)
        if not correct:
            wrong.append(f"{step.cache.format.name} {step.title}")
    columns = ("format", "step", "shapes", "implementation", "B/token", "error", "time", "GB/s")
    print_table("one decode step: append a token, attend", columns, rows, left=4)
    print("\nerror: largest difference from mla_jax.reference; time: host clock; GB/s: cache rows read over time")
    if wrong:
        print(f"\nWRONG: {', '.join(wrong)} differ from the reference by more than the tolerance")
        return 1
    return 0


def cuda_plugin() -> str | None:
    """Name and version of the installed CUDA plugin, or None."""
    for package in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def nvidia_gpu_present() -> bool:
    """Whether the driver shows a GPU, whatever jax thinks."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/proc/driver/nvidia/version")


def missing_extra(platform: str) -> str:
    """What to install where a GPU stands idle; empty where nothing is missing."""
    if platform == "gpu" or not nvidia_gpu_present():
        return ""
    if cuda_plugin() is None:
        return (
            "This machine has an NVIDIA GPU, but jax has no CUDA plugin: install the extra cuda13,\n"
            "  pip install 'mla-jax[cuda13]'      (in a clone: uv run --extra cuda13 mla-jax demo)"
        )
    return "This machine has an NVIDIA GPU and jax a CUDA plugin, but jax does not use it: see its warnings above."


def steps(rng: np.random.Generator) -> list[Step]:
    """Dense and sparse steps for both model types."""
    dense = (mla_jax.BF16_576, mla_jax.V32, mla_jax.BF16_512, mla_jax.MODEL1)
    return [*(_dense(fmt, rng) for fmt in dense), *(_sparse(fmt, rng) for fmt in (mla_jax.V32, mla_jax.MODEL1))]


def _scale(fmt: mla_jax.KVFormat) -> float:
    return V3_SCALE if fmt.d_qk == mla_jax.V32.d_qk else V4_SCALE


def _rows(rng: np.random.Generator, fmt: mla_jax.KVFormat, *shape: int) -> jax.Array:
    """Normally distributed rows [*shape, d_qk]."""
    return jnp.asarray(rng.standard_normal((*shape, fmt.d_qk), np.float32), fmt.compute_dtype)


def _pool(rng: np.random.Generator, fmt: mla_jax.KVFormat) -> tuple[mla_jax.PagedKVCache, jax.Array]:
    """A cache of every request's context, and its block table [b, max_pages]; pages in shuffled order."""
    max_pages = -(-max(CONTEXT_TOKENS) // PAGE_SIZE)
    table = rng.permutation(BATCH * max_pages).astype(np.int32).reshape(BATCH, max_pages)  # [b, max_pages]
    return mla_jax.pack_kv(_rows(rng, fmt, BATCH * max_pages, PAGE_SIZE), fmt), jnp.asarray(table)


def _common(rng: np.random.Generator, fmt: mla_jax.KVFormat, table: jax.Array) -> dict[str, jax.Array]:
    """Queries, and the new token of each request with the slot it goes to."""
    last = jnp.asarray(CONTEXT_TOKENS, jnp.int32)[:, None] - 1  # [b, 1]
    return {
        "q": _rows(rng, fmt, BATCH, 1, HEADS),  # [b, s_q = 1, h, d_qk]
        "new_kv": _rows(rng, fmt, BATCH),  # [b, d_qk]
        "slots": mla_jax.slots_from_positions(last, table, PAGE_SIZE)[:, 0],  # [b]
    }


def _dense(fmt: mla_jax.KVFormat, rng: np.random.Generator) -> Step:
    cache, table = _pool(rng, fmt)
    scale = _scale(fmt)
    return Step(
        title="dense",
        cache=cache,
        attend=lambda cache, q, block_table, cache_seqlens: mla_jax.mla_decode(
            q, cache, block_table, cache_seqlens, sm_scale=scale, return_lse=True
        ),
        reference=lambda cache, q, block_table, cache_seqlens: mla_jax.reference.mla_decode(
            q, cache, block_table, cache_seqlens, sm_scale=scale
        ),
        arrays=_common(rng, fmt, table)
        | {"block_table": table, "cache_seqlens": jnp.asarray(CONTEXT_TOKENS, jnp.int32)},
        keys=sum(CONTEXT_TOKENS),
        shapes=f"b {BATCH}, h {HEADS}, up to {max(CONTEXT_TOKENS)} tokens",
    )


def _sparse(fmt: mla_jax.KVFormat, rng: np.random.Generator) -> Step:
    """Top-k tokens of each request (V4: its sliding window) and a system prompt that all requests share."""
    cache, table = _pool(rng, fmt)
    scale = _scale(fmt)
    is_v4 = fmt.d_qk == mla_jax.MODEL1.d_qk
    width = WINDOW_TOKENS if is_v4 else TOPK
    positions = np.full((BATCH, width), -1, np.int32)  # [b, topk]: -1 is no key
    for request, length in enumerate(CONTEXT_TOKENS):
        first = max(0, length - width) if is_v4 else 0
        earlier = rng.permutation(np.arange(first, length - 1))[: width - 1]
        positions[request, : earlier.size + 1] = [*earlier, length - 1]  # the token this step appends is among them
    indices = mla_jax.slots_from_positions(jnp.asarray(positions), table, PAGE_SIZE)[:, None]  # [b, s_q = 1, topk]
    prompt = mla_jax.pack_kv(_rows(rng, fmt, PROMPT_TOKENS // PAGE_SIZE, PAGE_SIZE), fmt)
    shared = jnp.broadcast_to(jnp.arange(PROMPT_TOKENS, dtype=jnp.int32), (BATCH, 1, PROMPT_TOKENS))
    sink = jnp.asarray(rng.standard_normal(HEADS), jnp.float32) if is_v4 else None  # [h]
    return Step(
        title="sparse + shared prompt",
        cache=cache,
        attend=lambda cache, q, indices, **more: mla_jax.sparse_mla_decode(
            q, cache, indices, sm_scale=scale, attn_sink=sink, **more, return_lse=True
        ),
        reference=lambda cache, q, indices, **more: mla_jax.reference.sparse_mla_decode(
            q, cache, indices, sm_scale=scale, attn_sink=sink, **more
        ),
        arrays=_common(rng, fmt, table) | {"indices": indices, "extra_cache": prompt, "extra_indices": shared},
        keys=int((positions >= 0).sum()) + BATCH * PROMPT_TOKENS,
        shapes=f"b {BATCH}, h {HEADS}, top-k {width} + {PROMPT_TOKENS}",
    )


def measure(step: Step) -> tuple[tuple[str, ...], bool]:
    """Runs a step: its row of the table, and whether it agrees with the reference."""
    arrays = dict(step.arrays)
    new_kv, slots = arrays.pop("new_kv"), arrays.pop("slots")

    def decode(cache, new_kv, slots, arrays):
        cache = mla_jax.append_kv(cache, new_kv, slots)
        return cache, *step.attend(cache, **arrays)

    fmt = step.cache.format
    decode = jax.jit(decode, donate_argnums=0)
    cache, out, lse = jax.block_until_ready(decode(step.cache, new_kv, slots, arrays))
    want, want_lse = step.reference(cache, **arrays)
    want = want.astype(jnp.float32)
    error = jnp.abs(out.astype(jnp.float32) - want)  # [b, s_q, h, d_v]
    lse_error = jnp.max(jnp.abs(lse - want_lse))
    correct = bool(jnp.all(error <= ABS_TOLERANCE + REL_TOLERANCE * jnp.abs(want)) & (lse_error <= 1e-3))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        cache, out, lse = jax.block_until_ready(decode(cache, new_kv, slots, arrays))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    positional = [arrays[name] for name in ("block_table", "cache_seqlens", "indices") if name in arrays]
    extra = {name: x for name, x in arrays.items() if name.startswith("extra_")}
    chosen = mla_jax.explain(arrays["q"], cache, *positional, **extra).implementation
    row = (
        fmt.name,
        step.title,
        step.shapes,
        str(chosen),
        str(fmt.bytes_per_token),
        f"{float(jnp.max(error)):.1e}",
        f"{seconds * 1e3:.2f} ms",
        f"{step.keys * fmt.bytes_per_token / seconds / 1e9:.2f}",
    )
    return row, correct
