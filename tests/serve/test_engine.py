"""The serving loop: pages, joins and leaves, and logits that depend on nobody else."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mla_jax.serve import BlockAllocator, Engine, ModelConfig, PoolExhausted, init_params
from mla_jax.sharding import DecodeSharding

BATCH, LAYERS = 4, 2
# A request's logits in a full batch against alone, and on a mesh against one device: largest difference over largest
# logit. float32 throughout ("v3" exact), or fp8 caches, where the last bit of a row to cache may round the other way.
EXACT, FP8 = 1e-4, 0.1


def sharding(data=1, heads=1, context=1):
    kinds = (AxisType.Auto,) * 3
    devices = jax.devices()[: data * heads * context]
    mesh = jax.make_mesh((data, heads, context), ("d", "h", "c"), axis_types=kinds, devices=devices)
    return DecodeSharding(mesh, "d", "h", "c")


def config(kind="v3"):
    sizes = dict(num_heads=4, vocab_size=64, page_size=4, max_pages=6, prompt_pages=2, window=9)
    return ModelConfig(kind, LAYERS, **sizes, exact=True)


def engine(ds, logits, *, kind="v3", pages=8, system_prompt=(5, 3, 60, 7, 1)):
    """An engine that writes down every request's logits by position; a request that is fed again must repeat them."""

    def record(request, position, row):
        logits.setdefault(request.id, {}).setdefault(position, []).append(row)

    params = init_params(config(kind), ds)
    return Engine(
        config(kind), ds, params, batch=BATCH, num_pages=pages * LAYERS, system_prompt=system_prompt, on_logits=record
    )


