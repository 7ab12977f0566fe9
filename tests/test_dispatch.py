"""How an implementation is picked, with made-up tables."""

import dataclasses
import functools
import logging
import subprocess
import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import mla_jax
from mla_jax import decode, dispatch
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


def test_a_kernel_that_no_such_gpu_has_run_says_so(monkeypatch, caplog):
    new = dataclasses.replace(GOOD, proven_on=(9,))
    with caplog.at_level(logging.WARNING, logger="mla_jax"):
        for capability, logs in (("9.0", 0), ("10.0", 1)):
            monkeypatch.setattr(dispatch, "_local_cuda_device", lambda capability=capability: Device(capability))
            dispatch.choices(None, (new, PLAIN), Call, None)
            assert len(caplog.records) == logs
    assert "has not been run on one" in caplog.text


def test_a_jax_that_makes_a_kernel_slow_is_named_once(monkeypatch, caplog):
    slow = dataclasses.replace(GOOD, loses_registers_from_jax=(0, 12))
    cases = (("9.0", (0, 11, 2), 0), ("10.0", (0, 12, 0), 0), ("9.0", (0, 12, 0), 1), ("9.0", (0, 12, 1), 1))
    with caplog.at_level(logging.WARNING, logger="mla_jax"):
        for capability, version, logs in cases:
            monkeypatch.setattr(dispatch, "_local_cuda_device", lambda capability=capability: Device(capability))
            monkeypatch.setattr(jax, "__version_info__", version)
            dispatch.choices(None, (slow, PLAIN), Call, None)
            dispatch.choices("good", (slow, PLAIN), Call, None)
            assert len(caplog.records) == logs
    assert "'good'" in caplog.text and "as with jax < 0.12" in caplog.text


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


# -- the real tables, on made-up GPUs ----------------------------------------------------------------------------------

choices = dispatch.choices
GPUS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
MOSAIC = ("9.0", "10.0")


def _calls(fmt):
    cache = mla_jax.PagedKVCache.zeros(fmt, 2, 4)
    q = jnp.zeros((1, 1, 2, fmt.d_qk), fmt.compute_dtype)
    pages, length, slots = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros((1, 5), jnp.int32)
    return (
        lambda **more: functools.partial(mla_jax.mla_decode, q, cache, pages, length, sm_scale=1.0, **more),
        lambda **more: functools.partial(mla_jax.sparse_mla_decode, q, cache, slots, sm_scale=1.0, **more),
    )


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("fmt", [mla_jax.BF16_576, mla_jax.V32, mla_jax.MODEL1, mla_jax.F32_512], ids=lambda f: f.name)
def test_what_each_gpu_runs(monkeypatch, capability, fmt):
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device(capability))
    for op, has_mosaic in zip(_calls(fmt), (fmt is mla_jax.BF16_576, fmt is not mla_jax.F32_512), strict=True):
        (cuda, other), best = _explain(op), "triton"
        if capability in MOSAIC and has_mosaic:
            best = "mosaic"
        elif capability == "7.5":
            best = "xla"
        assert cuda.implementation.name == best and other.implementation.name == "xla"
        better = ["mosaic", "triton", "xla"]
        assert [name for name, _ in cuda.refusals] == better[: better.index(best)]
        assert all(reason for _, reason in cuda.refusals)
        # jax.export does not vouch for Triton kernels.
        assert cuda.exported.name == ("xla" if best == "triton" else best)


def _explain(op):
    """The choices of a call: what runs on CUDA, and elsewhere."""
    found = []
    with mock.patch.object(dispatch, "choices", lambda *a: found.append(choices(*a)) or found[0]):
        jax.eval_shape(op())
    return found[0]


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device("7.5"))
    for op in _calls(mla_jax.V32):
        with pytest.raises(NotImplementedError, match=r"triton: needs compute capability 8\.0 or above; this is 7\.5"):
            op(implementation="triton")()


def test_a_jax_without_the_triton_lowering_falls_through(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(sys.modules["jax.experimental.pallas"], "triton", raising=False)
    monkeypatch.delitem(sys.modules, "pallas_kernels.portable", raising=False)
    monkeypatch.delattr(sys.modules["pallas_kernels"], "portable", raising=False)
    monkeypatch.setattr(dispatch, "_local_cuda_device", lambda: Device("8.0"))
    for op in _calls(mla_jax.V32):
        cuda, _ = _explain(op)
        assert cuda.implementation.name == "xla"
        assert "has no Triton lowering for Pallas" in dict(cuda.refusals)["triton"]


def _lowered(op, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # users must not see that JAX deprecates the lowering
        return jax.jit(op(**options)).trace().lower(lowering_platforms=("cuda",)).as_text()


def test_triton_kernels_lower_without_a_gpu_or_a_warning():
    for op in _calls(mla_jax.MODEL1):
        text = _lowered(op, implementation="triton")
        assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2  # decode and merge


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_partial_results_are_float32_from_the_kernel_on(name):
    """Rounded, they would cost accuracy once more: no array of the width of `out` is bfloat16."""
    for op in _calls(mla_jax.BF16_576):
        usual = op(implementation=name)

        def partial(usual=usual, **_):
            return functools.partial(decode.partial_results, usual.func, *usual.args, **usual.keywords)

        assert "x512xbf16>" in _lowered(op, implementation=name)
        text = _lowered(partial)
        assert "x512xf32>" in text and "x512xbf16>" not in text


def test_exported_modules_hold_no_triton_kernels():
    """JAX gives no compatibility guarantee for them, and refuses to export one that is named alone."""
    op = _calls(mla_jax.V32)[0]
    exported = jax.export.export(jax.jit(op(implementation=("triton", "xla"))), platforms=["cuda", "cpu"])()
    assert "xla.gpu.triton" not in exported.mlir_module() and exported.call().shape == (1, 1, 2, 512)
    with pytest.raises(ValueError, match="compatibility guarantees"):
        jax.export.export(jax.jit(op(implementation="triton")), platforms=["cuda"])()


def test_triton_kernels_under_transformations():
    cache = mla_jax.PagedKVCache.zeros(mla_jax.V32, 2, 4)
    q, pages, length = jnp.zeros((2, 1, 1, 2, 576), jnp.bfloat16), jnp.zeros((2, 1, 2), jnp.int32), jnp.ones((2, 1))
    length = length.astype(jnp.int32)

    def f(q, pages, length):
        return mla_jax.mla_decode(q, cache, pages, length, sm_scale=1.0, implementation="triton")

    def kernels(fn):
        text = jax.jit(fn).trace(q, pages, length).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")

    assert kernels(jax.vmap(f)) == 2
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    local = lambda q, pages, length: f(q[0], pages[0], length[0])[None]  # noqa: E731
    with pytest.raises(NotImplementedError, match="a mesh of GPUs"):  # this one is of CPUs
        kernels(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    with pytest.raises(NotImplementedError, match="for inference"):
        jax.grad(lambda q: f(q, pages[0], length[0]).astype(jnp.float32).sum())(q[0])
