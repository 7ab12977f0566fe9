"""Dense (bf16, paged) MLA decode for SM100 (B200, B300): compiled and interpreted, not run.

Three warpgroups a CTA, persistent over the pieces of its part:

* the *softmax* warpgroup turns scores into probabilities, scales the output anew when it must, and writes results;
* one thread of the *product* warpgroup issues every matrix product, in the order in which the tensor core runs them;
* the *producer* keeps TMA loads in flight.

Scores, output and, for 128 rows, probabilities and most of Q live in tensor memory (TMEM), 512 columns of 128 lanes of
4 bytes. A block's tile in shared memory is both K (transposed) and V, in *groups* of columns that arrive and are freed
one by one: those that are no V as soon as the scores are there.

Two designs, one code. The tensor core's queue is: scores 0, scores 1, values 0, scores 2, values 1, ...

`tile_rows` 64: a CTA has all 512 output columns. The products run at half rate, and the tensor
core's left operands cannot lie in TMEM; it is meant for few heads, where memory binds.

`tile_rows` 128: a row's output would take all of TMEM, so two CTAs share a tile. Each scores all 576 columns, and
weights its own half of V. What is Q for the other columns lies in TMEM, which takes it off shared memory's bandwidth,
and leaves room for two blocks.

TMEM columns         | 64 rows              | 128 rows
O                    | 256 (half the lanes) | 256
S                    |  32                  |  64
P                    |   - (shared memory)  |  32
Q, other and rope    |   -                  | 160
sum                  | 288                  | 512

Shared memory, bytes | 64 rows              | 128 rows
Q                    |  73 728              |  65 536 (this CTA's half)
K, two blocks        | 147 456              | 147 456
P                    |   8 192              |  -
vectors, numbers     |   2 048              |   2 048
sum of 232 448       | 231 424              | 215 040

The result is staged where Q was. docs/sm100.md has the schedule and the model of its performance.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mgpu, schedule
from pallas_kernels.combine import NEVER
from pallas_kernels.dense_decode.config import DenseSm100Config, choose_sm100_config
from pallas_kernels.dense_decode.work import BLOCK, D_V, Shape, Work, for_each_piece, launch, no_keys, zero_rows
from pallas_kernels.mgpu import rows_to_tile, tile

STAGES = 2  # blocks in shared memory
HALF = 256  # output columns of a CTA, for 128 rows
PART_COLUMNS = 64  # of O or Q in registers at a time, for 128 rows
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # one row of 128 a thread
FACTOR, LSE = range(2)  # rows of `vectors`
PIECES, ROOM, ABSENT = range(3)  # rows of `numbers`, the last for each stage
LAUNCHED_REGISTERS = mgpu.MAX_REGISTERS // 3
# A thread of softmax, products and producer, by rows of a tile. What several warpgroups use (addresses) must lie in
# registers that each of them has, and softmax needs 128 of those where it scales the output: with more for softmax and
# fewer for the others, ptxas keeps addresses on the stack (docs/log.md).
REGISTERS = {64: (184, 152, 168), 128: (192, 160, 152)}
REGISTERS_WITHOUT_TMA = REGISTERS | {64: (176, 168, 160)}


class Design:
    """What depends on `tile_rows`: column groups, layouts, buffers."""

    def __init__(self, tile_rows: int, d_qk: int):
        self.rows = tile_rows
        self.d_qk = d_qk
        self.halves = tile_rows // 64
        self.columns = D_V // self.halves  # of the output, in a CTA
        self.q_in_tmem = self.p_in_tmem = tile_rows == 128
        # Whether softmax has numbers of the plan and the table from the producer. With 128 rows ptxas spills then.
        self.is_told = tile_rows == 64
        # M=64 products want 8 tile columns of at most half of their N, which is 64 for the scores.
        self.swizzle_bytes = 64 if tile_rows == 64 else 128
        # Registers: of scores and of output rows while they are scaled; of results on their way to memory.
        self.layout = NATIVE if tile_rows == 128 else plgpu.Layout.WGMMA
        self.result_layout = plgpu.Layout.TCGEN05 if tile_rows == 128 else plgpu.Layout.WGMMA
        # Groups of columns by width, in the order in which they are loaded and scored; V's come last.
        rope = {"rope": d_qk - D_V} if d_qk > D_V else {}
        if tile_rows == 64:
            # O is one array a group: an M=64 array in TMEM cannot be sliced. Wide, since each product reads P again.
            self.value_groups = {"value0": HALF, "value1": HALF}
            self.key_groups = rope
        else:
            self.value_groups = {"value": HALF}
            self.key_groups = {"other": HALF} | rope
        self.groups = self.key_groups | self.value_groups

    def first_column(self, group: str, half: jax.Array) -> Any:
        """Where a group's columns begin in a cache row."""
        if group == "rope":
            return D_V
        if self.rows == 64:
            return HALF * int(group.removeprefix("value"))
        return (half if group == "value" else 1 - half) * HALF

    def smem(self) -> dict[str, Any]:
        """Shared-memory buffers by name."""
        buffers = {
            # A result of the same size is staged in it.
            "q": tile((self.rows, self.columns), swizzle_bytes=self.swizzle_bytes),
            "vectors": plgpu.SMEM((2, self.rows), jnp.float32),
            # What the producer tells: of pieces, of a stage's block how many tokens it has (`Work.room`), and which
            # rows are no keys.
            "numbers": plgpu.SMEM((2 + STAGES, BLOCK), jnp.int32),
        }
        for group, width in self.groups.items():
            buffers[group] = tile((STAGES, BLOCK, width), swizzle_bytes=self.swizzle_bytes)
        if not self.q_in_tmem and "rope" in self.groups:
            buffers["q_rope"] = tile((self.rows, self.groups["rope"]), swizzle_bytes=self.swizzle_bytes)
        if not self.p_in_tmem:
            buffers["p"] = tile((self.rows, BLOCK))
        return buffers

    def tmem(self) -> dict[str, Any]:
        """Arrays in TMEM by name; the output of value group g is `sum_g`.

        They lie there in the order of their names: P, or the first group of the output, is first and needs no address
        of its own. In this order ptxas spills least (docs/log.md).
        """
        arrays = {}
        for group, width in self.value_groups.items():
            arrays[f"sum_{group}"] = plgpu.TMEM((self.rows, width), jnp.float32)
        arrays["unscaled_scores"] = plgpu.TMEM((self.rows, BLOCK), jnp.float32)
        if self.p_in_tmem:
            arrays["p"] = plgpu.TMEM((self.rows, BLOCK), jnp.bfloat16, packed=True)
        if self.q_in_tmem:
            for group, width in self.key_groups.items():
                arrays[f"q_{group}"] = plgpu.TMEM((self.rows, width), jnp.bfloat16, packed=True)
        return arrays

    def barriers(self, copies: int) -> dict[str, Any]:
        """mbarriers by name. `copies`: TMA copies that fill one group of a block."""
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        q_copies = 2 if "rope" in self.groups and not self.q_in_tmem else 1
        found = {
            "q": plgpu.Barrier(num_arrivals=q_copies),  # producer -> all: Q and the piece's record are in shared memory
            "free_q": plgpu.Barrier(),  # softmax -> producer: Q's place may be overwritten
            "q_tmem": ordered(),  # softmax -> product: Q is in TMEM
            "scores": ordered(),  # product -> softmax: scores are complete
            "free_scores": ordered(),  # softmax -> product: scores are in registers
            "p": ordered(),  # softmax -> product: P is written and the output scaled
            "out": ordered(),  # product -> softmax: a block's weighted values are added
        }
        if not self.q_in_tmem:
            del found["q_tmem"]
        for group in self.groups:
            found[f"full_{group}"] = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
            found[f"free_{group}"] = ordered(num_barriers=STAGES)  # product -> producer: a stage may be overwritten
        return found

    def q_part(self, refs: dict[str, Any], group: str, width: int) -> Any:
        """The columns of Q that go with a group of K: an operand of a product."""
        if group in self.key_groups:
            return refs[f"q_{group}"]
        return refs["q"] if self.q_in_tmem else refs["q"].at[:, pl.ds(self.first_column(group, jnp.int32(0)), width)]


