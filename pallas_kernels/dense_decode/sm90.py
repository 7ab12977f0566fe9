"""Dense (bf16, paged) MLA decode for SM90 (H100, H200).

One CTA works on a tile of 64 query rows (any mixture of heads and query positions of one request) and walks the KV
blocks of its pieces in pairs. Three warpgroups:

* the *left* consumer scores block 0 of a pair and accumulates columns 0..255 of the output over both blocks;
* the *right* consumer scores block 1 and accumulates columns 256..511;
* the *producer* keeps TMA loads in flight, and alone reads the plan, the lengths and the table.

Each consumer therefore needs the other's probabilities (P0 and P1, through shared memory) and a common running maximum
(through two rows of shared memory). The two run half a step apart, so that one's softmax hides under the other's
products: docs/dense-decode.md has the picture. A block's tile in shared memory is both K (transposed) and V: a KV byte
is loaded once.

Shared memory holds two blocks, each in halves with their own barriers: `left` (columns 0..255), `right` (256..511) and,
for d_qk 576, `rope` (512..575, which travels with `right`).
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
from pallas_kernels.dense_decode.config import DenseConfig, choose_config
from pallas_kernels.dense_decode.work import BLOCK, D_V, Shape, Work, for_each_piece, launch, no_keys, zero_rows
from pallas_kernels.mgpu import WGMMA, WGMMA_ROW, Handoff, rows_to_tile, tile

ROWS = schedule.TILE_ROWS  # query rows of a tile
HALF = 256  # columns of `left` and of `right`

# ------------------------------------------------------------------------------------------------ shared memory

# Rows of `vectors`: running maxima and sums of the two consumers.
MAX0, MAX1, SUM0, SUM1 = range(4)
# Rows of `numbers`, what the producer tells the consumers: of a piece (two records, for even and odd ones) and of each
# block of a pair (`Work.room`, which rows are no keys). So only the producer waits for reads of the plan and the table.
PIECES, ROOM, ABSENT0, ABSENT1 = range(4)
FETCHED_FIRST = (("left", 0), ("right", 1))  # of each block of a pair, the half that its own consumer reads first


def smem_plan(d_qk: int) -> dict[str, Any]:
    """Shared-memory buffers by name. 231 424 of 232 448 bytes for d_qk 576: a third block does not fit."""
    plan = {
        "q": tile((1, ROWS, D_V)),
        # P1, and before that the rope part of Q, which both consumers move to registers first.
        "p1": tile((ROWS, BLOCK)),
        "p0": tile((ROWS, BLOCK)),
        "left": tile((2, BLOCK, HALF)),
        "right": tile((2, BLOCK, HALF)),
        "vectors": plgpu.SMEM((4, ROWS), jnp.float32),
        "numbers": plgpu.SMEM((4, BLOCK), jnp.int32),
    }
    if d_qk > D_V:
        plan["rope"] = tile((2, BLOCK, d_qk - D_V))
    return plan


def handoffs(producer_threads: int) -> dict[str, Handoff]:
    """Barriers between the warpgroups, named after what is handed over."""
    group = mgpu.WARPGROUP
    return {
        "max0": Handoff(group, group),  # left -> right: its running maximum
        "max1": Handoff(group, group),  # right -> left: the pair's running maximum
        "p0": Handoff(group, group),  # left -> right
        "p1": Handoff(group, group),  # right -> left; its products are issued already and go first
        "sums": Handoff(2 * group, 0),  # both
        "free_left0": Handoff(group, producer_threads),  # consumer -> producer: a buffer may be overwritten
        "free_right0": Handoff(group, producer_threads),
        "free_left1": Handoff(group, producer_threads),
        "free_right1": Handoff(group, producer_threads),
        "free_q": Handoff(2 * group, producer_threads),
        "free_q_rope": Handoff(group, producer_threads),
    }


# ------------------------------------------------------------------------------------------------ consumers


def _scores(refs, full, side, scores_ref, half, dyn):
    """Issues one half of the scores of this side's block, without RoPE: scores += Q[:, half] K[:, half]^T."""
    plgpu.barrier_wait(full[f"{half}{side}"])
    columns = pl.ds(0 if half == "left" else HALF, HALF)
    plgpu.wgmma(scores_ref, refs["q"].at[dyn].at[:, columns], refs[half].at[side + dyn].transpose((1, 0)))


def _rope_scores(refs, q_rope, side, scores_ref, dyn, *, shape):
    """Issues the rest: scores += Q_rope K_rope^T. The keys have come with the right half."""
    if shape.has_rope:
        plgpu.wgmma(scores_ref, q_rope, refs["rope"].at[side + dyn].transpose((1, 0)))


