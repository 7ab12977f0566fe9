"""Every kernel configuration compiles without a GPU, and its machine code keeps what the design promises.

One architecture a process, so compilation runs in a child process. `-m aot` takes all configurations (minutes).
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

from mla_jax.bench import model
from pallas_kernels import aot, dense_decode, mgpu, sparse_decode
from pallas_kernels.dense_decode import DenseConfig, sm90
from pallas_kernels.dense_decode import sm100 as dense_sm100
from tests import compiling


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("arch", aot.TARGETS)
def test_every_configuration_compiles(arch):
    assert compiling.reports(arch).keys() == aot.configurations(arch).keys()


def loop_instructions(report: aot.Report) -> int:
    """Of the first three loops: those over blocks."""
    return sum(loop.instructions for loop in report.loops[:3])


@pytest.mark.aot
def test_instructions_are_the_intended_ones():
    (dense, combine) = compiling.reports("sm_90a", "dense")["dense"]
    assert dense.kernel == "mla_dense_decode" and combine.kernel == "mla_combine"
    # Per side: the first scores (36), a pair in the loop (44), the last pair (8).
    assert dense.counts["HGMMA"] == 2 * (36 + 44 + 8)
    # The loops take two blocks a round.
    assert loop_instructions(dense) / 2 == pytest.approx(model.INSTRUCTIONS["sm90"], rel=0.1)
    assert dense.loops[2].counts["UTMALDG"] == 6, "TMA loads of a round: left, right, rope of two blocks"
    assert dense.counts["UTMALDG"] == 2 + 2 * 6, "two of Q, and the first round's, which ptxas takes out of the loop"
    assert dense.spill_store_bytes == dense.spill_load_bytes == 0


@pytest.mark.aot
def test_sm100_instructions_are_the_intended_ones():
    found = compiling.reports("sm_103a", "dense", "dense-h3").values()
    (wide, narrow) = (report for kernels in found for report in kernels if report.kernel == "mla_dense_decode")
    for report in (wide, narrow):
        assert "HGMMA" not in report.counts and report.counts["LDTM"] > 0
        # 128 rows: an address of tensor memory with jax 0.12, none with 0.11.2.
        assert report.spill_store_bytes <= (4 if report is wide else 0)
        for loop in report.loops[:3]:  # over blocks
            assert loop.counts.get("LDL", 0) + loop.counts.get("STL", 0) <= (1 if report is wide else 0)
    # 128 rows: the first scores (36 products of 16 columns), the next ones, and the values' 4.
    assert wide.counts["UTCHMMA"] == 36 + 36 + 4 and wide.tmem_columns == 512
    # 64 rows: every product is two, one for each half of the lanes; the values are two groups.
    assert narrow.counts["UTCHMMA"] == 2 * (36 + 36 + 2 * 4) and narrow.tmem_columns == 288
    # The model of performance counts instructions a block.
    assert loop_instructions(wide) == pytest.approx(model.INSTRUCTIONS["sm100, 128 rows"], rel=0.2)
    assert loop_instructions(narrow) == pytest.approx(model.INSTRUCTIONS["sm100, 64 rows"], rel=0.2)
    assert wide.counts["UTMALDG"] == 1 + 3 and narrow.counts["UTMALDG"] == 2 + 3, "TMA loads: Q, and a block's columns"


def test_sm100_registers_are_not_oversubscribed():
    for registers in dense_sm100.REGISTERS.values():
        assert sum(registers) <= mgpu.MAX_REGISTERS and all(24 <= r <= 240 and r % 8 == 0 for r in registers)


SASS = """
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'toy_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
.text.toy_mosaic_gpu_kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
{body}
.L_x_2:
        /*0200*/              @!P0 BRA `(.L_x_1) ;
//--------------------- SYMBOLS
"""


def toy(body: list[str]) -> aot.Report:
    text = "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(body, start=2))
    (report,) = aot._parse("Resources(smem_scratch_bytes=1024, x)\n" + SASS.replace("{body}", text), "sm_90a")
    return report


def test_report_reads_loops_and_problems():
    body = ["STL [R1], R2"] * 10 + ["@P1 LDL R2, [R1]"] * 20
    report = toy(body)
    assert report.kernel == "toy" and report.registers == 168 and report.spill_load_bytes == 16
    assert report.counts["HGMMA"] == 1 and report.counts["LDL"] == 20
    (loop,) = report.loops
    assert loop.multiplies and loop.counts["STL"] == 10
    problems = " ".join(report.problems())
    assert "serialises wgmma" in problems and "10 STL, 20 LDL" in problems and "drops the register counts" in problems


def test_what_a_branch_skips_does_not_count():
    report = toy(["@P1 BRA `(.L_x_2)"] + ["LDL R2, [R1]"] * 20)
    assert "LDL" not in report.loops[0].counts and report.counts["LDL"] == 20
    # Unless it multiplies or synchronises: then it is the loop's own work.
    report = toy(["@P1 BRA `(.L_x_2)"] + ["LDL R2, [R1]"] * 20 + ["BAR.ARV 0x4, 0x100"])
    assert report.loops[0].counts["LDL"] == 20


