"""The kernel that makes the split plan, against jnp, entry by entry: on a machine in numpy, which also looks for races,
and compiled for an H100. In which programs it is used, and in which not. On a GPU: tests/gpu/test_plan.py."""

import functools
import logging

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mla_jax
from pallas_kernels import architectures, plan_kernel, schedule
from pallas_kernels.plan_kernel import Scope
from tests.kernels import aot, simt

DENSE = Scope(limit=2**31 - 1, items_each=1)
NAMES = ("parts", "pieces", "splits")


def problem_of(num_items, num_parts, scopes=(DENSE,), fixed_blocks=0):
    return schedule.problem_of(tuple(scopes), fixed_blocks, num_items, num_parts)


@functools.partial(jax.jit, static_argnames="problem")
def in_jnp(*lengths, problem):
    return schedule._split_in_jnp(*lengths, problem=problem)


def on_machine(*lengths, problem, machine=simt.Machine):
    given = [simt.Memory(values=np.ravel(length)) for length in lengths]
    sizes = dict(parts=problem.num_parts + 1, pieces=4 * problem.max_pieces, splits=problem.num_items + 1)
    out = {name: simt.Memory(size) for name, size in sizes.items()}
    scratch = {name: simt.Memory(size) for name, size in problem.scratch().items()}
    m = machine(problem.num_threads, [*out.values(), *scratch.values()])
    with np.errstate(all="raise"):  # nothing overflows, nothing is divided by 0
        plan_kernel.make_plan(m, problem, given, out, scratch)
    assert all(memory.stored.all() for memory in out.values())
    return out["parts"].values, out["pieces"].values.reshape(-1, 4), out["splits"].values


