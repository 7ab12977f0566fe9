"""The SM90 sparse kernel compiled to machine code without a GPU: registers, spills, shared memory."""

import pytest

import mla_jax
from mla_jax.bench.sparse_model import INSTRUCTIONS
from pallas_kernels import mgpu, sparse_decode
from pallas_kernels.aot import configurations
from pallas_kernels.sparse_decode import config, sm90, sm90_few
from tests.kernels import aot

SERIALISED = ("C7510", "C7511", "C7512")  # ptxas: wgmma waits for each other; it says so, and that is all
REGISTERS_IGNORED = ("C7507", "C7508")  # ptxas: setmaxnreg does nothing

# With 16 heads or fewer, the kernel for few.
WARM = {
    "sparse-v32-h128": (mla_jax.V32, None),
    "sparse-model1-model1-h64": (mla_jax.MODEL1, mla_jax.MODEL1),
    "sparse-v32-h8": (mla_jax.V32, None),
}
CASES = WARM | {
    "sparse-v32-bf16-h64": (mla_jax.V32, mla_jax.BF16_576),
    "sparse-bf16-v32-h96": (mla_jax.BF16_576, mla_jax.V32),
    "sparse-model1-bf16-h64": (mla_jax.MODEL1, mla_jax.BF16_512),
    "sparse-bf16-h64": (mla_jax.BF16_512, None),
    "sparse-model1-h16": (mla_jax.MODEL1, None),
    "sparse-v32-bf16-h16": (mla_jax.V32, mla_jax.BF16_576),
    "sparse-bf16-v32-h3": (mla_jax.BF16_576, mla_jax.V32),
    "sparse-model1-bf16-h1": (mla_jax.MODEL1, mla_jax.BF16_512),
}
# The loop over blocks that has an instruction, by what the model of performance calls it.
LOOPS = {"values": "LDSM", "softmax": "MUFU", "dequantise": "STS.128", "copy": "UBLKCP"}


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("name", [n if n in WARM else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_compiles_well(name):
    fmt, extra_fmt = CASES[name]
    function, arguments = configurations("sm_90a")[name]
    (kernel,) = (k for k in aot.compile_sm90(function, *arguments) if "sparse" in k.name)
    assert not [code for code in SERIALISED + REGISTERS_IGNORED if code in kernel.log], kernel.log
    assert kernel.smem_bytes <= mgpu.MAX_SMEM_BYTES
    assert kernel.count("USETMAXREG") == 4
    quantized = any(f is not None and f.is_quantized for f in (fmt, extra_fmt))
    assert (kernel.count("UBLKCP") > 0) == quantized
    few = int(name.rsplit("-h", 1)[1]) <= config.FEW_HEADS
    loops = kernel.hot_loops()
    # The loops over blocks: the gathering ones once a scope.
    assert len(loops) >= (3 if extra_fmt is None else 4) + few
    assert sum(any("HGMMA" in line for line in loop) for loop in loops) == (1 if few else 2)
    for loop in loops:
        # The copy warpgroup's, with what it does once a piece, has one stack access with jax 0.12 (MODEL1, 64 heads).
        copies = any("UBLKCP" in line for line in loop)
        assert sum("LDL" in line or "STL" in line for line in loop) <= (1 if copies else 0), loop
    if extra_fmt is None and fmt is mla_jax.V32 and not few:
        counted = INSTRUCTIONS["sm90", "V32"]
        for name, op in LOOPS.items():
            sizes = [sum(not line.endswith(":") for line in loop) for loop in loops if any(op in line for line in loop)]
            assert min(sizes) == pytest.approx(getattr(counted, name), rel=0.2), (name, sizes)


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_shared_memory_fits(fmt):
    assert mgpu.smem_bytes(sm90.scratch_types(fmt, 1)) <= mgpu.MAX_SMEM_BYTES


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_shared_memory_of_few_heads_fits(fmt, columns):
    """And a third stage where docs/sparse-decode.md says so."""
    scratch = sm90_few.scratch_types(fmt, columns, sm90_few.FEW_HARDWARE)
    assert mgpu.smem_bytes(scratch) <= mgpu.MAX_SMEM_BYTES
    assert scratch["kv"].shape[0] == (3 if fmt.d_qk == 512 else 2)


def test_registers_are_not_oversubscribed():
    assert sum(sm90_few.REGISTERS) <= config.MAX_REGISTERS
    chosen = config.SparseConfig()
    total = chosen.softmax_registers + chosen.value_registers + chosen.gather_registers + chosen.copy_registers
    assert total <= config.MAX_REGISTERS
    for wrong in (dict(softmax_registers=216), dict(value_registers=100), dict(gather_registers=248)):
        with pytest.raises(ValueError, match="registers of the four warpgroups"):
            config.SparseConfig(**wrong)


def test_check_names_the_reason():
    sparse_decode.check(mla_jax.V32, None, (9, 0))
    sparse_decode.check(mla_jax.MODEL1, mla_jax.BF16_512, (9, 0))
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0.*this is 12\.0: 12\.x lacks .* tcgen05"):
        sparse_decode.check(mla_jax.V32, None, (12, 0))
    with pytest.raises(NotImplementedError, match="F32_576: the kernel multiplies in bfloat16"):
        sparse_decode.check(mla_jax.V32, mla_jax.F32_576, (9, 0))
