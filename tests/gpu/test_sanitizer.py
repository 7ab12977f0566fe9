"""compute-sanitizer over the kernels: `python -m tests.gpu.sanitize` in short; and that its planted faults compile."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from tests.gpu import planted, sanitize


@pytest.mark.gpu
def test_sanitizer():
    """It reports a planted read and says nothing about the kernels; the whole list: `python -m tests.gpu.sanitize`."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed here")
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--quick"]
    done = subprocess.run(command, cwd=sanitize.ROOT, capture_output=True, text=True, timeout=1800)
    if "does not support this device" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


INSTRUCTIONS = {  # of the planted fault in the machine code, so that what is tested is what the name says
    "load": "LDG", "store": "STG", "cp.async": "LDGSTS", "bulk": "UBLKCP", "shared": "LDS", "tma": "UTMALDG",
    "race": "STS", "race cp.async": "LDGSTS", "named barriers": "BAR", "mbarrier": "SYNCS",
    "cluster barrier": "SYNCS",
}  # fmt: skip


@pytest.mark.slow  # 15 s
@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax's CUDA plugin: uv run --group aot"
)
def test_planted_faults_compile():
    script = (
        "from pallas_kernels import aot\n"
        "from tests.gpu import planted\n"
        "for kind in planted.KINDS:\n"
        "    (report,) = aot.compile_report(planted.kernel(kind), planted.arguments(1 << 20), 'sm_90a')\n"
        "    print(kind, *report.counts, sep='|')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=sanitize.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    assert found.keys() == set(planted.KINDS) == INSTRUCTIONS.keys()
    for kind, instruction in INSTRUCTIONS.items():
        assert instruction in found[kind], (kind, found[kind])


def test_a_report_is_told_from_silence_and_from_failure(monkeypatch):
    """By exit code, and by text where the fault killed the process first."""
    for code, text, want in (
        (0, "ERROR SUMMARY: 0 errors", "nothing"),
        (7, "", "reported"),
        (1, "Traceback", sanitize.FAILED),
        (139, "========= Invalid __global__ read of size 4 bytes", "reported"),
        (0, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "nothing"),
        (0, "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", "reported"),
        (1, "Device not supported", sanitize.FAILED),
    ):
        done = subprocess.CompletedProcess([], code, text, "")
        monkeypatch.setattr(sanitize.subprocess, "run", lambda *_, done=done, **__: done)
        assert sanitize.run("memcheck", ["true"])[0] == want, text
    assert {kind for _, kind, _ in sanitize.cases()} == set(planted.KINDS)


@pytest.mark.parametrize(
    "reported, status",
    [
        ({("racecheck", "named barriers"), ("racecheck", "dense")}, 0),  # the tool reports what is right, too
        ({("racecheck", "dense")}, 1),
        ({("racecheck", "named barriers"), ("racecheck", "sparse_V32")}, 1),  # other barriers
        ({("racecheck", "cluster barrier"), ("racecheck", "sparse_V32")}, 0),
        ({("racecheck", "named barriers"), ("memcheck", "dense")}, 1),
    ],
)
def test_the_exit_status_says_whether_a_kernel_is_reported_in_earnest(monkeypatch, reported, status):
    def run(tool, command, timeout=600):
        kernels = [name for name, own in sanitize.KERNELS.items() if own == command]
        what = kernels[0] if kernels else command[-2]
        seen = what in (*planted.BODIES, *planted.RACES) or (tool, what) in reported
        return "reported" if seen else "nothing", ""

    monkeypatch.setattr(sanitize, "run", run)
    monkeypatch.setattr(sanitize.shutil, "which", lambda _: "compute-sanitizer")
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    assert sanitize.main() == status
