"""The kernel that makes the split plan on a GPU, entry by entry against jnp on the same GPU."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import plan_kernel
from tests.kernels.test_plan_kernel import PROBLEMS, check, draw, plan, problem_of

BIGGEST = problem_of(plan_kernel.MAX_THREADS - 1, 132)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, BIGGEST], ids=lambda p: f"{p.num_items}-{p.num_parts}-{len(p.scopes)}")
def test_equals_the_jnp_plan(problem):
    launch = functools.partial(jax.jit, static_argnames="problem")(plan_kernel.launch)
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [draw(rng, problem.num_items // scope.items_each) for scope in problem.scopes]
        for _ in range(2):
            check(*lengths, problem=problem, kernel=launch)


@pytest.mark.gpu
def test_plans_are_made_by_the_kernel():
    lengths = np.arange(128, dtype=np.int32) * 77
    compiled = jax.jit(plan).lower(lengths).compile().as_text()
    assert "mosaic_gpu_v2" in compiled and " fusion(" not in compiled, "one kernel, and no other"
    for x, y in zip(plan(lengths), jax.jit(jax.vmap(plan))(lengths[None]), strict=True):  # vmap of a plan is jnp
        np.testing.assert_array_equal(x, y[0])