def _stage(count):
    """Where the block that `count` others precede, in this CTA, lies in shared memory."""
    return lax.rem(count, jnp.int32(STAGES))


# ------------------------------------------------------------------------------------------------ products


def _products(*, shape, design, part, inputs, refs, bars, ops):
    """One thread: S = Q K^T and O += P V of every block, as commands to the tensor core."""

    def scores(stage):
        plgpu.barrier_wait(bars["free_scores"])
        for index, (group, width) in enumerate(design.groups.items()):
            plgpu.barrier_wait(bars[f"full_{group}"].at[stage])
            keys = refs[group].at[stage].transpose((1, 0))  # [width, BLOCK]
            plgpu.tcgen05_mma(
                refs["unscaled_scores"], design.q_part(refs, group, width), keys, accumulate=index > 0
            )
            if group in design.key_groups:
                plgpu.tcgen05_commit_arrive(bars[f"free_{group}"].at[stage])
        plgpu.tcgen05_commit_arrive(bars["scores"])

    def values(block, stage):
        plgpu.barrier_wait(bars["p"])
        for group in design.value_groups:
            plgpu.tcgen05_mma(refs[f"sum_{group}"], refs["p"], refs[group].at[stage], accumulate=block > 0)
            plgpu.tcgen05_commit_arrive(bars[f"free_{group}"].at[stage])
        plgpu.tcgen05_commit_arrive(bars["out"])

    def piece(index, count):
        # Read from the plan: a warp alone reads no numbers from shared memory. Nothing waits for it but Q.
        work = Work.of_plan(shape, index, inputs["pieces"], inputs["seqlens"], inputs["table"])
        plgpu.barrier_wait(bars["q"])
        if design.q_in_tmem:
            plgpu.barrier_wait(bars["q_tmem"])
        scores(_stage(count))

        def block(i):
            # Scored ahead: the next softmax then runs while this block's values are weighted, and the other way round.
            pl.when(i + 1 < work.num_blocks)(lambda: scores(_stage(count + i + 1)))
            values(i, _stage(count + i))

        pl.loop(0, work.num_blocks)(block)
        return count + work.num_blocks

    def run():
        for group in design.groups:
            for stage in range(STAGES):
                plgpu.tcgen05_commit_arrive(bars[f"free_{group}"].at[stage])  # nothing is in flight: free at once
        for_each_piece(part, inputs["parts"], piece, jnp.int32(0))
        plgpu.barrier_wait(bars["free_scores"])  # every arrival is waited for, also the last

    ops.producer_warp(run)


