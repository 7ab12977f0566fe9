"""Rows that a GPU reads from pinned memory of the host, against numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.nn.engram import EngramTable, Partition, lookup, place
from pallas_kernels.formats import E4M3

VALUES = np.random.default_rng(0).standard_normal((1001, 256)).astype(np.float32)
ROWS = np.random.default_rng(1).integers(-3, 1009, (6, 5)).astype(np.int32)
ROWS[0, :2] = 2**31 - 1, -(2**31)
fetch = jax.jit(lookup, static_argnames="dtype")


@pytest.mark.gpu
@pytest.mark.parametrize("by", [None, "rows", "columns"])
def test_quantised(by):
    table = EngramTable.quantize(VALUES)
    partition = None if by is None else Partition(jax.make_mesh((jax.device_count(),), ("model",)), "model", by)
    placed = place(table, "pinned_host", partition=partition)
    compiled = fetch.lower(placed, jnp.asarray(ROWS)).compile().as_text()
    assert "mosaic_gpu" in compiled and "S(5)" in compiled, "one kernel, the table where it lies"
    np.testing.assert_array_equal(fetch(placed, jnp.asarray(ROWS)), lookup(table, ROWS))


@pytest.mark.gpu
def test_however_the_arrays_were_put():
    table = EngramTable.quantize(VALUES)
    sharding = place(table, "pinned_host").values.sharding
    put = EngramTable(*jax.device_put((table.values, table.scales), sharding), table.num_rows, None, "pinned_host")
    np.testing.assert_array_equal(fetch(put, jnp.asarray(ROWS)), lookup(table, ROWS))
    in_loop = jax.jit(lambda table, rows: jax.lax.scan(lambda _, r: (None, lookup(table, r)), None, rows)[1])
    np.testing.assert_array_equal(in_loop(put, jnp.asarray(ROWS)), lookup(table, ROWS))
    np.testing.assert_array_equal(jax.vmap(lambda r: lookup(put, r))(jnp.asarray(ROWS)), lookup(table, ROWS))


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "dtype"), [(64, np.float32), (160, jnp.bfloat16), (33, jnp.bfloat16)])
def test_unquantised(width, dtype):
    table = EngramTable(VALUES[:, :width].astype(dtype), None, len(VALUES))
    got = fetch(place(table, "pinned_host"), jnp.asarray(ROWS), dtype=jnp.float32)
    np.testing.assert_array_equal(got, lookup(table, ROWS, dtype=jnp.float32))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_four_gib():
    rows = 17_000_000
    values = np.zeros((rows, 256), np.uint8)
    index = np.array([[0, 2**23 - 1, 2**23, 2**24 - 1, 2**24, 2**24 + 1, rows - 1, rows]], np.int32)
    assert values.nbytes > 2**32
    values[index[0, :-1]] = np.arange(1, 8, dtype=np.float32).astype(E4M3).view(np.uint8)[:, None]
    placed = place(EngramTable(values.view(E4M3), np.full((rows, 8), 127, np.uint8), rows), "pinned_host")
    found = np.asarray(fetch(placed, jnp.asarray(index)), np.float32).reshape(8, 256)
    np.testing.assert_array_equal(found, np.repeat([[1.0], [2], [3], [4], [5], [6], [7], [0]], 256, axis=1))