def _zero_carry(columns=HALF):
    maximum = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), WGMMA_ROW)  # [ROWS], of base-2 scores
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA_ROW)  # [ROWS]
    acc = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), WGMMA)  # [ROWS, columns]
    return acc, maximum, total


def _left_step(pair, carry, *, is_last, config, work, refs, full, bar, ops, scale2, q_rope, tile_index, shape):
    """One pair for the left consumer: P0, then O_left += P0 V0_left + P1 V1_left, then the next pair's scores 0."""
    acc, scores, maximum, total = carry  # [ROWS, HALF], [ROWS, BLOCK], [ROWS], [ROWS]
    dyn = mgpu.opaque_zero(pair)
    block = work.first_block + 2 * pair
    if is_last:
        bar.arrive("free_q")
    scores = work.mask(scores, block, refs["numbers"][ROOM, 0], tile_index, refs["numbers"].at[ABSENT0], dyn)
    new_max = mgpu.raised(maximum, scores.max(axis=1) * scale2, config.rescale_above)  # [ROWS]
    refs["vectors"][MAX0] = new_max
    rescale = jnp.exp2(maximum - new_max)  # [ROWS]
    p = jnp.exp2(scores * scale2 - rows_to_tile(new_max, scores.shape))  # [ROWS, BLOCK]
    p_bf16 = p.astype(jnp.bfloat16)
    (acc,) = mgpu.rescale((acc,), rescale, ops)
    total = total * rescale + p.sum(axis=1)
    bar.arrive("max0")
    if is_last:
        zero_rows(refs["left"].at[0], work, block)

    def own_product(acc_ref):
        plgpu.wgmma(acc_ref, p_bf16, refs["left"].at[0 + dyn])

    acc = pl.run_state(own_product)(plgpu.ACC.init(acc))
    bar.wait("max1")
    bar.arrive("free_left0")
    # The right consumer raised the maximum again: bring P0 and the sums to its scale.
    pair_max = plgpu.load(refs["vectors"].at[MAX1], layout=WGMMA_ROW)  # [ROWS]
    p_pair = (p * rows_to_tile(jnp.exp2(new_max - pair_max), p.shape)).astype(jnp.bfloat16)  # [ROWS, BLOCK]
    refs["p0"][...] = p_pair
    ops.publish_smem()
    bar.arrive("p0")
    # Read again, so that the 128 multiplications below are not scheduled before the arrival above.
    rescale = jnp.exp2(new_max - plgpu.load(refs["vectors"].at[MAX1], layout=WGMMA_ROW))  # [ROWS]
    (acc,) = mgpu.rescale((acc,), rescale, ops)
    total = total * rescale
    if is_last:
        zero_rows(refs["left"].at[1], work, block + 1)
    bar.wait("p1")
    if is_last:

        def other_product(acc_ref):
            plgpu.wgmma(acc_ref, refs["p1"], refs["left"].at[1 + dyn])

        return pl.run_state(other_product)(plgpu.ACC.init(acc)), pair_max, total

    def other_product_and_next_scores(acc_and_scores):
        acc_ref, scores_ref = acc_and_scores
        plgpu.wgmma(acc_ref, refs["p1"], refs["left"].at[1 + dyn])
        # Given back before the next block is waited for: its second half would else be asked for when the first has
        # come, and a pair would take two latencies.
        plgpu.wgmma_wait(0)
        bar.arrive("free_left1")
        _scores(refs, full, 0, scores_ref, "left", dyn)
        _scores(refs, full, 0, scores_ref, "right", dyn)
        _rope_scores(refs, q_rope, 0, scores_ref, dyn, shape=shape)

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), WGMMA)  # [ROWS, BLOCK]
    acc, scores = pl.run_state(other_product_and_next_scores)((plgpu.ACC.init(acc), plgpu.ACC.init(zeros)))
    return acc, scores, pair_max, total


