"""Checks of arguments. Every error names the argument, says what came, and what is accepted.

Only what is static is checked: types, shapes, dtypes. Values inside integer arrays are data and never raise
(`pallas_kernels.formats`, `mla_jax.cache`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import FORMATS, KVFormat

if TYPE_CHECKING:
    from mla_jax.cache import PagedKVCache

Shape = tuple[int | str, ...]  # a name stands for any length


def _show_shape(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def describe(x: Any) -> str:
    """An argument in the words of an error: dtype and shape of arrays, type and value of anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{_show_shape(x.shape)}"
    return f"{type(x).__name__} {x!r}"


def kv_format(fmt: Any, name: str) -> KVFormat:
    if not isinstance(fmt, KVFormat):
        raise ValueError(f"{name} is {describe(fmt)}; accepted: a KVFormat, one of {', '.join(FORMATS)}")
    return fmt


def page_size(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"page_size is {describe(size)}; accepted: a Python int >= 1")
    return int(size)


def static(value: Any, name: str, types: tuple[type, ...]) -> None:
    """An argument that selects code must not be traced."""
    if isinstance(value, (jax.core.Tracer, jax.Array)):
        raise ValueError(
            f"{name} is a {'traced value' if isinstance(value, jax.core.Tracer) else 'JAX array'}; it selects code and "
            f"must be static: pass it as a Python value and list it in jax.jit's static_argnames=({name!r},)"
        )
    if not isinstance(value, types):
        accepted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise ValueError(f"{name} is {describe(value)}; accepted: {accepted}")


def array(x: Any, name: str, shape: Shape, dtype: Any, context: str = "") -> None:
    """`x` is an array of this dtype and shape; `context` says where the expectation comes from."""
    where = f" ({context})" if context else ""
    accepted = f"accepted: {np.dtype(dtype)}{_show_shape(shape)}{where}"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} is {describe(x)}; {accepted}")
    fits = len(x.shape) == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(x.shape, shape, strict=True)
    )
    if not fits or x.dtype != dtype:
        raise ValueError(f"{name} is {describe(x)}; {accepted}")


def int32(x: Any, name: str, shape: Shape | None) -> jax.Array:
    """`x` as int32. Integers of any width are accepted; what int32 cannot hold becomes -1, which names nothing."""
    accepted = "accepted: int32" + (_show_shape(shape) if shape is not None else " of any shape")
    if not hasattr(x, "shape") or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} is {describe(x)}; {accepted}")
    if shape is not None and not (
        len(x.shape) == len(shape)
        and all(isinstance(want, str) or got == want for got, want in zip(x.shape, shape, strict=True))
    ):
        raise ValueError(f"{name} is {describe(x)}; {accepted}")
    if x.dtype == jnp.int32:
        return x
    info = jnp.iinfo(x.dtype)
    if info.bits < 32:
        return x.astype(jnp.int32)
    fits = x <= jnp.asarray(2**31 - 1, x.dtype)
    if info.min < 0:
        fits &= x >= jnp.asarray(-(2**31), x.dtype)
    return jnp.where(fits, x, jnp.asarray(0, x.dtype)).astype(jnp.int32) - jnp.where(fits, 0, 1)


def cache(c: Any, name: str) -> PagedKVCache:
    """`c` is a PagedKVCache whose data has the shape and dtype that its format and page size call for."""
    from mla_jax.cache import PagedKVCache

    if not isinstance(c, PagedKVCache):
        raise ValueError(f"{name} is {describe(c)}; accepted: a PagedKVCache (mla_jax.pack_kv makes one)")
    fmt = c.format
    array(
        c.data,
        f"{name}.data",
        ("num_pages", *fmt.page_shape(c.page_size)),
        fmt.storage_dtype,
        f"format {fmt.name}, page_size {c.page_size}",
    )
    return c


def not_partitioned(x: Any, name: str) -> None:
    """An axis partitioned over Explicit mesh axes: the ops do not communicate, so this needs `mla_jax.sharding`."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    if spec is not None and any(axis is not None for axis in spec):
        raise ValueError(
            f"{name} is {describe(x)} partitioned over mesh axes as {spec}; accepted here: unpartitioned arrays. Use "
            "mla_jax.sharding, or call the op inside jax.shard_map, where it sees its own shard"
        )
