"""`mla-jax tune`: measures kernel configurations on this GPU and writes the best ones as a table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from mla_jax.bench import workloads
from mla_jax.cli import CommandError
from mla_jax.cli.progress import LINES, Progress
from mla_jax.cli.table import print_table

if TYPE_CHECKING:
    from mla_jax.bench.tune import Measured
    from mla_jax.tuning import Table


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="measure kernel configurations on this GPU and write the best ones",
        description="Times every candidate configuration of each workload on this GPU, interleaved, and writes a table "
        "for mla_jax.tuning.load. The default stays where nothing is at least 2 % faster.",
    )
    suites = ", ".join(workloads.SUITES)
    parser.add_argument("--suite", action="append", default=[], help=f"one of {suites}; may repeat")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only workloads whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=5, help="times each candidate is measured, in turn (default 5)")
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile first (default 4)")
    parser.add_argument("--out", type=Path, default=Path("tuned.json"), metavar="FILE", help="default tuned.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when jax first touches the GPU
    from mla_jax import dispatch
    from mla_jax.bench import timer, tune

    try:
        chosen = tune.tunable(workloads.select(args.suite, args.filter))
        if not chosen or args.rounds < 1:
            raise ValueError("nothing to tune: accepted are workloads of dense and sparse decode, and --rounds above 0")
        device, target = timer.require_gpu(), dispatch.cuda_target()
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(f"device  {device.device_kind}, jax {jax.__version__}; {len(chosen)} workloads")
    done = 0
    with Progress(len(chosen)) as progress:
        progress.print("        compiling every candidate")

        def on_compiled(done: int, total: int) -> None:
            if done * LINES // total > (done - 1) * LINES // total:
                progress.print(f"        {done} of {total} compiled")

        def on_done(measured: Measured) -> None:
            nonlocal done
            done += 1
            for config, reason in measured.failed.items():
                progress.print(f"        out: {config}: {reason}")
            progress.show(done, f"{done}/{len(chosen)} {measured.workload.name}")

        try:
            table = tune.tune(
                chosen,
                device=device.device_kind,
                capability=target.capability or dispatch.ASSUMED_CAPABILITY,
                jax_version=jax.__version__,
                rounds=args.rounds,
                jobs=args.jobs,
                on_compiled=on_compiled,
                on_done=on_done,
            )
        except (NotImplementedError, RuntimeError) as error:  # no kernel for this GPU; a measurement that is none
            raise CommandError(str(error)) from error
    print_table("tuned against default", ("workload", "us", "default us", "gain", "config"), _rows(table), left=1)
    table.save(args.out)
    print(f"\nwrote {args.out}: config=mla_jax.tuning.load({str(args.out)!r}).dense(q, cache, block_table)")
    return 0


def _rows(table: Table) -> list[tuple[str, ...]]:
    return [
        (name, f"{us:.1f}", f"{default:.1f}", f"{1 - us / default:.1%}", "same" if us == default else str(entry.config))
        for entry in table.entries.values()
        for name, (us, default) in entry.us.items()
    ]
