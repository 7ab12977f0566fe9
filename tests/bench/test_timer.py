"""The chain computes what single calls compute; the timestamps' arithmetic; and no GPU, no numbers."""

import contextlib
import ctypes

import jax
import numpy as np
import pytest

from mla_jax.bench import cupti, inputs, runner, timer
from mla_jax.bench.workloads import Dense, Scope, Sparse, append, plan
from pallas_kernels.formats import BF16_576, V32

DENSE = Dense(name="dense", b=2, s_q=1, h=2, s_k=70)
SPARSE = Sparse(name="sparse", b=2, s_q=1, h=2, main=Scope(fmt=V32, page_size=64, s_kv=128, topk=16))


def test_stream_chain_returns_every_call():
    compiled = timer.compile_chain(DENSE, sets=2, calls=3)
    arrays = inputs.build(DENSE, sets=2)
    assert compiled.calls == 4 and not compiled.linked  # a multiple of the sets
    results = timer.Chain(compiled, arrays).run()
    assert len(results) == 8
    for i, (out, lse) in enumerate(zip(results[::2], results[1::2], strict=True)):
        want, want_lse = inputs.call(DENSE, arrays.caches, arrays.sets[i % 2])
        np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=1e-2)
        np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@pytest.mark.parametrize("workload", [SPARSE, plan(SPARSE), plan(DENSE)])
def test_linked_chain_gives_the_last_call(workload):
    compiled = timer.compile_chain(workload, calls=3, implementation="xla")
    arrays = inputs.build(workload)
    assert compiled.linked and compiled.calls == 3
    got = timer.Chain(compiled, arrays).run()  # leaves
    want = inputs.call(workload, arrays.caches, arrays.sets[0])
    for g, w in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(w, np.float32), atol=1e-2)


def test_linked_chain_keeps_its_calls():
    """The zero that links calls is not folded away: the lowered chain still reads one call's result in the next."""
    compiled = timer.compile_chain(plan(DENSE), calls=3)
    one = timer.compile_chain(plan(DENSE), calls=1)
    assert compiled.executable.as_text().count("minimum") > one.executable.as_text().count("minimum")


@pytest.mark.parametrize("fmt", [BF16_576, V32])
def test_append_chain_writes_and_runs_again(fmt):
    workload = append(fmt, 4)
    arrays = inputs.build(workload)
    slots = np.asarray(arrays.sets[0]["slots"])
    chain = timer.Chain(timer.compile_chain(workload, calls=2), arrays)
    (data,) = map(np.asarray, chain.run())
    written = data.reshape(-1, data.shape[-1])[slots]  # [b, row]
    assert written.any() and np.count_nonzero(data.reshape(-1, data.shape[-1]).any(axis=1)) == 4
    with pytest.raises(timer.TimingError, match="one call at a time; this chain has 2"):
        chain.isolated()