def _right_step(pair, carry, *, is_last, config, work, refs, full, bar, ops, scale2, q_rope, tile_index, shape):
    """One pair for the right consumer: P1, then O_right += P1 V1_right + P0 V0_right, then the next pair's scores 1."""
    acc, scores, maximum, total = carry  # [ROWS, HALF], [ROWS, BLOCK], [ROWS], [ROWS]
    dyn = mgpu.opaque_zero(pair)
    block = work.first_block + 2 * pair + 1
    if is_last:
        bar.arrive("free_q")
    scores = work.mask(scores, block, refs["numbers"][ROOM, 1], tile_index, refs["numbers"].at[ABSENT1], dyn)
    own_max = scores.max(axis=1) * scale2  # [ROWS]
    bar.wait("max0")
    left_max = plgpu.load(refs["vectors"].at[MAX0], layout=WGMMA_ROW)  # [ROWS]
    new_max = mgpu.raised(left_max, own_max, config.rescale_above)  # [ROWS]
    refs["vectors"][MAX1] = new_max
    rescale = jnp.exp2(maximum - new_max)  # [ROWS]
    p = jnp.exp2(scores * scale2 - rows_to_tile(new_max, scores.shape))  # [ROWS, BLOCK]
    p_bf16 = p.astype(jnp.bfloat16)
    (acc,) = mgpu.rescale((acc,), rescale, ops)
    total = total * rescale + p.sum(axis=1)
    bar.arrive("max1")
    refs["p1"][...] = p_bf16
    if is_last:
        zero_rows(refs["right"].at[1], work, block)
        zero_rows(refs["right"].at[0], work, block - 1)

    def products(acc_ref):
        plgpu.wgmma(acc_ref, p_bf16, refs["right"].at[1 + dyn])
        ops.publish_smem()
        bar.wait("p0")
        plgpu.wgmma(acc_ref, refs["p0"], refs["right"].at[0 + dyn])
        bar.arrive("p1")
        plgpu.wgmma_wait(1)
        bar.arrive("free_right1")
        if not is_last:
            plgpu.wgmma_wait(0)
            bar.arrive("free_right0")

    acc = pl.run_state(products)(plgpu.ACC.init(acc))
    if is_last:
        return acc, new_max, total
    scores, _ = _scores_alone(refs, full, q_rope, 1, dyn, shape=shape)
    return acc, scores, new_max, total


def _scores_alone(refs, full, q_rope, side, dyn, *, shape):
    """Scores [ROWS, BLOCK] of this side's block, with nothing else in flight; and Q's RoPE columns in registers.

    `q_rope` None: of a piece's first block. Q's RoPE columns are then read from shared memory, where they come last.
    """

    def run(scores_ref):
        rope = q_rope
        for half in ("left", "right") if side == 0 else ("right", "left"):
            _scores(refs, full, side, scores_ref, half, dyn)
        if rope is None and shape.has_rope:
            plgpu.barrier_wait(full["q_rope"])
            rope = plgpu.load(refs["p1"], layout=WGMMA)  # bf16 [ROWS, 64]
        _rope_scores(refs, rope, side, scores_ref, dyn, shape=shape)
        return scores_ref[...], rope

    return pl.run_scoped(run, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def _store_result(side, acc, maximum, total, *, work, refs, outs, bar, ops, tile_index, shape, dyn):
    """Normalises, and writes the result of an unsplit item or the partial result of a piece."""
    vectors = refs["vectors"]
    vectors[SUM0 + side] = total
    bar.meet("sums")
    total = total + plgpu.load(vectors.at[SUM1 - side], layout=WGMMA_ROW)  # [ROWS]
    is_empty = total == 0.0  # [ROWS]: no key was seen
    # The weight by which a row's maximum was last moved is 1, so the sum is 0 or at least 1.
    acc = acc * rows_to_tile(1.0 / jnp.maximum(total, 0.5), acc.shape)  # [ROWS, HALF]
    rows = pl.ds(tile_index * ROWS, ROWS)
    columns = pl.ds(side * HALF, HALF)

    lse2 = jnp.where(is_empty, jnp.full_like(total, -jnp.inf), maximum + jnp.log2(total))  # [ROWS]
    store_lse = functools.partial(ops.store_row_values, tile=tile_index, num_rows=shape.rows)

    def store(out, index):
        ops.store_rows(acc, out=out, index=index, tile=tile_index, column=side * HALF, num_rows=shape.rows)

    @pl.when(jnp.logical_not(work.is_split))
    def _():
        if outs["out"].dtype == jnp.float32:  # too wide to stage
            store(outs["out"], work.item)
            if side == 0:
                store_lse(lse2 * mgpu.LN_2, out=outs["lse"], index=work.item)
            return
        # The last products read these two buffers; the other two are already being refilled.
        staging = refs["left"].at[1 + dyn] if side == 0 else refs["right"].at[0 + dyn]
        staging[...] = acc.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, outs["out"].at[work.item, rows, columns])
        if side == 0:
            store_lse(lse2 * mgpu.LN_2, out=outs["lse"], index=work.item)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(work.is_split)
    def _():
        store(outs["partial_out"], work.piece)
        if side == 0:
            store_lse(lse2, out=outs["partial_lse2"], index=work.piece)


