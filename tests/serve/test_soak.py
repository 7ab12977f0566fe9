"""The soak run: flat and right as it is, and each planted fault is named."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import pytest

import mla_jax
from mla_jax import cli
from mla_jax.serve import engine, model, soak

GOOD = soak.Sample(
    step=10, finished=3, preempted=1, live_arrays=18, live_bytes=1000, device_bytes=5000, host_bytes=2**30, compiled=3,
    op_error=1e-3, replay_error=0.0,
)  # fmt: skip


@pytest.mark.slow  # half a minute, nearly all of it compiling
def test_memory_is_flat_and_nothing_drifts(capsys):
    assert cli.main(["soak", "--steps", "36", "--interval", "12"]) == 0
    out = capsys.readouterr().out
    assert "36 steps of v3" in out and "WRONG" not in out


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("kind", ["v32", "model1"])
def test_fp8_caches(kind):
    assert soak.problems(soak.run(120, kind=kind, interval=40), kind) == []


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(live_arrays=19), "live arrays grew from 18"),
        (dict(live_bytes=1001), r"\(1001 bytes\)"),
        (dict(device_bytes=5001), "device memory grew from 5000 to 5001"),
        (dict(host_bytes=2**30 + 2**28), "the process grew by 256 MiB"),
        (dict(compiled=4), "compiled again: 3 versions, then 4"),
        (dict(op_error=0.01), "step 20: the op is off by 1.0e-02"),
        (dict(op_error=float("nan")), "the op is off by nan"),
        (dict(replay_error=0.2), "a request alone gives other logits, by 2.0e-01"),
    ],
)
def test_problems_are_named(change, said):
    assert soak.problems([GOOD, dataclasses.replace(GOOD, step=20)], "v3") == []
    (found,) = soak.problems([GOOD, dataclasses.replace(GOOD, **{"step": 20} | change)], "v3")
    assert re.search(said, found)


def test_a_run_without_a_replay_is_no_proof():
    assert "no request finished" in soak.problems([dataclasses.replace(GOOD, replay_error=float("nan"))], "v3")[0]


@pytest.mark.slow  # half a minute
def test_planted_faults_are_found(monkeypatch):
    """A leaked array a step, a pool whose rows go bad after a while, and an op that is a little off."""
    leaked, step, op = [], model.step, mla_jax.mla_decode
    calls = 0

    def leaky(params, config, ds, caches, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 20 and calls % 3 == 0:
            caches = model.Caches(caches.own.replace(-caches.own.data), caches.prompt)
        leaked.append(jnp.zeros(3))
        return step(params, config, ds, caches, *args, **kwargs)

    leaky._cache_size = step._cache_size
    monkeypatch.setattr(model, "step", leaky)
    monkeypatch.setattr(engine.model, "step", leaky)
    monkeypatch.setattr(mla_jax, "mla_decode", lambda *a, **k: op(*a, **k) * jnp.bfloat16(1.02))
    found = " ".join(soak.problems(soak.run(36, interval=6), "v3"))
    assert "live arrays grew" in found and "the op is off" in found and "a request alone gives other logits" in found


def test_refusals(capsys):
    assert cli.main(["soak", "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
