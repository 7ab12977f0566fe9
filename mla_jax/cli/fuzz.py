"""`mla-jax fuzz`: random calls, garbage included, through the ops and the caches, against a float64 oracle."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax

from mla_jax.cli import CommandError
from mla_jax.cli.progress import Progress

IMPLEMENTATIONS = ("mosaic", "triton", "xla")


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "fuzz",
        help="random calls with garbage in every argument, checked against a float64 oracle",
        description="Draws whole calls of both ops, of pack, append, gather and unpack, and of the FlashMLA-compatible "
        "call; checks what comes back; makes a failing call smaller and prints it as a script.",
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1); compiling counts")
    parser.add_argument(
        "--implementation", action="append", choices=IMPLEMENTATIONS, metavar="NAME",
        help=f"{', '.join(IMPLEMENTATIONS)}; may repeat (default: all that run here); the reference always runs",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default 0)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first case (default 0)")
    parser.add_argument("--case", type=int, metavar="K", help="run case K of the seed alone")
    parser.add_argument("--size", choices=("small", "large"), help="of shapes (default: large on a GPU)")
    parser.add_argument("--shrink-seconds", type=float, default=60.0, help="for each failure (default 60; 0: none)")
    parser.add_argument("--max-failures", type=int, default=5, help="stop after so many (default 5)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write each failure's script there as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mla_jax import fuzz

    if args.minutes <= 0 or args.first < 0 or (args.case is not None and args.case < 0):
        raise CommandError("--minutes must be above 0, --first and --case must not be negative")
    on_gpu = jax.default_backend() == "gpu"
    implementations = args.implementation or (["mosaic", "triton", "xla"] if on_gpu else ["xla"])
    size = args.size or ("large" if on_gpu else "small")
    device = jax.devices()[0]
    print(f"device  {device.device_kind} ({device.platform}), jax {jax.__version__}")
    print(f"checks  {', '.join(implementations)} and the reference; seed {args.seed}, {size} shapes")
    tally = fuzz.Tally()
    failures: list[fuzz.Failure] = []
    first, seconds = (args.first, args.minutes * 60) if args.case is None else (args.case, 0.0)
    start = time.monotonic()
    with Progress(seconds) as progress:

        def on_case(_: int) -> None:
            passed = time.monotonic() - start
            progress.show(passed, f"{passed / 60:.0f} min: {tally.cases} cases done, {len(failures)} failed")

        found = (
            fuzz.search(
                args.seed, implementations, fuzz.SIZES[size], seconds=seconds, first=first, tally=tally,
                on_case=on_case,
            )
            if args.case is None
            else _one(args, implementations, size, tally)
        )  # fmt: skip
        for failure in found:
            failures.append(failure)
            repeat = f"mla-jax fuzz --seed {args.seed} --case {failure.number} --size {size}"
            progress.print(f"\nFAILED  {repeat}\n        {failure.case}\n        {failure.problem}")
            script = _script(failure, implementations, repeat, args.shrink_seconds)
            progress.print(script)
            if args.save is not None:
                args.save.mkdir(parents=True, exist_ok=True)
                path = args.save / f"fuzz_{args.seed}_{failure.number}.py"
                path.write_text(script)
                progress.print(f"saved as {path}")
            if len(failures) >= args.max_failures:
                break
    print(f"done    {tally}")
    print(f"        {len(failures)} failed" if failures else "        no failure")
    if not tally.counts["exact"] and args.case is None:
        print("        NOTE: no row was compared by value; run for longer")
    return 1 if failures else 0


def _one(args, implementations, size, tally):
    from mla_jax import fuzz

    case = fuzz.draw(args.seed, args.case, fuzz.SIZES[size])
    outcome = fuzz.check(case, implementations)
    tally.cases += 1
    tally.counts += outcome.counts
    tally.refused.update(outcome.refused)
    if outcome.problem is not None:
        yield fuzz.Failure(args.case, case, outcome.problem)


def _script(failure, implementations, repeat: str, seconds: float) -> str:
    from mla_jax import fuzz

    who = [failure.implementation] if failure.implementation in implementations else []
    case = fuzz.shrink(failure.case, who, seconds=seconds) if seconds > 0 else failure.case
    problem = fuzz.check(case, who).problem or failure.problem
    title = f"Found by `{repeat}`" + (", made smaller." if case is not failure.case else ".")
    return fuzz.snippet(case, failure.implementation, title=title, problem=problem)