def _consumer(side, *, config, shape, part, tile_index, inputs, outs, refs, full, bar, ops):
    """Warpgroup `side` (0 left, 1 right)."""
    plgpu.set_max_registers(config.consumer_registers, action="increase")
    step = _left_step if side == 0 else _right_step
    for buffer in ("left0", "left1", "q") if side == 0 else ("right0", "right1", "q"):
        bar.arrive(f"free_{buffer}")
    if side == 0 and shape.has_rope:
        bar.arrive("free_q_rope")
    scale2 = inputs["sm_scale"][0] * mgpu.LOG2_E

    def piece(index):
        # With numbers that hang on the piece, addresses are not computed once, kept on the stack, and read back.
        dyn = mgpu.opaque_zero(index)
        plgpu.barrier_wait(full["q"])
        work = Work.read(shape, inputs["table"], refs["numbers"].at[PIECES], index)
        scores, q_rope = _scores_alone(refs, full, None, side, dyn, shape=shape)
        acc, maximum, total = _zero_carry()
        run = functools.partial(
            step, config=config, work=work, refs=refs, full=full, bar=bar, ops=ops, scale2=scale2, q_rope=q_rope,
            tile_index=tile_index, shape=shape,
        )  # fmt: skip
        carry = (acc, scores, maximum, total)
        carry = lax.fori_loop(0, work.num_pairs - 1, functools.partial(run, is_last=False), carry)
        acc, maximum, total = run(work.num_pairs - 1, carry, is_last=True)
        if side == 0 and shape.has_rope:
            bar.arrive("free_q_rope")  # the last read of P1, which lies in Q's rope tile
        _store_result(
            side, acc, maximum, total, work=work, refs=refs, outs=outs, bar=bar, ops=ops, tile_index=tile_index,
            shape=shape, dyn=dyn,
        )  # fmt: skip
        bar.arrive("free_left1" if side == 0 else "free_right0")

    for_each_piece(part, inputs["parts"], piece)


# ------------------------------------------------------------------------------------------------ producer


def _producer(*, config, shape, part, tile_index, inputs, refs, full, bar, ops):
    """The third warpgroup: fetches Q once a piece, and the halves of each block as their buffers become free."""
    plgpu.set_max_registers(config.producer_registers, action="decrease")

    columns_of = {"left": {"left": (0, HALF)}, "right": {"right": (HALF, HALF)}}
    if shape.has_rope:
        columns_of["right"]["rope"] = (D_V, shape.d_qk - D_V)

    def fetch(half, side, work, block, pages):
        bar.wait(f"free_{half}{side}")
        if (half, side) in FETCHED_FIRST:  # until this half was given back, the block before was masked by it
            refs["numbers"][ROOM, side] = work.room(block, pages)
        for buffer, (first, width) in columns_of[half].items():
            for index, (page, row) in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    inputs["kv"].at[page, pl.ds(row, shape.chunk), pl.ds(first, width)],
                    refs[buffer].at[side, pl.ds(index * shape.chunk, shape.chunk)],
                    full[f"{half}{side}"],
                )

    def gather(half, side, work, block):
        bar.wait(f"free_{half}{side}")
        if (half, side) in FETCHED_FIRST:
            refs["numbers"][ROOM, side] = work.room(block)
        end_token = jnp.minimum(work.tokens, work.end_block * BLOCK)
        for buffer, (first, _) in columns_of[half].items():
            rows = mgpu.GatherRows(work.item, block * BLOCK, end_token, first)
            absent = refs["numbers"].at[ABSENT0 + side] if (half, side) in FETCHED_FIRST and buffer == half else None
            ops.gather_rows(inputs["kv"], inputs["table"], refs[buffer].at[side], absent, rows)
        plgpu.barrier_arrive(full[f"{half}{side}"])

    def fetch_q(work, buffer, barrier, first, width):
        bar.wait(f"free_{barrier}")
        source = inputs["q"].at[work.item, pl.ds(tile_index * ROWS, ROWS), pl.ds(first, width)]
        plgpu.copy_gmem_to_smem(source, buffer, full[barrier])

    def piece(index):
        work = Work.of_plan(shape, index, inputs["pieces"], inputs["seqlens"], inputs["table"])
        work.write(refs["numbers"].at[PIECES])
        fetch_q(work, refs["q"].at[0], "q", 0, D_V)

        def pair(i):
            blocks = [work.first_block + 2 * i + side for side in (0, 1)]
            pages = [work.pages(block) for block in blocks] if shape.uses_tma else None
            # In the order in which the consumers need them.
            for half, side in (("left", 0), ("right", 1), ("right", 0), ("left", 1)):
                if pages:
                    fetch(half, side, work, blocks[side], pages[side])
                else:
                    gather(half, side, work, blocks[side])
                if (half, side) == ("right", 1) and shape.has_rope:
                    # Its place is P1's, which the piece before reads to its end.
                    pl.when(i == 0)(lambda: fetch_q(work, refs["p1"], "q_rope", D_V, shape.d_qk - D_V))

        pl.loop(0, work.num_pairs)(pair)

    def run():
        for_each_piece(part, inputs["parts"], piece)
        # Every arrival is waited for, also the last of each buffer.
        for buffer in ("left0", "right1", "right0", "left1", "q", "q_rope"):
            if buffer != "q_rope" or shape.has_rope:
                bar.wait(f"free_{buffer}")

    if shape.uses_tma:
        ops.producer_warp(run)
    else:
        run()


