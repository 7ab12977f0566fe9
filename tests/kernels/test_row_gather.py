"""The kernel that gathers rows wherever they lie: on a machine in numpy, byte by byte, and compiled for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import row_gather
from pallas_kernels.row_gather import THREADS, Problem
from tests.kernels import aot, simt


class Bytes(simt.Machine):
    """The machine with rows of bytes: what is read must exist, what is written is written once."""

    def load_bytes(self, memory, row, row_bytes, offset, size, where):
        assert offset.min() >= 0 and (offset % size == 0).all() and row_bytes % size == 0
        found = np.zeros((self.num_threads, size), np.uint8)
        for t in np.flatnonzero(where):
            start = int(row[t]) * row_bytes + int(offset[t])
            assert 0 <= start <= memory.values.size - size and offset[t] + size <= row_bytes
            found[t] = memory.values.reshape(-1)[start : start + size]
        return found

    def store_bytes(self, memory, row, row_bytes, offset, data, size, where):
        for t in np.flatnonzero(where):
            start = int(row[t]) * row_bytes + int(offset[t])
            assert not memory.stored[start : start + size].any()
            memory.values[start : start + size], memory.stored[start : start + size] = data[t], True


class Rows:
    def __init__(self, values):
        self.values, self.stored = values, np.zeros(values.size, bool)


@pytest.mark.parametrize("widths", [(256, 8), (32, 1), (128,), (66, 2), (20,), (4096, 8)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 192, 700])
def test_every_byte(num_rows, widths):
    rng = np.random.default_rng(num_rows)
    arrays = [Rows(rng.integers(1, 256, (50, width), dtype=np.uint8)) for width in widths]
    found = [Rows(np.zeros(num_rows * width, np.uint8)) for width in widths]
    rows = rng.integers(-5, 56, num_rows).astype(np.int32)
    rows[:2] = (2**31 - 1, -(2**31))[: len(rows[:2])]
    problem = Problem(num_rows, 50, widths)
    asked = simt.Memory(values=rows)
    for cta in range(problem.num_ctas):
        asked.forget()
        row_gather.copy_rows(Bytes(THREADS, []), problem, np.int32(cta), arrays, asked, found)
    inside = (rows >= 0) & (rows < 50)
    for source, target in zip(arrays, found, strict=True):
        want = np.where(inside[:, None], source.values[np.where(inside, rows, 0)], 0)
        assert target.stored.all()
        np.testing.assert_array_equal(target.values.reshape(want.shape), want)


def test_compiled():
    """For a published table, beyond any 32-bit offset: one trip for all of a thread's chunks, 16 bytes each."""
    rows = 384_006_168
    shapes = [jax.ShapeDtypeStruct((rows, 256), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows, 8), jnp.uint8)]
    (kernel,) = aot.compile_sm90(row_gather.launch, *shapes, jax.ShapeDtypeStruct((8, 1, 24), jnp.int32))
    assert "mla_row_gather" in kernel.name and "0 bytes spill stores" in kernel.log
    table_loads = [n for n, line in enumerate(kernel.sass) if "LDG.E.NA" in line]
    stores = [n for n, line in enumerate(kernel.sass) if "STG.E" in line]
    assert kernel.count("LDG.E.NA.128.CONSTANT") == kernel.count("STG.E.128") == row_gather.CHUNKS
    assert len(table_loads) == len(stores) == row_gather.CHUNKS + 1 and max(table_loads) < min(stores)
    assert kernel.count("IMAD.WIDE.U32") >= row_gather.CHUNKS + 1  # 64-bit addresses
