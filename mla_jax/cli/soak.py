"""`mla-jax soak`: thousands of decode steps of the serving loop, watching memory and drift."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import jax

from mla_jax.cli import CommandError
from mla_jax.cli.progress import Progress
from mla_jax.cli.table import print_table

if TYPE_CHECKING:
    from mla_jax.serve.soak import Sample


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "soak",
        help="thousands of decode steps: is memory flat, do results drift?",
        description="Runs the serving loop with joins, leaves, cancellations and a pool that is too small; samples "
        "memory, compares the op with the reference on the aged pools, and replays finished requests alone.",
    )
    parser.add_argument("--steps", type=int, default=10_000, help="decode steps (default 10000)")
    kinds = ("v3", "v32", "model1")
    parser.add_argument("--attention", choices=kinds, default="v3", help="kind of every layer (default v3)")
    parser.add_argument("--interval", type=int, default=250, help="steps between samples (default 250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mla_jax.serve import soak

    if args.steps < 1 or args.interval < 1:
        raise CommandError(f"--steps is {args.steps} and --interval {args.interval}; accepted: 1 or more")
    device = jax.devices()[0]
    print(f"device  {device.device_kind} ({device.platform}), jax {jax.__version__}")
    start = time.monotonic()
    with Progress(args.steps) as progress:
        samples = soak.run(
            args.steps,
            kind=args.attention,
            seed=args.seed,
            interval=args.interval,
            on_step=lambda step: progress.show(step, f"{step} steps, {time.monotonic() - start:.0f} s"),
        )
    seconds = time.monotonic() - start
    keep = samples[:: max(1, len(samples) // 10)]
    rows = [_row(s) for s in (keep if keep[-1] is samples[-1] else [*keep, samples[-1]])]
    columns = ("steps", "done", "preempted", "arrays", "array bytes", "device bytes", "host MiB", "op error", "replay")
    print_table(f"{args.steps} steps of {args.attention}", columns, rows, left=0)
    op_error = max(s.op_error for s in samples)
    replay_error = max((s.replay_error for s in samples if s.replay_error >= 0), default=0.0)  # NaN: none yet
    print(f"\nop error: against the reference, at most {op_error:.1e}; replay: a request alone, {replay_error:.1e}")
    print(f"{seconds / args.steps * 1e3:.1f} ms a step, checks included; {samples[-1].compiled} versions compiled")
    found = soak.problems(samples, args.attention)
    for problem in found:
        print(f"WRONG: {problem}")
    return 1 if found else 0


def _row(s: Sample) -> tuple[str, ...]:
    device = "-" if s.device_bytes is None else str(s.device_bytes)
    host = "-" if s.host_bytes is None else f"{s.host_bytes / 2**20:.0f}"
    counts = (s.step, s.finished, s.preempted, s.live_arrays, s.live_bytes)
    return (*map(str, counts), device, host, f"{s.op_error:.1e}", f"{s.replay_error:.1e}")