# ------------------------------------------------------------------------------------------------ softmax


def _load_q(work, *, design, half, tile_index, inputs, refs):
    """Q's columns for the key groups: from global memory to TMEM, a row a thread."""
    rows = pl.ds(tile_index * design.rows, design.rows)
    for group, width in design.key_groups.items():
        for column in range(0, width, PART_COLUMNS):
            columns = pl.ds(design.first_column(group, half) + column, PART_COLUMNS)
            # 16 bytes a load. (Pallas calls a transfer optimized if it goes to shared memory.)
            values = plgpu.load(inputs["q"].at[work.item, rows, columns], layout=NATIVE(8), optimized=False)
            values = plgpu.layout_cast(values, NATIVE)  # bf16 [rows, 64]
            plgpu.async_store_tmem(refs[f"q_{group}"].at[:, pl.ds(column, PART_COLUMNS)], values)
    plgpu.commit_tmem()


def _scale_rows(design, ops):
    """(f32 [rows, columns], f32 [rows]) -> each row times its value."""
    if design.rows == 64:
        return ops.scale_rows
    return lambda values, factor: values * rows_to_tile(factor, values.shape)


def _output_parts(design, refs):
    """[(columns of the CTA's output, their array in TMEM)], as many columns as fit registers."""
    if design.rows == 64:
        return [(i * HALF, refs[f"sum_{group}"]) for i, group in enumerate(design.value_groups)]
    out = refs["sum_value"]
    return [(c, out.at[:, pl.ds(c, PART_COLUMNS)]) for c in range(0, HALF, PART_COLUMNS)]


