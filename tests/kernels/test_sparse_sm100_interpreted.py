"""The SM100 sparse kernels on Pallas' interpreter: results, and the order of every access to shared and tensor memory.

Both designs: a CTA a tile of 64 heads, and two a tile of 128.

There is no such GPU to run on: this and the compiled code (test_sparse_sm100_aot.py) are the proofs. The kernel is the
shipped one; the tables in gather.py and mgpu.py list what stands in for PTX. What the interpreter does not model, and
so nothing here can find:

* the swizzled places of rows, and their dequantisation by PTX (`finish_keys`), written and read on hardware only;
* how TMA orders its writes after reads of the same memory through other instructions (`fence.proxy.async`, which it
  takes for a part of `commit_smem`), and the fences around tcgen05 that barriers with `orders_tensor_core` bring;
* that a load from tensor memory is there only after `wait_load_tmem` (it is at once, here);
* numbers of the tensor cores (float32 here), capacity of tensor memory (ahead-of-time compilation checks it);
* how long anything takes, and a deadlock that only some schedules have.
"""

import inspect
import types

import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from pallas_kernels import formats
from pallas_kernels.sparse_decode import gather, sm100, sm100_pair
from pallas_kernels.sparse_decode.config import TILE_HEADS, Scope, sm100_heuristic
from tests import golden_files, samples
from tests.kernels import interpreter
from tests.kernels.test_sparse_interpreted import (
    PAIRS,
    check,
    check_float32,
    decode,
    every_index,
    golden_call,
    growing_call,
)


@pytest.mark.slow  # 10 s each
@pytest.mark.parametrize("name", golden_files.SPARSE)
def test_golden(name):
    call, want_out, want_lse = golden_call(name)
    out, lse = decode(call, module=sm100)
    assert samples.relative_error(out, want_out) < 4e-3
    np.testing.assert_allclose(golden_files.flash_lse(lse), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [5, pytest.param(72, marks=pytest.mark.slow)])
def test_two_scopes(h):
    """NaN in every slot that no index names, invalid indices, lengths, a sink; items in pieces, which are merged."""
    rng = np.random.default_rng(3)
    shapes = dict(b=1, s_q=2, h=h, topk=75, extra_topk=70)
    check(samples.sparse_call(rng, mla_jax.MODEL1, mla_jax.BF16_512, **shapes), module=sm100)


@pytest.mark.slow  # 60 s
@pytest.mark.parametrize("fmt, extra_fmt", PAIRS)
def test_pairs_of_formats(fmt, extra_fmt):
    call = samples.sparse_call(np.random.default_rng(1), fmt, extra_fmt, b=2, s_q=1, topk=75, extra_topk=70)
    check(call, module=sm100)


@pytest.mark.slow
@pytest.mark.parametrize("h", [3, 65])
def test_float32_results(h):
    call = samples.sparse_call(np.random.default_rng(5), mla_jax.BF16_512, b=2, s_q=1, h=h, topk=140)
    check_float32(call, module=sm100)


def test_pair_of_ctas():
    """65 heads: both halves of V, rows that do not exist, a pair whose second tile has one head."""
    check(samples.sparse_call(np.random.default_rng(4), mla_jax.BF16_512, b=1, s_q=1, h=65, topk=70), module=sm100)


@pytest.mark.slow  # 30 s each
@pytest.mark.parametrize("fmt, extra_fmt", [(mla_jax.V32, None), (mla_jax.BF16_576, None), *PAIRS])
def test_pairs_of_ctas(fmt, extra_fmt):
    """All formats; 200 heads are two pairs; items in pieces; lengths that leave an item without keys."""
    h = 200 if extra_fmt is None else 128
    call = samples.sparse_call(
        np.random.default_rng(2), fmt, extra_fmt, b=2, s_q=1, h=h, topk=140, extra_topk=70 if extra_fmt else 0
    )
    for name in {"topk_length", "extra_topk_length"} & call.keys():
        call[name] = jnp.asarray(call[name]).at[0].set(0)
    check(call, module=sm100)


