"""Compiles a jitted function for an SM90 GPU without having one, and reads what ptxas and the disassembler say.

Needs the CUDA plugin (no driver) and ptxas, nvlink and nvdisasm: the `aot` dependency group. One process can compile
for one GPU architecture only.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from unittest import mock

import jax
import jax.experimental.mosaic.gpu  # names the toolkit in os.environ, which `compile_sm90` restores
from jax.experimental import topologies

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 ecc_enabled: true name: "h100"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "h100"
"""


def missing() -> str | None:
    """What the machine lacks to compile; None if nothing."""
    for module in ("jax_plugins.xla_cuda13", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed (dependency group aot)"
    return None


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


@functools.cache
def _sharding() -> jax.sharding.Sharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("_",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_sm90(function, *args: jax.ShapeDtypeStruct) -> list[Kernel]:
    """Compiles function(*args) and returns its Mosaic kernels."""
    sharding = _sharding()
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    device = next(iter(sharding.device_set))
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