def _softmax_step(i, carry, *, work, count, design, config, tile_index, refs, bars, ops, scale2):
    """One block: scores -> P, with the running maximum and sum of each row."""
    maximum, total = carry  # [rows] each; the maximum is of base-2 scores
    scale_rows = _scale_rows(design, ops)
    block, stage = work.first_block + i, _stage(count + i)
    if design.is_told:
        plgpu.barrier_wait(bars[f"full_{list(design.groups)[-1]}"].at[stage])
        room = refs["numbers"][ROOM, stage]
    else:
        room = work.room(block)  # its loads come back while the scores are computed
    plgpu.barrier_wait(bars["scores"])
    scores = plgpu.async_load_tmem(refs["unscaled_scores"], layout=design.layout)  # f32 [rows, BLOCK]
    plgpu.wait_load_tmem()
    plgpu.barrier_arrive(bars["free_scores"])
    dyn = mgpu.opaque_zero(i)
    scores = work.mask(scores, block, room, tile_index, refs["numbers"].at[ABSENT + stage], dyn, design.layout)
    row_max = scores.max(axis=1) * scale2  # [rows]
    # Weights may exceed 1 as long as float32 sums do not mind: what was added so far is seldom scaled.
    grown = row_max - (maximum + config.rescale_above)  # [rows]
    new_max = jnp.where(grown > 0, row_max, maximum)  # [rows]
    p = jnp.exp2(scores * scale2 - rows_to_tile(new_max, scores.shape))  # [rows, BLOCK]
    rescale = jnp.exp2(maximum - new_max)  # [rows]
    total = total * rescale + p.sum(axis=1)
    must_rescale = ops.any_positive(grown, design.layout.reduce(1)) & (i > 0)

    @pl.when(i > 0)
    def _():
        plgpu.barrier_wait(bars["out"])  # the previous block's: P and the output are ours

    if design.p_in_tmem:
        plgpu.async_store_tmem(refs["p"], p.astype(jnp.bfloat16))
    else:
        refs["p"][...] = p.astype(jnp.bfloat16)

    @pl.when(must_rescale)
    def _():
        for _, out in _output_parts(design, refs):
            values = plgpu.async_load_tmem(out, layout=design.layout)  # f32 [rows, 256 or 64]
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(out, scale_rows(values, rescale))
        plgpu.commit_tmem()

    (plgpu.commit_tmem if design.p_in_tmem else plgpu.commit_smem)()
    for group in design.value_groups:
        zero_rows(refs[group].at[stage], work, block, dyn)
    plgpu.barrier_arrive(bars["p"])
    return new_max, total


