"""The dense Mosaic kernel on a GPU, against the reference.

`pytest -m gpu tests/gpu/test_dense.py` takes a sample of the pairwise-covering list of shapes; `-m slow` the rest of
it, which resumes where it stopped (`--cache-clear` begins anew).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import decode
from tests import samples
from tests.gpu import cases, dense_cases
from tests.gpu.dense_cases import Case

SAMPLE = 25

@functools.partial(jax.jit, static_argnames=("is_causal", "batch_invariant"))
def mosaic(q, cache, block_table, cache_seqlens, *, is_causal=False, batch_invariant=False):
    plan = mla_jax.plan_decode(
        cache_seqlens, s_q=q.shape[1], num_heads=q.shape[2], page_size=cache.page_size, batch_invariant=batch_invariant
    )
    return mla_jax.mla_decode(
        q, cache, block_table, cache_seqlens, sm_scale=dense_cases.SM_SCALE, is_causal=is_causal, plan=plan,
        implementation="mosaic", return_lse=True,
    )  # fmt: skip


def check(case: Case):
    """Full lengths, then mixed ones (zero and full among them), through one compilation."""
    rng = np.random.default_rng(1)
    mixed = rng.integers(0, case.s_k + 1, case.b)
    mixed[0] = 0 if case.b > 1 else mixed[0]
    for lengths in (np.full(case.b, case.s_k), mixed):
        args = dense_cases.build(case, lengths.astype(np.int32))
        want = dense_cases.expected(**args, sm_scale=dense_cases.SM_SCALE, is_causal=case.is_causal)
        cases.assert_close(mosaic(**args, is_causal=case.is_causal), want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", dense_cases.pairwise()[:SAMPLE], ids=str)
def test_sample(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", dense_cases.pairwise()[SAMPLE:], ids=str)
def test_sweep(case, request):
    cases.sweep(request, "dense_sweep", case, check)


BASE = Case(b=6, s_q=2, s_k=1500, h=16, page_size=64, d_qk=576, is_causal=True, contiguous=False)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 61, 64])
def test_integer_garbage(page_size):
    """Lengths far out of range, and pages that do not exist in the middle of requests."""
    case = dataclasses.replace(BASE, page_size=page_size)
    args = dense_cases.build(case, np.full(case.b, case.s_k, np.int32))
    table = np.array(args["block_table"])
    width = table.shape[1]
    table[:, -1] = 0  # lengths beyond the table are clamped to it: its last page must be readable
    args["cache"] = args["cache"].replace(jnp.nan_to_num(args["cache"].data))
    table[0, 1], table[1, 0], table[2, width // 2], table[3, :] = -1, 2**31 - 1, len(args["cache"].data), -(2**31)
    args["block_table"] = jnp.asarray(table)
    args["cache_seqlens"] = jnp.array([1500, 2**31 - 1, -1, 700, -(2**31), 2**30], jnp.int32)
    want = dense_cases.expected(**args, sm_scale=dense_cases.SM_SCALE, is_causal=True)
    cases.assert_close(mosaic(**args, is_causal=True), want)


@pytest.mark.gpu
@pytest.mark.parametrize("h", [16, 128])
def test_repeats_are_bit_identical(h):
    case = dataclasses.replace(BASE, h=h)
    args = dense_cases.build(case, np.array([1500, 3, 64, 1200, 0, 900], np.int32))
    first, *others = [jax.device_get(mosaic(**args, is_causal=True)) for _ in range(20)]
    for other in others:
        np.testing.assert_array_equal(first[0].view(np.uint16), other[0].view(np.uint16))
        np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.gpu
@pytest.mark.parametrize("h", [3, 128])
def test_float32_results(h):
    """Of requests in pieces, whole ones and an empty one."""
    args = dense_cases.build(dataclasses.replace(BASE, h=h), np.array([1500, 3, 64, 1200, 0, 900], np.int32))
    options = dict(sm_scale=dense_cases.SM_SCALE, is_causal=True, implementation="mosaic")
    got = jax.jit(functools.partial(decode.partial_results, mla_jax.mla_decode, **options))(**args)
    want = jax.jit(functools.partial(mla_jax.mla_decode, **options, return_lse=True))(**args)
    samples.assert_equal_before_rounding(got, want)


@pytest.mark.gpu
def test_batch_invariant_plan_ignores_neighbours():
    case = Case(b=6, s_q=1, s_k=20000, h=128, page_size=64, d_qk=576, is_causal=False, contiguous=False)
    args = dense_cases.build(case, np.full(6, 20000, np.int32))
    results = []
    for neighbours in ([0, 0, 0, 0, 0], [20000] * 5, [1, 64, 5000, 12345, 0]):
        lengths = jnp.array([*neighbours[:3], 17001, *neighbours[3:]], jnp.int32)
        out, lse = mosaic(**(args | {"cache_seqlens": lengths}), batch_invariant=True)
        results.append((np.asarray(out[3]).view(np.uint16), np.asarray(lse[3])))
    alone = {name: x[3:4] for name, x in args.items() if name in ("q", "block_table")}
    out, lse = mosaic(
        **alone, cache=args["cache"], cache_seqlens=jnp.array([17001], jnp.int32), batch_invariant=True
    )
    results.append((np.asarray(out[0]).view(np.uint16), np.asarray(lse[0])))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [64, 61])
def test_pool_beyond_int32_bytes(page_size):
    """8.6 GiB of cache, all NaN but for the last pages, which are the valid ones."""
    case = dataclasses.replace(BASE, page_size=page_size)
    args = dense_cases.build(case, np.array([1500, 3, 64, 1200, 0, 900], np.int32))
    small = args["cache"].data
    want = dense_cases.expected(**args, sm_scale=dense_cases.SM_SCALE, is_causal=True)
    data = cases.large_pool(small, 8.6, jnp.nan)
    table = np.array(args["block_table"])
    in_pool = (table >= 0) & (table < len(small))
    table = np.where(in_pool, table + len(data) - len(small), -1)
    args |= {"cache": mla_jax.PagedKVCache(data, case.fmt, page_size), "block_table": jnp.asarray(table, jnp.int32)}
    cases.assert_close(mosaic(**args, is_causal=True), want)


@pytest.mark.gpu
def test_stale_plan_gives_the_right_answer():
    case = dataclasses.replace(BASE, is_causal=False)
    lengths = np.array([1500, 3, 64, 1200, 0, 900], np.int32)
    args = dense_cases.build(case, lengths)
    want = dense_cases.expected(**args, sm_scale=dense_cases.SM_SCALE, is_causal=False)
    run = jax.jit(
        lambda args, plan: mla_jax.mla_decode(
            **args, sm_scale=dense_cases.SM_SCALE, plan=plan, implementation="mosaic", return_lse=True
        )
    )
    for stale in ([0] * 6, [1, 1500, 1500, 64, 700, 2000], [2**31 - 1] * 6):
        plan = mla_jax.plan_decode(jnp.array(stale, jnp.int32), s_q=2, num_heads=16, page_size=64)
        cases.assert_close(run(args, plan), want)
