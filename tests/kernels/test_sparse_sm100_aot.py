"""The SM100 sparse kernel compiled to machine code, for B200 and B300: instructions, registers, memory."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

import mla_jax
from mla_jax.bench.sparse_model import INSTRUCTIONS
from pallas_kernels import aot, mgpu
from pallas_kernels.sparse_decode import SparseConfigSm100, gather, sm100, sm100_pair
from pallas_kernels.sparse_decode.config import MAX_REGISTERS, sm100_heuristic
from tests import compiling

FORMATS = {
    "sparse-v32-h128": (mla_jax.V32, None),
    "sparse-v32-h64": (mla_jax.V32, None),
    "sparse-model1-model1-h64": (mla_jax.MODEL1, mla_jax.MODEL1),
    "sparse-model1-model1-h128": (mla_jax.MODEL1, mla_jax.MODEL1),
    "sparse-v32-bf16-h16": (mla_jax.V32, mla_jax.BF16_576),
    "sparse-bf16-v32-h96": (mla_jax.BF16_576, mla_jax.V32),
    "sparse-model1-bf16-h1": (mla_jax.MODEL1, mla_jax.BF16_512),
    "sparse-bf16-h64": (mla_jax.BF16_512, None),
}
# Bytes a thread that ptxas spills, and stack accesses a round of a hot loop: none but these.
SPILLS = {"sparse-bf16-v32-h96": (4, 1)}


def gathers(fmt) -> int:
    """TMA instructions that one warp issues for a block of 64 rows, of which it copies 16, four an instruction."""
    if fmt.is_quantized:
        return 4 * (gather.raw_row_bytes(fmt) // gather.RAW_TILE_BYTES + 1)
    return 4 * (fmt.d_qk * 2 // gather.KEY_TILE_BYTES)


@pytest.mark.aot
@pytest.mark.parametrize(
    "arch, names",
    [
        ("sm_100a", ("sparse-v32-h128",)),
        pytest.param("sm_100a", tuple(FORMATS)[1:], marks=pytest.mark.slow),
        pytest.param("sm_103a", tuple(FORMATS), marks=pytest.mark.slow),
    ],
)
def test_compiles_well(arch, names):
    """An architecture a process. 15 s of CPU a name."""
    for name, (report, *_) in compiling.reports(arch, *names).items():
        fmt, extra = FORMATS[name]
        assert not report.warnings, name
        assert 0 < report.tmem_columns <= aot.MAX_TMEM_COLUMNS
        assert report.smem_bytes <= mgpu.MAX_SMEM_BYTES
        assert report.registers * 512 <= 65536
        counts = report.counts
        # Code for each of two stages and each scope; for pairs of CTAs also for each half of V.
        assert counts["GATHER4"] == 2 * sum(map(gathers, filter(None, (fmt, extra)))), name
        tile_heads = sm100_heuristic(fmt, int(name.rpartition("h")[2])).tile_heads
        if tile_heads == 64:
            # Two products for each 16 columns (or keys).
            products, halves = 2 * (fmt.d_qk // 16 + len(sm100.value_parts(fmt)) * 64 // 16), 1
        else:
            products, halves = fmt.d_qk // 16 + len(sm100_pair.half_groups(fmt, 0)) * 64 // 16, 2
            assert report.tmem_columns == (512 if fmt.d_qk == 576 else 480)
        assert counts["UTCHMMA"] == 2 * halves * products, name
        assert counts["UTMALDG"] == counts["GATHER4"] + halves  # and Q
        hot = [loop.counts for loop in report.loops if any(loop.counts.get(op) for op in HOT)]
        assert len(hot) >= 5, name
        spilled, accesses = SPILLS.get(name, (0, 0))
        assert report.spill_store_bytes <= spilled, name
        for loop in hot:
            assert loop.get("LDL", 0) + loop.get("STL", 0) <= accesses, (name, loop)
        design = "sm100" if tile_heads == 64 else "sm100, 128 heads"
        if (counted := INSTRUCTIONS.get((design, fmt.name))) is not None:  # of the model of performance
            for what, (op, stages) in LOOPS.items():
                # Softmax, which alone has MUFU, multiplies too, where it rescales O.
                loops = [x for x in report.loops if what == "softmax" or not x.counts.get("MUFU")]
                sizes = [loop.instructions // stages for loop in loops if loop.counts.get(op)]
                assert sizes[0] == pytest.approx(getattr(counted, what), rel=0.15), (name, what, sizes)


# Which loop the model of performance means: the first with that instruction; how many stages it has code for.
LOOPS = {"softmax": ("MUFU", 1), "values": ("UTCHMMA", 2), "dequantise": ("FMUL", 1), "copy": ("GATHER4", 2)}
HOT = ("UTCHMMA", "GATHER4", "LDTM", "STS")


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_values_fit_where_raw_bytes_were(fmt):
    gather.check_in_place(fmt)
    columns = [part[2] for part in sm100.value_parts(fmt)]
    assert sum(columns) == fmt.d_v and max(columns) <= sm100.ACC_COLUMNS


def test_config_names_what_it_accepts():
    with pytest.raises(ValueError, match=r"rescale_above must lie in \[0, 16\], got 17"):
        SparseConfigSm100(rescale_above=17)
    with pytest.raises(ValueError, match="tile_heads must be 64 or 128, got 96"):
        SparseConfigSm100(tile_heads=96)


def test_registers_are_not_oversubscribed():
    for registers in (sm100.REGISTERS, sm100.REGISTERS_TWO_QUANTIZED, sm100_pair.REGISTERS):
        assert sum(registers) <= MAX_REGISTERS and all(24 <= r <= 240 and r % 8 == 0 for r in registers)


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
@pytest.mark.parametrize("design", [sm100, sm100_pair])
def test_memory_fits(design, fmt):
    leaves = jax.tree.leaves(design.scratch_types(fmt))
    tensor = [leaf for leaf in leaves if getattr(leaf, "memory_space", None) == plgpu.TMEM]
    assert mgpu.smem_bytes([leaf for leaf in leaves if leaf not in tensor]) <= mgpu.MAX_SMEM_BYTES
    columns = sum(array.shape[1] * array.shape[0] // 128 * array.dtype.itemsize // 4 for array in tensor)
    assert columns == {sm100: 288, sm100_pair: 512 if fmt.d_qk == 576 else 480}[design]