def _store_result(maximum, total, *, work, design, half, tile_index, refs, outs, ops):
    """Normalises, and writes the result of an unsplit item or the partial result of a piece."""
    vectors, scale_rows = refs["vectors"], _scale_rows(design, ops)
    is_empty = total == 0.0  # [rows]: no key was seen
    lse2 = maximum + jnp.log2(total)  # [rows]
    lse2 = jnp.where(is_empty, jnp.full_like(lse2, -jnp.inf), lse2)
    # The first weight of a row is 1, so the sum is 0 or at least 1. To another layout by way of shared memory.
    vectors[FACTOR] = 1.0 / jnp.maximum(total, 0.5)
    vectors[LSE] = lse2 * jnp.where(work.is_split, jnp.float32(1), jnp.float32(mgpu.LN_2))
    plgpu.commit_smem()
    factor = plgpu.load(vectors.at[FACTOR], layout=design.result_layout.reduce(1))  # [rows]
    rows = pl.ds(tile_index * design.rows, design.rows)

    def results():
        """(columns of the CTA's output, f32 [rows, columns])"""
        for column, out in _output_parts(design, refs):
            values = plgpu.async_load_tmem(out, layout=design.result_layout)
            plgpu.wait_load_tmem()
            yield pl.ds(column, values.shape[1]), scale_rows(values, factor)

    def store_lse(to, row):
        @pl.when(half == 0)
        def _():
            plgpu.copy_smem_to_gmem(vectors.at[LSE], to.at[row, rows])

    def store(to, row):
        for columns, values in results():
            to[row, rows, pl.ds(half * design.columns + columns.start, columns.size)] = values

    @pl.when(jnp.logical_not(work.is_split))
    def _():
        if outs["out"].dtype == jnp.float32:  # too wide to stage
            store(outs["out"], work.item)
            store_lse(outs["lse"], work.item)
            return
        staging = refs["q"]  # the scores are done with it
        for columns, values in results():
            staging.at[:, columns][...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, outs["out"].at[work.item, rows, pl.ds(half * design.columns, design.columns)])
        store_lse(outs["lse"], work.item)

    @pl.when(work.is_split)
    def _():
        store(outs["partial_out"], work.piece)
        store_lse(outs["partial_lse2"], work.piece)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _softmax(*, shape, design, config, part, tile_index, half, inputs, outs, refs, bars, ops):
    """The warpgroup that does all arithmetic but the products."""
    scale2 = inputs["sm_scale"][0] * mgpu.LOG2_E
    plgpu.barrier_arrive(bars["free_scores"])
    plgpu.barrier_arrive(bars["free_q"])

    def piece(index, count):
        if design.is_told:
            plgpu.barrier_wait(bars["q"])
            work = Work.read(shape, inputs["table"], refs["numbers"].at[PIECES], index)
        else:
            work = Work.of_plan(shape, index, inputs["pieces"], inputs["seqlens"], inputs["table"])
        if design.q_in_tmem:
            _load_q(work, design=design, half=half, tile_index=tile_index, inputs=inputs, refs=refs)
            plgpu.barrier_arrive(bars["q_tmem"])
        row_layout = design.layout.reduce(1)
        maximum = plgpu.layout_cast(jnp.full((design.rows,), NEVER, jnp.float32), row_layout)  # [rows]
        total = plgpu.layout_cast(jnp.zeros((design.rows,), jnp.float32), row_layout)  # [rows]
        step = functools.partial(
            _softmax_step, work=work, count=count, design=design, config=config, tile_index=tile_index, refs=refs,
            bars=bars, ops=ops, scale2=scale2,
        )  # fmt: skip
        maximum, total = lax.fori_loop(0, work.num_blocks, step, (maximum, total))
        plgpu.barrier_wait(bars["out"])
        _store_result(
            maximum, total, work=work, design=design, half=half, tile_index=tile_index, refs=refs, outs=outs, ops=ops
        )
        plgpu.barrier_arrive(bars["free_q"])
        return count + work.num_blocks

    for_each_piece(part, inputs["parts"], piece, jnp.int32(0))


# ------------------------------------------------------------------------------------------------ producer


def _producer(*, shape, design, part, tile_index, half, inputs, refs, bars, ops):
    """Fetches Q once a piece, and the groups of each block as their places become free."""

    def fetch(group, width, work, block, stage):
        plgpu.barrier_wait(bars[f"free_{group}"].at[stage])
        first = design.first_column(group, half)
        is_last = group == list(design.groups)[-1]  # freed when the scores have been masked
        if is_last and design.is_told:
            refs["numbers"][ROOM, stage] = work.room(block)
        if not shape.uses_tma:
            end_token = jnp.minimum(work.tokens, work.end_block * BLOCK)
            rows = mgpu.GatherRows(work.item, block * BLOCK, end_token, first, design.swizzle_bytes)
            absent = refs["numbers"].at[ABSENT + stage] if is_last else None
            ops.gather_rows(inputs["kv"], inputs["table"], refs[group].at[stage], absent, rows)
            plgpu.barrier_arrive(bars[f"full_{group}"].at[stage])
            return
        for index, (page, row) in enumerate(work.pages(block)):
            plgpu.copy_gmem_to_smem(
                inputs["kv"].at[page, pl.ds(row, shape.chunk), pl.ds(first, width)],
                refs[group].at[stage, pl.ds(index * shape.chunk, shape.chunk)],
                bars[f"full_{group}"].at[stage],
            )

    def piece(index, count):
        work = Work.of_plan(shape, index, inputs["pieces"], inputs["seqlens"], inputs["table"])
        rows = pl.ds(tile_index * design.rows, design.rows)
        columns = pl.ds(half * design.columns, design.columns)
        if design.is_told:
            work.write(refs["numbers"].at[PIECES])
        plgpu.barrier_wait(bars["free_q"])
        plgpu.copy_gmem_to_smem(inputs["q"].at[work.item, rows, columns], refs["q"], bars["q"])
        if not design.q_in_tmem and shape.has_rope:
            rope = pl.ds(D_V, shape.d_qk - D_V)
            plgpu.copy_gmem_to_smem(inputs["q"].at[work.item, rows, rope], refs["q_rope"], bars["q"])

        def block(i):
            for group, width in design.groups.items():
                fetch(group, width, work, work.first_block + i, _stage(count + i))

        pl.loop(0, work.num_blocks)(block)
        return count + work.num_blocks

    def run():
        for_each_piece(part, inputs["parts"], piece, jnp.int32(0))
        # Every arrival is waited for, also the last of each place.
        plgpu.barrier_wait(bars["free_q"])
        for group in design.groups:
            for stage in range(STAGES):
                plgpu.barrier_wait(bars[f"free_{group}"].at[stage])

    if shape.uses_tma:
        ops.producer_warp(run)
    else:
        run()


