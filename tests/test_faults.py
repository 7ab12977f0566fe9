"""Faults stay where they are: a corrupt page, a NaN in one request's q. (Plans made for other lengths: test_ops.py.)

What docs/hardening.md promises: a sparse row suffers if it reads a bad key or has a bad query; so does, in a dense
call, any row of a request one of whose rows reads a bad key. Everybody else's bits do not change.
"""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import reference
from tests import samples
from tests.kernels import test_dense_interpreted, test_sparse_interpreted

by_name = lambda fmt: fmt.name  # noqa: E731


def corrupt(cache, page):
    """NaN in every byte or value of a page."""
    data = np.array(cache.data)
    data[page] = 0xFF if cache.format.is_quantized else np.nan
    return cache.replace(jnp.asarray(data))


def xla_dense(call):
    return mla_jax.mla_decode(**call, return_lse=True)


def xla_sparse(call):
    return mla_jax.sparse_mla_decode(**call, return_lse=True)


def reference_dense(call):
    return reference.mla_decode(**call)


def reference_sparse(call):
    return reference.sparse_mla_decode(**call)


def interpreted_dense(call):
    return test_dense_interpreted.decode(call, num_parts=2)


def assert_only_these_suffer(got, clean, bad):
    """`bad` bool [b] or [b, s_q]: there NaN, everywhere else the bits of the clean result."""
    bad = np.asarray(bad)
    for x, y in zip(got, clean, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.isnan(x[bad].astype(np.float32)).all()
        chex.assert_trees_all_equal(x[~bad], y[~bad])
    assert bad.any() and not bad.all()


def dense_call(fmt, page_size=5):
    rng = np.random.default_rng(0)
    call = samples.dense_call(rng, fmt, b=3, s_q=2, h=4, page_size=page_size, max_pages=3, lengths=[15, 11, 0])
    return call | {"cache": samples.random_cache(rng, fmt, call["cache"].num_pages, page_size)}


@pytest.mark.parametrize(
    ("fmt", "run"), [(mla_jax.V32, xla_dense), (mla_jax.BF16_576, xla_dense), (mla_jax.MODEL1, reference_dense)]
)
def test_a_corrupt_page_in_a_dense_call(fmt, run):
    call = dense_call(fmt)
    clean = run(call)
    page = int(call["block_table"][1, 2])  # holds the last token of request 1
    assert_only_these_suffer(run(call | {"cache": corrupt(call["cache"], page)}), clean, [False, True, False])
    idle = int(call["block_table"][2, 0])  # of the request that has no tokens
    chex.assert_trees_all_equal(run(call | {"cache": corrupt(call["cache"], idle)}), clean)


@pytest.mark.parametrize(
    ("fmt", "run", "scope"),
    [(mla_jax.V32, xla_sparse, ""), (mla_jax.MODEL1, xla_sparse, "extra_"), (mla_jax.V32, reference_sparse, "extra_")],
)
def test_a_corrupt_page_in_a_sparse_call(fmt, run, scope):
    rng = np.random.default_rng(1)
    call = samples.sparse_call(rng, fmt, fmt, b=3, s_q=2, h=2, topk=12, extra_topk=9)
    for name, pages, size in (("cache", 9, 7), ("extra_cache", 30, 2)):
        call[name] = samples.random_cache(rng, fmt, pages, size)
    clean = run(call)
    cache, indices, length = (call[f"{scope}{name}"] for name in ("cache", "indices", "topk_length"))
    slots = np.asarray(indices)
    counted = (np.arange(slots.shape[-1]) < np.asarray(length)[..., None]) & (slots >= 0) & (slots < cache.num_slots)
    page = slots[counted][0] // cache.page_size
    reads = (counted & (slots // cache.page_size == page)).any(-1)  # [b, s_q]
    sinks = np.asarray(call["attn_sink"])
    assert np.isposinf(sinks).any()  # a sink that leaves nothing of out does not hide a NaN
    assert_only_these_suffer(run(call | {f"{scope}cache": corrupt(cache, page)}), clean, reads)


@pytest.mark.parametrize("run", [xla_dense, reference_dense], ids=["xla", "reference"])
def test_a_nan_in_one_query(run):
    """One value of one head: that row of that head, nothing else."""
    call = dense_call(mla_jax.BF16_576)
    clean = run(call)
    bad = np.zeros((3, 2, 4), bool)
    bad[0, 1, 2] = True
    assert_only_these_suffer(run(call | {"q": call["q"].at[0, 1, 2, 17].set(jnp.nan)}), clean, bad)
    # A query without keys has nothing to multiply with.
    chex.assert_trees_all_equal(run(call | {"q": call["q"].at[2].set(jnp.nan)}), clean)


@pytest.mark.slow  # a minute each: interpreted kernels
@pytest.mark.parametrize("fault", ["page", "q"])
def test_faults_in_the_interpreted_dense_kernel(fault):
    call = dense_call(mla_jax.BF16_576, page_size=64)
    call["cache_seqlens"] = jnp.asarray([100, 130, 0], jnp.int32)
    clean = interpreted_dense(call)
    if fault == "q":
        broken = call | {"q": call["q"].at[1].set(jnp.nan)}
    else:
        broken = call | {"cache": corrupt(call["cache"], int(call["block_table"][1, 1]))}
    assert_only_these_suffer(interpreted_dense(broken), clean, [False, True, False])


@pytest.mark.slow  # a minute each: interpreted kernels
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=by_name)
def test_a_corrupt_page_in_the_interpreted_sparse_kernel(fmt):
    rng = np.random.default_rng(2)
    q = samples.rows(rng, 2, 1, 4, fmt=fmt)
    cache = samples.random_cache(rng, fmt, 4, 8)
    indices = jnp.asarray([[[0, 3, 9, -1]], [[1, 17, 25, 2]]], jnp.int32)
    call = dict(q=q, cache=cache, indices=indices, sm_scale=0.05)
    clean = test_sparse_interpreted.decode(call)
    got = test_sparse_interpreted.decode(call | {"cache": corrupt(cache, 2)})  # slots 16 to 23
    assert_only_these_suffer(got, clean, [False, True])
