"""A donated append compiled for an H100 without one: a kernel or a few, none of which copies the pool."""

import re

import jax
import jax.numpy as jnp
import pytest

import mla_jax
from mla_jax.bench import inputs, timer, workloads
from pallas_kernels.formats import INDEX_FP8
from tests import compiling, samples

by_name = lambda fmt: fmt.name  # noqa: E731
FORMATS = [*samples.FORMATS, INDEX_FP8]
CALLS = 3


@pytest.fixture(scope="module")
def h100():
    return compiling.h100()


def kernels(compiled):
    """Kinds of the ops that run: fusions by name, copies."""
    entry = compiled.as_text().partition("ENTRY")[2]
    names = re.findall(r"%(\S+) = \S+ (?:fusion|scatter|custom-call|copy|copy-start|while)\(", entry)
    return [re.sub(r"[.\d]+$", "", name) for name in names]


def check_in_place(compiled, pool_bytes):
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 100
    assert not any("copy" in name for name in kernels(compiled))


def lower_append(device, fmt, rows, pages=2048, page_size=64):
    on = lambda shape, dtype: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    cache = mla_jax.PagedKVCache(on((pages, *fmt.page_shape(page_size)), fmt.storage_dtype), fmt, page_size)
    arguments = cache, on((rows, fmt.d_qk), fmt.compute_dtype), on((rows,), jnp.int32)
    return jax.jit(mla_jax.append_kv, donate_argnums=0).lower(*arguments), cache.data.size * cache.data.dtype.itemsize


@pytest.mark.aot
@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_an_append_is_one_kernel_in_place(h100, fmt):
    lowered, pool_bytes = lower_append(h100, fmt, 128)
    compiled = lowered.compile()
    check_in_place(compiled, pool_bytes)
    assert kernels(compiled) == ["input_scatter_fusion"]


@pytest.mark.aot
@pytest.mark.parametrize("fmt", [mla_jax.V32, mla_jax.MODEL1], ids=by_name)
@pytest.mark.parametrize("rows", [1, 4096])
def test_a_token_and_a_prompt_are_appended_in_place(h100, fmt, rows):
    lowered, pool_bytes = lower_append(h100, fmt, rows)
    compiled = lowered.compile()
    check_in_place(compiled, pool_bytes)
    assert len(kernels(compiled)) <= 3


@pytest.mark.aot
@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_the_benchmark_times_appends_alone(h100, fmt):
    """Its chain is as many appends as it counts, one after the other, and nothing else."""
    workload = workloads.append(fmt, 128)
    (pool,) = jax.tree.leaves(inputs.abstract(workload).carry)
    with jax.default_device(h100):
        compiled = timer.compile_chain(workload, calls=CALLS).executable
    check_in_place(compiled, pool.size * pool.dtype.itemsize)
    assert kernels(compiled) == ["input_scatter_fusion"] * CALLS


@pytest.mark.aot
def test_a_link_by_data_would_not_pass(h100, monkeypatch):
    """The negative control: where the kernel that updates a pool also reads it, XLA keeps a copy."""
    workload = workloads.append(mla_jax.MODEL1, 128)
    (pool,) = jax.tree.leaves(inputs.abstract(workload).carry)

    def by_data(op):
        def chain(caches, args, carry):
            for arg in args:
                carry = op(caches, timer.linked(arg, carry) | {"carry": carry})
            return carry

        return chain

    monkeypatch.setattr(timer, "_carry_chain", by_data)
    with jax.default_device(h100):
        compiled = timer.compile_chain(workload, calls=CALLS).executable
    with pytest.raises(AssertionError):
        check_in_place(compiled, pool.size)