# ------------------------------------------------------------------------------------------------ host


def _kernel_body(inputs, outs, *, shape, design, config, ops, **scratch):
    bars = scratch.pop("bars")
    common = {
        "shape": shape, "design": design, "part": lax.axis_index("part"), "inputs": inputs, "refs": scratch,
        "bars": bars,
    }  # fmt: skip
    place = {"tile_index": lax.axis_index("tile"), "half": lax.axis_index("half"), "ops": ops}
    group = lax.axis_index("warpgroup")
    roles = (
        functools.partial(_softmax, config=config, outs=outs, **place, **common),
        functools.partial(_products, ops=ops, **common),
        functools.partial(_producer, **place, **common),
    )

    def play(role, registers):
        if registers != LAUNCHED_REGISTERS:
            grows = registers > LAUNCHED_REGISTERS
            plgpu.set_max_registers(registers, action="increase" if grows else "decrease")
        role()

    splits = REGISTERS if shape.uses_tma else REGISTERS_WITHOUT_TMA
    for number, (role, registers) in enumerate(zip(roles, splits[design.rows], strict=True)):
        pl.when(group == number)(functools.partial(play, role, registers))


def dense_decode(
    q: jax.Array, kv: jax.Array, block_table: jax.Array | None, cache_seqlens: jax.Array, plan: schedule.SplitPlan,
    sm_scale: jax.Array, *, is_causal: bool, d_v: int, out_dtype: Any = jnp.bfloat16,
    config: DenseSm100Config | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention of each request's query rows over its cached tokens: the arguments of `sm90.dense_decode`."""
    table_width = None if block_table is None else block_table.shape[1]
    config = config or choose_sm100_config(q.shape[1] * q.shape[2])
    shape = Shape(q.shape, kv.shape, table_width, is_causal, config.tile_rows)
    plan.check(
        op="dense", batch=shape.batch, s_q=shape.s_q, num_heads=shape.heads, page_size=shape.page_size
    )
    if shape.is_empty:
        return no_keys(q, d_v, out_dtype)
    design = Design(config.tile_rows, shape.d_qk)
    ops = mgpu.operations(interpret)

    padded_rows = shape.tiles * design.rows
    return launch(
        functools.partial(_kernel_body, shape=shape, design=design, config=config, ops=ops),
        q, kv, block_table, cache_seqlens, plan, sm_scale,
        # TMA fills up the rows that a tile lacks; what goes to TMEM does not come by TMA.
        shape=shape, d_v=d_v, out_dtype=out_dtype,
        q_rows=padded_rows if design.q_in_tmem else shape.tma_rows, result_rows=padded_rows,
        grid={"half": design.halves},
        smem=design.smem() | {"bars": design.barriers(BLOCK // shape.chunk if shape.uses_tma else 1)},
        tmem=design.tmem(), config=config, interpret=interpret,
    )  # fmt: skip
