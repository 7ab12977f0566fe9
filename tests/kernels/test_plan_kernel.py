"""The kernel that makes the split plan: on a machine in numpy, compiled for an H100, and on a GPU, against jnp."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import plan_kernel, schedule
from tests.kernels import simt

DENSE = plan_kernel.Scope(limit=2**31 - 1, items_each=1)


def problem_of(num_items, num_parts, scopes=(DENSE,), fixed_blocks=0):
    return schedule.problem_of(tuple(scopes), fixed_blocks, num_items, num_parts)


@functools.partial(jax.jit, static_argnames="problem")
def in_jnp(*lengths, problem):
    return schedule._split_in_jnp(*lengths, problem=problem)


def on_machine(lengths, problem, machine=simt.Machine):
    given = [simt.Memory(values=length) for length in lengths]
    out = dict(
        parts=simt.Memory(problem.num_parts + 1),
        pieces=simt.Memory(problem.max_pieces * 4),
        splits=simt.Memory(problem.num_items + 1),
    )
    scratch = {name: simt.Memory(size) for name, size in problem.scratch().items()}
    m = machine(problem.num_threads, [*out.values(), *scratch.values()])
    with np.errstate(over="raise", divide="raise"):
        plan_kernel.make_plan(m, problem, given, out, scratch)
    assert m.barriers == 6 and all(memory.known.all() for memory in out.values())
    return out["parts"].values, out["pieces"].values.reshape(-1, 4), out["splits"].values


def check(lengths, problem, kernel=on_machine):
    for name, got, want in zip(("parts", "pieces", "splits"), kernel(lengths, problem), in_jnp(*lengths, problem=problem), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


if __name__ == "__main__":
    pass
