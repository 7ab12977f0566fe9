"""The SM100 dense kernel on Pallas' interpreter: both designs, results and the order of every memory access.

No SM100 GPU was at hand: this, and the machine code (test_aot.py), is all that is known of it. What stands in for what:
`mgpu.Interpreted`. Not modelled: layouts of tensor memory, swizzles, and how long anything takes.
"""

import inspect
import types

import pytest

import mla_jax
from pallas_kernels import mgpu
from pallas_kernels.dense_decode import DenseSm100Config, choose_sm100_config, sm100
from tests.kernels import interpreter
from tests.kernels.test_dense_interpreted import (
    FLOAT32,
    SHARED,
    check,
    check_float32,
    decode,
    growing_call,
    random_call,
    with_bad_pages,
)

CASES = {f"64 rows, {name}": case for name, case in SHARED.items()} | {
    # Pieces of one request on several parts, the combine kernel, a part of several pieces.
    "128 rows, split": (
        lambda: random_call(b=2, s_q=1, h=128, page_size=64, max_pages=6, lengths=[330, 70]),
        dict(num_parts=2),
    ),
    "three tiles of 64, bad pages": (
        lambda: with_bad_pages(random_call(b=2, s_q=3, h=43, page_size=128, max_pages=3, lengths=[100, 384])),
        dict(num_parts=2),
    ),
    "128 rows, causal, rows missing, an empty request": (
        lambda: random_call(b=3, s_q=2, h=33, page_size=64, max_pages=4, lengths=[0, 1, 200]),
        dict(num_parts=2, is_causal=True),
    ),
    "two tiles of 128": (
        lambda: with_bad_pages(random_call(b=1, s_q=2, h=128, page_size=128, max_pages=2, lengths=[200])),
        dict(num_parts=1, is_causal=True),
    ),
    "d_qk 512, 128 rows, small pages": (
        lambda: with_bad_pages(
            random_call(mla_jax.BF16_512, b=2, s_q=1, h=72, page_size=32, max_pages=5, lengths=[70, 144])
        ),
        dict(num_parts=1),
    ),
    "128 rows, page size 5": (
        lambda: with_bad_pages(random_call(b=1, s_q=1, h=65, page_size=5, max_pages=20, lengths=[100])),
        dict(num_parts=1),
    ),
    "stale plan": (
        lambda: random_call(b=2, s_q=1, h=66, page_size=64, max_pages=6, lengths=[384, 70]),
        dict(num_parts=3, planned=[100, 300]),
    ),
}
QUICK = ("64 rows, causal", "128 rows, split")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_equals_reference(case):
    make_call, options = CASES[case]
    check(make_call(), module=sm100, **options)


@pytest.mark.slow
@pytest.mark.parametrize("h", [9, 65])
def test_float32_results(h):
    shapes, options = FLOAT32
    check_float32(random_call(**shapes | {"h": h}), module=sm100, **options)


@pytest.mark.slow
@pytest.mark.parametrize("h", [4, 68])
def test_maximum_grows(h):
    check(growing_call(h), num_parts=1, module=sm100)


# -- planted mistakes ------------------------------------------------------------------------------------------------