def check(*lengths, problem, kernel=on_machine):
    want = in_jnp(*lengths, problem=problem)
    for name, x, y in zip(NAMES, kernel(*lengths, problem=problem), want, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def draw(rng, size):
    """Lengths of a kind that the generator chooses: short ones, usual ones, equal ones, huge and negative ones."""
    match rng.integers(6):
        case 0:
            return rng.integers(0, 2, size).astype(np.int32)
        case 1:
            return rng.integers(0, 1000, size).astype(np.int32)
        case 2:
            return rng.integers(0, 100_000, size).astype(np.int32)
        case 3:
            return np.full(size, rng.integers(0, 40_000), np.int32)
        case 4:
            return rng.integers(-(2**31), 2**31, size).astype(np.int32)
        case _:
            return np.where(rng.random(size) < 0.9, 0, rng.integers(0, 2**20, size)).astype(np.int32)


# Few shapes, many values: a new shape is a new compilation.
PROBLEMS = [
    problem_of(1, 1),
    problem_of(1, 66),
    problem_of(7, 3),
    problem_of(31, 132),
    problem_of(128, 132),
    problem_of(12, 66, [Scope(2048, 2), Scope(700, 1)]),
    problem_of(256, 132, [Scope(1024, 2)], fixed_blocks=2),
]


@hypothesis.given(st.sampled_from(PROBLEMS), st.integers(0, 2**32))
@hypothesis.settings(max_examples=100, deadline=None)
def test_equals_the_jnp_plan(problem, seed):
    rng = np.random.default_rng(seed)
    check(*(draw(rng, problem.num_items // scope.items_each) for scope in problem.scopes), problem=problem)


@pytest.mark.parametrize("length", [0, 1, 64, 4096, 8192, 16384, 2**31 - 1, -1])
def test_equal_lengths(length):
    for problem in (PROBLEMS[1], PROBLEMS[4]):  # one item, and 128
        check(np.full(problem.num_items, length, np.int32), problem=problem)


def test_as_many_items_as_a_cta_takes():
    problem = problem_of(plan_kernel.MAX_THREADS - 1, 132)
    assert plan_kernel.fits(problem) and not plan_kernel.fits(problem_of(plan_kernel.MAX_THREADS, 132))
    check(draw(np.random.default_rng(0), problem.num_items), problem=problem)


def forgetful(number):
    """A machine that leaves out one barrier."""

    class Forgetful(simt.Machine):
        def sync(self):
            if self.barriers != number:
                return super().sync()
            self.barriers += 1

    return Forgetful


def test_every_barrier_is_needed():
    problem = PROBLEMS[4]
    lengths = np.random.default_rng(0).integers(0, 9000, problem.num_items).astype(np.int32)
    machines = []

    def count(*args):
        machines.append(simt.Machine(*args))
        return machines[0]

    on_machine(lengths, problem=problem, machine=count)
    assert machines[0].barriers == 6
    for number in range(6):
        with pytest.raises(simt.Race):
            on_machine(lengths, problem=problem, machine=forgetful(number))


# -- where it is used ------------------------------------------------------------------------------------------------


def plan(lengths, **options):
    made = mla_jax.plan_decode(lengths, s_q=1, num_heads=128, page_size=64, **options)
    return made.parts, made.pieces, made.splits


def sparse_plan(length):
    return mla_jax.plan_sparse_decode(640, batch=4, s_q=2, num_heads=16, topk_length=length).splits


I32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def kernels_in(fn, *args, platforms=("cuda",)):
    """How many Mosaic kernels a program for these platforms holds."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text().count("mosaic_gpu_v2")


def test_one_kernel_makes_the_plan():
    for fn, shape in ((plan, (8,)), (sparse_plan, (4,)), (sparse_plan, (4, 2))):
        assert kernels_in(fn, I32(shape)) == 1
    assert kernels_in(plan, I32((8,)), platforms=("cpu",)) == 0


def test_jnp_makes_the_plans_that_the_kernel_does_not():
    assert kernels_in(lambda n: plan(n, batch_invariant=True), I32((8,))) == 0
    assert kernels_in(plan, I32((3000,))) == 0
    assert kernels_in(lambda: mla_jax.plan_sparse_decode(640, batch=4, s_q=2, num_heads=16)) == 0  # a constant


@pytest.mark.parametrize("capability, kernels", [((8, 0), 0), ((9, 0), 1), ((10, 3), 1), ((12, 0), 0)])
def test_gpus_with_other_kernels_have_jnp_plans(capability, kernels, monkeypatch):
    monkeypatch.setattr(architectures, "lowered_for", lambda: capability)
    batch = 10 + capability[0]  # a shape of its own, since jax remembers what it lowered
    assert kernels_in(plan, I32((batch,))) == kernels


def test_a_kernel_that_cannot_be_lowered_is_no_error(monkeypatch, caplog):
    def broken(*lengths, problem):
        raise TypeError("another jax")

    monkeypatch.setattr(plan_kernel, "launch", broken)
    with caplog.at_level(logging.WARNING, "mla_jax"):
        assert kernels_in(plan, I32((30,))) == 0
    assert "made by XLA" in caplog.text and "another jax" in caplog.text


def test_transformations():
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, 9000, (4, 6)), jnp.int32)
    one_by_one = [plan(row) for row in lengths]
    want = [np.stack(x) for x in zip(*one_by_one, strict=True)]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def local(lengths):  # [2, 6]
        return jax.lax.map(plan, lengths)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for fn, num_kernels in ((jax.vmap(plan), 0), (sharded, 1)):
        assert kernels_in(fn, lengths) == num_kernels
        for x, y in zip(jax.jit(fn)(lengths), want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_programs_that_xla_splits_over_devices_have_jnp_plans():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    lengths = jax.device_put(jnp.arange(8, dtype=jnp.int32), NamedSharding(mesh, P("data")))
    assert kernels_in(plan, lengths) == 0
    for x, y in zip(jax.jit(plan)(lengths), plan(jnp.arange(8, dtype=jnp.int32)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_exported_programs():
    """One module for both platforms holds the kernel and the jnp plan; called here, it takes the latter."""
    exported = jax.export.export(jax.jit(plan), platforms=["cuda", "cpu"])(I32((8,)))
    assert exported.mlir_module().count("mosaic_gpu_v2") == 1
    lengths = jnp.arange(8, dtype=jnp.int32) * 999
    for x, y in zip(exported.call(lengths), plan(lengths), strict=True):
        np.testing.assert_array_equal(x, y)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("num_items", [1, 128, plan_kernel.MAX_THREADS - 1])
def test_compiles_well(num_items):
    (kernel,) = aot.compile_sm90(plan, I32((num_items,)))
    assert "mla_plan" in kernel.name and "0 bytes spill stores, 0 bytes spill loads" in kernel.log
    problem = problem_of(num_items, 66)
    # Every array is written; rows of pieces, 16 bytes each.
    assert kernel.count("STG.E.128") == -(-problem.max_pieces // problem.num_threads)
    assert kernel.count("STG") - kernel.count("STG.E.128") == 2
    # Two barriers are Mosaic's own.
    assert kernel.count("BAR.SYNC") == 6 + 2 and len(kernel.sass) < 800
