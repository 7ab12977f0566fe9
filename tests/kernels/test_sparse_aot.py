"""The SM90 sparse kernel compiled to machine code without a GPU: registers, spills, shared memory."""

import jax
import jax.numpy as jnp
import pytest

import mla_jax
from mla_jax.bench.sparse_model import INSTRUCTIONS
from pallas_kernels import mgpu, schedule, sparse_decode
from pallas_kernels.sparse_decode import config, sm90
from tests.kernels import aot

B, S_Q = 4, 2
SERIALISED = ("C7510", "C7511", "C7512")  # ptxas: wgmma waits for each other; it says so, and that is all
REGISTERS_IGNORED = ("C7507", "C7508")  # ptxas: setmaxnreg does nothing

WARM = ((mla_jax.V32, None, 128), (mla_jax.MODEL1, mla_jax.MODEL1, 64))
# The loop over blocks that has an instruction, by what the model of performance calls it.
LOOPS = {"values": "LDSM", "softmax": "MUFU", "dequantise": "STS.128", "copy": "UBLKCP"}
CASES = (
    *WARM,
    (mla_jax.V32, mla_jax.BF16_576, 16),
    (mla_jax.BF16_576, mla_jax.V32, 96),
    (mla_jax.MODEL1, mla_jax.BF16_512, 1),
    (mla_jax.BF16_512, None, 64),
)


def compiled(fmt, extra_fmt, num_heads):
    page_size, extra_page_size, topk, extra_topk = 64, 2, 300, 130
    shape = jax.ShapeDtypeStruct

    def cache(scope_fmt, size):
        return shape((64, *scope_fmt.page_shape(size)), scope_fmt.storage_dtype)

    def decode(q, data, indices, length, scale, sink, *extra):
        plan = schedule.plan_sparse_decode(
            topk, batch=B, s_q=S_Q, num_heads=num_heads, topk_length=length, extra_topk=extra_topk if extra else 0
        )
        more = {}
        if extra:
            more = dict(
                extra_data=extra[0], extra_fmt=extra_fmt, extra_page_size=extra_page_size, extra_indices=extra[1]
            )
        return sparse_decode.sparse_decode(
            q, data, fmt, page_size, indices, plan, scale, topk_length=length, attn_sink=sink,
            capability=(9, 0), **more,
        )

    args = [
        shape((B, S_Q, num_heads, fmt.d_qk), jnp.bfloat16),
        cache(fmt, page_size),
        shape((B, S_Q, topk), jnp.int32),
        shape((B, S_Q), jnp.int32),
        shape((), jnp.float32),
        shape((num_heads,), jnp.float32),
    ]
    if extra_fmt is not None:
        args += [cache(extra_fmt, extra_page_size), shape((B, S_Q, extra_topk), jnp.int32)]
    (kernel,) = (k for k in aot.compile_sm90(decode, *args) if "sparse" in k.name)
    return kernel


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    "fmt, extra_fmt, num_heads", [c if c in WARM else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_compiles_well(fmt, extra_fmt, num_heads):
    kernel = compiled(fmt, extra_fmt, num_heads)
    assert not [code for code in SERIALISED + REGISTERS_IGNORED if code in kernel.log], kernel.log
    assert kernel.smem_bytes <= mgpu.MAX_SMEM_BYTES
    assert kernel.count("USETMAXREG") == 4
    quantized = any(f is not None and f.is_quantized for f in (fmt, extra_fmt))
    assert (kernel.count("UBLKCP") > 0) == quantized
    loops = kernel.hot_loops()
    # The loops over blocks: the gathering one once a scope.
    assert len(loops) >= (3 if extra_fmt is None else 4)
    assert sum(any("HGMMA" in line for line in loop) for loop in loops) == 2
    for loop in loops:
        # The copy warpgroup has 24 registers and time to spare: a few accesses of its loop may go to memory.
        copies = any("UBLKCP" in line for line in loop)
        spilled = [line for line in loop if "LDL" in line or "STL" in line]
        assert len(spilled) <= (8 if copies else 0), spilled
    if extra_fmt is None and fmt is mla_jax.V32:
        counted = INSTRUCTIONS["sm90", "V32"]
        for name, op in LOOPS.items():
            sizes = [sum(not line.endswith(":") for line in loop) for loop in loops if any(op in line for line in loop)]
            assert min(sizes) == pytest.approx(getattr(counted, name), rel=0.2), (name, sizes)


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_shared_memory_fits(fmt):
    assert mgpu.smem_bytes(sm90.scratch_types(fmt)) <= mgpu.MAX_SMEM_BYTES


def test_registers_are_not_oversubscribed():
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
