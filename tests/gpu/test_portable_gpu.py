"""The portable kernels on a GPU (compute capability 8.0 and above), against the reference.

`pytest -m gpu tests/gpu/test_portable_gpu.py` takes a small sample of the covering lists of shapes that the Mosaic
kernels are tested with, and formats that only these kernels take; `-m slow` takes more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import reference
from pallas_kernels.portable import PortableConfig
from tests import samples
from tests.gpu import cases, dense_cases, sparse_cases

SAMPLE = 6


@functools.partial(jax.jit, static_argnames=("is_causal", "batch_invariant", "config"))
def dense(args, *, is_causal=False, batch_invariant=False, config=None):
    q, cache = args["q"], args["cache"]
    plan = mla_jax.plan_decode(
        args["cache_seqlens"], s_q=q.shape[1], num_heads=q.shape[2], page_size=cache.page_size,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return mla_jax.mla_decode(
        **args, is_causal=is_causal, plan=plan, config=config, implementation="triton", return_lse=True
    )


@functools.partial(jax.jit, static_argnames=("batch_invariant", "config"))
def sparse(args, *, batch_invariant=False, config=None):
    b, s_q, h, _ = args["q"].shape
    extra = args.get("extra_indices")
    plan = mla_jax.plan_sparse_decode(
        args["indices"].shape[-1], batch=b, s_q=s_q, num_heads=h, topk_length=args.get("topk_length"),
        extra_topk=0 if extra is None else extra.shape[-1], extra_topk_length=args.get("extra_topk_length"),
        batch_invariant=batch_invariant,
    )  # fmt: skip
    return mla_jax.sparse_mla_decode(**args, plan=plan, config=config, implementation="triton", return_lse=True)


def check_dense(case: dense_cases.Case):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, case.s_k + 1, case.b).astype(np.int32)
    args = dense_cases.build(case, lengths) | {"sm_scale": jnp.float32(dense_cases.SM_SCALE)}
    want = dense_cases.expected(**args, is_causal=case.is_causal)
    cases.assert_close(dense(args, is_causal=case.is_causal), want)


def check_sparse(case: sparse_cases.Case):
    args = sparse_cases.build(case)
    cases.assert_close(sparse(args, batch_invariant=case.batch_invariant), sparse_cases.expected(**args))


@pytest.mark.gpu
@pytest.mark.parametrize("case", dense_cases.pairwise()[:SAMPLE], ids=str)
def test_dense_sample(case):
    check_dense(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", sparse_cases.pairwise()[:SAMPLE], ids=str)
def test_sparse_sample(case):
    check_sparse(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", dense_cases.pairwise()[SAMPLE:60], ids=str)
def test_dense_sweep(case, request):
    cases.sweep(request, "portable_dense_sweep", case, check_dense)


@pytest.mark.slow
@pytest.mark.parametrize("case", sparse_cases.pairwise()[SAMPLE:40], ids=str)
def test_sparse_sweep(case, request):
    cases.sweep(request, "portable_sparse_sweep", case, check_sparse)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", samples.FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("h", [3, 40, 128])
def test_dense_formats(fmt, h):
    """NaN in every slot that no table names, causal, an empty request."""
    args = samples.dense_call(
        np.random.default_rng(7), fmt, page_size=61, s_q=2, h=h, max_pages=9, lengths=[0, 3, 549]
    )
    want = reference.mla_decode(**args, is_causal=True)
    samples.assert_equal_results(dense(args, is_causal=True), want, fmt)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PortableConfig(16, 16, 4, 1), PortableConfig(16, 32, 4, 2)], ids=str)
@pytest.mark.parametrize("fmt, extra", [(mla_jax.V32, mla_jax.BF16_576), (mla_jax.MODEL1, mla_jax.MODEL1)])
def test_configs(fmt, extra, config):
    args = samples.sparse_call(np.random.default_rng(7), fmt, extra, topk=300, extra_topk=130)
    samples.assert_equal_results(sparse(args, config=config), reference.sparse_mla_decode(**args), fmt)


@pytest.mark.gpu
def test_repeats_are_bit_identical():
    args = samples.dense_call(np.random.default_rng(7), mla_jax.V32, page_size=64, h=16, max_pages=40)
    first, *others = [jax.device_get(dense(args)) for _ in range(10)]
    for other in others:
        np.testing.assert_array_equal(first[0].view(np.uint16), other[0].view(np.uint16))
        np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.gpu
def test_batch_invariant_plan_ignores_neighbours():
    args = samples.dense_call(np.random.default_rng(7), mla_jax.BF16_576, page_size=64, h=16, max_pages=140)
    results = []
    for lengths in ([8960, 5000, 64], [0, 5000, 8960], [1, 5000, 1]):
        call = args | {"cache": jax.tree.map(jnp.nan_to_num, args["cache"])}
        out, lse = dense(call | {"cache_seqlens": jnp.asarray(lengths, jnp.int32)}, batch_invariant=True)
        results.append((np.asarray(out[1]).view(np.uint16), np.asarray(lse[1])))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=lambda f: f.name)
@pytest.mark.parametrize("gib", [3, 5])
def test_pools_beyond_int32_bytes(fmt, gib):
    """Up to 4 GiB of bytes Pallas' own offsets would be wrong. All NaN but for the last pages, which are named."""
    args = samples.sparse_call(np.random.default_rng(7), fmt, page_size=64, topk=200)
    want = reference.sparse_mla_decode(**args)
    small = args["cache"]
    data = cases.large_pool(small.data, gib, 0xFF)
    indices = np.array(args["indices"])
    named = (indices >= 0) & (indices < small.num_slots)
    indices = np.where(named, indices + (len(data) - small.num_pages) * 64, -1).astype(np.int32)
    args |= {"cache": small.replace(data), "indices": jnp.asarray(indices)}
    samples.assert_equal_results(sparse(args), want, fmt)