def difference(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


def churn(e, steps, seed=0):
    """Random joins and leaves for some steps; returns every request's first tokens and length by id."""
    rng = np.random.default_rng(seed)
    asked = {}
    for _ in range(steps):
        if rng.random() < 0.3 and len(e.waiting) < 4:
            tokens, most = rng.integers(0, 64, int(rng.integers(1, 6))).tolist(), int(rng.integers(7, 25))
            asked[e.submit(tokens, most)] = tokens, most
        if rng.random() < 0.03 and asked:
            e.cancel(int(rng.choice(list(asked))))
        e.step()
        e.pages.check()
    return asked


def assert_equal_to_alone(logits, asked, ids, ds, *, kind="v3", bound=EXACT):
    """Feeds the same requests one at a time to an engine of the same shapes, with pages in plenty."""
    alone: dict = {}
    e = engine(ds, alone, kind=kind, pages=8)
    for id in ids:
        e.submit(*asked[id], id=id)
        e.run()
        for position, rows in logits[id].items():
            for row in rows:
                assert difference(row, alone[id][position][0]) <= bound, (id, position)


def run_churn(steps, compared):
    logits: dict = {}
    ds = sharding()
    e = engine(ds, logits, pages=8)  # a layer's pages: four requests may want 24
    asked = churn(e, steps)
    assert e.num_preempted > steps // 100 and len(e.finished) > steps // 60  # the pool did run dry
    finished = sorted(e.finished)
    ids = finished[:: max(1, len(finished) // compared)]
    assert_equal_to_alone(logits, asked, ids, ds)
    e.run()
    assert e.pages.num_free == 8 and (e.pages.table == -1).all()


def test_joins_and_leaves():
    run_churn(150, compared=4)


@pytest.mark.slow
def test_two_thousand_steps():
    run_churn(2000, compared=60)


@pytest.mark.parametrize("kind", ["v32", "model1"])
@pytest.mark.slow
def test_joins_and_leaves_with_fp8_caches(kind):
    logits: dict = {}
    ds = sharding()
    e = engine(ds, logits, kind=kind)
    asked = churn(e, 150)
    assert_equal_to_alone(logits, asked, sorted(e.finished)[:4], ds, kind=kind, bound=FP8)


def teacher_forced(ds, kind):
    """Logits of fixed texts [requests, positions, vocab]: every token is given, nothing is sampled."""
    logits: dict = {}
    e = engine(ds, logits, kind=kind, pages=32)
    rng = np.random.default_rng(1)
    for _ in range(3):
        e.submit(rng.integers(0, 64, 14).tolist(), 15)
    e.run()
    e.pages.check()
    return np.stack([[logits[id][t][0] for t in range(14)] for id in sorted(logits)])


@pytest.mark.parametrize(
    "kind, sizes, bound",
    [
        pytest.param("v3", (2, 2, 2), EXACT, marks=pytest.mark.slow),
        pytest.param("v32", (2, 2, 2), FP8, marks=pytest.mark.slow),
        pytest.param("model1", (2, 2, 2), FP8, marks=pytest.mark.slow),
        pytest.param("v3", (4, 1, 2), EXACT, marks=pytest.mark.slow),
        pytest.param("v3", (1, 2, 4), EXACT, marks=pytest.mark.slow),
    ],
)
def test_sharded_logits(kind, sizes, bound):
    assert difference(teacher_forced(sharding(*sizes), kind), teacher_forced(sharding(), kind)) <= bound


def test_the_system_prompt_is_read():
    """Two prompts, two results; and the first step of a request sees the whole prompt."""
    first, second = {}, {}
    for logits, prompt in ((first, (5, 3)), (second, (5, 4))):
        e = engine(sharding(), logits, system_prompt=prompt)
        e.submit([9], 2)
        e.run()
    assert difference(first[0][0][0], second[0][0][0]) > 1e-2


def test_draws_do_not_depend_on_the_batch():
    logits: dict = {}
    crowd, alone = (engine(sharding(), logits, pages=8) for _ in range(2))
    for id in range(5):
        crowd.submit([id + 1, 2], 12, id=id)
    crowd.run()
    alone.submit([4, 2], 12, id=3)
    alone.run()
    assert crowd.finished[3].tokens == alone.finished[3].tokens and len(alone.finished[3].tokens) == 12


# -- pages ---------------------------------------------------------------------------------------------------------


def allocator(ds, pages=16, max_pages=4):
    return BlockAllocator(ds, num_pages=pages, num_layers=2, page_size=2, b=4, max_pages=max_pages)


def test_pages_come_from_the_right_parts_and_go_back():
    pages = allocator(sharding(2, 1, 2))  # four parts of 4 pages, two of them layer 0's
    assert pages.layer_stride == 2 and pages.num_free == 8
    for _ in range(5):
        pages.grow(0)
        pages.check()
    assert [p in range(0, 2) for p in pages.table[0, [0, 2]]] == [True, True] and pages.table[0, 1] in range(4, 6)
    with pytest.raises(PoolExhausted, match="data group 0, context rank 0 has no free page"):
        pages.grow(1)
    assert (pages.table[1] == -1).all() and pages.tokens[1] == 0
    pages.grow(2)
    assert pages.table[2, 0] in range(8, 10)
    pages.leave(0)
    pages.check()
    assert pages.free_in(0) == 4


def test_a_full_table():
    pages = allocator(sharding(), max_pages=1)
    pages.grow(0)
    pages.grow(0)
    with pytest.raises(ValueError, match="row 0 holds 2 tokens, all that its table has room for"):
        pages.grow(0)


@pytest.mark.parametrize("damage", ["lost", "twice", "elsewhere", "idle"])
def test_check_finds_damage(damage):
    pages = allocator(sharding(2, 1, 1))
    pages.grow(0)
    pages.grow(2)
    if damage == "lost":
        pages.table[0, 0] = -1
    elif damage == "twice":
        pages.table[0, 0] = pages.table[2, 0]
    elif damage == "elsewhere":
        pages.table[[0, 2], 0] = pages.table[[2, 0], 0]
    else:
        pages.tokens[0] = 0
    with pytest.raises(AssertionError):
        pages.check()


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="num_pages=10; accepted: a multiple of 8"):
        allocator(sharding(2, 1, 2), pages=10)
    e = engine(sharding(), {})
    with pytest.raises(ValueError, match=r"max_tokens=25; accepted: .* up to 24"):
        e.submit([1], 25)
    with pytest.raises(ValueError, match="a request of 0 tokens"):
        e.submit([], 3)
    assert not e.cancel(17)
    with pytest.raises(ValueError, match="system_prompt has 9 tokens; accepted: up to 8"):
        engine(sharding(), {}, system_prompt=range(9))
    with pytest.raises(ValueError, match="kind='v5'"):
        ModelConfig("v5")
    explicit = DecodeSharding(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match="accepted: Auto"):
        engine(explicit, {})
