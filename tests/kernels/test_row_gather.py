"""The kernel that gathers rows wherever they lie: on a machine in numpy, byte by byte, and compiled for an H100."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir import ir

from mla_jax.nn.engram import EngramTable, lookup
from pallas_kernels import row_gather
from pallas_kernels.formats import E4M3
from pallas_kernels.row_gather import THREADS, Problem
from tests import compiling
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


def test_the_table_stays_where_it_lies():
    """XLA hands the kernel a table in host memory as it is and copies none of it, in a loop too."""
    device = compiling.h100()
    rows = jax.ShapeDtypeStruct((3, 8, 24), jnp.int32, sharding=SingleDeviceSharding(device))

    def steps(values, scales, rows):
        def step(total, rows):
            found = lookup(EngramTable(values, scales, 10**7, None, "pinned_host"), rows)
            return total + found, None

        return jax.lax.scan(step, jnp.zeros((8, 6144), jnp.bfloat16), rows)[0]

    with jax.default_device(device):
        arrays = [jax.ShapeDtypeStruct((10**7, n), t, sharding=rows.sharding) for n, t in ((256, E4M3), (8, jnp.uint8))]
        lowered = jax.jit(steps).trace(*arrays, rows).lower()
        _put_arguments(lowered.compiler_ir("stablehlo"), ("pinned_host", "pinned_host", "device"))
        text = lowered.compile().as_text()
    kernels = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert len(kernels) == 1 and "S(5)" in text.splitlines()[0]
    in_host_memory = [line for line in text.splitlines() if re.match(r" .* = .*S\(5\)", line)]
    operations = {re.search(r" ([a-z-]+)\(", line.split(" = ", 1)[1])[1] for line in in_host_memory}
    assert operations == {"parameter", "get-tuple-element", "tuple", "while"}


def _put_arguments(module, memory_kinds):
    """Names the memory of each argument, as JAX does for arrays that exist: a device to compile for has no memories."""
    with module.context:
        (main,) = (op for op in module.body.operations if op.operation.attributes["sym_name"].value == "main")
        attributes = [
            ir.DictAttr.get({a.name: a.attr for a in old} | {"mhlo.memory_kind": ir.StringAttr.get(kind)})
            for old, kind in zip(main.attributes["arg_attrs"], memory_kinds, strict=True)
        ]
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
