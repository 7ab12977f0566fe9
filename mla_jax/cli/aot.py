"""`mla-jax aot`: compiles every kernel configuration for a GPU that is not there, and reports on the machine code."""

from __future__ import annotations

import argparse
import sys

from mla_jax.cli import CommandError
from mla_jax.cli.table import print_table

COLUMNS = ("configuration", "kernel", "registers", "spill st/ld B", "SMEM B", "TMEM columns", "instructions",
           "matrix", "TMA", "of them gather4", "loops")  # fmt: skip


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "aot",
        help="compile every kernel without a GPU and check the machine code",
        description="Exits with 1 when a kernel does not compile, spills too much in a loop that multiplies, has its "
        "matrix instructions serialised, or wants more shared or tensor memory than there is. Needs JAX's CUDA plugin, "
        "ptxas and nvdisasm, but no GPU: uv run --group aot mla-jax aot",
    )
    parser.add_argument("--arch", default="sm_90a", help="sm_90a (default), sm_100a or sm_103a: one a process")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only configurations whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the configurations' names and stop")
    parser.add_argument(
        "--model",
        action="store_true",
        help="compile nothing; print how long the workloads should take, and what they wait for (docs/sm100.md)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model:
        return _predict(args.arch, args.filter)
    from pallas_kernels import aot

    try:
        cases = {name: case for name, case in aot.configurations(args.arch).items() if args.filter in name}
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    if not cases:
        raise CommandError(f"no configuration for {args.arch} has {args.filter!r} in its name")
    if args.list:
        print("\n".join(cases))
        return 0
    rows: list[tuple[str, ...]] = []
    problems: list[str] = []
    for number, (name, (function, arguments)) in enumerate(cases.items(), 1):
        print(f"[{number}/{len(cases)}] {name}", file=sys.stderr, flush=True)
        try:
            reports = aot.compile_report(function, arguments, args.arch)
        except Exception as error:  # lowering and ptxas raise many kinds; each is a configuration that does not compile
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            continue
        for report in reports:
            rows.append((name, *_row(report)))
            problems += [f"{name}, {report.kernel}: {problem}" for problem in report.problems()]
    print_table(f"compiled for {args.arch}, not run", COLUMNS, rows, left=2)
    print("\n" + ("\n".join(problems) if problems else f"{len(rows)} kernels, no problem"))
    return 1 if problems else 0


def _row(report) -> tuple[str, ...]:
    """A kernel's row under `COLUMNS`, the configuration's name left out. Loops by their number of instructions."""
    from pallas_kernels import aot

    return (
        report.kernel,
        str(report.registers),
        f"{report.spill_store_bytes}/{report.spill_load_bytes}",
        str(report.smem_bytes),
        str(report.tmem_columns),
        str(report.instructions),
        str(sum(report.counts.get(op, 0) for op in aot.MULTIPLY)),
        str(sum(report.counts.get(op, 0) for op in ("UTMALDG", "UTMASTG", "UBLKCP"))),
        str(report.counts.get("GATHER4", 0)),
        " ".join(str(loop.instructions) for loop in report.loops) or "-",
    )


UNITS = ("tensor core", "shared memory", "instructions", "stages", "memory")
MODEL_COLUMNS = ("workload", "us", "TFLOP/s", "TB/s", "waits for", *UNITS, "combine")


def _predict(arch: str, text: str) -> int:
    """Prints the model's times of the dense and sparse workloads whose name contains `text`."""
    from mla_jax.bench import model, sparse_model
    from mla_jax.bench.workloads import WORKLOADS, Dense, Sparse

    if arch not in model.GPUS:
        raise CommandError(f"--arch is {arch!r}; the model knows the limits of {', '.join(model.GPUS)}")
    gpu = model.GPUS[arch]
    rows: list[tuple[str, ...]] = []
    for name, workload in WORKLOADS.items():
        if text not in name:
            continue
        if isinstance(workload, Dense):
            found = model.predict(workload, gpu)
        elif isinstance(workload, Sparse):
            found = sparse_model.predict(workload, gpu)
        else:
            continue
        rates = (workload.flop / found.us / 1e6, workload.bytes_moved / found.us / 1e6)
        units = (f"{found.units_us[unit]:.1f}" if unit in found.units_us else "-" for unit in UNITS)
        rows.append(
            (name, f"{found.us:.1f}", f"{rates[0]:.0f}", f"{rates[1]:.2f}", found.bottleneck, *units,
             f"{found.combine_us:.1f}")
        )  # fmt: skip
    if not rows:
        raise CommandError(f"no dense or sparse workload has {text!r} in its name")
    print_table(f"predicted for {gpu.name}, not measured; units in us", MODEL_COLUMNS, rows, left=1)
    return 0
