"""The sparse Mosaic kernel on a GPU, against the reference.

`pytest -m gpu tests/gpu/test_sparse.py` takes a sample of the pairwise-covering list of shapes; `-m slow` the rest of
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
from tests.gpu import cases, sparse_cases
from tests.gpu.sparse_cases import Case

SAMPLE = 18


@functools.partial(jax.jit, static_argnames="batch_invariant")
def mosaic(args, plan=None, batch_invariant=False):
    def length(name):
        return args.get(name)

    if plan is None:
        b, s_q, h, _ = args["q"].shape
        extra = args.get("extra_indices")
        plan = mla_jax.plan_sparse_decode(
            args["indices"].shape[-1], batch=b, s_q=s_q, num_heads=h, topk_length=length("topk_length"),
            extra_topk=0 if extra is None else extra.shape[-1], extra_topk_length=length("extra_topk_length"),
            batch_invariant=batch_invariant,
        )  # fmt: skip
    return mla_jax.sparse_mla_decode(**args, plan=plan, implementation="mosaic", return_lse=True)


def check(case: Case):
    args = sparse_cases.build(case)
    got = mosaic(args, batch_invariant=case.batch_invariant)
    cases.assert_close(got, sparse_cases.expected(**args))


@pytest.mark.gpu
@pytest.mark.parametrize("case", sparse_cases.pairwise()[:SAMPLE], ids=str)
def test_sample(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sparse_cases.pairwise()[SAMPLE:], ids=str)
def test_sweep(case, request):
    cases.sweep(request, "sparse_sweep", case, check)


BASE = Case(
    fmt=mla_jax.MODEL1, main=(700, 100, 37), extra=(512, 64, 2), extra_quantized=True, b=6, s_q=2, h=16, keys="varlen",
    sink=True, batch_invariant=False,
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fmt, h", [(mla_jax.V32, 128), (mla_jax.MODEL1, 16)])
def test_repeats_are_bit_identical(fmt, h):
    args = sparse_cases.build(dataclasses.replace(BASE, fmt=fmt, h=h))
    first, *others = [jax.device_get(mosaic(args)) for _ in range(20)]
    for other in others:
        np.testing.assert_array_equal(first[0].view(np.uint16), other[0].view(np.uint16))
        np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.gpu
@pytest.mark.parametrize("fmt, h", [(mla_jax.V32, 128), (mla_jax.MODEL1, 3)])
def test_float32_results(fmt, h):
    args = sparse_cases.build(dataclasses.replace(BASE, fmt=fmt, h=h))
    got = jax.jit(lambda args: decode.partial_results(mla_jax.sparse_mla_decode, **args, implementation="mosaic"))(args)
    samples.assert_equal_before_rounding(got, mosaic(args))


@pytest.mark.gpu
def test_batch_invariant_plan_ignores_neighbours():
    case = dataclasses.replace(BASE, fmt=mla_jax.V32, main=(2046, 2048, 576), extra=None, keys="some")
    args = sparse_cases.build(case)
    results = []
    for neighbours in ([0] * 5, [2048] * 5, [1, 64, 500, 1234, 0]):
        length = jnp.array([*neighbours[:3], 1700, *neighbours[3:]], jnp.int32)
        out, lse = mosaic(args | {"topk_length": length}, batch_invariant=True)
        results.append((np.asarray(out[3]).view(np.uint16), np.asarray(lse[3])))
    alone = {k: v[3:4] for k, v in args.items() if k in ("q", "indices")}
    out, lse = mosaic(args | alone | {"topk_length": jnp.array([1700], jnp.int32)}, batch_invariant=True)
    results.append((np.asarray(out[0]).view(np.uint16), np.asarray(lse[0])))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1])
def test_pool_beyond_int32_bytes(fmt):
    """8.6 GiB of cache, all NaN but for the last pages, which are the ones named."""
    args = sparse_cases.build(dataclasses.replace(BASE, fmt=fmt, extra=None))
    small = args["cache"]
    want = sparse_cases.expected(**args)
    data = cases.large_pool(small.data, 8.6, 0xFF)
    indices = np.array(args["indices"])
    named = (indices >= 0) & (indices < small.num_slots)
    indices = np.where(named, indices + (len(data) - small.num_pages) * small.page_size, -1).astype(np.int32)
    args |= {"cache": mla_jax.PagedKVCache(data, fmt, small.page_size), "indices": jnp.asarray(indices)}
    cases.assert_close(mosaic(args), want)


@pytest.mark.gpu
def test_stale_plan_gives_the_right_answer():
    args = sparse_cases.build(BASE)
    want = sparse_cases.expected(**args)
    for stale in ([0] * 6, [1, 100, 100, 64, 7, 100], [2**31 - 1] * 6):
        plan = mla_jax.plan_sparse_decode(
            100, batch=6, s_q=2, num_heads=16, topk_length=jnp.array(stale, jnp.int32), extra_topk=64,
            extra_topk_length=jnp.array(stale[::-1], jnp.int32),
        )  # fmt: skip
        cases.assert_close(mosaic(args, plan), want)


@pytest.mark.gpu
def test_nan_scale_of_a_key_makes_its_row_nan():
    args = sparse_cases.build(dataclasses.replace(BASE, extra=None, keys="all", sink=False))
    cache, slot = args["cache"], int(args["indices"][2, 1, 5])
    page, offset = divmod(slot, cache.page_size)
    place = cache.format.area_offset_bytes(1, cache.page_size) + cache.format.record_bytes[1] * offset
    args["cache"] = cache.replace(cache.data.at[page, place].set(255))
    out, lse = mosaic(args)
    names_it = np.asarray((args["indices"] == slot).any(-1))
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).all((-1, -2)), names_it)
    np.testing.assert_array_equal(np.isnan(np.asarray(lse)).all(-1), names_it)
