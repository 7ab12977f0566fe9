"""What both modules share: where a step's tokens are, chunked prefill, and checks of a call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import checks
from mla_jax.cache import PagedKVCache, append_kv
from mla_jax.nn.paging import is_concrete
from mla_jax.quantize import ScaleRule

if TYPE_CHECKING:
    from pallas_kernels.formats import KVFormat


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("start", "count", "positions"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Step:
    """Where the tokens of `x [b, s, hidden]` stand.

    Attributes:
      start: int32 `[b]`, position of each row's first token; may be negative in rows without tokens.
      count: int32 `[b]`, tokens in each row.
      positions: int32 `[b, s]`, -1 where there is no token.
    """

    start: jax.Array
    count: jax.Array
    positions: jax.Array

    @property
    def visible(self) -> jax.Array:
        """Tokens that each query sees, itself included: int32 `[b, s]`, 0 where there is no query."""
        return self.positions + 1


def chunk_step(start: jax.Array, count: jax.Array, s: int) -> Step:
    """s columns of which each row uses the first `count`, at positions `start`, `start + 1`, ..."""
    i = jnp.arange(s, dtype=jnp.int32)[None]  # [1, s]
    positions = start[:, None] + i  # [b, s]
    there = (i < count[:, None]) & (positions >= 0)  # [b, s]
    return Step(start, count, jnp.where(there, positions, -1))


def decode_step(cache_seqlens: jax.Array, s_q: int) -> Step:
    """The last s_q positions of each request; none for requests of length 0."""
    count = jnp.where(cache_seqlens > 0, jnp.int32(s_q), 0)  # [b]
    return chunk_step(cache_seqlens - s_q, count, s_q)


def in_chunks(
    attend: Callable[[Any, jax.Array, Step], tuple[jax.Array, Any]],
    cache: Any,
    x: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    chunk: int | None,
) -> tuple[jax.Array, Any]:
    """Runs `attend(cache, x, step) -> (out, cache)` over x `[b, s, hidden]`, `chunk` tokens at a time."""
    b, s, hidden = x.shape
    lengths = jnp.clip(lengths, 0, s)  # [b]
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk={chunk!r}; accepted: None, or an int of at least 1")
    if chunk is None or chunk >= s:
        return attend(cache, x, chunk_step(start, lengths, s))
    num = -(-s // chunk)
    parts = jnp.pad(x, ((0, 0), (0, num * chunk - s), (0, 0))).reshape(b, num, chunk, hidden)

    def one(cache, part):
        i, x = part
        count = jnp.clip(lengths - i * chunk, 0, chunk)  # [b]
        out, cache = attend(cache, x, chunk_step(start + i * chunk, count, chunk))
        return cache, out

    cache, out = lax.scan(one, cache, (jnp.arange(num, dtype=jnp.int32), parts.swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(b, num * chunk, -1)[:, :s], cache  # [b, s, hidden]


def roll(rows: jax.Array, by: jax.Array) -> jax.Array:
    """rows `[b, s, ...]` moved along s by `by` int32 `[b, 1]`, request by request; what falls off comes back in."""
    s = rows.shape[1]
    if s == 1:
        return rows
    source = (jnp.arange(s, dtype=jnp.int32)[None] - by) % s  # [b, s]
    return jnp.take_along_axis(rows, source.reshape(source.shape + (1,) * (rows.ndim - 2)), axis=1)


def mark(out: jax.Array, step: Step, placed: jax.Array) -> jax.Array:
    """out `[b, s, hidden]` with 0 where there is no token, and NaN where a token found no place (`placed [b, s]`)."""
    there = step.positions >= 0  # [b, s]
    out = jnp.where(placed[..., None], out, jnp.asarray(jnp.nan, out.dtype))
    return jnp.where(there[..., None], out, jnp.asarray(0, out.dtype))


def append_rows(pool: PagedKVCache, rows: jax.Array, slots: jax.Array, scale_rule: ScaleRule) -> PagedKVCache:
    """`append_kv` of rows `[b, n, d]` to slots `[b, n]`, whatever the rows' dtype."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(pool.format.compute_dtype)  # [b * n, d]
    return append_kv(pool, flat, slots.reshape(-1), scale_rule=scale_rule)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_call(
    config: Any,
    params: Mapping[str, Any],
    specs: Mapping[str, jax.ShapeDtypeStruct],
    x: Any,
    block_table: Any,
    **per_row: Any,
) -> None:
    """Raises ValueError unless the arguments of `prefill` and `decode` fit the config."""
    checks.array(x, "x", ("b", "s", config.hidden_size), config.dtype, f"of {type(config).__name__}")
    if 0 in x.shape:
        raise ValueError(f"x is {checks.describe(x)}; accepted: at least one request and one token")
    if params.keys() != specs.keys():
        lacking, extra = sorted(specs.keys() - params.keys()), sorted(params.keys() - specs.keys())
        raise ValueError(f"params lack {lacking} and have {extra} too many; accepted: {list(specs)}")
    for name, spec in specs.items():
        checks.array(params[name], f"params[{name!r}]", spec.shape, spec.dtype, f"of {type(config).__name__}")
    check_table("block_table", block_table, x.shape[0])
    for name, value in per_row.items():
        checks.array(value, name, (x.shape[0],), jnp.int32)


