"""Rows of large arrays by number, read by the GPU where they lie: in its own memory, or in pinned memory of the host,
which it addresses like its own and reads over the bus.

A row is cut into chunks of up to 16 bytes, and a thread copies a few of them: first all loads, so that a trip to the
host is waited for once, then all stores. Addresses are 64-bit. Rows outside the array give zeros; nothing is read for
them. What a thread does is written for the machine of `threads.py`, so tests run it in numpy.

`gather` binds a primitive that becomes this kernel when it is lowered for a GPU that has it, and otherwise whatever the
caller names: XLA itself knows no gather from host memory but one by the host's processors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels import architectures

THREADS = 128  # of a CTA: one warpgroup
CHUNKS = 4  # that a thread copies of the array with most of them
MAX_CHUNK_BYTES = 16
CAPABILITIES = (9, 10)  # major ones, that Mosaic GPU kernels here are compiled for


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a gather.

    Attributes:
      num_rows: rows asked for.
      stored: rows of each array.
      row_bytes: of each array.
    """

    num_rows: int
    stored: int
    row_bytes: tuple[int, ...]

    @property
    def num_ctas(self) -> int:
        chunks = max(self.num_rows * row_bytes // chunk_bytes(row_bytes) for row_bytes in self.row_bytes)
        return -(-chunks // (CHUNKS * THREADS))


def chunk_bytes(row_bytes: int) -> int:
    """The most that every row of an array can be cut into: a power of two up to 16."""
    return math.gcd(row_bytes, MAX_CHUNK_BYTES)


# ------------------------------------------------------------------------------------------------ thread by thread


def copy_rows(m: Any, problem: Problem, cta: Any, sources: Sequence[Any], rows: Any, targets: Sequence[Any]) -> None:
    """One CTA's program, see `threads.py`.

    Args:
      m: the machine.
      problem: static facts.
      cta: its number.
      sources: arrays of `stored` rows, in any memory.
      rows: int32 `[num_rows]`, in global memory.
      targets: arrays of `num_rows` rows, in global memory.
    """
    copies = []
    for source, target, row_bytes in zip(sources, targets, problem.row_bytes, strict=True):
        size = chunk_bytes(row_bytes)
        per_row = row_bytes // size
        threads = problem.num_ctas * THREADS
        for first in range(0, problem.num_rows * per_row, threads):
            chunk = cta * THREADS + m.thread + first
            to = chunk // per_row
            offset = (chunk - to * per_row) * size
            is_chunk = to < problem.num_rows
            row = m.load(rows, m.minimum(to, problem.num_rows - 1))
            inside = is_chunk & (row >= 0) & (row < problem.stored)
            data = m.load_bytes(source, row, row_bytes, offset, size, where=inside)
            copies.append((target, to, row_bytes, offset, data, size, is_chunk))
    for *copy, is_chunk in copies:
        m.store_bytes(*copy, where=is_chunk)


# ------------------------------------------------------------------------------------------------ the kernel, and when


def gather(
    arrays: Sequence[jax.Array], rows: jax.Array, reference: Callable[..., list[jax.Array]]
) -> list[jax.Array]:
    """`[stored, width]` arrays at int32 `[*n]` -> `[*n, width]` each; zeros for rows outside [0, stored).

    Args:
      arrays: of any dtype, in the GPU's memory or in pinned memory of the host (by their type, or in fact).
      rows: their numbers.
      reference: (*arrays, rows) -> the same, for everything but a GPU with the kernel, under `vmap` of the arrays, and
        for programs that XLA itself splits over devices.
    """
    out_avals = tuple(jax.make_jaxpr(reference)(*arrays, rows).out_avals)
    return _gather_p.bind(*arrays, rows, reference=reference, out_avals=out_avals)


def launch(*operands: jax.Array) -> list[jax.Array]:
    """The kernel itself: (*arrays, rows), as for `gather`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax import lax

    from pallas_kernels.threads import Threads, Value

    *arrays, rows = operands
    num_rows = math.prod(rows.shape)
    problem = Problem(num_rows, arrays[0].shape[0], tuple(x.shape[1] * x.dtype.itemsize for x in arrays))
    k = len(arrays)

    def body(*refs):
        parts = (refs[:k], refs[k], refs[k + 1 :])

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *jax.tree.map(lambda _: plgpu.RefType(), parts)))
        def program(_, cta, sources, rows, targets):
            copy_rows(Threads(THREADS), problem, Value(cta.registers[()]), sources, rows, targets)

        program(lax.axis_index("cta"), *parts)

    found = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((num_rows, x.shape[1]), x.dtype) for x in arrays),
        grid=(problem.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="wg",
        kernel_name="mla_row_gather",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*arrays, rows.reshape(num_rows))
    return [x.reshape(*rows.shape, x.shape[1]) for x in found]


_gather_p = Primitive("mla_row_gather")
_gather_p.multiple_results = True
_gather_p.def_abstract_eval(lambda *_, out_avals, **__: out_avals)


def _lower_for_cuda(ctx, *operands, reference, out_avals):
    ctx = ctx.replace(platforms=("cuda",))  # Pallas refuses to lower for more than one platform at a time
    compute = reference
    if architectures.on_one_device(ctx) and architectures.lowered_for()[0] in CAPABILITIES and ctx.avals_in[-1].size:
        compute = launch
    return mlir.lower_fun(compute, multiple_results=True)(ctx, *operands)


def _lower_elsewhere(ctx, *operands, reference, **_):
    return mlir.lower_fun(reference, multiple_results=True)(ctx, *operands)


def _batch(operands, axes, *, reference, **_):
    *arrays, rows = operands
    if any(axis is not None for axis in axes[:-1]):
        return jax.vmap(reference, in_axes=axes)(*operands), (0,) * len(arrays)
    return gather(arrays, jnp.moveaxis(rows, axes[-1], 0), reference), (0,) * len(arrays)


mlir.register_lowering(_gather_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_gather_p, _lower_elsewhere)
batching.primitive_batchers[_gather_p] = _batch
