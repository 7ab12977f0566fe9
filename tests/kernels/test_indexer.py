"""The indexer's kernels, interpreted on the CPU, against numpy; `-m aot` compiles them for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import PagedKVCache, append_kv, unpack_kv
from pallas_kernels import aot
from pallas_kernels.formats import BF16_512, INDEX_FP8
from pallas_kernels.indexer import scores, topk


def check_topk(values, visible, k, columns):
    for row, n, got in zip(values, visible, columns, strict=True):
        n = int(np.clip(n, 0, len(row)))
        chosen, rest = got[: min(n, k)], got[min(n, k) :]
        assert (rest == -1).all() and len(set(chosen.tolist())) == len(chosen)
        assert ((chosen >= 0) & (chosen < n)).all()
        np.testing.assert_array_equal(np.sort(row[chosen]), np.sort(row[:n])[::-1][: len(chosen)][::-1])


@pytest.mark.parametrize(
    ("n", "k", "pieces"),
    [(1, 1, 1), (100, 16, 1), (1000, 130, 1), (900, 100, 4), pytest.param(2000, 128, 8, marks=pytest.mark.slow)],
)
def test_topk(n, k, pieces, monkeypatch):
    if pieces > 1:
        monkeypatch.setattr(topk, "MAX_COLUMNS", 256)
    rng = np.random.default_rng(n)
    values = rng.standard_normal((6, n)).astype(np.float32)
    values[1] = rng.integers(-1, 2, n)  # ties
    values[2] = -np.inf
    values[3, n // 2 :] = np.nan  # not visible
    visible = np.array([n, n, n, n // 2, 0, n + 5], np.int32)
    columns = np.asarray(topk.topk(jnp.asarray(values), jnp.asarray(visible), k, interpret=True))
    check_topk(values, visible, k, columns)


def test_topk_prefers_low_columns_among_equals():
    columns = topk.topk(jnp.ones((1, 700)), jnp.array([650], jnp.int32), 64, interpret=True)
    assert set(columns[0].tolist()) == set(range(64))


def test_topk_refuses_more_than_half_a_program():
    with pytest.raises(NotImplementedError, match="k=20000"):
        topk.topk(jnp.ones((1, 30_000)), jnp.array([1], jnp.int32), 20_000)


@pytest.mark.parametrize(("s", "heads", "page"), [(1, 64, 64), (3, 16, 16)])
def test_scores(s, heads, page):
    check_scores(s, heads, page, interpret=True)


def check_scores(s, heads, page, interpret):
    rng = np.random.default_rng(0)
    b, columns, pages = 2, 5, 12
    keys = jnp.asarray(rng.standard_normal((pages * page, 128)), jnp.bfloat16)
    slots = jnp.arange(pages * page, dtype=jnp.int32)
    cache = append_kv(PagedKVCache.zeros(INDEX_FP8, pages, page), keys, slots, scale_rule="pow2_low")
    rows = np.asarray(unpack_kv(cache), np.float64).reshape(pages, page, 128)
    table = rng.permutation(pages)[: b * columns].reshape(b, columns).astype(np.int32)
    table[1, 2], table[0, 3] = -1, 2**31 - 1
    q = rng.standard_normal((b, s, heads, 128)).astype(jnp.bfloat16)
    q = (q * 2.0 ** rng.integers(-100, 100, (b, s, heads, 1))).astype(jnp.bfloat16)  # far outside float16's range
    w = rng.standard_normal((b, s, heads)).astype(np.float32)
    visible = np.tile(np.array([[columns * page], [2 * page + 3]], np.int32), (1, s))
    got = scores.scores(
        *map(jnp.asarray, (q, w, cache.data, table, visible)), page_size=page, interpret=interpret
    )  # [b, s, n]
    for r in range(b):
        for t in range(visible[r, 0]):
            p = table[r, t // page]
            if not 0 <= p < pages:
                assert (got[r, :, t] == -np.inf).all()
                continue
            terms = np.maximum(np.einsum("shd,d->sh", q[r].astype(np.float64), rows[p, t % page]), 0) * w[r]
            assert (np.abs(got[r, :, t] - terms.sum(-1)) <= 1e-3 * np.abs(terms).sum(-1) + 1e-30).all()


def test_scores_refuse_what_they_do_not_read():
    cases = {
        "BF16_512": (BF16_512, 64, 64, 1), "page_size=24": (INDEX_FP8, 24, 64, 1), "num_heads=4": (INDEX_FP8, 64, 4, 1),
        "num_queries=17": (INDEX_FP8, 64, 64, 17),
    }  # fmt: skip
    for reason, arguments in cases.items():
        with pytest.raises(NotImplementedError, match=reason):
            scores.check(*arguments)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_kernels_compile_for_an_h100():
    try:
        device = aot._device("sm_90a")
    except RuntimeError as reason:
        pytest.skip(f"{reason} (dependency group aot)")
    sharding = jax.sharding.SingleDeviceSharding(device)

    def compile_for_h100(function, *shapes):
        with jax.default_device(device):
            shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
            return jax.jit(function).lower(*shapes).compile()

    f32, i32 = jnp.float32, jnp.int32
    for n in (32_768, 131_072):
        select = compile_for_h100(lambda x, v: topk.topk(x, v, 2048), ((4, n), f32), ((4,), i32))
        assert "index_topk" in select.as_text()
    score = compile_for_h100(
        lambda *a: scores.scores(*a, page_size=64),
        *(((2, 1, 64, 128), jnp.bfloat16), ((2, 1, 64), f32), ((9, 64 * 132), jnp.uint8), ((2, 4), i32), ((2, 1), i32)),
    )
    assert "index_scores" in score.as_text()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("n", "k"), [(100, 16), (32_768, 2048), (131_072, 2048)])
def test_topk_on_a_gpu(n, k):
    rng = np.random.default_rng(n)
    values = rng.standard_normal((64, n)).astype(np.float32)
    values[1] = rng.integers(-1, 2, n)  # ties
    values[2] = -np.inf
    visible = rng.integers(0, n + 1, 64).astype(np.int32)
    visible[:4] = n
    columns = jax.jit(topk.topk, static_argnums=2)(values, visible, k)
    check_topk(values, visible, k, np.asarray(columns))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("s", "heads", "page"), [(1, 64, 64), (3, 16, 16)])
def test_scores_on_a_gpu(s, heads, page):
    check_scores(s, heads, page, interpret=False)
