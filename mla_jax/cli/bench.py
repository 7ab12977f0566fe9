"""`mla-jax bench`: times the ops on this GPU, beside FlashMLA if asked, and keeps results and README together."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mla_jax.bench import report, workloads
from mla_jax.cli import CommandError
from mla_jax.cli.table import print_table


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the ops on this GPU, against FlashMLA if asked",
        description="Times the ops on this GPU by the rule in mla_jax/bench/timer.py and prints achieved rates beside "
        "this GPU's ceilings, measured in the same run.",
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--suite", action="append", default=[], help=f"one of {', '.join(workloads.SUITES)}; may repeat")
    what.add_argument("--filter", default="", metavar="TEXT", help="only workloads whose name contains TEXT")
    what.add_argument("--list", action="store_true", help="list the workloads and stop")
    what.add_argument("--implementation", help="mosaic, triton or xla instead of the best one")
    what.add_argument("--peer", choices=("flash_mla",), help="run FlashMLA in the same process, interleaved")
    how = parser.add_argument_group("how to time")
    how.add_argument("--regime", choices=("graph", "isolated"), default="graph", help="back to back, or one at a time")
    how.add_argument("--rounds", type=int, default=5, help="ours, peer, ours, peer ...: this many each (default 5)")
    how.add_argument("--calls", type=int, help="calls in a chain (default 20, or one per input set)")
    how.add_argument("--jobs", type=int, default=4, help="processes that compile before anything is timed (default 4)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON lines")
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw achieved against roofline from --results, and stop")
    out.add_argument("--results", type=Path, action="append", default=[], metavar="FILE", help="files for --plot")
    out.add_argument("--readme", action="store_true", help="rewrite README.md's tables from docs/results, and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.readme:
        return _write_readme(Path.cwd())
    if args.plot is not None:
        return _plot(args.results, args.plot)
    try:
        chosen = workloads.select(args.suite, args.filter)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.list:
        for workload in chosen:
            print(f"{workload.name:40s} {workload.flop / 1e9:10.1f} GFLOP {workload.bytes_moved / 1e6:10.1f} MB")
        return 0
    return _measure(args, chosen)


def _measure(args: argparse.Namespace, chosen: list[workloads.Workload]) -> int:
    # JAX and torch share the GPU: neither may take all of it. Read when JAX first touches the GPU, which is below.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from mla_jax.bench import cupti, peer, runner

    try:
        if args.peer:
            peer.load(args.peer)
        run_record = runner.describe_run("mla-jax bench " + shlex.join(_words(args)), args.peer)
    except (RuntimeError, cupti.CuptiError) as error:
        raise CommandError(str(error)) from error
    print(
        f"{run_record.device}, jax {run_record.jax}; DRAM reads {run_record.dram_gb_s:.0f} GB/s, "
        f"bf16 matmul {run_record.matmul_tflop_s:.0f} TFLOP/s"
    )
    results: list[report.Result] = []
    with _progress(len(chosen)) as on_start:
        for result in runner.measure_all(
            chosen, on_start=on_start, implementation=args.implementation, regime=args.regime, peer=args.peer,
            rounds=args.rounds, calls=args.calls, jobs=args.jobs,
        ):  # fmt: skip
            results.append(result)
            if args.out is not None:  # after every workload: a kernel that hangs costs no results
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(report.dumps(run_record, results))
    print_table(f"regime {args.regime}; ratio = peer time / ours", report.COLUMNS, report.rows(run_record, results))
    for result in results:
        if result.error is not None:
            print(f"{result.workload}: {result.error}", file=sys.stderr)
    return 1 if any(result.error is not None for result in results) else 0


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, without where the results went."""
    words = [word for suite in args.suite for word in ("--suite", suite)]
    if args.filter:
        words += ["--filter", args.filter]
    if args.implementation:
        words += ["--implementation", args.implementation]
    if args.peer:
        words += ["--peer", args.peer]
    return [*words, "--regime", args.regime]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call when a workload starts: a bar on a terminal with rich, else a line each on stderr."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda name: print(f"  {name}", file=sys.stderr, flush=True)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: print(f"  {name}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        started = -1  # the first line is about compiling

        def on_start(name: str) -> None:
            nonlocal started
            progress.update(task, completed=max(started, 0), description=name)
            started += 1

        yield on_start
        progress.update(task, completed=total, description="")


def _write_readme(root: Path) -> int:
    readme = root / "README.md"
    if not readme.is_file() or not (root / "mla_jax").is_dir():
        raise CommandError("--readme rewrites README.md: run it in the repository's root")
    old = readme.read_text()
    new = report.with_results(old, report.readme_section(root))
    readme.write_text(new)
    print("README.md is up to date" if new == old else "README.md rewritten")
    return 0


def _plot(files: list[Path], target: Path) -> int:
    if not files:
        raise CommandError("--plot draws stored results: name them with --results FILE")
    try:
        from mla_jax.bench import plot
    except ImportError as error:
        raise CommandError(f"--plot needs matplotlib: pip install 'mla-jax[bench]' ({error})") from error
    try:
        plot.roofline([report.loads(file.read_text()) for file in files], target)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(f"wrote {target}")
    return 0
