"""What a dense decode should take: a model of the kernels on paper, in code.

    time = max(busiest CTA's blocks * cycles a block / (clock * SCHEDULE), cache bytes / (memory rate * MEMORY))
           + KERNEL_US a kernel, and if requests are split: + partial results' bytes / (memory rate * MEMORY)

The cycles of a block of 64 keys are those of its busiest unit: the tensor core, shared memory (operands of products,
TMA, probabilities) or the instruction schedulers. They follow from the kernel's shapes, the instruction counts from its
machine code (`mla-jax aot`). How many blocks the busiest CTA has follows from the very plan that the kernel would run.

Three numbers are not derived. `SCHEDULE`, how much of its busiest unit's time a kernel uses, was fitted on one of the
measured cases; `PIECE_BLOCKS`, what a piece costs besides its blocks, was chosen with all of them in view;
tests/bench/test_model.py compares. `MEMORY` is what FlashMLA reached on the same GPU. For SM100, where nothing was
measured, all are carried over from SM90, and so is the ratio of the clock under load to that of the data sheet: four
assumptions, which the first measurement on a B200 will test (docs/sm100.md).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench.workloads import Dense
from pallas_kernels import schedule
from pallas_kernels.dense_decode import choose_sm100_config

BLOCK = schedule.BLOCK_TOKENS

SCHEDULE = 0.92787  # fitted: dense-b128-sq1-h128-sk16384, 888.9 us on an H200 (tests/bench/h200_times.jsonl)
PIECE_BLOCKS = 2.0  # first scores, last products and the result, which nothing of the next piece hides
MEMORY = 0.88  # FlashMLA, b=128, h=16, s_k 4096: 4.07 of 4.62 TB/s on an H200 (docs/results/h200.jsonl)
# What a kernel takes that finds nothing to do: the combine kernel over 16384 rows of which none was split, on an H100
# (pallas_kernels/combine.py). Counted once for each kernel.
KERNEL_US = 2.7


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Limits of a GPU. Rates are those that a plain copy and a plain matrix product reach.

    Attributes:
      name: as NVIDIA calls it.
      major: of the compute capability.
      num_sms: multiprocessors.
      tensor_flop: dense bf16 operations of an SM a cycle, at full rate.
      smem_bytes: of shared memory, of an SM a cycle.
      clock_ghz: under the load of matrix products.
      memory_tb_s: of a copy, reads and writes.
    """

    name: str
    major: int
    num_sms: int
    tensor_flop: int
    smem_bytes: int
    clock_ghz: float
    memory_tb_s: float


# H200: measured in the run that the tests compare with: 776 TFLOP/s and 4.62 TB/s; data sheet: 989 and 4.8.
H200_TFLOP_S, H200_TB_S = 775.6, 4.6189
_LOADED, _COPIED = H200_TFLOP_S / 989.4, H200_TB_S / 4.8
H200 = Gpu("H200", 9, 132, 4096, 128, H200_TFLOP_S * 1e3 / (132 * 4096), H200_TB_S)
# B200: data sheet, 2250 TFLOP/s and 8 TB/s, times the ratios of the H200. Nothing measured.
B200 = Gpu("B200", 10, 148, 8192, 128, _LOADED * 2250e3 / (148 * 8192), 8.0 * _COPIED)
GPUS = {"sm_90a": H200, "sm_100a": B200}


@dataclasses.dataclass(frozen=True)
class Block:
    """What one CTA spends on a block of 64 keys.

    Attributes:
      ctas: that share a tile of query rows, each with the whole block.
      tile_rows: query rows of them.
      align: blocks that are worked on together.
      tensor_cycles: of the tensor core, at the rate that the product's shape allows.
      smem_bytes: read and written in shared memory.
      issue_slots: instructions of the busiest of the four schedulers: of one warp of each warpgroup.
    """

    ctas: int
    tile_rows: int
    align: int
    tensor_cycles: float
    smem_bytes: float
    issue_slots: float

    def units(self, gpu: Gpu) -> dict[str, float]:
        """Cycles a block by unit."""
        return {
            "tensor core": self.tensor_cycles,
            "shared memory": self.smem_bytes / gpu.smem_bytes,
            "instructions": self.issue_slots,
        }


# Instructions of the loops over blocks for a block of 64 keys, a warp of each warpgroup, from `mla-jax aot` (SM100:
# with the rare branches that scale the output and clear rows). tests/kernels/test_aot.py compiles and compares.
INSTRUCTIONS = {"sm90": 562, "sm100, 64 rows": 1600, "sm100, 128 rows": 1350}


def sm90_block(d_qk: int, d_v: int = 512) -> Block:
    """`dense_decode/sm90.py`: 64 rows, two consumers with half of V's columns each; P0 and P1 cross over."""
    rows = 64
    flop = 2 * rows * BLOCK * (d_qk + d_v)
    # Scores: both operands from shared memory, but for Q's rope columns, which are registers. Values: each half of V
    # once; P from registers in one consumer, from shared memory in the other, where it was written before.
    scores = (rows * d_v + BLOCK * d_qk) * 2
    values = BLOCK * d_v * 2 + 2 * rows * BLOCK * 2
    loaded = BLOCK * d_qk * 2
    return Block(1, rows, 2, flop / H200.tensor_flop, scores + values + loaded, INSTRUCTIONS["sm90"])