# ------------------------------------------------------------------------------------------------ host


def _kernel_body(inputs, outs, *, shape, config, ops, **scratch):
    handoff_refs, full = scratch.pop("handoffs"), scratch.pop("full")
    bar = ops.barriers(handoffs(shape.producer_threads), handoff_refs)
    common = {
        "config": config, "shape": shape, "part": lax.axis_index("part"), "tile_index": lax.axis_index("tile"),
        "inputs": inputs, "refs": scratch, "full": full, "bar": bar, "ops": ops,
    }  # fmt: skip
    group = lax.axis_index("warpgroup")
    pl.when(group == 0)(lambda: _consumer(0, outs=outs, **common))
    pl.when(group == 1)(lambda: _consumer(1, outs=outs, **common))
    pl.when(group == 2)(lambda: _producer(**common))


def dense_decode(
    q: jax.Array,
    kv: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array,
    plan: schedule.SplitPlan,
    sm_scale: jax.Array,
    *,
    is_causal: bool,
    d_v: int,
    out_dtype: Any = jnp.bfloat16,
    config: DenseConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each request's query rows over its cached tokens.

    Args:
      q: bf16 `[b, s_q, h, d_qk]`, d_qk 576 or 512.
      kv: bf16 `[num_pages, page_size, d_qk]`; V is the first 512 columns.
      block_table: int32 `[b, max_pages]`, or None: page i belongs to request i. Values outside [0, num_pages) are pages
        without keys.
      cache_seqlens: int32 `[b]`, clamped to [0, what the table can hold].
      plan: from `plan_decode` for these shapes.
      sm_scale: float32 `[]`, positive.
      is_causal: query row j sees keys before cache_seqlens - (s_q - 1 - j) only.
      d_v: 512.
      out_dtype: bfloat16, or float32 for results that will be merged with others.
      config: None chooses one.
      interpret: Pallas' GPU interpreter parameters, for tests.

    Returns:
      out `[b, s_q, h, d_v]` and lse float32 `[b, s_q, h]` (natural logarithm; out 0 and lse -inf without any key).
    """
    table_width = None if block_table is None else block_table.shape[1]
    shape = Shape(q.shape, kv.shape, table_width, is_causal, ROWS)
    plan.check(
        op="dense", batch=shape.batch, s_q=shape.s_q, num_heads=shape.heads, page_size=shape.page_size
    )
    if shape.is_empty:
        return no_keys(q, d_v, out_dtype)
    config = config or choose_config(shape.page_size, shape.contiguous)
    ops = mgpu.operations(interpret)

    scratch = smem_plan(shape.d_qk)
    copies = BLOCK // shape.chunk if shape.uses_tma else 1
    with_rope = 2 if shape.has_rope and shape.uses_tma else 1
    full = {
        f"{half}{side}": plgpu.Barrier(num_arrivals=copies * (with_rope if half == "right" else 1))
        for half in ("left", "right")
        for side in (0, 1)
    }
    full["q"] = plgpu.Barrier()
    if shape.has_rope:
        full["q_rope"] = plgpu.Barrier()
    scratch |= {"full": full, "handoffs": ops.barrier_scratch(handoffs(shape.producer_threads))}
    return launch(
        functools.partial(_kernel_body, shape=shape, config=config, ops=ops),
        q, kv, block_table, cache_seqlens, plan, sm_scale,
        shape=shape, d_v=d_v, out_dtype=out_dtype, q_rows=shape.tma_rows, result_rows=shape.rows, grid={},
        smem=scratch, config=config, interpret=interpret,
    )  # fmt: skip
