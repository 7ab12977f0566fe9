"""Ahead-of-time compilation: every kernel to machine code without a GPU, and what the machine code says.

`compile_report` lowers a function for an architecture, lets XLA and ptxas compile it, and reads registers, spills,
shared memory, tensor memory, instruction counts and loops of each Mosaic kernel in it from what the compilers print.
`configurations` lists every kernel configuration that ships; `mla-jax aot` and CI compile them all.

Needs the CUDA plugin of jax and ptxas, not a driver (`pip install mla-jax[cuda13]` and the `aot` dependency group).
One architecture a process: Mosaic GPU registers its ptxas pass for the first one it sees.

Mosaic GPU lowers for compute capability 9.0 wherever it knows of no device, and such a kernel even compiles for another
architecture: `compile_report` therefore asserts the capability that Mosaic saw, and the one that ptxas was given.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mosaic_utils

from pallas_kernels import mgpu


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for: what XLA wants to know of it. Facts from the vendor's data sheets."""

    device: str
    major: int
    minor: int
    num_sms: int
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: int
    clock_ghz: float


TARGETS = {
    "sm_90a": Target("NVIDIA H100 80GB HBM3", 9, 0, 132, 50 * 2**20, 80 * 2**30, 3_350_000_000_000, 1.98),
    "sm_100a": Target("NVIDIA B200", 10, 0, 148, 126 * 2**20, 180 * 2**30, 7_700_000_000_000, 1.965),
    "sm_103a": Target("NVIDIA B300", 10, 3, 148, 126 * 2**20, 270 * 2**30, 7_700_000_000_000, 1.92),
}
MAX_TMEM_COLUMNS = 512  # of 128 lanes of 4 bytes: the tensor memory of an SM

# ------------------------------------------------------------------------------------------------ what is reported

MULTIPLY = ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "HMMA")  # tensor core instructions
COUNTED = (*MULTIPLY, "UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL",
           "STL", "LDTM", "STTM", "MUFU", "FMUL", "FFMA", "FADD", "F2FP", "BAR", "SYNCS", "VOTE", "R2UR")  # fmt: skip
