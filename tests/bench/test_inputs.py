"""Arrays for the benchmark: every set reads its own pages, every query its own request's."""

import jax
import numpy as np
import pytest

from mla_jax.bench import inputs
from mla_jax.bench.workloads import SUITES, WORKLOADS, Dense, Scope, Sparse
from pallas_kernels.formats import MODEL1, V32

DENSE = Dense(name="dense", b=3, s_q=2, h=4, s_k=130)
SPARSE = Sparse(
    name="sparse", b=3, s_q=2, h=4,
    main=Scope(fmt=MODEL1, page_size=64, s_kv=256, topk=32),
    extra=Scope(fmt=MODEL1, page_size=2, s_kv=128, topk=128, varlen=True),
)  # fmt: skip


def test_dense_sets_are_disjoint():
    arrays = inputs.build(DENSE, sets=2)
    tables = np.concatenate([np.asarray(s["block_table"]).ravel() for s in arrays.sets])
    assert sorted(tables) == list(range(2 * 3 * 3))
    assert arrays.caches["cache"].num_pages >= tables.size
    assert not np.array_equal(arrays.sets[0]["q"], arrays.sets[1]["q"])
    np.testing.assert_array_equal(arrays.sets[0]["cache_seqlens"], [130] * 3)


def test_sparse_slots():
    arrays = inputs.build(SPARSE, sets=2)
    for name, scope in (("indices", SPARSE.main), ("extra_indices", SPARSE.extra)):
        slots = np.stack([s[name] for s in arrays.sets])  # [sets, b, s_q, topk]
        assert slots.shape == (2, 3, 2, scope.topk) and slots.dtype == np.int32
        assert all(np.unique(row).size == scope.topk for row in slots.reshape(-1, scope.topk))
        pages = slots // scope.page_size
        owners = {}
        for s, r in np.ndindex(2, 3):
            for page in np.unique(pages[s, r]):
                assert owners.setdefault(page, (s, r)) == (s, r)  # one request of one set owns a page
        assert slots.max() < arrays.caches["cache" if name == "indices" else "extra_cache"].num_slots
    np.testing.assert_array_equal(arrays.sets[0]["extra_topk_length"], SPARSE.extra.lengths(3))


@pytest.mark.parametrize("workload", SUITES["plan"], ids=lambda w: w.name)
def test_plans_of_the_suite_depend_on_their_lengths(workload):
    """One that does not is a constant, without a kernel, and its time that of a copy."""
    plan = jax.jit(lambda args: inputs.call(workload, {}, args))
    (args,) = inputs.build(workload).sets
    assert "mosaic_gpu_v2" in plan.trace(args).lower(lowering_platforms=("cuda",)).as_text()


def test_same_seed_same_arrays():
    one, two, other = (inputs.build(DENSE, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.caches["cache"].data, two.caches["cache"].data)
    assert not np.array_equal(one.caches["cache"].data, other.caches["cache"].data)


def test_pool_is_filled_piece_by_piece(monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", 2 * 4 * 576 * 4)  # two pages of four tokens
    cache = inputs.random_cache(V32, pages=5, page_size=4)
    pages = np.asarray(cache.data)
    assert cache.num_pages == 6 and all(page.any() for page in pages)
    assert len({page.tobytes() for page in pages}) == 6  # no piece was drawn or written twice


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("dense-b128-sq1-h128-sk4096", 1),  # 637 MB: no L2 holds that
        ("dense-b1-sq1-h128-sk8192", 11),  # 9.7 MB
        ("dense-b1-sq1-h128-sk1024", 72),
        ("append-v32-b128", 1),
        ("plan-dense-b128-sq1-h128-sk4096", 1),
    ],
)
def test_sets_outgrow_the_l2(name, sets):
    assert inputs.num_sets(WORKLOADS[name], 50 << 20) == sets
