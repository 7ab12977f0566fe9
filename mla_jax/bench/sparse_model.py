"""What a sparse decode should take: the model of `model.py` for kernels that gather and dequantise.

    time = max(busiest CTA's (blocks * cycles a block + runs * RUN_STAGES * cycles a stage is taken) / clock,
               cache bytes / (memory rate * MEMORY))
           + START_US + launches, and if items are split: + partial results' bytes / (memory rate * MEMORY)

    cycles a block = max(busiest unit's cycles / SCHEDULE, cycles a stage is taken / stages)

A *run* is what a piece has of one scope. It begins with an empty pipeline, which would take as long as one stage to
fill and to drain if nothing went on meanwhile; `RUN_STAGES` of that is what it costs.

The second term of the maximum is what the dense kernels do not have. A block's rows come, are dequantised, scored,
passed through softmax and multiplied one after the other, all in one stage of shared memory; there is room for two, or
three. So a block cannot take less than half of the sum of those phases, however little each unit has to do. The phases
follow from the shapes and from the machine code; what remains, the time from asking for 64 scattered rows to having
them, and the handoffs, is `WAIT_US`, and what a call takes before its first block `START_US`: the two numbers that
were fitted, on a case each (tests/bench/test_sparse_model.py compares all others); `RUN_STAGES` was chosen with all of
them in view. For SM100 they are assumed to be what they are on SM90; nothing was measured there.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mla_jax.bench import model
from mla_jax.bench.model import KERNEL_US, MEMORY, SCHEDULE, Gpu, Prediction
from mla_jax.bench.workloads import Sparse
from pallas_kernels import schedule
from pallas_kernels.formats import KVFormat
from pallas_kernels.sparse_decode import gather, sm90_few
from pallas_kernels.sparse_decode.config import BLOCK_TOKENS, FEW_HEADS, STAGES, TILE_HEADS, Scope, sm100_heuristic
from pallas_kernels.sparse_decode.dequant import SPARSE_HARDWARE

WAIT_US = 2.4472  # fitted: v32-b128-sq2-h128-topk2048 on an H200 (tests/bench/h200_times.jsonl)
START_US = 3.2854  # fitted: model1-c1-b2-sq2-h64
RUN_STAGES = 0.6  # chosen from 0.3 to 1: least error over all cases, all within 15 %
# An empty kernel of a CUDA graph takes 0.8 to 1.1 us on an H100; the combine kernel KERNEL_US for 16384 rows.
LAUNCH_US, COMBINE_ROWS = 1.0, 16384


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Of a loop over blocks, for a block of 64 keys, in a warp of each warpgroup, from `mla-jax aot`."""

    softmax: int
    values: int  # SM100: the warp that issues products
    dequantise: int
    copy: int

    @property
    def slots(self) -> int:
        """Of one scheduler, which has a warp of each warpgroup. (Warps that only issue products share one.)"""
        return self.softmax + self.values + self.dequantise + self.copy