def test_too_much_shared_memory_is_a_problem():
    report = dataclasses.replace(toy(["NOP"] * 20), smem_bytes=mgpu.MAX_SMEM_BYTES + 1)
    assert any("shared memory" in problem for problem in report.problems())


def test_unknown_architecture():
    with pytest.raises(ValueError, match="sm_90a"):
        aot.configurations("sm_75")


@pytest.mark.parametrize("d_qk", [512, 576])
def test_shared_memory_plan_fits(d_qk):
    barriers = 8 * (5 + len(sm90.handoffs(mgpu.WARP)))
    assert mgpu.smem_bytes(sm90.smem_plan(d_qk)) + barriers <= mgpu.MAX_SMEM_BYTES


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(consumer_registers=248), "hang the GPU"),
        (dict(consumer_registers=100), "multiple of 8"),
        (dict(combine_rows=3), "combine_rows"),
    ],
)
def test_config_refuses_what_would_hang(options, text):
    with pytest.raises(ValueError, match=text):
        DenseConfig(**options)


def test_every_architecture_has_its_kernels():
    for arch in aot.TARGETS:
        names = set(aot.configurations(arch))
        for op, package in (("dense", dense_decode), ("sparse", sparse_decode)):
            has_some = any(name.startswith(op) for name in names)
            assert has_some == (aot.capability(arch)[0] in package.MODULES)


def test_another_architecture_is_noticed():
    with pytest.raises(RuntimeError, match="was compiled for sm_90a, not for sm_100a"):
        list(aot._parse("Resources(smem_scratch_bytes=1024, x)\n" + SASS, "sm_100a"))


def test_tensor_memory_is_reported():
    text = "Resources(smem_scratch_bytes=1024, tmem_scratch_cols=520, x)\n" + SASS.replace("{body}", "")
    (report,) = aot._parse(text, "sm_90a")
    assert report.tmem_columns == 520
    assert any("520 columns of tensor memory" in problem for problem in report.problems())


@pytest.mark.parametrize(
    ("capability", "text"), [((8, 0), "lacks wgmma"), ((12, 0), "tcgen05"), ((6, 1), "this is 6.1")]
)
def test_other_gpus_are_refused_with_the_reason(capability, text):
    with pytest.raises(NotImplementedError, match=text):
        dense_decode.config_type(capability)


def test_loading_an_exported_step_prepares_the_runtime():
    """Where JAX has a CUDA plugin, deserialising a function of a cache makes Mosaic's runtime library known."""
    code = (
        "import jax, os, sys, mla_jax; from jax import export\n"
        "assert 'jax.experimental.mosaic.gpu' not in sys.modules\n"
        "cache = mla_jax.PagedKVCache.zeros(mla_jax.V32, 2, 4)\n"
        "exported = export.deserialize(export.export(jax.jit(lambda c: c.data))(cache).serialize())\n"
        "exported.call(cache)\n"
        "print('MOSAIC_GPU_RUNTIME_LIB_PATH' in os.environ)\n"
    )
    has_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(compiling.ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == str(has_plugin), child.stderr[-2000:]