# Stack accesses a round that a loop with products may make. Most configurations have none; with pages of 16 tokens the
# dense kernel has up to 14, and took 250.7 us where pages of 64 tokens took 248.0 (b=128, h=128, 4096 tokens, H200).
# Pages that are copied row by row (61 tokens, say), where loads take longer than all else, have up to 28.
MAX_SPILLS_IN_LOOP = 28


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop: its size and instruction counts, without the code that a branch skips.

    What lies behind a forward branch and neither multiplies nor synchronises is for rare events, such as a mask.
    """

    instructions: int
    counts: dict[str, int]

    @property
    def multiplies(self) -> bool:
        return any(self.counts.get(op) for op in MULTIPLY)


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled kernel.

    Attributes:
      kernel: the kernel's name.
      arch: a key of `TARGETS`; what ptxas compiled for.
      registers: a thread, at launch.
      spill_store_bytes, spill_load_bytes: a thread, over the whole kernel.
      smem_bytes: a CTA, without barriers.
      tmem_columns: of tensor memory a CTA; 0 on SM90, which has none.
      instructions: in the whole kernel.
      counts: of the instructions in `COUNTED`, and of TMA loads that gather rows ("GATHER4").
      loops: innermost loops of at least 16 instructions, in program order.
      warnings: what ptxas said beyond information.
    """

    kernel: str
    arch: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    smem_bytes: int
    tmem_columns: int
    instructions: int
    counts: dict[str, int]
    loops: tuple[Loop, ...]
    warnings: tuple[str, ...]

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty if it may."""
        found = [
            f"ptxas serialises wgmma: {text}" for text in self.warnings if re.search(r"C751[0-2]|serializ", text)
        ]
        found += [f"ptxas drops the register counts: {text}" for text in self.warnings if "setmaxnreg" in text]
        if self.smem_bytes > mgpu.MAX_SMEM_BYTES:
            found.append(f"{self.smem_bytes} bytes of shared memory, more than {mgpu.MAX_SMEM_BYTES}")
        if self.tmem_columns > MAX_TMEM_COLUMNS:
            found.append(f"{self.tmem_columns} columns of tensor memory, more than {MAX_TMEM_COLUMNS}")
        if "decode" in self.kernel and not any(self.counts.get(op) for op in MULTIPLY):
            found.append("no tensor core instruction")
        for loop in self.loops:
            stores, loads = loop.counts.get("STL", 0), loop.counts.get("LDL", 0)
            if loop.multiplies and stores + loads > MAX_SPILLS_IN_LOOP:
                found.append(f"a loop of {loop.instructions} instructions spills: {stores} STL, {loads} LDL")
        return found


# ------------------------------------------------------------------------------------------------ compiling


def compile_report(fn: Callable, args: Sequence[Any], arch: str) -> tuple[Report, ...]:
    """Compiles `fn(*args)` for `arch` and reports on each Mosaic kernel in it, in program order.

    Args:
      fn: any function of arrays.
      args: a pytree of arrays or `jax.ShapeDtypeStruct`s for each argument.
      arch: a key of `TARGETS`.

    Raises:
      ValueError: unknown arch. RuntimeError: another architecture was compiled for in this process, or the compiler is
        missing; whatever lowering or ptxas raises.
    """
    device = _device(arch)
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(args))
    with jax.default_device(device), _compiler_output() as read:
        seen, wanted = tuple(mosaic_utils._infer_arch()), (TARGETS[arch].major, TARGETS[arch].minor)
        if seen != wanted:  # the kernel would be lowered for another architecture, and nobody would notice
            raise RuntimeError(f"Mosaic GPU lowers for compute capability {seen}, {arch} is {wanted}")
        jax.jit(fn).trace(*shapes).lower().compile()
        text = read()
    return tuple(_parse(text, arch))


@functools.cache
def _device(arch: str) -> Any:
    from jax.experimental import topologies

    if arch not in TARGETS:
        raise ValueError(f"arch is {arch!r}; accepted: {', '.join(TARGETS)}")
    # Two architectures in a process die in ptxas: "SM version specified by .target is higher than ...".
    if _device.cache_info().currsize:
        raise RuntimeError(f"this process has compiled for another architecture than {arch}: use one process for each")
    # The plugin asks for cuDNN and the driver before it registers itself, unless CUDA is not to run anything here.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(TARGETS[arch]), topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(f"cannot compile for CUDA here: is jax's CUDA plugin installed? {error}") from error
    return topology.devices[0]


def _target_config(target: Target) -> str:
    """XLA's GpuTargetConfigProto as text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {target.num_sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.memory_bytes_per_s}
  l2_cache_size: {target.l2_bytes}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes}
  shared_memory_per_block_optin: {mgpu.MAX_SMEM_BYTES}
  cuda_compute_capability {{ major: {target.major} minor: {target.minor} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  ecc_enabled: true
  name: "{target.device}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{target.device}"
"""


@contextlib.contextmanager
def _compiler_output() -> Iterator[Callable[[], str]]:
    """Catches what Mosaic GPU and ptxas write, in Python and below it; yields a function that returns it so far.

    The flags print what `MOSAIC_GPU_DUMP_TO` would write to files among hundreds of megabytes of other things.
    """
    flags = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS", "MOSAIC_GPU_DUMP_RESOURCES")
    before = {flag: os.environ.get(flag) for flag in flags}
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:

        def read() -> str:
            sys.stdout.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            os.environ.update(dict.fromkeys(flags, "1"))
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            # Python's own streams may point elsewhere (pytest): Mosaic prints the resources through them.
            with open(1, "w", closefd=False) as stdout, contextlib.redirect_stdout(stdout):
                yield read
        finally:
            for fd, copy in enumerate(saved, start=1):
                os.dup2(copy, fd)
                os.close(copy)
            for flag, value in before.items():
                if value is None:
                    del os.environ[flag]
                else:
                    os.environ[flag] = value


# ------------------------------------------------------------------------------------------------ reading


def _parse(text: str, arch: str) -> Iterator[Report]:
    scratch = re.findall(r"Resources\(smem_scratch_bytes=(\d+)(?:, tmem_scratch_cols=(\d+))?", text)
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", text)
    # parts: what came before the first kernel, then name, target and what follows, for each. Warnings come before.
    kernels = list(zip(parts[1::3], parts[2::3], parts[3::3], parts[0::3], strict=False))
    # jax 0.12 does not compile a kernel again that this process has compiled (such as the combine kernel, which comes
    # last): it was reported then.
    if not 0 < len(kernels) <= len(scratch):
        raise RuntimeError(f"{len(scratch)} kernels were lowered, {len(kernels)} compiled: cannot read ptxas' output")
    for (name, target, after, before), (smem_bytes, tmem_columns) in zip(kernels, scratch, strict=False):
        if target != arch:
            raise RuntimeError(f"{name} was compiled for {target}, not for {arch}")
        registers = re.search(r"Used (\d+) registers", after)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", after)
        instructions, labels = _instructions(after, name)
        if registers is None or spills is None or not instructions:
            raise RuntimeError(f"ptxas' output about {name} is not understood")
        notes = before[before.rfind("EIATTR") if "EIATTR" in before else 0 :]
        warnings = {m[1].strip() for m in re.finditer(r"ptxas \w+\s*: (\(C\d+\).*)", notes)}
        yield Report(
            kernel=name.removesuffix("_mosaic_gpu_kernel"),
            arch=arch,
            registers=int(registers[1]),
            spill_store_bytes=int(spills[1]),
            spill_load_bytes=int(spills[2]),
            smem_bytes=int(smem_bytes),
            tmem_columns=int(tmem_columns or 0),
            instructions=len(instructions),
            counts=_count(instructions),
            loops=tuple(_innermost_loops(instructions, labels)),
            warnings=tuple(sorted(warnings)),
        )


def _instructions(text: str, name: str) -> tuple[list[str], dict[str, int]]:
    """A kernel's instructions, and the index that each label stands before."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    body = text.partition(f".text.{name}:")[2]
    for line in body.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
        elif line.startswith("//----"):
            break
    return instructions, labels


def _innermost_loops(instructions: list[str], labels: dict[str, int]) -> Iterator[Loop]:
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
        if target and labels.get(target[1], end + 1) <= end and end - labels[target[1]] >= 16:
            spans.append((labels[target[1]], end))
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            always = [instructions[i] for i in _always_run(instructions, labels, begin, end)]
            yield Loop(len(always), _count(always))


def _always_run(instructions: list[str], labels: dict[str, int], begin: int, end: int) -> Iterator[int]:
    """Indices of a loop's instructions that no branch skips, see `Loop`."""
    i = begin
    while i <= end:
        yield i
        branch = re.match(r"@!?U?P\w+\s+BRA\b.*?(\.L_\w+)", instructions[i])
        target = labels.get(branch[1], 0) if branch else 0
        skipped = instructions[i + 1 : target]
        is_rare = not any(re.search(r"GMMA|UTC\w+MMA|\bBAR\b|SYNCS", text) for text in skipped)
        i = target if i < target <= end and is_rare else i + 1


def _count(instructions: Sequence[str]) -> dict[str, int]:
    names = (re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in instructions)
    found = collections.Counter(name for name in names if name in COUNTED)
    found["GATHER4"] = sum("UTMALDG" in text and "GATHER4" in text for text in instructions)
    return {name: found[name] for name in (*COUNTED, "GATHER4") if found[name]}


# ------------------------------------------------------------------------------------------------ what ships

KERNELS = (
    "pallas_kernels.dense_decode.aot_cases", "pallas_kernels.sparse_decode.aot_cases", "pallas_kernels.plan_aot_cases",
    "pallas_kernels.row_gather_aot_cases",
)  # fmt: skip
"""Modules with a function `configurations(arch) -> {name: (function, arguments)}`: what an op ships for `arch`."""


def configurations(arch: str) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Every kernel configuration that ships for `arch`: name -> (function, arguments), for `compile_report`."""
    if arch not in TARGETS:
        raise ValueError(f"arch is {arch!r}; accepted: {', '.join(TARGETS)}")
    found: dict[str, tuple[Callable, tuple[Any, ...]]] = {}
    for name in KERNELS:
        found |= importlib.import_module(name).configurations(arch)
    return found


def capability(arch: str) -> tuple[int, int]:
    """The compute capability of `arch`, by which an op package picks its kernel."""
    return TARGETS[arch].major, TARGETS[arch].minor


def shape(*extents: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Shorthand for the modules in `KERNELS`."""
    return jax.ShapeDtypeStruct(extents, dtype)
