"""How tests compile: quickly, or for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pallas_kernels.aot import Report

# Compiler options for what runs once or a few times: compiling is what takes the time in tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

ROOT = pathlib.Path(__file__).parents[1]
CHILD = """
import dataclasses, json, sys
from pallas_kernels import aot
arch, *names = sys.argv[1:]
cases = aot.configurations(arch)
found = {name: aot.compile_report(*cases[name], arch) for name in names or cases}
print("REPORTS", json.dumps({name: [dataclasses.asdict(r) for r in reports] for name, reports in found.items()}))
"""


def missing() -> str | None:
    """What the machine lacks to compile for CUDA; None if nothing."""
    for module in ("jax_plugins.xla_cuda13", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed (dependency group aot)"
    return None


def h100() -> Any:
    """A device to compile for in this process. It must not compile for another architecture."""
    from pallas_kernels import aot

    if (reason := missing()) is not None:
        pytest.skip(reason)
    return aot._device("sm_90a")


def reports(arch: str, *names: str) -> dict[str, list[Report]]:
    """Compiles configurations that ship for `arch`, all if none is named, in a process of its own.

    Every kernel must be fit to ship.
    """
    from pallas_kernels.aot import Loop, Report

    if (reason := missing()) is not None:
        pytest.skip(reason)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, arch, *names]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    found = {}
    for name, kernels in json.loads(child.stdout.rpartition("REPORTS")[2]).items():
        for fields in kernels:
            fields |= {"loops": tuple(Loop(**x) for x in fields["loops"]), "warnings": tuple(fields["warnings"])}
        found[name] = [Report(**fields) for fields in kernels]
        for report in found[name]:
            assert report.arch == arch and not report.problems(), (name, report.kernel, report.problems())
    return found
