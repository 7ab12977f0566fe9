"""How an implementation is picked, with made-up tables."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mla_jax import dispatch
from mla_jax.dispatch import Choice, Implementation, Target


class Call:
    op = "made_up"
    wide_out = False


def needs(platform, capability=None):
    def check(call, target, config):
        if target.platform != platform:
            raise NotImplementedError(f"needs {platform}")
        if capability is not None and target.capability != capability:
            raise NotImplementedError(f"needs {capability}")

    return check


def always(call, target, config):
    pass


def adds(n):
    return lambda call, target, config, operands: jax.tree.map(lambda x: x + n, operands)


BEST = Implementation("best", needs("cuda", (9, 0)), adds(100))
GOOD = Implementation("good", needs("cuda"), adds(10))
PLAIN = Implementation("plain", always, adds(1))
TABLE = (BEST, GOOD, PLAIN)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests say themselves which device there is."""
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: None)
    dispatch._logged.clear()


class Device:
    def __init__(self, capability):
        self.compute_capability = capability
        self.platform = "gpu"


@pytest.mark.parametrize(
    ("capability", "name", "refused"), [("9.0", "best", []), ("10.0", "good", ["best"]), ("8.6", "good", ["best"])]
)
def test_best_for_the_device(monkeypatch, capability, name, refused):
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device(capability))
    cuda, other = dispatch.choices(None, TABLE, Call, None)
    assert cuda.implementation.name == name and [n for n, _ in cuda.refusals] == refused
    assert other.implementation is PLAIN and len(other.refusals) == 2


def test_without_a_device_the_capability_is_assumed():
    assert dispatch.cuda_target() == Target("cuda", (9, 0))
    cuda, _ = dispatch.choices(None, TABLE, Call, None)
    assert cuda.implementation is BEST


@pytest.mark.parametrize(("asked", "cuda_name", "other_name"), [
    ("good", "good", None), (["good", "plain"], "good", "plain"), ("plain", "plain", "plain"),
    (("plain", "best"), "plain", "plain"),
])  # fmt: skip
def test_asking(asked, cuda_name, other_name):
    name = lambda choice: choice.implementation.name if choice.implementation else None  # noqa: E731
    cuda, other = dispatch.choices(asked, TABLE, Call, None)
    assert (name(cuda), name(other)) == (cuda_name, other_name)


def test_nothing_can_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device("8.0"))
    with pytest.raises(NotImplementedError, match=r"made_up.*best: needs \(9, 0\)"):
        dispatch.choices("best", TABLE, Call, None)


def test_falling_back_on_a_gpu_logs_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device("8.9"))
    with caplog.at_level(logging.WARNING, logger="mla_jax"):
        dispatch.choices(None, TABLE, Call, None)
        dispatch.choices(None, TABLE, Call, None)
        dispatch.choices("good", TABLE, Call, None)
    assert [r.message for r in caplog.records] == ["made_up on cuda 8.9 runs 'good'. best: needs (9, 0)"]


def test_no_log_without_a_gpu(caplog):
    with caplog.at_level(logging.WARNING, logger="mla_jax"):
        dispatch.choices(None, (GOOD, PLAIN), Call, None)
    assert not caplog.records


@pytest.mark.parametrize("version", [(0, 11, 1), (0, 13, 0), (1, 0, 0)])
def test_an_untested_jax_falls_back(monkeypatch, version):
    monkeypatch.setattr(jax, "__version_info__", version)
    with pytest.raises(NotImplementedError, match=r"tested with jax >= 0\.11\.2, < 0\.13; this is jax"):
        dispatch.check_tested_jax()


def test_this_jax_is_tested():
    dispatch.check_tested_jax()


def test_run_follows_the_platform_it_is_lowered_for():
    cuda, other = dispatch.choices(None, TABLE, Call, None)
    f = jax.jit(lambda x: dispatch.run(cuda, other, Call, x, None))
    assert f(jnp.float32(0)) == 1
    text = jax.export.export(f, platforms=["cuda"])(jnp.float32(0)).mlir_module()
    assert "1.000000e+02" in text and "1.000000e+00" not in text


def test_a_named_implementation_runs_or_raises():
    cuda, other = dispatch.choices("good", TABLE, Call, None)
    f = jax.jit(lambda x: dispatch.run(cuda, other, Call, x, None))
    with pytest.raises(NotImplementedError, match=r"cannot run on cpu\. good: needs cuda"):
        f(jnp.float32(0))
    assert "1.000000e+01" in jax.export.export(f, platforms=["cuda"])(jnp.float32(0)).mlir_module()


def test_guard_is_the_identity_under_vmap():
    x = jnp.arange(3.0)
    assert (jax.vmap(lambda x: dispatch.guard(x, "op"))(x) == x).all()
    with pytest.raises(NotImplementedError, match="op is for inference"):
        jax.jvp(lambda x: dispatch.guard(x, "op"), (x,), (x,))


def test_targets_read_well():
    assert str(Target("cuda", (9, 0))) == "cuda 9.0" and str(Target("cpu")) == "cpu"
    assert Choice(Target("cpu"), None, (("a", "x"), ("b", "y"))).refusal_text() == "a: x; b: y"


def test_import_pulls_in_nothing_optional():
    code = (
        "import sys, mla_jax; "
        "bad = [m for m in ('flax', 'chex', 'rich', 'matplotlib', 'safetensors', 'torch', 'orbax', 'jaxtyping') "
        "if m in sys.modules]; sys.exit(', '.join(bad) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