def sm100_block(tile_rows: int, d_qk: int, d_v: int = 512) -> Block:
    """`dense_decode/sm100.py`. A product of 64 rows is two, one for each half of its columns: both read the rows."""
    loaded = BLOCK * d_qk * 2
    if tile_rows == 64:
        flop = 2 * 64 * BLOCK * (d_qk + d_v)
        scores = (2 * 64 + BLOCK) * d_qk * 2
        values = (2 * 2 * 64 * BLOCK + BLOCK * d_v) * 2  # P: twice for each of the two column groups
        p = 64 * BLOCK * 2
        smem = scores + values + p + loaded
        return Block(1, 64, 1, flop / (B200.tensor_flop / 2), smem, INSTRUCTIONS["sm100, 64 rows"])
    flop = 2 * 128 * BLOCK * (d_qk + d_v // 2)
    scores = (128 * d_v // 2 + BLOCK * d_qk) * 2  # the other columns of Q are in TMEM, and so is P
    smem = scores + BLOCK * d_v // 2 * 2 + loaded
    return Block(2, 128, 1, flop / B200.tensor_flop, smem, INSTRUCTIONS["sm100, 128 rows"])


def block_of(workload: Dense, gpu: Gpu) -> Block:
    """What the kernel that dispatch would pick spends on a block."""
    if gpu.major == 9:
        return sm90_block(workload.fmt.d_qk, workload.fmt.d_v)
    rows = choose_sm100_config(workload.s_q * workload.h).tile_rows
    return sm100_block(rows, workload.fmt.d_qk, workload.fmt.d_v)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one workload, in microseconds.

    Attributes:
      us: decode and combine.
      units_us: what each unit of the busiest SM, and memory, would take if nothing else counted.
      bottleneck: the one that takes longest.
      combine_us: of `us`, merging partial results.
    """

    us: float
    units_us: dict[str, float]
    bottleneck: str
    combine_us: float


def predict(workload: Dense, gpu: Gpu) -> Prediction:
    """How long a dense decode should take, and what it waits for."""
    block = block_of(workload, gpu)
    blocks, split_pieces = _busiest_part(
        workload.b, workload.s_q, workload.h, workload.s_k, gpu.num_sms, block.align
    )
    clock_us = gpu.clock_ghz * 1e3  # cycles a microsecond
    units_us = {unit: blocks * cycles / (clock_us * SCHEDULE) for unit, cycles in block.units(gpu).items()}
    units_us["memory"] = workload.bytes_moved / (gpu.memory_tb_s * 1e6 * MEMORY)
    bottleneck = max(units_us, key=lambda unit: units_us[unit])
    combine_us = 0.0
    if split_pieces:
        # Read: they are written while others decode.
        partial_bytes = split_pieces * workload.s_q * workload.h * workload.fmt.d_v * 4
        combine_us = KERNEL_US + partial_bytes / (gpu.memory_tb_s * 1e6 * MEMORY)
    # Decode and combine, which also looks for pieces where there are none.
    return Prediction(units_us[bottleneck] + 2 * KERNEL_US + combine_us, units_us, bottleneck, combine_us)


def _busiest_part(b, s_q, h, s_k, num_sms, align) -> tuple[float, int]:
    """Blocks of the part that has most, with what pieces cost besides, and pieces of items that are cut."""
    num_blocks = -(-s_k // BLOCK)
    parts, pieces, splits = plan((num_blocks,) * b, schedule.dense_parts(s_q, h, num_sms))
    size = np.minimum(pieces[:, 2], num_blocks) - pieces[:, 1]  # [max_pieces]
    cost = -(-size // align) * align + PIECE_BLOCKS  # [max_pieces]
    return busiest(cost, parts), cut_pieces(splits)


@functools.cache
def plan(num_blocks: tuple[int, ...], num_parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(parts, pieces, splits) of items with so many blocks each, see `schedule.SplitPlan`."""
    with jax.default_device(jax.devices("cpu")[0]):
        split = jax.jit(schedule.split_work, static_argnums=1)
        lowered = split.lower(jnp.asarray(num_blocks, jnp.int32), num_parts)
        # It runs once: what an optimiser would save is less than its own time.
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        parts, pieces, splits = compiled(jnp.asarray(num_blocks, jnp.int32))
    return np.asarray(parts), np.asarray(pieces), np.asarray(splits)


def busiest(cost: np.ndarray, parts: np.ndarray) -> float:
    """The highest sum of the pieces' cost [pieces] that a part has."""
    return max(cost[first:last].sum().item() for first, last in itertools.pairwise(parts))


def cut_pieces(splits: np.ndarray) -> int:
    """Pieces of items that have more than one, which the combine step reads."""
    count = np.diff(splits)  # [items]
    return int(count[count > 1].sum())
