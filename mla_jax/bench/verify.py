"""Does this GPU compute what the documents claim? Correctness, sanitizer and benchmark, in one report to send back.

Every program runs in a process of its own with a time limit, so that a kernel that hangs or crashes costs seconds and
is a line of the report. The parent never touches the GPU. `mla-jax verify` runs it; `python -m mla_jax.bench.verify
NAME IMPLEMENTATION` runs one check alone, which is what a sanitizer or a debugger wants.

A check draws calls as the fuzzer does (mla_jax/fuzz: garbage in every integer argument, NaN in slots that nothing
names), compares them with the float64 oracle, and repeats the last one: a kernel's bits must not change.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla_jax.fuzz.cases import Case, Spec, make
from pallas_kernels.formats import BF16_512, BF16_576, MODEL1, V32, KVFormat

DRAWS = 3  # calls a check compares
REPEATS = 10  # of the last of them
MARK = "MLA_JAX_VERIFY "  # in front of the line of a child's output that counts
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "numpy", "ml-dtypes")
SANITIZED = ("dense-h128", "sparse-v32-h64", "sparse-model1-model1-h128")
SUITES = ("dense", "sparse_v32", "model1", "small")


@dataclasses.dataclass(frozen=True)
class Check:
    """A call to verify: what is static about it, and the sizes of its arrays (see `fuzz.cases.draw_spec`)."""

    name: str
    spec: Spec
    shapes: dict[str, Any]

    def case(self, draw: int) -> Case:
        return make(self.spec, self.shapes, np.random.default_rng([draw, *self.name.encode()]))


def _dense(name: str, *, b=3, s_q=1, h=128, keys=700, fmt=BF16_576, page_size=64, **spec: Any) -> Check:
    width = max(1, keys // page_size)
    shapes = dict(b=b, s_q=s_q, h=h, ints="int32", max_pages=width, pages=b * width)
    return Check(f"dense-{name}", Spec("dense", fmt, page_size, **spec), shapes)


def _sparse(
    name: str, fmt: KVFormat, extra: KVFormat | None = None, *, b=3, s_q=2, h=64, topk=300, sink=True, page_size=64,
    extra_page_size=2, **spec: Any,
) -> Check:  # fmt: skip
    extra_topk = 130
    shapes = dict(
        b=b, s_q=s_q, h=h, ints="int32", topk=topk, pages=-(-2 * topk // page_size), length_rank=2, sink=sink,
        extra_topk=extra_topk, extra_pages=-(-2 * extra_topk // extra_page_size), extra_length_rank=1,
    )  # fmt: skip
    spec |= dict(extra_fmt=extra, extra_page_size=extra_page_size if extra else 0)
    return Check(f"sparse-{name}", Spec("sparse", fmt, page_size, **spec), shapes)


CHECKS = {
    check.name: check
    for check in (
        _dense("h128"),
        _dense("h16-causal", h=16, s_q=2, is_causal=True),
        _dense("h1", h=1),
        _dense("h65-d512", h=65, fmt=BF16_512),
        _dense("page16", page_size=16),
        _dense("page61-causal", page_size=61, s_q=3, is_causal=True),
        _dense("page128", page_size=128),
        _dense("long", b=1, keys=9000),
        _dense("batch", b=40, h=32, keys=400),
        _dense("invariant", b=5, plan="invariant"),
        _sparse("v32-h64", V32),
        _sparse("v32-h128", V32, h=128),
        _sparse("v32-h1", V32, h=1, s_q=1),
        _sparse("v32-h16-page61", V32, h=16, page_size=61),
        _sparse("v32-long", V32, b=1, s_q=1, topk=2048),
        _sparse("v32-batch", V32, b=70, s_q=1, h=8),
        _sparse("v32-bf16-h96", V32, BF16_576, h=96),
        _sparse("bf16-v32-h48", BF16_576, V32, h=48),
        _sparse("bf16-576-h64", BF16_576),
        _sparse("bf16-512-h128", BF16_512, h=128),
        _sparse("model1-h64", MODEL1),
        _sparse("model1-model1-h128", MODEL1, MODEL1, h=128),
        _sparse("model1-model1-page2-h64", MODEL1, MODEL1, page_size=2, extra_page_size=256),
        _sparse("model1-bf16-h8", MODEL1, BF16_512, h=8, sink=False),
        _sparse("bf16-model1-h128", BF16_512, MODEL1, h=128),
        _sparse("invariant", V32, b=5, plan="invariant"),
    )
}


# -- one check, in the process that runs it ----------------------------------------------------------------------------


def run_check(check: Check, implementation: str, *, draws: int = DRAWS, repeats: int = REPEATS) -> dict[str, Any]:
    """The check's record: `status` is "passed", "wrong", or "refused" (no such kernel here), `text` says more."""
    import jax
    import jax.numpy as jnp

    from mla_jax.fuzz import checks

    compared = 0
    for draw in range(draws):
        outcome = checks.check(check.case(draw), [implementation], reference=False)
        if outcome.refused:
            return dict(status="refused", text=f"{implementation} cannot serve this call here")
        if outcome.problem is not None:
            return dict(status="wrong", text=f"draw {draw}: {outcome.problem}")
        compared += outcome.counts["exact"]
    case = check.case(draws - 1)
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items() if name != "neighbours"}
    first, *others = [jax.device_get(checks.run(case.spec, implementation, arrays)) for _ in range(repeats)]
    for n, other in enumerate(others, 1):
        if any(x.tobytes() != y.tobytes() for x, y in zip(first, other, strict=True)):
            return dict(status="wrong", text=f"repetition {n} of draw {draws - 1} has other bits")
    return dict(status="passed", text=f"{draws} calls, {compared} rows by value; {repeats} repetitions, equal bits")