@pytest.mark.parametrize("workload", [SPARSE, plan(DENSE), append(V32, 4)])
def test_chains_travel_between_processes(workload):
    compiled = timer.compile_chain(workload, calls=2)
    loaded = timer.deserialize_chain(workload, compiled.serialize())
    assert (loaded.calls, loaded.sets, loaded.linked) == (2, 1, compiled.linked)
    results = [timer.Chain(chain, inputs.build(workload)).run() for chain in (compiled, loaded)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wall_clock():
    chain = timer.Chain(timer.compile_chain(DENSE, calls=2), inputs.build(DENSE))
    # A difference of two times: beside other work it can come out negative.
    assert any(0 < chain.wall_us(passes=20) < 1e6 for _ in range(5))


def _ran(*kernels):
    return [cupti.Activity(name, start, end, True) for name, start, end in kernels]


def test_kernels_of_a_call():
    good = _ran(("fill", 0, 1), ("fill", 1, 2), ("main", 2, 9), ("merge", 9, 10), ("main", 10, 17), ("merge", 17, 18))
    assert timer.kernels_of_a_call(good, 2) == ("fill", "main", "merge")
    assert timer.kernels_of_a_call(good, 1) == ("fill", "fill", "main", "main", "merge", "merge")
    with pytest.raises(timer.TimingError, match=r"merged or dropped: kernels ran \{'fill': 1, 'main': 2, 'merge': 2\}"):
        timer.kernels_of_a_call(good[1:], 2)
    with pytest.raises(timer.TimingError, match="merged or dropped"):
        timer.kernels_of_a_call([], 2)
    once = _ran(("constant", 0, 1), ("main", 1, 100), ("main", 100, 200))
    assert timer.kernels_of_a_call(once, 2) == ("main",)


@pytest.mark.parametrize(("second", "overlaps"), [(95, False), (50, True)])
def test_calls_that_overlap(second, overlaps):
    chain = _ran(("main", 0, 100), ("merge", 90, 110), ("main", second, second + 100), ("merge", 200, 210))
    if not overlaps:
        assert timer.kernels_of_a_call(chain, 2) == ("main", "merge")
        return
    with pytest.raises(timer.TimingError, match="main ran beside itself for 25% of its time"):
        timer.kernels_of_a_call(chain, 2)


def test_isolated_calls(monkeypatch):
    """Between calls the L2 is flushed; what that ran is not counted, the gaps within a call are."""
    clock = iter(range(0, 10**9, 1000))
    running: list[cupti.Activity] = []

    @contextlib.contextmanager
    def trace():
        running.clear()
        found: list[cupti.Activity] = []
        yield found
        found += running

    def ran(name, us):
        start = next(clock)
        running.append(cupti.Activity(name, start, start + us * 1000 - 500, False))

    monkeypatch.setattr(cupti, "trace", trace)
    monkeypatch.setattr(jax, "block_until_ready", lambda _: ran("fill", 1))
    monkeypatch.setattr(timer, "_FLUSH_BYTES", 4)

    def one(i):
        ran("main", 1)
        ran("merge", 1)

    sample = timer.isolated(one, 3)
    assert sample == timer.Sample(us=1.5, busy_us=1.0, kernels=("main", "merge"), in_graph=False)
    with pytest.raises(timer.TimingError, match="3 kernels ran in 3 isolated calls"):
        timer.isolated(lambda i: None, 3)


def test_plain_names():
    assert timer._plain_name("loop_add_fusion_12") == timer._plain_name("loop_add_fusion") == "loop_add_fusion"


def test_no_gpu_no_numbers(monkeypatch):
    def no_cuda(platform=None):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", no_cuda)
    with pytest.raises(RuntimeError, match="times kernels on an NVIDIA GPU, and jax sees none"):
        timer.require_gpu()


def test_spans():
    kernels = [cupti.Activity("a", 1_000, 4_000, False), cupti.Activity("b", 6_000, 9_500, False)]
    assert cupti.span_us(kernels) == 8.5
    assert cupti.busy_us(kernels) == 6.5


class _Kernel(ctypes.Structure):
    """CUpti_ActivityKernel10, down to the last field that is read, as CUPTI's header declares it."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("cacheConfig", ctypes.c_uint8),
        ("sharedMemoryConfig", ctypes.c_uint8),
        ("registersPerThread", ctypes.c_uint16),
        ("partitionedGlobalCacheRequested", ctypes.c_int32),
        ("partitionedGlobalCacheExecuted", ctypes.c_int32),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("completed", ctypes.c_uint64),
        ("deviceId", ctypes.c_uint32),
        ("contextId", ctypes.c_uint32),
        ("streamId", ctypes.c_uint32),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("staticSharedMemory", ctypes.c_int32),
        ("dynamicSharedMemory", ctypes.c_int32),
        ("localMemoryPerThread", ctypes.c_uint32),
        ("localMemoryTotal", ctypes.c_uint32),
        ("correlationId", ctypes.c_uint32),
        ("gridId", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("reserved0", ctypes.c_void_p),
        ("queued", ctypes.c_uint64),
        ("submitted", ctypes.c_uint64),
        ("launch", ctypes.c_uint8 * 4),
        ("sharedMemoryExecuted", ctypes.c_uint32),
        ("graphNodeId", ctypes.c_uint64),
        ("shmemLimitConfig", ctypes.c_int32),
        ("graphId", ctypes.c_uint32),
    )


@pytest.mark.parametrize("graph", [0, 7])
def test_kernel_records(graph):
    record = _Kernel(kind=10, start=123, end=456, deviceId=1, name=b"mla_decode", graphId=graph)
    assert cupti._read(ctypes.addressof(record)) == cupti.Activity("mla_decode", 123, 456, bool(graph), 1)


@pytest.mark.parametrize(("kind", "name"), [(1, "memcpy"), (2, "memset")])
def test_copies_and_fills(kind, name):
    record = _Kernel(kind=kind, start=1, end=2, completed=3)  # whose place is the device's in these
    assert cupti._read(ctypes.addressof(record)) == cupti.Activity(name, 1, 2, False, 3)


def test_missing_cupti(monkeypatch):
    monkeypatch.setattr(cupti, "_candidates", lambda: ["libcupti-that-is-not-there.so"])
    with pytest.raises(cupti.CuptiError, match="comes with JAX's CUDA plugin"):
        cupti._Cupti()


def test_compiling_here_where_loading_fails(monkeypatch):
    def cannot(workload, serialized):
        raise ValueError("no executable")

    monkeypatch.setattr(timer, "deserialize_chain", cannot)
    with pytest.warns(UserWarning, match="compiling in one process instead of 2: ValueError: no executable"):
        (chain,) = runner.compile_all([plan(DENSE)], jobs=2, calls=2)
    assert chain.calls == 2


def test_compiling_in_other_processes():
    impossible = Dense(name="impossible", b=1, s_q=1, h=1, s_k=64, page_size=0)
    good = plan(DENSE)
    done = []
    chain, reason = runner.compile_all([good, impossible], jobs=2, calls=2, on_compiled=lambda *x: done.append(x))
    assert done == [(1, 2), (2, 2)]
    assert chain.calls == 2
    np.testing.assert_array_equal(timer.Chain(chain, inputs.build(good)).run()[0][0], 0)
    assert reason.startswith("ZeroDivisionError")
    (again,) = runner.compile_all([impossible], on_compiled=lambda *x: done.append(x))
    assert done[2:] == [(1, 1)]
    assert again == reason
