"""`mla-jax verify`: correctness, sanitizer and benchmark of this GPU's kernels, in one report to send back."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from mla_jax.cli import CommandError


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check the kernels on this GPU, each in a process of its own, and write a report",
        description="Compares both ops with a float64 oracle over a matrix of calls, runs some under compute-sanitizer "
        "if that is installed, and benchmarks. Writes verify.json and verify.md. Made for GPUs that the kernels have "
        "been compiled for and never run on: please send the report back.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: verify-DATE)")
    parser.add_argument("--implementation", help="mosaic, triton or xla (default: mosaic on a GPU, else xla)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only checks whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the checks' names and stop")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a check may take (300)")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer")
    parser.add_argument("--no-benchmark", action="store_true", help="leave out the benchmark")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mla_jax.bench import verify

    names = [name for name in verify.CHECKS if args.filter in name]
    if not names:
        raise CommandError(f"no check has {args.filter!r} in its name; see mla-jax verify --list")
    if args.list:
        print("\n".join(names))
        return 0
    if args.timeout <= 0:
        raise CommandError("--timeout must be above 0")
    folder = args.out or Path(f"verify-{datetime.date.today()}")
    report = verify.verify(
        args.implementation, names, folder=folder, timeout_s=args.timeout, sanitize=not args.no_sanitizer,
        benchmark_suites=() if args.no_benchmark else verify.SUITES, on_record=_print,
    )  # fmt: skip
    bad = verify.failures(report)
    refused = sum(record.get("status") == "refused" for record in report["records"])
    print(f"\n{len(report['records'])} records, {len(bad)} failed, {refused} refused")
    print(f"wrote {folder / 'verify.md'} and {folder / 'verify.json'}")
    if refused == len(names):
        print(f"NOTE: {report['implementation']} served no call here; `mla_jax.explain` says why")
    return 1 if bad or refused == len(names) else 0


def _print(record) -> None:
    text = " ".join(record.get("text", "").split())[-120:]
    what = f"{record['kind']} {record['name']}"
    print(f"{record.get('status'):8s} {record['seconds']:7.1f} s  {what}  {text}", flush=True)
