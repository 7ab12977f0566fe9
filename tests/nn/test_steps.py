"""Decode steps as a serving loop makes them: several tokens at once, ragged and padded batches, joins and leaves."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from driver import Runner, relative

from mla_jax.nn import Model1Config, Model1Tables, PagePool, V32Config, init_params, model1, v32
from tests.compiling import QUICK

KINDS = ("v32", "ratio0", "ratio4", "ratio128")
F32_LIMIT, FP8_LIMIT = 2e-5, 2e-3


def by_kind(*default):
    """All kinds; those named are in the default run, which has no time for more."""
    return [pytest.param(kind, marks=[] if kind in default else pytest.mark.slow) for kind in KINDS]


def make(kind, cache="f32", **changes):
    """A small config with one layer, its parameters, and the oracle x [t, hidden] -> out [t, hidden]."""
    if kind == "v32":
        config = V32Config.small(cache=cache, **changes)
    else:
        config = Model1Config.small(cache=cache, ratios=(int(kind.removeprefix("ratio")),), window=24, **changes)
    params = init_params(config, 0, jax.random.key(7))
    if kind == "v32":
        return config, params, lambda x: oracle.v32(config, params, x)[0]
    return config, params, lambda x: oracle.model1(config, config.ratios[0], params, x)[0]


def tokens(rng, *shape):
    return rng.standard_normal((*shape, 64)).astype(np.float32)


@pytest.mark.parametrize("cache", ["f32", pytest.param("fp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", by_kind("ratio4"))
def test_three_tokens_at_once_equal_three_steps(kind, cache):
    """At every phase of a ratio-4 window and of a page, over a batch whose requests differ in phase."""
    config, params, _ = make(kind, cache)
    x = tokens(np.random.default_rng(0), 2, 150)
    one, three = (Runner(config, params, batch=2, step_tokens=128) for _ in range(2))
    lengths = np.array([125, 122])
    for runner in (one, three):
        runner.prefill(x[:, :128], lengths=lengths)
    for _ in range(4):
        new = np.stack([x[r, n : n + 3] for r, n in enumerate(lengths)])
        got = three.decode(new, lengths + 3)
        want = np.concatenate([one.decode(new[:, i : i + 1], lengths + i + 1) for i in range(3)], axis=1)
        assert relative(got, want) < (F32_LIMIT if cache == "f32" else FP8_LIMIT)
        lengths = lengths + 3
    # Pools agree too, bit for bit where rows are integers or float32 sums of the same order.
    if cache == "fp8" and kind != "v32":
        window = [np.asarray(runner.cache.window.data) for runner in (one, three)]
        assert (window[0] != window[1]).mean() < 1e-3


@pytest.mark.parametrize("kind", by_kind("ratio4"))
def test_rejected_tokens_can_be_taken_back(kind):
    """Drafts are written, rejected and overwritten: outputs follow the accepted tokens alone."""
    config, params, reference = make(kind)
    rng = np.random.default_rng(1)
    x = tokens(rng, 1, 160)
    runner = Runner(config, params, step_tokens=128)
    runner.prefill(x[:, :128], lengths=[120])
    n, outs = 120, []
    while n < 150:
        accepted = int(rng.integers(1, 4))
        step = x[:, n : n + 3].copy()
        step[:, accepted:] = tokens(rng, 3 - accepted)  # drafts that turn out wrong
        outs.append(runner.decode(step, [n + 3])[0, :accepted])
        n += accepted
    want = reference(x[0, :n].astype(np.float64))[120:]
    assert relative(np.concatenate(outs), want) < F32_LIMIT


@pytest.mark.parametrize("kind", by_kind("v32"))
def test_ragged_batches_and_padded_rows(kind):
    """Requests of any length share a batch; rows of length 0 with garbage tables and NaN inputs disturb nobody."""
    config, params, reference = make(kind)
    x = tokens(np.random.default_rng(2), 4, 130)
    lengths = np.array([97, 0, 128, 3])
    runner = Runner(config, params, batch=4, step_tokens=128)
    x[1] = np.nan
    runner.tables = jax.tree.map(lambda t: t.at[1].set(np.int32(2**31 - 1)), runner.tables)
    before = jax.tree.map(np.asarray, runner.cache)
    padded = np.where(np.arange(128)[None, :, None] < lengths[:, None, None], x[:, :128], np.nan)
    out = runner.prefill(padded, lengths=lengths)
    for r, n in enumerate(lengths):
        assert (out[r, n:] == 0).all()
        if n:
            assert relative(out[r, :n], reference(x[r, :n].astype(np.float64))) < F32_LIMIT
    seqlens = np.where(lengths > 0, lengths + 1, 0)
    step = runner.decode(np.stack([x[r, n : n + 1] for r, n in enumerate(lengths)]), seqlens)
    for r, n in enumerate(lengths):
        if n:
            assert relative(step[r, 0], reference(x[r, : n + 1].astype(np.float64))[n]) < F32_LIMIT
    assert (step[1] == 0).all()
    # A step of padded rows alone writes nothing at all.
    kept = jax.tree.map(np.asarray, runner.cache)
    runner.decode(np.full((4, 1, 64), np.nan, np.float32), np.zeros(4, np.int32))
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, runner.cache))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), before, kept)
    assert not any(jax.tree.leaves(same))


class Server:
    """Four rows, requests that join and leave between steps. One compiled prefill and one compiled step for all."""

    def __init__(self, config, params):
        self.config, self.params, self.batch = config, params, 4
        self.is_v32 = isinstance(config, V32Config)
        if self.is_v32:
            self.module, self.pools = v32, {"kv": PagePool(14, 16, batch=4, columns=6)}
            self.cache = v32.init_cache(config, 14, 16)
        else:
            self.module = model1
            self.pools = {
                "window": PagePool(14, 16, batch=4, columns=3, ring=True),
                "context": PagePool(5, config.page_tokens, batch=4, columns=1),
            }
            self.cache = model1.init_cache(config, window_pages=14, context_pages=5, rows=4, window_page_size=16)
        jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=QUICK)
        self.prefill = jit(chex.assert_max_traces(self._prefill, 1))
        self.decode = jit(chex.assert_max_traces(self._decode, 1))

    def _prefill(self, params, cache, x, tables, lengths):
        return self.module.prefill(params, self.config, cache, x, tables, lengths)

    def _decode(self, params, cache, x, tables, seqlens):
        return self.module.decode(params, self.config, cache, x, tables, seqlens)

    def tables(self):
        if self.is_v32:
            return jnp.asarray(self.pools["kv"].table)
        row = np.arange(4, dtype=np.int32)[::-1].copy()
        return Model1Tables(*(jnp.asarray(a) for a in (self.pools["window"].table, self.pools["context"].table, row)))

    def grow(self, new):
        for pool in self.pools.values():
            seqlens = pool.grow(new)
        return jnp.asarray(np.where(new > 0, seqlens, 0), jnp.int32)

    def leave(self, row):
        for pool in self.pools.values():
            pool.leave(row)


@pytest.mark.parametrize("kind", ["v32", "ratio4", pytest.param("ratio128", marks=pytest.mark.slow)])
def test_continuous_batching_without_recompiling(kind):
    """64 steps, requests joining and leaving by block table alone; every output is checked against the oracle."""
    config, params, reference = make(kind, page_tokens=128) if kind != "v32" else make(kind)
    chex.clear_trace_counter()  # it counts by source line: one parametrised case would count for the next
    server, rng = Server(config, params), np.random.default_rng(3)
    running, done, joined = {}, [], 0  # row -> [tokens [n, hidden], outputs]

    def join(row):
        prompt = tokens(rng, int(rng.integers(1, 17)))
        x = np.full((4, 16, 64), np.nan, np.float32)
        x[row, : len(prompt)] = prompt
        lengths = np.where(np.arange(4) == row, len(prompt), 0).astype(np.int32)
        server.grow(lengths)
        out, server.cache = server.prefill(params, server.cache, x, server.tables(), jnp.asarray(lengths))
        running[row] = [prompt, [np.asarray(out)[row, : len(prompt)]]]

    for _ in range(64):
        for row in range(4):
            if row not in running and rng.random() < 0.3:
                join(row)
                joined += 1
        x = np.full((4, 1, 64), np.nan, np.float32)
        for row in running:
            x[row] = tokens(rng, 1)
            running[row][0] = np.concatenate([running[row][0], x[row]])
        seqlens = server.grow(np.array([row in running for row in range(4)], np.int32))
        out, server.cache = server.decode(params, server.cache, x, server.tables(), seqlens)
        for row in list(running):
            running[row][1].append(np.asarray(out)[row])
            if rng.random() < 0.06 or len(running[row][0]) > 76:
                done.append(running.pop(row))
                server.leave(row)
    assert joined > 6 and len(done) > 3
    for history, outs in [*done, *running.values()]:
        assert relative(np.concatenate(outs), reference(history.astype(np.float64))) < F32_LIMIT


@pytest.mark.slow
def test_layers_share_pools_without_touching_each_other():
    """Layer 1 of three, decoded alone: its output is that of a cache of its own, the other layers' pages stay."""
    config, params, _ = make("v32")
    shared = dataclasses.replace(config, num_layers=3)
    x = tokens(np.random.default_rng(4), 2, 20)
    alone, among = Runner(config, params, batch=2, capacity=32), Runner(shared, params, batch=2, capacity=32, layer=1)
    np.testing.assert_array_equal(alone.prefill(x), among.prefill(x))
    for got, want in ((among.cache.kv, alone.cache.kv), (among.cache.index, alone.cache.index)):
        layers = np.asarray(got.data).reshape(3, -1, *want.data.shape[1:])
        np.testing.assert_array_equal(layers[1], np.asarray(want.data))
        assert np.isnan(layers[0]).all() and np.isnan(layers[2]).all()
    config = Model1Config.small(cache="f32", ratios=(4, 0, 4, 128), window=24)
    params = init_params(config, 2, jax.random.key(0))
    among = Runner(config, params, batch=2, capacity=32, layer=2, step_tokens=20)
    alone = Runner(dataclasses.replace(config, ratios=(4,)), params, batch=2, capacity=32, step_tokens=20)
    np.testing.assert_array_equal(alone.prefill(x), among.prefill(x))
    entries = np.asarray(among.cache.ratio4.entries.data)
    np.testing.assert_array_equal(entries[len(entries) // 2 :], np.asarray(alone.cache.ratio4.entries.data))
    assert np.isnan(entries[: len(entries) // 2]).all()


@pytest.mark.parametrize("kind", by_kind("v32"))
def test_tokens_without_a_place_are_not_written(kind):
    """Under jit: past the table, or without a page, the output is NaN and nothing is lost; neighbours do not notice."""
    config, params, reference = make(kind)
    x = tokens(np.random.default_rng(5), 2, 40)
    runner = Runner(config, params, batch=2, step_tokens=40, capacity=256)
    runner.prefill(x, lengths=[39, 39])
    if kind == "v32":
        tables = runner.tables.at[0, 39 // 16].set(-1)
    elif kind == "ratio0":
        tables = dataclasses.replace(runner.tables, window=runner.tables.window.at[0, 39 // 16].set(10**6))
    elif kind == "ratio4":
        tables = dataclasses.replace(runner.tables, context=runner.tables.context.at[0, 0].set(-5))
    else:
        tables = dataclasses.replace(runner.tables, row=runner.tables.row.at[0].set(99))
    kept_tables, runner.tables = runner.tables, tables
    out = runner.decode(x[:, 39:], [40, 40])
    assert np.isnan(out[0]).all()
    want = reference(x[1].astype(np.float64))[39]
    assert relative(out[1, 0], want) < F32_LIMIT
    runner.tables = kept_tables  # the request gets its page after all: nothing was lost
    out = runner.decode(x[:, 39:], [40, 40])
    assert relative(out[0, 0], reference(x[0].astype(np.float64))[39]) < F32_LIMIT
    if kind != "ratio0":  # a window never runs out of table
        assert np.isnan(runner.decode(x[:, 39:], [4000, 40])[0]).all()
