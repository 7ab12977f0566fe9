"""compute-sanitizer over the kernels and over planted faults: what it reports, and where it is blind.

    python -m tests.gpu.sanitize [--quick] [--jobs N] [--out FILE]      from the repository's root

Every fault of tests/gpu/planted.py runs under the tool that should see it, near its array (1 KiB behind) and far from
it (1 GiB); the SM90 kernels run under memcheck and racecheck. A clean report on a kernel means no more than the
faults of the same kind that were found, and a race in a kernel no more than that a correct use of its barriers was not
reported. Exit status 1: a kernel is reported in earnest, or the tool saw not even a far plain read.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys

from tests.gpu import memcheck, planted

ROOT = pathlib.Path(__file__).parents[2]
NEAR_KIB, FAR_KIB = 5, 1 << 20  # of a 4 KiB array
FOUND, FAILED = 7, "the run itself failed"  # --error-exitcode
KERNELS = {name: [sys.executable, "-m", "tests.gpu.memcheck", name] for name in memcheck.KERNELS}
# By what a kernel orders what racecheck may report: a kind of planted.NO_FAULT.
ORDERED_BY = {name: planted.CLUSTER if name.startswith("sparse") else "mbarrier" for name in KERNELS}
ORDERED_BY["dense"] = "named barriers"


def environment() -> dict[str, str]:
    """Every array an allocation of its own, and no CUDA graphs, whose kernels a tool may see late or not at all."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    return os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": flags.strip(),
        "PYTHONPATH": str(ROOT),
    }


def run(tool: str, command: list[str], timeout: int = 600) -> tuple[str, str]:
    """("reported", "nothing" or FAILED, the end of the output)."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
    if tool == "memcheck":
        sanitizer += ["--padding", "4096"]  # a gap behind each allocation that the tool sees
    try:
        done = subprocess.run(
            [*sanitizer, *command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end after {timeout} s"
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        return FAILED, "compute-sanitizer does not support this device"
    outcome = {0: "nothing", FOUND: "reported"}.get(done.returncode, FAILED)
    if "========= Invalid" in text or ("hazard" in text and "0 hazards" not in text):
        outcome = "reported"  # a fault may kill the process before the tool sets the exit code
    return outcome, text[-3000:]


def cases() -> list[tuple[str, str, int]]:
    """(tool, kind, offset in KiB) of every planted fault."""
    found = [("memcheck", kind, kib) for kind in (*planted.BODIES, "tma") for kib in (NEAR_KIB, FAR_KIB)]
    return [*found, *(("racecheck", kind, 0) for kind in (*planted.RACES, *planted.NO_FAULT))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a far plain read, a race, and memcheck of the kernels")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; they may share the GPU")
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: it comes with the CUDA toolkit (cuda-sanitizer)", file=sys.stderr)
        return 2
    quick = [("memcheck", "load", FAR_KIB), ("racecheck", "race", 0)]
    planted_runs = [
        ((tool, [sys.executable, "-m", "tests.gpu.planted", kind, str(kib)], 200), {"planted": kind, "offset_kib": kib})
        for tool, kind, kib in (quick if args.quick else cases())
    ]
    kernel_runs = [
        ((tool, command, 600), {"kernel": name})
        for name, command in KERNELS.items()
        for tool in (("memcheck",) if args.quick else ("memcheck", "racecheck"))
    ]
    results = []

    def perform(how: tuple, what: dict) -> None:
        outcome, text = run(*how)
        results.append({"tool": how[0], **what, "outcome": outcome, "output": text})
        print(f"{how[0]:10s} {' '.join(f'{key} {value}' for key, value in what.items()):40s} {outcome}", flush=True)
        if "kernel" in what and outcome != "nothing":
            print(text, flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: perform(*one), [*kernel_runs, *planted_runs]))  # the longest first
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1))
    misread = {r["planted"] for r in results if r.get("planted") in planted.NO_FAULT and r["outcome"] == "reported"}

    def says_nothing(result: dict) -> bool:
        """Of a race checker that reports a correct use of the kernel's own barriers."""
        return result["tool"] == "racecheck" and ORDERED_BY[result["kernel"]] in misread

    for result in results:
        if "kernel" in result and result["outcome"] == "reported" and says_nothing(result):
            kind = ORDERED_BY[result["kernel"]]
            print(f"racecheck reports a correct use of {kind} too: what it reports of {result['kernel']} says nothing")
    kernels_clean = all(r["outcome"] == "nothing" or says_nothing(r) for r in results if "kernel" in r)
    sees = any(r.get("planted") == "load" and r["outcome"] == "reported" for r in results)
    if not sees:
        print("a plain read 1 GiB behind an array was not reported: silence about the kernels proves nothing")
    return 0 if kernels_clean and sees else 1


if __name__ == "__main__":
    sys.exit(main())
