"""Tables of configurations: read, refused, looked up under jit; and how they are chosen, by a made-up timer."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import cli, dispatch, tuning
from mla_jax.bench import inputs, runner, timer, tune, workloads
from pallas_kernels.dense_decode import DenseConfig, choose_config
from pallas_kernels.sparse_decode import SparseConfig
from pallas_kernels.sparse_decode.config import FEW_HEADS

DENSE = workloads.dense(8, 1, 16, 8192)
SPARSE = workloads.model1("c2", 8, 1)
FAST = DenseConfig(combine_rows=4)


def table(device="cpu"):
    entries = [
        tuning.Entry(tune.bucket_of(DENSE), FAST, {DENSE.name: (90.0, 100.0)}),
        tuning.Entry(tune.bucket_of(SPARSE), SparseConfig(softmax_registers=200), {SPARSE.name: (9.0, 10.0)}),
    ]
    return tuning.Table(device, mla_jax.__version__, jax.__version__, {e.bucket: e for e in entries})


def test_a_table_survives_the_file(tmp_path):
    table(jax.devices()[0].device_kind).save(tmp_path / "t.json")
    assert tuning.load(tmp_path / "t.json") == table(jax.devices()[0].device_kind)


def test_the_ops_arguments_find_what_the_workload_measured():
    found = table()
    call = inputs.abstract(DENSE)
    args = call.sets[0]
    assert found.dense(args["q"], call.caches["cache"], args["block_table"]) == FAST
    assert found.dense(args["q"], call.caches["cache"]) is None  # contiguous: one page a request
    call = inputs.abstract(SPARSE)
    args = call.sets[0]
    both = args["q"], call.caches["cache"], args["indices"], call.caches["extra_cache"], args["extra_indices"]
    assert found.sparse(*both) == SparseConfig(softmax_registers=200)
    assert found.sparse(*both[:3]) is None


def test_buckets_round_up_to_powers_of_two():
    one = tuning.Bucket.of("dense", "V32", 64, batch=5, rows=16, keys=4097)
    assert (one.batch, one.rows, one.keys) == (8, 16, 8192)
    assert tuning.Bucket.of("dense", "V32", 64, batch=0, rows=1, keys=0) == tuning.Bucket.of(
        "dense", "V32", 64, batch=1, rows=1, keys=1
    )


def test_lookups_are_static_under_jit():
    """The config reaches the kernel where there is one, and the same call runs here."""
    found = dataclasses.replace(table(), entries={})
    bucket = tuning.Bucket.of("dense", "BF16_576", 8, batch=2, rows=4, keys=24)
    found = dataclasses.replace(found, entries={bucket: tuning.Entry(bucket, FAST, {})})
    seen = []

    @jax.jit
    def step(q, cache, block_table, lengths):
        seen.append(found.dense(q, cache, block_table))
        return mla_jax.mla_decode(q, cache, block_table, lengths, sm_scale=0.1, config=seen[-1])

    args = (
        jnp.ones((2, 1, 4, 576), jnp.bfloat16),
        mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, 6, 8),
        jnp.zeros((2, 3), jnp.int32),
        jnp.asarray([3, 24], jnp.int32),
    )
    out = step(*args)
    assert seen == [FAST]
    np.testing.assert_array_equal(out, mla_jax.mla_decode(*args, sm_scale=0.1))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(device="NVIDIA B200"), "is for device 'NVIDIA B200'; accepted here: 'NVIDIA H200'. Measure anew"),
        (dict(mla_jax="0.0.1"), "is for mla-jax version '0.0.1'; accepted here: '0.1.0'"),
        (dict(layout=9), "is for layout 9"),
        (dict(entries=[{"op": "dense"}]), "holds an entry that this version cannot read"),
        (dict(entries=None), "holds an entry"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, said):
    data = json.loads(table("NVIDIA H200").dumps())
    assert tuning.loads(json.dumps(data), device="NVIDIA H200") == table("NVIDIA H200")
    with pytest.raises(ValueError, match=said):
        tuning.loads(json.dumps(data | change), device="NVIDIA H200")


@pytest.mark.parametrize(
    "change", [dict(producer_registers=25), dict(type="Nothing"), dict(colour="red"), dict(consumer_registers=256)]
)
def test_configs_in_a_table_are_checked(change):
    """Registers that would hang the GPU do not come in through a file."""
    data = json.loads(table().dumps())
    data["entries"][0]["config"] |= change
    with pytest.raises(ValueError, match="cannot read"):
        tuning.loads(json.dumps(data), device="cpu")


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", "null"])
def test_what_is_no_table(text):
    with pytest.raises(ValueError, match=r"x\.json is no tuning table.*`mla-jax tune` wrote"):
        tuning.loads(text, "x.json")


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_candidates_are_valid_and_begin_with_the_default():
    for workload in tune.tunable(list(workloads.WORKLOADS.values())):
        configs = tune.candidates(workload)
        few = isinstance(workload, workloads.Sparse) and workload.h <= FEW_HEADS  # a kernel without registers to choose
        assert len(configs) == len(set(configs)) > (1 if few else 3)
        assert {type(c) for c in configs} == {DenseConfig if isinstance(workload, workloads.Dense) else SparseConfig}
    assert tune.candidates(DENSE)[0] == choose_config(DENSE.page_size, contiguous=False)
    with pytest.raises(NotImplementedError):
        tune.candidates(DENSE, (8, 0))


def fake(monkeypatch, us_of, outputs=None):
    """`us_of(workload, config)` for a timer; the order of measurements is returned."""
    order = []

    class Chain:
        def __init__(self, compiled, arrays):
            self.workload, self.config = compiled.workload, compiled.config

        def run(self):
            return [(outputs or {}).get(self.config, jnp.ones(4)), jnp.zeros(1)]

        def measure(self):
            order.append(self.config)
            return timer.Sample(us_of(self.workload, self.config), 0.0, (), True)

    @dataclasses.dataclass
    class Compiled:
        workload: object
        config: object
        sets: int = 1

    def compile_chain(workload, *, implementation, config):
        assert implementation == "mosaic"
        if config.combine_rows == 8:
            raise RuntimeError("ptxas said no")
        return Compiled(workload, config)

    monkeypatch.setattr(timer, "Chain", Chain)
    monkeypatch.setattr(runner, "compile_chain", compile_chain)
    monkeypatch.setattr(tune, "build", lambda workload, sets: None)
    return order


def test_the_fastest_candidate_wins_measured_in_turn(monkeypatch):
    order = fake(monkeypatch, lambda _, config: 80.0 if config == FAST else 100.0)
    found = tune.tune([DENSE], device="GPU", capability=(9, 0), jax_version="1", rounds=3)
    entry = found.entries[tune.bucket_of(DENSE)]
    assert entry.config == FAST and entry.us == {DENSE.name: (80.0, 100.0)}
    n = len(order) // 3
    assert order[:n] == order[n : 2 * n] == order[2 * n :] and len(set(order)) == n  # interleaved
    assert all(config.combine_rows != 8 for config in order)  # the one that did not compile


def test_small_gains_and_wrong_results_do_not_win(monkeypatch):
    default = tune.candidates(DENSE)[0]
    fake(monkeypatch, lambda _, config: 98.5 if config == FAST else 100.0)
    assert tune.choose([tune.measure(DENSE, *tune.compile_candidates([DENSE]))]) == default
    fake(monkeypatch, lambda _, config: 50.0 if config == FAST else 100.0, {FAST: jnp.asarray([1.0, -1, 1, 1])})
    measured = tune.measure(DENSE, *tune.compile_candidates([DENSE]))
    assert tune.choose([measured]) == default and "other results" in measured.failed[FAST]


def test_no_workload_of_a_bucket_may_lose():
    default, other = DenseConfig(), FAST
    ten = tune.Measured(DENSE, {default: 100.0, other: 70.0}, {})
    for us, want in ((101.0, other), (103.0, default)):
        assert tune.choose([ten, tune.Measured(DENSE, {default: 100.0, other: us}, {})]) == want
    assert tune.choose([ten, tune.Measured(DENSE, {default: 100.0}, {other: "failed"})]) == default


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    def no_gpu():
        raise RuntimeError("the benchmark times kernels on an NVIDIA GPU, and jax sees none here")

    monkeypatch.setattr(timer, "require_gpu", no_gpu)
    assert cli.main(["tune", "--suite", "dense"]) == 2
    assert "on an NVIDIA GPU, and jax sees none here" in capsys.readouterr().err
    assert cli.main(["tune", "--suite", "plan"]) == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_the_command_writes_a_table(monkeypatch, capsys, tmp_path):
    class Gpu:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(timer, "require_gpu", Gpu)
    monkeypatch.setattr(dispatch, "cuda_target", lambda: dispatch.Target("cuda", (9, 0)))
    fake(monkeypatch, lambda _, config: 80.0 if config == FAST else 100.0)
    out = tmp_path / "h200.json"
    assert cli.main(["tune", "--suite", "dense", "--filter", "b8-sq1-h16", "--jobs", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "20.0%" in text and "ptxas said no" in text and str(out) in text
    assert tuning.load(out, device="NVIDIA H200").lookup(tune.bucket_of(DENSE)) == FAST
