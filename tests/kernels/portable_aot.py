"""Compiles the portable kernels without a GPU: `python -m tests.kernels.portable_aot sm_80 [names of cases]`.

One JSON line a case: what ptxas says of registers and spills, and the shared memory that Triton asks for. One
architecture a process. XLA is told to run ptxas as a program, whose output it then logs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile

# Before jax loads XLA.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["TF_CPP_VMODULE"] = "subprocess_compilation=3,xtile_compiler=2"
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_enable_libnvptxcompiler=false --xla_gpu_enable_libnvjitlink=false "
    "--xla_gpu_ptx_compiler_extra_flags=-v --xla_gpu_force_compilation_parallelism=1"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import mla_jax
from mla_jax import BF16_512, BF16_576, F32_576, MODEL1, V32, dispatch
from pallas_kernels import aot

KIB = 1024
# Shared memory of a CTA, bytes: CUDA's programming guide, table of technical specifications.
TARGETS = {
    "sm_80": (aot.Target("NVIDIA A100-SXM4-80GB", 8, 0, 108, 40 * 2**20, 80 * 2**30, 2_039_000_000_000, 1.41), 163),
    "sm_89": (aot.Target("NVIDIA L40S", 8, 9, 142, 96 * 2**20, 48 * 2**30, 864_000_000_000, 2.52), 99),
    "sm_90a": (aot.TARGETS["sm_90a"], 227),
    "sm_100a": (aot.TARGETS["sm_100a"], 227),
    "sm_120": (aot.Target("NVIDIA RTX PRO 6000", 12, 0, 188, 128 * 2**20, 96 * 2**30, 1_792_000_000_000, 2.6), 99),
}
# (main format, extra format or "dense", heads)
CASES = {
    f"{op}-{fmt.name}{'+' + extra.name if extra else ''}-h{h}": (op, fmt, extra, h)
    for h in (16, 128)
    for op, fmt, extra in [
        ("dense", BF16_576, None), ("dense", V32, None), ("dense", MODEL1, None), ("sparse", V32, None),
        ("sparse", MODEL1, MODEL1), ("sparse", V32, BF16_576), ("sparse", BF16_512, MODEL1),
    ]
} | {"dense-F32_576-h16": ("dense", F32_576, None, 16)}  # fmt: skip


def device(arch: str):
    target, smem_kib = TARGETS[arch]
    text = aot._target_config(target)
    text = re.sub(r"(per_block_optin:) \d+", rf"\1 {smem_kib * KIB}", text)
    if not arch.endswith("a"):
        text = text.replace(" feature_extension: ACCELERATED_FEATURES", "")
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1").devices[0]


def call(op, fmt, extra, h):
    """(function, abstract arguments)"""
    shape, pages, size, b = jax.ShapeDtypeStruct, 4096, 64, 8

    def cache(f):
        return mla_jax.PagedKVCache(shape((pages, *f.page_shape(size)), f.storage_dtype), f, size)

    q = shape((b, 1, h, fmt.d_qk), fmt.compute_dtype)
    options = dict(implementation="triton", return_lse=True)
    lengths = shape((b,), jnp.int32)
    if op == "dense":
        table = shape((b, 512), jnp.int32)
        return (
            lambda q, c, t, n: mla_jax.mla_decode(q, c, t, n, sm_scale=0.1, is_causal=True, **options),
            (q, cache(fmt), table, lengths),
        )
    more = {}
    if extra is not None:
        more = dict(extra_cache=cache(extra), extra_indices=shape((b, 512), jnp.int32), extra_topk_length=lengths)
    return (
        lambda q, c, i, n, s, more: mla_jax.sparse_mla_decode(
            q, c, i, sm_scale=0.1, topk_length=n, attn_sink=s, **more, **options
        ),
        (q, cache(fmt), shape((b, 2048), jnp.int32), lengths, shape((h,), jnp.float32), more),
    )


def compile_case(name: str, gpu) -> dict:
    function, args = call(*CASES[name])
    sharding = jax.sharding.SingleDeviceSharding(gpu)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    saved = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)  # XLA writes there, below Python
        try:
            with jax.default_device(gpu):
                assert dispatch.cuda_target().capability == tuple(map(int, gpu.compute_capability.split(".")))
                jax.jit(function).trace(*args).lower().compile()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        log.seek(0)
        return read(log.read().decode(errors="replace"))


def read(text: str) -> dict:
    """The decode kernel's figures; spills of both kernels."""
    smem = [int(n) for n in re.findall(r"Shared memory usage: (\d+) B", text)]
    found = re.findall(
        r"entry function '(mla_portable_\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers", text, re.S,
    )  # fmt: skip
    kernels = {name: (target, int(stores), int(registers)) for name, target, stores, _, registers in found}
    (decode,) = (name for name in kernels if "merge" not in name)
    target, spilled, registers = kernels[decode]
    merge = kernels["mla_portable_merge"]
    return dict(
        target=target, registers=registers, spill_bytes=spilled, smem_bytes=max(smem), merge_registers=merge[2],
        merge_spill_bytes=merge[1],
    )  # fmt: skip


def main(arch: str, *names: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    gpu = device(arch)
    for name in names or CASES:
        print(json.dumps(dict(arch=arch, case=name) | compile_case(name, gpu)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
