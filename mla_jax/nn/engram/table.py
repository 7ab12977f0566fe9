"""The rows themselves: an `EngramTable`, where it lives, and how rows are fetched from it.

A table is far larger than anything else in the model (94 GiB for each of DeepSeek-V4.1-Flash's two), and a token reads
24 rows of it. So what matters is where it lives:

  device      in the GPU's memory, on one device or, with a `Partition`, over the devices of a mesh axis.
  host        in pinned host memory (JAX's memory kind "pinned_host"), partitioned or not. The GPU reads the rows over
              the bus, within the jitted step, with a kernel of its own (pallas_kernels/row_gather.py); the host's
              processors gather them where there is none.
  mapped      numpy arrays, a memory-mapped checkpoint for instance. Rows are gathered by numpy, outside `jit`: while
              layers dispatched before it run.

Rows are stored as e4m3 with an e8m0 scale per 32 values, as in checkpoints, or unquantised. What travels (between
devices, or from the host) is the stored bytes; they become values after that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mla_jax import checks
from pallas_kernels import row_gather
from pallas_kernels.formats import BF16, E4M3, E8M0, F32

SCALE_TILE = 32  # values that share a scale

Placement = Literal["device", "pinned_host"]


@dataclasses.dataclass(frozen=True)
class Partition:
    """A table cut over the devices of one mesh axis.

    Attributes:
      mesh, axis: the mesh and the name of its axis.
      by: "rows" gives each device a range of rows; a row comes from the one that has it (an all-reduce of bytes, zeros
        elsewhere). "columns" gives each device a slice of every row (an all-gather); the slices must hold whole scales.
    """

    mesh: Mesh
    axis: str
    by: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        if self.axis not in self.mesh.axis_names:
            raise ValueError(f"Partition: axis={self.axis!r}; accepted: an axis of the mesh, {self.mesh.axis_names}")
        if self.by not in ("rows", "columns"):
            raise ValueError(f"Partition: by={self.by!r}; accepted: 'rows' or 'columns'")

    @property
    def shards(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(self.axis, None) if self.by == "rows" else PartitionSpec(None, self.axis)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["num_rows", "partition", "where"]
)
@dataclasses.dataclass(frozen=True)
class EngramTable:
    """The rows of one layer. A pytree: `values` and `scales` are leaves, the rest is static.

    Attributes:
      values: e4m3 `[stored, head_dim]`, or bfloat16 or float32.
      scales: uint8 `[stored, head_dim / 32]`, e8m0: a row's values are e4m3 2^(byte - 127). None if unquantised.
      num_rows: rows of the table. `stored` is that, or more where rows were added so that devices get equal shares.
      partition: how it is cut over a mesh, or None.
      where: the memory that jax arrays are in.
    """

    values: Any
    scales: Any
    num_rows: int
    partition: Partition | None = None
    where: Placement = "device"

    @classmethod
    def quantize(cls, rows: np.ndarray | jax.Array) -> EngramTable:
        """Rows float `[num_rows, head_dim]` as e4m3, each scale the smallest power of two that fits its 32 values.

        The table is numpy's; `place` puts it where it belongs.
        """
        rows = np.asarray(rows, np.float32)  # [num_rows, head_dim]
        if rows.ndim != 2 or rows.shape[1] % SCALE_TILE:
            raise ValueError(f"rows is {checks.describe(rows)}; accepted: [num_rows, a multiple of {SCALE_TILE}]")
        tiles = rows.reshape(len(rows), -1, SCALE_TILE)  # [num_rows, tiles, 32]
        largest = float(ml_dtypes.finfo(E4M3).max)
        fraction, exponent = np.frexp(np.abs(tiles).max(axis=-1) / largest)  # [num_rows, tiles], fraction in [0.5, 1)
        exponent = np.clip(np.where(fraction == 0.5, exponent - 1, exponent), -126, 127)
        values = np.ldexp(tiles, -exponent[..., None]).reshape(rows.shape).astype(E4M3)
        return cls(values, (exponent + 127).astype(np.uint8), len(rows))

    @property
    def head_dim(self) -> int:
        return self.values.shape[1]

    @property
    def bytes_per_row(self) -> int:
        return sum(x.shape[1] * x.dtype.itemsize for x in self._arrays())

    def _arrays(self) -> list[Any]:
        return [x for x in (self.values, self.scales) if x is not None]


def check_table(table: Any, num_rows: int, head_dim: int, name: str = "table") -> None:
    """Raises ValueError unless `table` is an EngramTable of that many rows of that width, its arrays fitting."""
    if not isinstance(table, EngramTable):
        raise ValueError(f"{name} is {checks.describe(table)}; accepted: an EngramTable")
    if table.num_rows != num_rows:
        raise ValueError(f"{name} has {table.num_rows} rows; accepted: {num_rows}, as the EngramConfig's primes add up")
    shards = table.partition.shards if table.partition and table.partition.by == "rows" else 1
    stored = -(-num_rows // shards) * shards
    dtype = getattr(table.values, "dtype", None)
    if table.scales is None and dtype not in (BF16, F32):
        found = checks.describe(table.values)
        raise ValueError(f"{name}.values is {found}; accepted without scales: bfloat16, float32")
    checks.array(table.values, f"{name}.values", (stored, head_dim), dtype if table.scales is None else E4M3)
    if table.scales is not None:
        checks.array(table.scales, f"{name}.scales", (stored, head_dim // SCALE_TILE), np.uint8)


def place(
    table: EngramTable,
    where: Placement = "device",
    *,
    partition: Partition | None = None,
    device: jax.Device | None = None,
) -> EngramTable:
    """A table in numpy arrays (memory-mapped files, say) to where it is to live; each device reads its own part only.

    Args:
      table: numpy leaves.
      where: "device" or "pinned_host".
      partition: over which devices. None: all on `device`, by default JAX's first.

    Raises:
      ValueError: a partition that cuts scales in two, or an unknown place.
    """
    if where not in get_args(Placement):
        raise ValueError(f"where={where!r}; accepted: {', '.join(map(repr, get_args(Placement)))}")
    shards = partition.shards if partition else 1
    if partition and partition.by == "columns" and any(x.shape[1] % shards for x in table._arrays()):
        raise ValueError(
            f"partition by columns over {shards} devices cuts rows of {table.head_dim} values with a scale per "
            f"{SCALE_TILE}; accepted: a number of devices that divides {table._arrays()[-1].shape[1]}"
        )
    by_rows = partition is not None and partition.by == "rows"
    stored = -(-table.num_rows // shards) * shards if by_rows else table.num_rows
    sharding: Sharding
    if partition is not None:
        sharding = NamedSharding(partition.mesh, partition.spec, memory_kind=where)
    else:
        sharding = SingleDeviceSharding(device or jax.devices()[0], memory_kind=where)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            rows, columns = index
            wanted = len(range(*rows.indices(stored)))
            found = array[rows, columns]  # shorter in the last part, where `stored` is more than there is
            missing = np.zeros((wanted - len(found), found.shape[1]), array.dtype)
            return np.concatenate([found, missing]) if len(missing) else found

        return jax.make_array_from_callback((stored, array.shape[1]), sharding, part)

    scales = None if table.scales is None else put(table.scales)
    return EngramTable(put(table.values), scales, table.num_rows, partition, where)


def lookup(table: EngramTable, rows: jax.Array, *, dtype: Any = BF16) -> jax.Array:
    """Embeddings of rows: each token's, one after another.

    Nothing it reads depends on the model's layers, so it may run ahead of them: see docs/engram.md for how to hide a
    fetch from host memory behind them. Rows outside the table give zeros.

    Args:
      table: from `place`, or of numpy arrays; the latter is read by numpy, outside `jit`.
      rows: int32 `[*n, columns]`.
      dtype: of the result. bfloat16 holds every e4m3 value times a power of two exactly.

    Returns:
      `[*n, columns * head_dim]`.

    Raises:
      ValueError: `rows` of another dtype, or traced rows for a table in numpy arrays.
    """
    if not hasattr(rows, "ndim") or rows.ndim < 1:
        raise ValueError(f"rows is {checks.describe(rows)}; accepted: int32[*n, columns]")
    rows = checks.int32(rows, "rows", rows.shape)
    if isinstance(table.values, np.ndarray):
        if isinstance(rows, jax.core.Tracer):
            raise ValueError(
                "table is in numpy arrays and rows is traced; accepted: a lookup outside jit, or a table from `place`"
            )
        parts = _take_numpy(table, np.asarray(rows))
    else:
        parts = _fetch(table._arrays(), rows, table.partition, table.where)
    return _embeddings(parts, dtype)


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of the first axis: `[k, ...]` at int32 `[*n]` in [0, k) -> `[*n, ...]`, partitioned as the index is."""
    sharding = jax.typeof(index).sharding  # names Explicit mesh axes only: for them jax wants to be told the result's
    spec = PartitionSpec(*sharding.spec, *[None] * (array.ndim - 1))
    out = NamedSharding(sharding.mesh, spec) if any(sharding.spec) else None
    return array.at[index].get(mode="promise_in_bounds", out_sharding=out)


