"""The SM90 dense kernel on Pallas' interpreter: results, and the order of every shared-memory access.

The kernel is the shipped one; `mgpu.Interpreted` lists what stands in for PTX. Each interpreted CTA takes seconds, so
the cases are few and small; NaN fills whatever no key of a call lies in.
"""

import inspect
import types

import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import reference
from pallas_kernels import schedule
from pallas_kernels.dense_decode import sm90
from tests import golden_files, samples
from tests.kernels import interpreter


def decode(call, *, num_parts, is_causal=False, planned=None, module=sm90, **options):
    """`mla_decode`'s arguments, through the kernel: (out, lse). `planned`: other lengths for the plan."""
    cache, table = call["cache"], call["block_table"]
    _, s_q, h, _ = call["q"].shape
    tiles = -(-s_q * h // schedule.TILE_ROWS)

    def run(lengths, planned):
        plan = schedule.plan_decode(
            planned, s_q=s_q, num_heads=h, page_size=cache.page_size, num_sms=num_parts * tiles
        )
        return module.dense_decode(
            call["q"], cache.data, table, lengths, plan, jnp.float32(call["sm_scale"]),
            is_causal=is_causal, d_v=cache.format.d_v, interpret=interpreter.parameters(), **options,
        )  # fmt: skip

    lengths = call["cache_seqlens"]
    return interpreter.run(run, lengths, lengths if planned is None else jnp.asarray(planned, jnp.int32))


def check(call, *, is_causal=False, **kwargs):
    got = decode(call, is_causal=is_causal, **kwargs)
    want = reference.mla_decode(**call, is_causal=is_causal)
    samples.assert_equal_results(got, want, call["cache"].format)


def check_float32(call, **kwargs):
    """Results that will be merged elsewhere are the usual ones before they are rounded."""
    got = decode(call, **kwargs, out_dtype=jnp.float32)
    samples.assert_equal_before_rounding(got, decode(call, **kwargs))


def random_call(fmt=mla_jax.BF16_576, **shapes):
    return samples.dense_call(np.random.default_rng(0), fmt, **shapes)


def growing_call(h):
    """Scores that grow by more than `rescale_above` from block to block, for some rows, by less, and shrink again."""
    call = random_call(b=1, s_q=1, h=h, page_size=64, max_pages=5, lengths=[300])
    data = np.array(call["cache"].data)
    table = np.asarray(call["block_table"])
    for block, growth in enumerate((1, 40, 5, 80, 2)):
        data[table[0, block], :, 512:] *= growth
    return call | {"cache": call["cache"].replace(jnp.asarray(data))}


def with_bad_pages(call):
    table = np.array(call["block_table"])
    table[0, 0], table[-1, -1] = -7, 2**30
    return call | {"block_table": jnp.asarray(table)}


def contiguous(call, max_len):
    b = call["q"].shape[0]
    rng = np.random.default_rng(1)
    data = samples.rows(rng, b, max_len, fmt=call["cache"].format)
    unused = np.arange(max_len)[None] >= np.asarray(call["cache_seqlens"])[:, None]
    data = jnp.where(unused[..., None], jnp.bfloat16(jnp.nan), data)
    return call | {"cache": mla_jax.PagedKVCache(data, call["cache"].format, max_len), "block_table": None}


# name -> (a function that makes the call, what `check` is told). These are for kernels of any architecture.
SHARED = {
    # Causal, fewer rows than a tile, an empty request, several pieces in a part.
    "causal": (
        lambda: random_call(s_q=2, h=3, page_size=64, max_pages=4, lengths=[0, 1, 200]),
        dict(num_parts=2, is_causal=True),
    ),
    # Requests in pieces, which the combine kernel merges; rows that fill no group of 8.
    "split": (
        lambda: random_call(b=2, s_q=1, h=9, page_size=64, max_pages=7, lengths=[400, 330]),
        dict(num_parts=4),
    ),
    "d_qk 512, small pages": (
        lambda: with_bad_pages(
            random_call(mla_jax.BF16_512, b=2, s_q=1, h=8, page_size=16, max_pages=9, lengths=[70, 144])
        ),
        dict(num_parts=1),
    ),
    # Blocks that begin inside a page.
    "page size 96": (
        lambda: with_bad_pages(random_call(b=2, s_q=3, h=8, page_size=96, max_pages=3, lengths=[100, 288])),
        dict(num_parts=2, is_causal=True),
    ),
    # Rows fetched one by one.
    "page size 5": (
        lambda: with_bad_pages(random_call(b=1, s_q=2, h=3, page_size=5, max_pages=20, lengths=[100])),
        dict(num_parts=1, is_causal=True),
    ),
    "contiguous": (lambda: contiguous(random_call(b=2, s_q=1, h=8, lengths=[40, 264]), 264), dict(num_parts=2)),
    # Mosaic leaves an axis of length 1 out of TMA's coordinates: what must not be read has to be out of range twice.
    "one contiguous request": (lambda: contiguous(random_call(b=1, s_q=1, h=8, lengths=[40]), 264), dict(num_parts=1)),
}
CASES = SHARED | {
    # Two tiles, an odd number of rows, pages larger than a block, pages that do not exist.
    "two tiles, bad pages": (
        lambda: with_bad_pages(random_call(b=2, s_q=1, h=65, page_size=128, max_pages=3, lengths=[100, 384])),
        dict(num_parts=3),
    ),
    # The plan is older than the lengths.
    "stale plan": (
        lambda: random_call(b=2, s_q=1, h=8, page_size=64, max_pages=6, lengths=[384, 70]),
        dict(num_parts=3, planned=[100, 300]),
    ),
}
QUICK = ("causal", "split", "one contiguous request")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_equals_reference(case):
    make_call, options = CASES[case]
    check(make_call(), **options)


# A request in pieces and one that is whole; rows that fill no group of 8.
FLOAT32 = dict(b=2, s_q=1, h=9, page_size=64, max_pages=5, lengths=[300, 60]), dict(num_parts=2)


def test_maximum_grows():
    check(growing_call(4), num_parts=1)


def test_float32_results():
    shapes, options = FLOAT32
    check_float32(random_call(**shapes), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_files.DENSE)
def test_golden(name):
    x = golden_files.load(name)
    fmt = mla_jax.BF16_576 if x["q"].shape[-1] == 576 else mla_jax.BF16_512
    data = golden_files.bf16(x["kv"])[:, :, 0]
    call = dict(
        q=golden_files.bf16(x["q"]), cache=mla_jax.PagedKVCache(data, fmt, data.shape[1]),
        block_table=jnp.asarray(x["block_table"]), cache_seqlens=jnp.asarray(x["cache_seqlens"]),
        sm_scale=float(x["q"].shape[-1]) ** -0.5,
    )  # fmt: skip
    out, lse = decode(call, num_parts=3, is_causal=bool(x["causal"]))
    assert samples.relative_error(out, x["out"]) < 4e-3
    np.testing.assert_allclose(golden_files.flash_lse(lse), x["lse"], rtol=1e-5, atol=1e-5)


# -- planted mistakes ------------------------------------------------------------------------------------------------

OWN_PRODUCT = "    acc = pl.run_state(own_product)(plgpu.ACC.init(acc))\n"
PLANTED = {
    "a V buffer is given back while it is multiplied": (
        OWN_PRODUCT + '    bar.wait("max1")\n    bar.arrive("free_left0")\n',
        '    bar.arrive("free_left0")\n' + OWN_PRODUCT + '    bar.wait("max1")\n',
    ),
    "P0 is handed over before it is written": (
        "    refs[\"p0\"][...] = p_pair\n    ops.publish_smem()\n    bar.arrive(\"p0\")\n",
        "    bar.arrive(\"p0\")\n    refs[\"p0\"][...] = p_pair\n    ops.publish_smem()\n",
    ),
    "P0 is not published to wgmma": (
        "    ops.publish_smem()\n    bar.arrive(\"p0\")\n",
        "    bar.arrive(\"p0\")\n",
    ),
    "the maximum is read without waiting for it": (
        "    bar.wait(\"max0\")\n    left_max = plgpu.load(refs[\"vectors\"].at[MAX0], layout=WGMMA_ROW)",
        "    left_max = plgpu.load(refs[\"vectors\"].at[MAX0], layout=WGMMA_ROW)\n    bar.wait(\"max0\")",
    ),
    "Q is replaced while it is read": (
        '        bar.wait(f"free_{barrier}")\n        source = ',
        '        if barrier != "q":\n            bar.wait(f"free_{barrier}")\n        source = ',
    ),
    "Q's RoPE columns replace P1 while it is read": (
        '        bar.wait(f"free_{barrier}")\n        source = ',
        '        if barrier == "q":\n            bar.wait(f"free_{barrier}")\n        source = ',
    ),
    "the next piece's record takes this one's place": (
        '        work.write(refs["numbers"].at[PIECES])\n',
        '        work.write(refs["numbers"].at[PIECES])\n'
        '        refs["numbers"].at[PIECES][lax.rem(index + 1, 2) * Work.RECORD + 1] = work.item\n',
    ),
    "a block's room is written before the block before has been masked": (
        '        bar.wait(f"free_{half}{side}")\n        if (half, side) in FETCHED_FIRST:  # until this half was '
        "given back, the block before was masked by it\n"
        '            refs["numbers"][ROOM, side] = work.room(block, pages)\n',
        '        if (half, side) in FETCHED_FIRST:\n            refs["numbers"][ROOM, side] = work.room(block, pages)\n'
        '        bar.wait(f"free_{half}{side}")\n',
    ),
    "the result is staged in a buffer that is being refilled": (
        "        staging = refs[\"left\"].at[1 + dyn] if side == 0 else refs[\"right\"].at[0 + dyn]\n",
        "        staging = refs[\"left\"].at[0 + dyn] if side == 0 else refs[\"right\"].at[1 + dyn]\n",
    ),
}
QUICK_PLANTED = ("P0 is handed over before it is written", "P0 is not published to wgmma")


@pytest.mark.parametrize(
    "what", [w if w in QUICK_PLANTED else pytest.param(w, marks=pytest.mark.slow) for w in PLANTED]
)
def test_planted_mistake_is_found(what):
    right, wrong = PLANTED[what]
    source = inspect.getsource(sm90)
    assert source.count(right) == 1, "the kernel changed: plant this mistake anew"
    module = types.ModuleType("planted")
    exec(compile(source.replace(right, wrong), "planted", "exec"), module.__dict__)
    # The last two pieces are of one pair: their records follow each other at once.
    call = random_call(b=4, s_q=1, h=64, page_size=64, max_pages=6, lengths=[384, 300, 40, 40])
    # Depending on what the threads do first, the detector reports, or the barrier protocol breaks.
    with pytest.raises(Exception, match=r"race|no threads observed"):
        for _ in range(interpreter.TRIES):
            decode(call, num_parts=1, module=module)
