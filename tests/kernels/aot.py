"""Compiles a jitted function for an SM90 GPU without having one, and reads what ptxas and the disassembler say.

Needs the CUDA plugin (no driver) and ptxas, nvlink and nvdisasm: the `aot` dependency group. One process can compile
for one GPU architecture only.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tempfile
from unittest import mock

import jax
import jax.experimental.mosaic.gpu  # names the toolkit in os.environ, which `compile_sm90` restores

from tests import compiling
from tests.compiling import missing as missing


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What became of one kernel.

    Attributes:
      name: its name.
      log: what ptxas said.
      sass: its instructions and labels, a line each.
      smem_bytes: shared memory of its scratch buffers.
    """

    name: str
    log: str
    sass: tuple[str, ...]
    smem_bytes: int

    def count(self, opcode: str) -> int:
        return sum(opcode in line for line in self.sass)

    def hot_loops(self, at_least: int = 60) -> list[list[str]]:
        """Instructions of each innermost loop of some length that writes no results. (Waits at barriers are short loops
        of their own, whose retries lie behind everything else.)"""
        labels = {m[1]: n for n, line in enumerate(self.sass) if (m := re.match(r"(\.L_x_\d+):", line))}
        spans = []
        for n, line in enumerate(self.sass):
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and n - labels.get(target[1], n) > at_least:
                spans.append((labels[target[1]], n))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        loops = [list(self.sass[begin : end + 1]) for begin, end in inner]
        return [loop for loop in loops if not any("STG" in line for line in loop)]


def compile_sm90(function, *args: jax.ShapeDtypeStruct) -> list[Kernel]:
    """Compiles function(*args) and returns its Mosaic kernels."""
    device = compiling.h100()
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": folder}),
        jax.default_device(device),
    ):
        jax.jit(function).trace(*args).lower().compile()
        return [_read(path) for path in sorted(pathlib.Path(folder).glob("*.ptx"))]


def _read(ptx: pathlib.Path) -> Kernel:
    assert ".target sm_90a" in ptx.read_text()
    sass = ptx.with_suffix(".sass_ctrl")
    lines = (sass if sass.exists() else ptx.with_suffix(".sass")).read_text().splitlines()
    # What was lowered and what was compiled are counted apart: a process that has lowered a kernel without compiling it
    # gives the two other numbers.
    name = ptx.stem.rpartition("_")[0]
    resources = next(ptx.parent.glob(f"{name}_*.resources.txt"))
    smem = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text())
    assert smem is not None
    return Kernel(ptx.stem, ptx.with_suffix(".ptxas").read_text(), tuple(map(str.strip, lines)), int(smem[1]))