@functools.partial(jax.jit, static_argnames="dtype")
def _embeddings(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Stored bytes, or values, `[*n, columns, head_dim]` and scales `[*n, columns, tiles]` -> what `lookup` returns."""
    values, *scales = parts
    *n, columns, head_dim = values.shape
    if scales:
        tiles = values.reshape(*scales[0].shape, SCALE_TILE).astype(jnp.float32)  # [*n, columns, tiles, 32]
        factor = lax.bitcast_convert_type(scales[0], E8M0).astype(jnp.float32)[..., None]  # [*n, columns, tiles, 1]
        values = (tiles * factor).astype(dtype).reshape(values.shape)
    return values.astype(dtype).reshape(*n, columns * head_dim)


def _take_numpy(table: EngramTable, rows: np.ndarray) -> list[np.ndarray]:
    """Rows of numpy arrays; zeros for those outside. Each `[*n, columns, width]`."""
    inside = (rows >= 0) & (rows < table.num_rows)  # [*n, columns]
    index = np.where(inside, rows, 0)
    found = []
    for array in table._arrays():
        raw = array.view(np.uint8) if array.dtype.itemsize == 1 else array  # numpy copies e4m3 value by value
        part = raw.take(index, axis=0)  # [*n, columns, width]
        part[~inside] = 0
        found.append(part.view(array.dtype))
    return found


def _take(arrays: Sequence[jax.Array], rows: jax.Array, where: Placement) -> list[jax.Array]:
    """Rows of arrays; zeros for those outside. Each `[*n, columns, width]`."""
    if where == "pinned_host":
        return row_gather.gather(arrays, rows, functools.partial(_take_by, _gather_on_host))
    return _take_by(_gather, *arrays, rows)


def _take_by(gather: Callable[..., list[jax.Array]], *operands: jax.Array) -> list[jax.Array]:
    *arrays, rows = operands
    stored = arrays[0].shape[0]
    inside = (rows >= 0) & (rows < stored)  # [*n, columns]
    found = gather(arrays, jnp.clip(rows, 0, stored - 1))
    return [jnp.where(inside[..., None], x, jnp.zeros((), x.dtype)) for x in found]


def _gather(arrays: Sequence[jax.Array], index: jax.Array) -> list[jax.Array]:
    return [take_rows(x, index) for x in arrays]


def _gather_on_host(arrays: Sequence[jax.Array], index: jax.Array) -> list[jax.Array]:
    """The host's processors gather, where no kernel can: XLA's own GPU code computes nothing from host memory."""
    # The arrays are there already, but `jax.make_array_from_callback` leaves types that do not say so.
    operands = jax.device_put((list(arrays), index), jax.memory.Space.Host)
    return compute_on(_gather, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)(*operands)


@functools.partial(jax.jit, static_argnames=("partition", "where"))
def _fetch(
    arrays: Sequence[jax.Array], rows: jax.Array, partition: Partition | None, where: Placement
) -> list[jax.Array]:
    """The same from arrays that may be cut over a mesh. Each `[*n, columns, width]`."""
    if partition is None:
        return _take(arrays, rows, where)
    by_rows = partition.by == "rows"

    def local(arrays: Sequence[jax.Array], rows: jax.Array) -> list[jax.Array]:
        first = lax.axis_index(partition.axis) * arrays[0].shape[0] if by_rows else 0
        return [join(part) for part in _take(arrays, rows - first, where)]

    def join(part: jax.Array) -> jax.Array:
        small = part.dtype.itemsize == 1
        raw = lax.bitcast_convert_type(part, jnp.uint8) if small else part  # collectives know no 8-bit floats
        if by_rows:
            raw = lax.psum(raw, partition.axis)  # [*n, columns, width]; all terms but one are 0: bytes do not overflow
        else:
            raw = lax.all_gather(raw, partition.axis, axis=raw.ndim - 1, tiled=True)  # [*n, columns, width]
        return lax.bitcast_convert_type(raw, part.dtype) if small else raw

    axes, spec = {partition.axis}, PartitionSpec()
    if where == "pinned_host":  # a kernel must see every axis cut; by those that no type names, rows are not
        axes, spec = set(partition.mesh.axis_names), jax.typeof(rows).sharding.spec
    run = jax.shard_map(
        local,
        mesh=partition.mesh,
        in_specs=([partition.spec] * len(arrays), spec),
        out_specs=spec,
        axis_names=axes,
        check_vma=False,  # an all-gather's result is the same everywhere, which the checker does not know
    )
    return run(list(arrays), rows)