def environment() -> dict[str, Any]:
    """What the checks run on."""
    import jax

    device = jax.devices()[0]
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return dict(
        device=device.device_kind, platform=device.platform, num_devices=len(jax.devices()),
        capability=getattr(device, "compute_capability", None),
        runtime=getattr(device.client, "platform_version", ""), python=platform.python_version(), packages=packages,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """`environment`, or a check's name and an implementation. Prints one marked line of JSON."""
    name, *rest = arguments
    record = environment() if name == "environment" else run_check(CHECKS[name], rest[0])
    print(MARK + json.dumps(record), flush=True)
    return 0


# -- many, each in a process -------------------------------------------------------------------------------------------


def run_isolated(command: Sequence[str], timeout_s: float, **environ: str) -> dict[str, Any]:
    """Runs a command to its end or its time limit: its record, or `status` "hung", "crashed" or "failed"."""
    # A GPU client takes most of the memory unless told otherwise, and a sanitizer needs some.
    environ = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environ
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environ,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started: of this process group alone
        output, _ = process.communicate()
        record = dict(status="hung", text=f"still running after {timeout_s:.0f} s: {_end(output)}")
    else:
        marked = [line for line in output.splitlines() if line.startswith(MARK)]
        if process.returncode == 0 and marked:
            record = json.loads(marked[-1][len(MARK) :])
        elif process.returncode == 0:
            record = dict(status="passed", text=_end(output))
        else:
            how = "crashed" if process.returncode < 0 else "failed"
            record = dict(status=how, text=f"exit status {process.returncode}: {_end(output)}")
    return record | {"seconds": round(time.monotonic() - start, 1)}


def _end(output: str) -> str:
    return output.strip()[-1500:]


def _child(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mla_jax.bench.verify", *arguments]


def verify(
    implementation: str | None,
    names: Sequence[str],
    *,
    folder: Path,
    timeout_s: float,
    sanitize: bool = True,
    benchmark_suites: Sequence[str] = SUITES,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Runs everything and writes `verify.json` and `verify.md` to `folder`, again after each record.

    Args:
      implementation: None: "mosaic" on a GPU, else "xla".
      names: of `CHECKS`.
      timeout_s: for each check; a sanitizer has ten times as long, the benchmark of a suite a minute a workload.
      sanitize: run `SANITIZED` under compute-sanitizer, if that is installed and this is a GPU.
      benchmark_suites: of `mla-jax bench`; nothing is measured without a GPU.
      on_record: called with each record.

    Returns:
      The report: "environment", "implementation" and "records".
    """
    found = run_isolated(_child("environment"), timeout_s)
    on_gpu = found.get("platform") in ("gpu", "cuda")
    implementation = implementation or ("mosaic" if on_gpu else "xla")
    report: dict[str, Any] = dict(environment=found, implementation=implementation, records=[])
    folder.mkdir(parents=True, exist_ok=True)

    def add(kind: str, name: str, record: dict[str, Any]) -> None:
        report["records"].append(dict(kind=kind, name=name) | record)
        (folder / "verify.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "verify.md").write_text(markdown(report))
        on_record(report["records"][-1])

    if "device" not in found:
        add("environment", "devices", found)
        return report
    for name in names:
        add("check", name, run_isolated(_child(name, implementation), timeout_s))
    tool = shutil.which("compute-sanitizer")
    if sanitize and on_gpu and tool is None:
        add("sanitizer", "memcheck", dict(status="skipped", text="compute-sanitizer is not installed", seconds=0.0))
    elif sanitize and on_gpu and tool is not None:
        for name in (n for n in SANITIZED if n in names):
            command = [tool, "--tool", "memcheck", "--error-exitcode", "86", *_child(name, implementation)]
            add("sanitizer", name, run_isolated(command, 10 * timeout_s))
    for suite in benchmark_suites if on_gpu else ():
        add("benchmark", suite, _benchmark(suite, implementation, folder))
    return report


def _benchmark(suite: str, implementation: str, folder: Path) -> dict[str, Any]:
    from mla_jax.bench import workloads

    results = folder / f"{suite}.jsonl"
    command = [sys.executable, "-m", "mla_jax", "bench", "--suite", suite, "--implementation", implementation,
               "--out", str(results)]  # fmt: skip
    record = run_isolated(command, 60 * len(workloads.SUITES[suite]))
    lines = results.read_text().splitlines() if results.exists() else []
    return record | {"results": [json.loads(line) for line in lines]}


# -- the report --------------------------------------------------------------------------------------------------------


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of what did not work. What no kernel is there for, or no tool, is none."""
    return [record for record in report["records"] if record.get("status") not in ("passed", "refused", "skipped")]


def markdown(report: dict[str, Any]) -> str:
    """The report to read."""
    facts = report["environment"]
    lines = ["# mla-jax verify", "", f"Implementation: {report['implementation']}.", ""]
    lines += [f"* {key}: {value}" for key, value in facts.items() if key not in ("packages", "seconds", "runtime")]
    lines += [f"* {name}: {version}" for name, version in facts.get("packages", {}).items()]
    lines += ["", "| what | | status | s | |", "|---|---|---|---|---|"]
    for record in report["records"]:
        text = " ".join(record.get("text", "").replace("|", "/").split())[-300:]
        lines.append(f"| {record['kind']} | {record['name']} | {record.get('status')} | {record['seconds']} | {text} |")
    for record in report["records"]:
        if record.get("results"):
            lines += ["", f"## {record['name']}", "", *_times(record["results"])]
    return "\n".join(lines) + "\n"


def _times(lines: list[dict[str, Any]]) -> list[str]:
    from mla_jax.bench import report

    run, results = report.loads("".join(json.dumps(line) + "\n" for line in lines))
    table = [report.COLUMNS, ["---"] * len(report.COLUMNS), *report.rows(run, results)]
    ceilings = f"DRAM reads {run.dram_gb_s:.0f} GB/s, bf16 matmul {run.matmul_tflop_s:.0f} TFLOP/s."
    return [ceilings, "", *(f"| {' | '.join(row)} |" for row in table)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