@pytest.mark.parametrize(
    ("heads", "tile_heads"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 64), (192, 64), (193, 128), (256, 128)]
)
def test_choice_of_a_design(heads, tile_heads):
    chosen = sm100_heuristic(mla_jax.V32, heads).tile_heads
    assert chosen == tile_heads
    # As many CTAs as the plan counts on.
    assert -(-heads // chosen) * (chosen // TILE_HEADS) == -(-heads // TILE_HEADS)


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_halves_of_a_key(fmt):
    """Every column meets its column of Q, once; half h of V is O's columns from h * d_v / 2 on."""
    for half in range(2):
        mine, others = (
            [sm100_pair.q_column(fmt, g) + k for g in groups(fmt, half) for k in range(g[2])]
            for groups in (sm100_pair.half_groups, sm100_pair.other_groups)
        )
        assert mine == list(range(half * fmt.d_v // 2, (half + 1) * fmt.d_v // 2))
        assert sorted(mine + others) == list(range(fmt.d_qk))
        for groups in (sm100_pair.half_groups, sm100_pair.other_groups):
            assert [g[2] for g in groups(fmt, half)] == [g[2] for g in groups(fmt, 0)]
            assert all(g[1] + g[2] <= (fmt.d_rope if g[0] == "rope" else fmt.d_nope) for g in groups(fmt, half))


@pytest.mark.slow  # 20 s, 60 s
@pytest.mark.parametrize("h", [8, 72])
def test_maximum_that_grows_and_shrinks(h):
    check(growing_call(h), module=sm100, num_sms=1)


# -- rows of the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512])
def test_rows_of_slots(fmt):
    """`rows_of` names the row of `row_view` that holds a slot's first record, and none for slots that are no keys."""
    page_size, pages = 7, 3
    scope = Scope(fmt, page_size, pages * page_size, 64)
    shape = (pages, *fmt.page_shape(page_size))
    numbers = np.arange(np.prod(shape), dtype=np.int64)
    if fmt.is_quantized:  # the number of each byte, as many arrays of bytes
        digits = [jnp.asarray((numbers >> (8 * n) & 255).astype(np.uint8).reshape(shape)) for n in range(4)]
        view = sum(np.asarray(gather.row_view(d, scope), np.int64) << (8 * n) for n, d in enumerate(digits))
    else:
        view = np.arange(pages * page_size)[:, None] * fmt.d_qk * 2  # first byte of each row
    slots = np.concatenate([np.arange(-3, pages * page_size + 3), [2**31 - 1, -(2**31)]])
    slots = np.concatenate([slots, np.full(64 - slots.size, -1)]).astype(np.int32)
    rows = np.asarray(gather.rows_of(jnp.asarray(slots), scope)).astype(np.int64)
    for slot, row in zip(slots, rows, strict=True):
        if 0 <= slot < pages * page_size:
            page, offset = divmod(int(slot), page_size)
            assert view[row, 0] == page * scope.page_bytes + offset * scope.row_bytes
        else:
            assert row == 2**32 - 1


@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1])
def test_scales_of_slots(fmt):
    """Every byte a scale can be, 0 and 255 of e8m0 included; zeros for slots that are no keys."""
    page_size, pages = 64, 5
    rng = np.random.default_rng(0)
    cache = samples.random_cache(rng, fmt, pages, page_size, "amax" if fmt is mla_jax.V32 else None)
    data = np.asarray(cache.data).reshape(pages, -1).copy()
    index, start, what = fmt.locate("scale")
    slots = rng.permutation(pages * page_size)[:64].astype(np.int32)
    slots[5], slots[9] = -1, pages * page_size
    want = np.zeros((64, what.count), np.float32)
    for n, slot in enumerate(slots):
        if not 0 <= slot < pages * page_size:
            continue
        page, offset = divmod(int(slot), page_size)
        at = fmt.area_offset_bytes(index, page_size) + offset * fmt.record_bytes[index] + start
        if what.dtype == formats.E8M0:
            data[page, at : at + what.count] = (n * what.count + np.arange(what.count)) % 256
        raw = data[page, at : at + what.num_bytes]
        want[n] = raw.view(what.dtype).astype(np.float32)
    if what.dtype == formats.E8M0:
        want[want < 2.0**-126] = 0  # byte 0: 2^-127 is subnormal
    scope = Scope(fmt, page_size, pages * page_size, 64)
    got = gather.GATHER_INTERPRETED.load_scales(jnp.asarray(data), jnp.asarray(slots), scope)
    np.testing.assert_array_equal(np.asarray(got[0]), want)


# -- planted mistakes ------------------------------------------------------------------------------------------------

PLANTED = {
    "a stage is refilled while it is read": (
        "        plgpu.barrier_wait(empty.at[number])\n        start_gather",
        "        start_gather",
        "            number, stages, functools.partial(start_gather, landed=landed.at[number], scope=call.scopes[k])\n"
        "        )\n",
        "            number, stages, functools.partial(start_gather, landed=landed.at[number], scope=call.scopes[k])\n"
        "        )\n        plgpu.barrier_wait(empty.at[number])\n",
    ),
    "a stage is given back before its values are multiplied": (
        "            for_stage(number, stages, products)\n            plgpu.tcgen05_commit_arrive(empty.at[number])\n",
        "            plgpu.tcgen05_commit_arrive(empty.at[number])\n            for_stage(number, stages, products)\n",
    ),
    "P is handed over before it is written": (
        "        p[...] = probabilities\n        call.ops.publish_smem()\n        plgpu.commit_tmem()\n"
        "        plgpu.barrier_arrive(p_ready)\n",
        "        plgpu.commit_tmem()\n        plgpu.barrier_arrive(p_ready)\n        p[...] = probabilities\n"
        "        call.ops.publish_smem()\n",
    ),
    "P is not made visible to the tensor cores": (
        "        call.ops.publish_smem()\n        plgpu.commit_tmem()\n",
        "        plgpu.commit_tmem()\n",
    ),
    "P is overwritten without waiting for the product that reads it": (
        "            plgpu.barrier_wait(pv_done)  # of the block before: P has been read, O is whole\n"
        "            pl.when(grown)(lambda: _rescale(o, rescale, call.ops))\n\n        p[...] = probabilities\n",
        "            pl.when(grown)(lambda: _rescale(o, rescale, call.ops))\n\n        p[...] = probabilities\n"
        "        pl.when(i > 0)(lambda: plgpu.barrier_wait(pv_done))\n",
    ),
    "the products do not wait for the keys": (
        "            plgpu.barrier_wait(full.at[number])\n            plgpu.barrier_wait(s_free)\n"
        "            for_stage(number, stages, products)\n",
        "            plgpu.barrier_wait(s_free)\n            for_stage(number, stages, products)\n"
        "            plgpu.barrier_wait(full.at[number])\n",
    ),
    "rows are dequantised before they have landed": (
        "        plgpu.barrier_wait(landed.at[number])\n"
        "        call.ops.finish_keys(slots, scales, stages, number, rows, call.scopes[k])\n",
        "        call.ops.finish_keys(slots, scales, stages, number, rows, call.scopes[k])\n"
        "        plgpu.barrier_wait(landed.at[number])\n",
    ),
    "S is overwritten before it is read": (
        "        plgpu.wait_load_tmem()\n        plgpu.barrier_arrive(s_free)\n",
        "        plgpu.wait_load_tmem()\n",
        "        plgpu.barrier_wait(s_ready)\n        scores = ",
        "        plgpu.barrier_wait(s_ready)\n        plgpu.barrier_arrive(s_free)\n        scores = ",
    ),
}  # fmt: skip
QUICK_PLANTED = (1, 3)
# Depending on what the threads do first, the detector reports, a stage is read as what it is not, or the barrier
# protocol breaks.
FOUND = "saw a race|RACE DETECTED|alias group|no threads observed"

WAIT_FOR_VALUES = """        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(pv_done)  # of the block before: P has been read, O is whole

"""
PLANTED_IN_PAIR = {
    "a stage is given back before its values are multiplied": (
        "            for_stage(number, stages, products)\n            plgpu.tcgen05_commit_arrive(empty.at[number])\n",
        "            plgpu.tcgen05_commit_arrive(empty.at[number])\n            for_stage(number, stages, products)\n",
    ),
    "P is handed over before it is written": (
        "        plgpu.async_store_tmem(p, probabilities)\n",
        "",
        "        plgpu.barrier_arrive(p_ready)\n",
        "        plgpu.barrier_arrive(p_ready)\n        plgpu.async_store_tmem(p, probabilities)\n"
        "        plgpu.commit_tmem()\n",
    ),
    "P is not committed": (
        "        plgpu.commit_tmem()\n        plgpu.barrier_arrive(p_ready)\n",
        "        plgpu.barrier_arrive(p_ready)\n",
    ),
    "P is overwritten without waiting for the product that reads it": (
        WAIT_FOR_VALUES + "        plgpu.async_store_tmem(p, probabilities)\n",
        "        plgpu.async_store_tmem(p, probabilities)\n" + WAIT_FOR_VALUES,
    ),
    "the products do not wait for the keys": (
        "            plgpu.barrier_wait(full.at[number])\n            plgpu.barrier_wait(s_free)\n"
        "            for_stage(number, stages, products)\n",
        "            plgpu.barrier_wait(s_free)\n            for_stage(number, stages, products)\n"
        "            plgpu.barrier_wait(full.at[number])\n",
    ),
    "S is overwritten before it is read": (
        "        scores = _load(s)  # [128 heads, 64 keys]\n        plgpu.barrier_arrive(s_free)\n",
        "        plgpu.barrier_arrive(s_free)\n        scores = _load(s)  # [128 heads, 64 keys]\n",
    ),
    "the scores do not wait for Q in tensor memory": (
        "                plgpu.barrier_wait(q_tmem)\n                lax.fori_loop(",
        "                lax.fori_loop(",
        "                plgpu.tcgen05_commit_arrive(q_free)\n",
        "                plgpu.barrier_wait(q_tmem)\n                plgpu.tcgen05_commit_arrive(q_free)\n",
    ),
    "Q in shared memory is overwritten while it is read": (
        "                plgpu.tcgen05_commit_arrive(q_free)\n"
        "                plgpu.barrier_wait(q_free)  # Q may be overwritten\n",
        "",
    ),
}


@pytest.mark.parametrize(
    "what",
    [w if n in QUICK_PLANTED else pytest.param(w, marks=pytest.mark.slow) for n, w in enumerate(PLANTED)],
)
def test_planted_mistake_is_found(what):
    call = every_index(mla_jax.MODEL1, h=4, topk=200)
    with pytest.raises(Exception, match=FOUND):
        for _ in range(interpreter.TRIES):
            decode(call, num_sms=1, module=planted(sm100, PLANTED[what]))


@pytest.mark.slow  # 15 s each
@pytest.mark.parametrize("what", PLANTED_IN_PAIR)
def test_planted_mistake_in_a_pair_is_found(what, monkeypatch):
    monkeypatch.setattr(sm100, "sm100_pair", planted(sm100_pair, PLANTED_IN_PAIR[what]))
    call = samples.sparse_call(np.random.default_rng(0), mla_jax.BF16_512, b=2, s_q=1, h=65, topk=200)
    del call["topk_length"]
    with pytest.raises(Exception, match=FOUND):
        for _ in range(interpreter.TRIES):
            decode(call, num_sms=2, module=sm100)


def planted(module, edits):
    """The module with each text of `edits[::2]` replaced by the one behind it."""
    source = inspect.getsource(module)
    for right, wrong in zip(edits[::2], edits[1::2], strict=True):
        assert source.count(right) == 1, "the kernel has changed; plant the mistake anew"
        source = source.replace(right, wrong)
    changed = types.ModuleType("planted")
    exec(compile(source, "planted", "exec"), changed.__dict__)
    return changed