OUT_IS_DONE = """    @pl.when(i > 0)
    def _():
        plgpu.barrier_wait(bars["out"])  # the previous block's: P and the output are ours
"""
STORE_P = """    if design.p_in_tmem:
        plgpu.async_store_tmem(refs["p"], p.astype(jnp.bfloat16))
    else:
        refs["p"][...] = p.astype(jnp.bfloat16)
"""
PLANTED = {
    "a stage is given back before it is multiplied": (
        '            plgpu.tcgen05_mma(refs[f"sum_{group}"], refs["p"], refs[group].at[stage], accumulate=block > 0)\n'
        '            plgpu.tcgen05_commit_arrive(bars[f"free_{group}"].at[stage])\n',
        '            plgpu.tcgen05_commit_arrive(bars[f"free_{group}"].at[stage])\n'
        '            plgpu.tcgen05_mma(refs[f"sum_{group}"], refs["p"], refs[group].at[stage], accumulate=block > 0)\n',
    ),
    "P is not published to the products": (
        "    (plgpu.commit_tmem if design.p_in_tmem else plgpu.commit_smem)()\n",
        "",
    ),
    "P is read without waiting for it": (
        '        plgpu.barrier_wait(bars["p"])\n        for group',
        '        pl.when(block > 0)(lambda: plgpu.barrier_wait(bars["p"]))\n        for group',
    ),
    "P is overwritten while it is multiplied": (
        OUT_IS_DONE + "\n" + STORE_P,
        STORE_P + "\n" + OUT_IS_DONE,
    ),
    "scores are overwritten before they are read": (
        '    scores = plgpu.async_load_tmem(refs["unscaled_scores"], layout=design.layout)  # f32 [rows, BLOCK]\n'
        "    plgpu.wait_load_tmem()\n"
        '    plgpu.barrier_arrive(bars["free_scores"])\n',
        '    plgpu.barrier_arrive(bars["free_scores"])\n'
        '    scores = plgpu.async_load_tmem(refs["unscaled_scores"], layout=design.layout)  # f32 [rows, BLOCK]\n'
        "    plgpu.wait_load_tmem()\n",
    ),
    "Q is replaced while the result is staged in it": (
        '        plgpu.barrier_wait(bars["free_q"])\n        plgpu.copy_gmem',
        "        plgpu.copy_gmem",
    ),
}
PLANTED_IN_RECORDS = {
    "the piece's record is read without waiting for it": (
        '            plgpu.barrier_wait(bars["q"])\n            work = Work.read(',
        "            work = Work.read(",
    ),
    "a block's numbers are read without waiting for them": (
        '        plgpu.barrier_wait(bars[f"full_{list(design.groups)[-1]}"].at[stage])\n        room',
        "        room",
    ),
}  # of 64 rows, where softmax is told
QUICK_PLANTED = (("a stage is given back before it is multiplied", 65), ("P is not published to the products", 8))
ALL_PLANTED = [(what, rows) for what in PLANTED for rows in (8, 65)] + [(what, 8) for what in PLANTED_IN_RECORDS]


@pytest.mark.parametrize(
    ("what", "rows"), [p if p in QUICK_PLANTED else pytest.param(*p, marks=pytest.mark.slow) for p in ALL_PLANTED]
)
def test_planted_mistake_is_found(what, rows):
    right, wrong = (PLANTED | PLANTED_IN_RECORDS)[what]
    source = inspect.getsource(sm100)
    assert source.count(right) == 1, "the kernel changed: plant this mistake anew"
    module = types.ModuleType("planted")
    exec(compile(source.replace(right, wrong), "planted", "exec"), module.__dict__)
    call = random_call(b=2, s_q=1, h=rows, page_size=64, max_pages=4, lengths=[256, 130])
    # Depending on what the threads do first, the detector reports, or the barrier protocol breaks.
    with pytest.raises(Exception, match=r"race|RACE|no threads observed"):
        for _ in range(interpreter.TRIES):
            decode(call, num_parts=1, module=module)


# -- what needs no interpreter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "tile_rows"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 64), (192, 64), (256, 128)]
)
def test_choice_of_a_design(rows, tile_rows):
    chosen = choose_sm100_config(rows)
    assert chosen.tile_rows == tile_rows
    # As many CTAs as the plan counts on.
    assert -(-rows // tile_rows) * (tile_rows // 64) == -(-rows // 64)


@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("tile_rows", [64, 128])
def test_memory_fits(tile_rows, d_qk):
    design = sm100.Design(tile_rows, d_qk)
    assert mgpu.smem_bytes(design.smem() | design.barriers(8)) <= mgpu.MAX_SMEM_BYTES
    columns = 0
    for array in design.tmem().values():
        rows, width = array.shape
        columns += width * rows // 128 * array.dtype.itemsize // 4
    assert columns == {(64, 512): 288, (64, 576): 288, (128, 512): 480, (128, 576): 512}[tile_rows, d_qk]


@pytest.mark.parametrize(
    ("options", "text"),
    [(dict(tile_rows=32), "tile_rows"), (dict(tile_rows=64, rescale_above=-1), "rescale_above"),
     (dict(tile_rows=64, combine_rows=3), "combine_rows")],
)  # fmt: skip
def test_config_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        DenseSm100Config(**options)