# By kernel and format. tests/kernels/test_sparse_aot.py and test_sparse_sm100_aot.py compile and compare.
INSTRUCTIONS = {
    ("sm90", "V32"): Instructions(564, 212, 918, 204),
    ("sm90", "MODEL1"): Instructions(423, 80, 871, 228),
    ("sm90, few heads", "V32"): Instructions(403, 0, 477, 204),
    ("sm90, few heads", "MODEL1"): Instructions(304, 0, 451, 228),
    # Loops of copies and products hold code for both stages, of which a block runs half.
    ("sm100", "V32"): Instructions(488, 1134 // 2, 911, 632 // 2),
    ("sm100", "MODEL1"): Instructions(493, 865 // 2, 859, 838 // 2),
    ("sm100, 128 heads", "V32"): Instructions(448, 399 // 2, 911, 655 // 2),
    ("sm100, 128 heads", "MODEL1"): Instructions(446, 396 // 2, 869, 902 // 2),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """What one CTA spends on a block of 64 keys: cycles of each phase of a stage, and what each unit has to do.

    Attributes:
      heads: rows of query of a tile; `ctas` share it, each with the whole block.
      phases: cycles by name, one after the other.
      tensor_cycles, smem_bytes, issue_slots: as in `model.Block`.
      stages: blocks that are under way at a time.
    """

    heads: int
    ctas: int
    phases: dict[str, float]
    tensor_cycles: float
    smem_bytes: float
    issue_slots: float
    stages: int = STAGES

    def stage_cycles(self, gpu: Gpu) -> float:
        """How long a stage is taken."""
        return sum(self.phases.values()) + WAIT_US * gpu.clock_ghz * 1e3

    def units(self, gpu: Gpu) -> dict[str, float]:
        """Cycles a block by unit."""
        return {
            "tensor core": self.tensor_cycles / SCHEDULE,
            "shared memory": self.smem_bytes / gpu.smem_bytes / SCHEDULE,
            "instructions": self.issue_slots / SCHEDULE,
            "stages": self.stage_cycles(gpu) / self.stages,
        }


def _block(heads, ctas, fmt, gpu, count, rate, scores_bytes, values_bytes, p_bytes, raw_row_bytes) -> Block:
    """A product takes as long as the tensor core or its operands in shared memory do."""
    scores_tensor, values_tensor = (2 * heads * BLOCK_TOKENS * d / rate for d in (fmt.d_qk, fmt.d_v // ctas))
    scores = max(scores_tensor, scores_bytes / gpu.smem_bytes)
    values = max(values_tensor, values_bytes / gpu.smem_bytes)
    # Raw rows are written and read, keys written.
    dequantised = BLOCK_TOKENS * (2 * raw_row_bytes + 2 * fmt.d_qk)
    return Block(
        heads=heads,
        ctas=ctas,
        phases={"dequantise": count.dequantise, "scores": scores, "softmax": count.softmax, "values": values},
        tensor_cycles=scores_tensor + values_tensor,
        smem_bytes=scores_bytes + values_bytes + p_bytes + dequantised,
        issue_slots=count.slots,
    )


def sm90_block(fmt: KVFormat) -> Block:
    """`sparse_decode/sm90.py`: 64 heads, two warpgroups with half of V's columns each."""
    scores = (TILE_HEADS + BLOCK_TOKENS) * fmt.d_qk * 2
    p = 2 * TILE_HEADS * BLOCK_TOKENS * 2  # written, and read by one of the two
    return _block(
        TILE_HEADS, 1, fmt, model.H200, INSTRUCTIONS["sm90", fmt.name], model.H200.tensor_flop, scores,
        BLOCK_TOKENS * fmt.d_v * 2, p, Scope(fmt, 1, 1, 1).row_bytes,
    )  # fmt: skip


def sm90_few_block(fmt: KVFormat, heads: int) -> Block:
    """`sparse_decode/sm90_few.py`: keys are rows of both products, so Q and P cost next to nothing."""
    scores = (BLOCK_TOKENS + heads) * fmt.d_qk * 2
    values = BLOCK_TOKENS * fmt.d_v * 2
    p = 2 * BLOCK_TOKENS * heads * 2
    block = _block(
        heads, 1, fmt, model.H200, INSTRUCTIONS["sm90, few heads", fmt.name], model.H200.tensor_flop, scores, values, p,
        Scope(fmt, 1, 1, 1).row_bytes,
    )  # fmt: skip
    stages = sm90_few.scratch_types(fmt, heads, SPARSE_HARDWARE)["kv"].shape[0]
    return dataclasses.replace(block, stages=stages)


def sm100_block(fmt: KVFormat, heads: int = TILE_HEADS) -> Block:
    """`sparse_decode/sm100.py`: 64 heads. With 128, `sm100_pair.py`: two CTAs, more than half of Q, and P, in TMEM."""
    raw_row_bytes = gather.raw_row_bytes(fmt) + 2 * fmt.d_rope
    if heads == TILE_HEADS:
        # A product of 64 rows is two, one for each half of its columns: both read the rows. V in groups of 128 columns.
        scores = (2 * TILE_HEADS + BLOCK_TOKENS) * fmt.d_qk * 2
        values = (fmt.d_v // 128 * 2 * TILE_HEADS + fmt.d_v) * BLOCK_TOKENS * 2
        p = TILE_HEADS * BLOCK_TOKENS * 2
        count = INSTRUCTIONS["sm100", fmt.name]
        return _block(heads, 1, fmt, model.B200, count, model.B200.tensor_flop / 2, scores, values, p, raw_row_bytes)
    count = INSTRUCTIONS["sm100, 128 heads", fmt.name]
    scores = (heads * fmt.d_v // 2 + BLOCK_TOKENS * fmt.d_qk) * 2
    values = BLOCK_TOKENS * fmt.d_v // 2 * 2
    return _block(heads, 2, fmt, model.B200, count, model.B200.tensor_flop, scores, values, 0, raw_row_bytes)


def block_of(workload: Sparse, gpu: Gpu) -> Block:
    """What the kernel that dispatch would pick spends on a block."""
    if gpu.major == 9 and workload.h <= FEW_HEADS:
        return sm90_few_block(workload.fmt, -(-workload.h // 8) * 8)
    if gpu.major == 9:
        return sm90_block(workload.fmt)
    return sm100_block(workload.fmt, sm100_heuristic(workload.fmt, workload.h).tile_heads)


def predict(workload: Sparse, gpu: Gpu, block: Block | None = None) -> Prediction:
    """How long a sparse decode should take, and what it waits for.

    Args:
      workload: one of V32 or MODEL1.
      gpu: its limits.
      block: another design than that of the kernel that ships.
    """
    block = block or block_of(workload, gpu)
    units = block.units(gpu)
    per_run = RUN_STAGES * block.stage_cycles(gpu) / max(units.values())
    blocks, split_pieces = busiest_part(workload, gpu.num_sms, per_run)
    clock_us = gpu.clock_ghz * 1e3  # cycles a microsecond
    units_us = {unit: blocks * cycles / clock_us for unit, cycles in units.items()}
    units_us["memory"] = workload.bytes_moved / (gpu.memory_tb_s * 1e6 * MEMORY)
    bottleneck = max(units_us, key=lambda unit: units_us[unit])
    rows = workload.b * workload.s_q * workload.h
    partial_bytes = split_pieces * workload.h * workload.fmt.d_v * 4  # read: they are written while others decode
    combine_us = LAUNCH_US + (KERNEL_US - LAUNCH_US) * rows / COMBINE_ROWS
    combine_us += partial_bytes / (gpu.memory_tb_s * 1e6 * MEMORY)
    # Lengths of requests become those of query rows in a kernel of its own.
    spread = workload.extra is not None and workload.extra.varlen and workload.s_q > 1
    us = START_US + units_us[bottleneck] + LAUNCH_US * (2 if spread else 1) + combine_us
    return Prediction(us, units_us, bottleneck, combine_us)


def busiest_part(workload: Sparse, num_sms: int, per_run: float = STAGES) -> tuple[float, int]:
    """Blocks of the part that has most, `per_run` more for each run counted in, and pieces of items that are cut."""
    scopes = [scope for scope in (workload.main, workload.extra) if scope is not None]
    # [scopes, b * s_q]
    num_blocks = np.array([np.repeat(-(-scope.lengths(workload.b) // BLOCK_TOKENS), workload.s_q) for scope in scopes])
    parts, pieces, splits = model.plan(
        tuple(num_blocks.sum(axis=0).tolist()), schedule.sparse_parts(workload.h, num_sms)
    )
    pieces = pieces[: splits[-1]]
    main, total = num_blocks[0, pieces[:, 0]], num_blocks.sum(axis=0)[pieces[:, 0]]  # [pieces] each
    begin, end = pieces[:, 1], np.minimum(pieces[:, 2], total)  # [pieces] each
    runs = (begin < np.minimum(end, main)).astype(int) + (np.maximum(begin, main) < end)  # [pieces]
    return model.busiest(end - begin + per_run * runs, parts), model.cut_pieces(splits)