def check_table(name: str, table: Any, b: int) -> None:
    checks.array(table, name, (b, "columns"), jnp.int32)
    if table.shape[1] < 1:
        raise ValueError(f"{name} is {checks.describe(table)}; accepted: at least one column")


def check_pool(
    name: str,
    pool: Any,
    fmt: KVFormat,
    num_layers: int,
    *,
    page_size: int | None = None,
    num_pages: int | None = None,
) -> None:
    """Raises ValueError unless `pool` is a cache of that format whose pages divide among the layers."""
    checks.cache(pool, name)
    assert isinstance(pool, PagedKVCache)
    if pool.format != fmt:
        raise ValueError(f"{name} has format {pool.format.name}; accepted: {fmt.name}, by the config")
    if pool.num_pages % num_layers:
        raise ValueError(f"{name} has {pool.num_pages} pages; accepted: a multiple of {num_layers}, the layers")
    if page_size is not None and pool.page_size != page_size:
        raise ValueError(f"{name} has page_size={pool.page_size}; accepted: {page_size}, to go with the other pools")
    if num_pages is not None and pool.num_pages != num_pages:
        raise ValueError(f"{name} has {pool.num_pages} pages; accepted: {num_pages}, to go with the other pools")


def check_places(
    name: str, table: Any, page_size: int, num_pages: int, start: Any, count: Any, s: int, *, ring: bool = False
) -> None:
    """Outside jit, raises ValueError for a token that has no place. Under jit values are not known: see `mark`."""
    if not is_concrete(table, start, count):
        return
    table, start, count = (np.asarray(a) for a in (table, start, count))
    if (count > s).any() or (count < 0).any():
        raise ValueError(f"lengths={count.tolist()}; accepted: 0 to {s}, the tokens in x")
    columns = table.shape[1]
    for row in np.flatnonzero(count > 0):
        first, end = max(int(start[row]), 0), int(start[row] + count[row])
        if not ring and end > columns * page_size:
            raise ValueError(
                f"request {row} would have a token at position {end - 1}; accepted: below {columns * page_size}, its "
                f"{name} has {columns} columns of {page_size} tokens"
            )
        used = np.arange(first // page_size, -(-end // page_size)) % columns
        pages = table[row, used]
        if ((pages < 0) | (pages >= num_pages)).any():
            column = int(used[np.argmax((pages < 0) | (pages >= num_pages))])
            raise ValueError(
                f"request {row} has no page for its new tokens: {name}[{row}, {column}] is {table[row, column]}; "
                f"accepted: 0 to {num_pages - 1}"
            )
