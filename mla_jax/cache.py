"""`PagedKVCache` and the functions that write and read it: pack, append, gather, unpack.

A cache is one array of pages plus two static facts, the format and the page size. A *slot* is a token's place:
page * page_size + offset, int32. Slots and positions are data: any integer is safe, and one that names no place is
dropped when written and reads as zeros.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import checks
from mla_jax.quantize import ScaleRule, check_scale_rule, decode_rows, encode_rows
from pallas_kernels import load_runtime
from pallas_kernels.formats import FORMATS, KVFormat

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_INT32_MAX = 2**31 - 1


@jax.tree_util.register_pytree_with_keys_class
class PagedKVCache:
    """Pages of key/value rows.

    A pytree whose only leaf is `data`; `format` and `page_size` are static. Nothing is validated when JAX rebuilds it,
    so the leaf may be a sharding, a spec, a `ShapeDtypeStruct`, None, or carry leading axes; the ops validate.

    Attributes:
      data: V32 uint8 [pages, page_size, bytes_per_token]; MODEL1 uint8 [pages, page_bytes]; BF16_*, F32_* [pages,
        page_size, d_qk]. Used without a block table, page i is the whole of request i's cache and page_size its
        greatest length.
      format: the `KVFormat`.
      page_size: tokens a page.

    Raises:
      ValueError: `fmt` is no KVFormat, or `page_size` is no positive int.
    """

    data: Any
    format: KVFormat
    page_size: int

    __slots__ = ("data", "format", "page_size")

    def __init__(self, data: Any, fmt: KVFormat, page_size: int):
        self.data = data
        self.format = checks.kv_format(fmt, "fmt")
        self.page_size = checks.page_size(page_size)

    @classmethod
    def zeros(cls, fmt: KVFormat, num_pages: int, page_size: int, *, sharding=None) -> PagedKVCache:
        """An empty cache of `num_pages` pages; `sharding` (a jax.sharding.Sharding) places it."""
        checks.kv_format(fmt, "fmt")
        checks.page_size(page_size)
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or num_pages < 0:
            raise ValueError(f"num_pages is {num_pages!r}; accepted: an int >= 0")
        data = jnp.zeros((num_pages, *fmt.page_shape(page_size)), fmt.storage_dtype, device=sharding)
        return cls(data, fmt, page_size)

    @property
    def num_pages(self) -> int:
        """Pages in `data`; inside shard_map those of this shard."""
        return self.data.shape[0]

    @property
    def num_slots(self) -> int:
        """Tokens the cache can hold."""
        return self.num_pages * self.page_size

    def replace(self, data: Any) -> PagedKVCache:
        """The same format and page size around other data."""
        return PagedKVCache(data, self.format, self.page_size)

    def __repr__(self) -> str:
        shape = getattr(self.data, "shape", None)
        what = f"{getattr(self.data, 'dtype', type(self.data).__name__)}{list(shape) if shape is not None else ''}"
        return f"PagedKVCache({what}, {self.format.name}, page_size={self.page_size})"

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("data"), self.data),), (self.format, self.page_size)

    def tree_flatten(self):
        return (self.data,), (self.format, self.page_size)

    @classmethod
    def tree_unflatten(cls, aux, children):
        cache = object.__new__(cls)
        (cache.data,), (cache.format, cache.page_size) = children, aux
        return cache


def _serialize_aux(aux) -> bytes:
    fmt, page_size = aux
    return f"{fmt.name}/{page_size}".encode()


def _deserialize_aux(aux: bytes):
    load_runtime()  # an exported function that takes a cache may hold kernels
    name, page_size = aux.decode().rsplit("/", 1)
    if name not in FORMATS:
        raise ValueError(f"the serialised cache has format {name!r}; this version knows {', '.join(FORMATS)}")
    return FORMATS[name], int(page_size)


jax.export.register_pytree_node_serialization(
    PagedKVCache,
    serialized_name="mla_jax.PagedKVCache",
    serialize_auxdata=_serialize_aux,
    deserialize_auxdata=_deserialize_aux,
)


def _area(cache: PagedKVCache, record: int) -> tuple[jax.Array, int]:
    """A cache's pages as rows of one record, [pages, rows, record width], and the area's first row in a page.

    Indexed by (page, row), never by flat bytes: pools outgrow what 32-bit byte offsets hold.
    """
    fmt = cache.format
    if cache.data.ndim == 3:
        return cache.data, 0
    width = fmt.record_bytes[record]
    pages = cache.data.shape[0]
    rows = fmt.page_bytes(cache.page_size) // width
    return cache.data.reshape(pages, rows, width), fmt.area_first_row(record, cache.page_size)


def _locate(slots: Int[Array, "*n"], cache: PagedKVCache) -> tuple[jax.Array, jax.Array]:
    """(page, offset) of each slot; slots that name no place get page num_pages, which is out of range.

    JAX would take a negative index from the end and so touch somebody else's row: hence the explicit test.
    """
    valid = (slots >= 0) & (slots < min(cache.num_slots, _INT32_MAX))
    inside = jnp.where(valid, slots, 0)
    page = lax.div(inside, jnp.int32(cache.page_size))
    offset = lax.rem(inside, jnp.int32(cache.page_size))
    return jnp.where(valid, page, cache.num_pages), offset


@functools.partial(jax.jit, static_argnames=("fmt", "scale_rule"))
def _pack(kv, fmt: KVFormat, scale_rule: ScaleRule) -> jax.Array:
    num_pages, page_size, _ = kv.shape
    records = encode_rows(kv, fmt, scale_rule)  # each [num_pages, page_size, record bytes]
    if len(fmt.page_shape(page_size)) == 2:
        return records[0]
    tail = fmt.page_bytes(page_size) - fmt.bytes_per_token * page_size
    areas = [r.reshape(num_pages, page_size * r.shape[-1]) for r in records]
    return jnp.concatenate([*areas, jnp.zeros((num_pages, tail), jnp.uint8)], axis=-1)


def pack_kv(
    kv: Float[Array, "num_pages page_size d_qk"], fmt: KVFormat, *, scale_rule: ScaleRule = "pow2"
) -> PagedKVCache:
    """Whole pages of rows -> a cache.

    Args:
      kv: [num_pages, page_size, d_qk], bfloat16 (float32 for F32_576 and F32_512).
      fmt: the cache format.
      scale_rule: "pow2" (FlashMLA's, the default) or "amax" (float32 scales only, so V32); see `mla_jax.quantize`.

    Returns:
      The cache. Pad bytes and page tails are 0.

    Raises:
      ValueError: wrong rank, width, dtype, format or scale rule.
    """
    checks.kv_format(fmt, "fmt")
    check_scale_rule(scale_rule, fmt)
    checks.array(kv, "kv", ("num_pages", "page_size", fmt.d_qk), fmt.compute_dtype, f"of format {fmt.name}")
    return PagedKVCache(_pack(kv, fmt, scale_rule), fmt, checks.page_size(kv.shape[1]))


@functools.partial(jax.jit, static_argnames=("scale_rule",), inline=True)
def _append(cache: PagedKVCache, kv, slots, scale_rule: ScaleRule) -> PagedKVCache:
    # One scatter for all areas, so that XLA makes one kernel of it: a page is seen as units that every record is a
    # whole number of, and a token's units, those of all its records, are written side by side. Slots that come twice
    # make the promise of unique indices false: what they then hold is unspecified, which is what `append_kv` says of
    # them. Without it, XLA writes each byte by a loop of compare-and-swap on the word around it.
    fmt, page_size = cache.format, cache.page_size
    page, offset = _locate(slots, cache)  # [n]
    records = encode_rows(kv, fmt, scale_rule)  # each [n, record width]
    if cache.data.ndim == 3:
        return cache.replace(cache.data.at[page, offset].set(records[0], mode="drop", unique_indices=True))
    unit_bytes = fmt.unit_bytes(page_size)
    areas = []
    for record, num_bytes in enumerate(fmt.record_bytes):
        first, count = fmt.area_offset_bytes(record, page_size) // unit_bytes, num_bytes // unit_bytes
        areas.append(first + offset[:, None] * count + jnp.arange(count, dtype=jnp.int32)[None])  # [n, count]
    unit = jnp.concatenate(areas, axis=1)  # [n, units of a token]
    rows = jnp.concatenate(records, axis=1).reshape(*unit.shape, unit_bytes)  # [n, units of a token, unit_bytes]
    pool = cache.data.reshape(cache.num_pages, fmt.page_bytes(page_size) // unit_bytes, unit_bytes)
    pool = pool.at[page[:, None], unit].set(rows, mode="drop", unique_indices=True)
    return cache.replace(pool.reshape(cache.data.shape))


def append_kv(
    cache: PagedKVCache,
    kv: Float[Array, "n d_qk"],
    slots: Int[Array, "n"],
    *,
    scale_rule: ScaleRule = "pow2",
) -> PagedKVCache:
    """Writes one row per slot. Jit it with the cache donated and it writes in place.

    Args:
      cache: the cache to write into.
      kv: [n, d_qk] in the format's compute dtype (bfloat16; float32 for F32_*).
      slots: int32 [n], page * page_size + offset. A slot outside [0, num_pages * page_size) is dropped: pass -1 for
        padded rows. Where a slot comes twice, what it then holds is unspecified (on a GPU, bytes of either row).
      scale_rule: as in `pack_kv`.

    Returns:
      The cache with the rows written.

    Raises:
      ValueError: wrong rank, width, dtype or scale rule.
    """
    checks.cache(cache, "cache")
    check_scale_rule(scale_rule, cache.format)
    checks.array(kv, "kv", ("n", cache.format.d_qk), cache.format.compute_dtype, f"of format {cache.format.name}")
    slots = checks.int32(slots, "slots", (kv.shape[0],))
    return _append(cache, kv, slots, scale_rule)


def gather_records(cache: PagedKVCache, slots: Int[Array, "*n"]) -> tuple[jax.Array, ...]:
    """The records of some slots, one array [*n, record width] per area; zeros where a slot names no place."""
    if cache.num_slots == 0:
        widths = (cache.format.d_qk,) if not cache.format.is_quantized else cache.format.record_bytes
        return tuple(jnp.zeros((*slots.shape, width), cache.data.dtype) for width in widths)
    page, offset = _locate(slots, cache)
    out = []
    for record in range(len(cache.format.records)):
        area, first_row = _area(cache, record)
        out.append(area.at[page, first_row + offset].get(mode="fill", fill_value=0))
    return tuple(out)


def gather_rows(cache: PagedKVCache, slots: Int[Array, "*n"]) -> jax.Array:
    """`gather_kv` without its checks, for use inside the ops."""
    return decode_rows(gather_records(cache, slots), cache.format)


_gather = jax.jit(gather_rows)


def gather_kv(cache: PagedKVCache, slots: Int[Array, "*n"]) -> jax.Array:
    """The rows of some slots, dequantised: [*n, d_qk] in the format's compute dtype.

    Only the named rows are read and dequantised. A slot that names no place (-1, say) gives a row of zeros.

    Args:
      cache: the cache to read.
      slots: integers of any shape.

    Raises:
      ValueError: `slots` is not integer, or the cache's data does not fit its format.
    """
    checks.cache(cache, "cache")
    return _gather(cache, checks.int32(slots, "slots", None))


@jax.jit
def _unpack(cache: PagedKVCache) -> jax.Array:
    records = []
    for record in range(len(cache.format.records)):
        area, first_row = _area(cache, record)
        records.append(area[:, first_row : first_row + cache.page_size])
    return decode_rows(tuple(records), cache.format)


def unpack_kv(cache: PagedKVCache) -> jax.Array:
    """Every row of a cache, dequantised: [num_pages, page_size, d_qk] in the format's compute dtype.

    Slots that were never written hold whatever their bytes say. Raises ValueError if the data does not fit the format.
    """
    checks.cache(cache, "cache")
    return _unpack(cache)


def slots_from_positions(
    positions: Int[Array, "b *n"], block_table: Int[Array, "b max_pages"] | None, page_size: int
) -> jax.Array:
    """Logical positions of each request -> slots: block_table[r, t // page_size] * page_size + t % page_size.

    Args:
      positions: integers [b, ...], row r being positions within request r.
      block_table: integers [b, max_pages], or None when page i is request i's whole cache.
      page_size: tokens a page.

    Returns:
      int32, shaped like `positions`. -1 where the position is negative (so -1 stays -1), lies past the table, or its
      page is negative or its slot past int32.

    Raises:
      ValueError: wrong rank, dtype or page size.
    """
    size = checks.page_size(page_size)
    positions = checks.int32(positions, "positions", None)
    if positions.ndim < 1:
        raise ValueError("positions has shape []; accepted: [b, ...], one row a request")
    if block_table is not None:
        block_table = checks.int32(block_table, "block_table", (positions.shape[0], "max_pages"))
    return _slots(positions, block_table, size)


@functools.partial(jax.jit, static_argnames=("page_size",))
def _slots(positions, block_table, page_size: int) -> jax.Array:
    rows = lax.broadcasted_iota(jnp.int32, positions.shape, 0)
    valid = positions >= 0
    inside = jnp.where(valid, positions, 0)
    column = lax.div(inside, jnp.int32(page_size))
    offset = lax.rem(inside, jnp.int32(page_size))
    if block_table is None:
        page, valid = rows, valid & (column == 0)
    else:
        page = block_table.at[rows, column].get(mode="fill", fill_value=-1)
    valid = valid & (page >= 0) & (page <= (_INT32_MAX - page_size) // page_size)
    return jnp.where(valid, jnp.where(valid, page, 0) * page_size + offset, -1)
