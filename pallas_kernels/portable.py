"""Both decode ops in kernels that any NVIDIA GPU from compute capability 8.0 runs, lowered through Triton.

One program takes one piece of the split plan for one tile of query rows and goes through its keys with an online
softmax; a second kernel merges items of several pieces. What Triton asks for shapes everything else: widths are powers
of two, so a row of 576 or 512 is a list of *chunks* (`row_chunks`), each with operands and accumulators of its own, and
no chunk of a quantised row crosses a scale tile. Keys are fetched by (page, offset), one address a key: any page size,
any table, any index list. Keys that do not count are never read; they are zeros, and their score is -inf.

JAX has deprecated this lowering. In a version without it importing this module fails, and dispatch takes the next
implementation, saying so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats import E4M3, E8M0, F32, KVFormat
from pallas_kernels.schedule import BLOCK_TOKENS, SplitPlan
from pallas_kernels.wide_offsets import with_wide_offsets

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
MIN_CAPABILITY = (8, 0)
LARGE_SMEM_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))  # a CTA may have 163 KiB or more, elsewhere 99
NATIVE_E4M3_CAPABILITY = (8, 9)  # below, neither the GPU nor Pallas converts e4m3
MIN_DOT = 16  # rows and columns of the smallest product Triton makes
INT32_MAX = 2**31 - 1

# ------------------------------------------------------------------------------------------------ config


@dataclasses.dataclass(frozen=True)
class PortableConfig:
    """How a program is cut. All are powers of two.

    Attributes:
      tile_rows: query rows of a program, at least 16.
      block_keys: keys of a round of the loop, 16 to `BLOCK_TOKENS`.
      num_warps: of a program.
      num_stages: rounds that Triton may keep in flight; each costs shared memory for plain caches.
    """

    tile_rows: int = 16
    block_keys: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        limits = dict(tile_rows=(16, 128), block_keys=(16, BLOCK_TOKENS), num_warps=(1, 16), num_stages=(1, 8))
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            is_power = isinstance(value, int) and value > 0 and (value & (value - 1) == 0 or name == "num_stages")
            if not is_power or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}; accepted: powers of two from {least} to {most}")


def default_config(formats: tuple[KVFormat, ...], rows: int, capability: tuple[int, int]) -> PortableConfig:
    """What compiles without spills, or nearly, in the shared memory of every GPU it is for (docs/portable.md); nothing
    of it has been timed. `formats`: of each scope; `rows`: query rows of an item."""
    if formats[0].compute_dtype == F32:
        return PortableConfig(tile_rows=16, block_keys=16, num_warps=4)
    if rows > 32 and capability[0] == 9:  # 64 rows, so that Triton multiplies with wgmma
        return PortableConfig(tile_rows=64, block_keys=32, num_warps=8)
    # Two scopes that share no chunk widths need shared memory for both: 106 KiB with 32 rows.
    mixed = len({fmt.is_quantized for fmt in formats}) > 1 and capability not in LARGE_SMEM_CAPABILITIES
    if rows > 16 and not mixed:
        return PortableConfig(tile_rows=32, block_keys=16, num_warps=8)
    many_chunks = len(row_chunks(*formats)) > 5
    return PortableConfig(tile_rows=16, block_keys=32, num_warps=8 if many_chunks else 4)


def check(fmt: KVFormat, page_size: int, capability: tuple[int, int]) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not serve."""
    if capability < MIN_CAPABILITY:
        needed, got = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        raise NotImplementedError(f"needs compute capability {needed} or above; this is {got}")
    if len(fmt.page_shape(page_size)) == 1 and fmt.page_bytes(page_size) > INT32_MAX:
        raise NotImplementedError(f"a page of {fmt.page_bytes(page_size)} bytes; the kernel takes up to {INT32_MAX}")


# ------------------------------------------------------------------------------------------------ chunks of a row


def row_chunks(*formats: KVFormat, widest: int = 512) -> tuple[tuple[int, int], ...]:
    """(first column, width) of each chunk: widths are powers of two, none crosses a scale tile, nope from rope, d_v."""
    cuts = set()
    for fmt in formats:
        cuts |= {0, fmt.d_qk, fmt.d_v}
        if fmt.is_quantized:
            cuts |= set(range(0, fmt.d_nope + 1, fmt.scale_tile))
    ends = sorted(cuts)
    chunks = []
    for begin, end in itertools.pairwise(ends):
        width = min(end - begin, widest)
        chunks += [(start, width) for start in range(begin, end, width)]
    assert all(w & (w - 1) == 0 and w >= MIN_DOT for _, w in chunks), chunks
    return tuple(chunks)


# ------------------------------------------------------------------------------------------------ reading keys


@dataclasses.dataclass(frozen=True)
class _Cache:
    """A cache inside a kernel: its pages, and how a chunk of some rows is read and dequantised."""

    data: Any  # ref [pages, page_size, d or bytes], or [pages, page_bytes]; it may claim more pages than there are
    num_pages: int
    fmt: KVFormat
    page_size: int
    native_e4m3: bool

    def chunk(self, page, offset, valid, start: int, width: int) -> jax.Array:
        """Columns [start, start + width) of some rows, in the compute dtype: [n, width], 0 if invalid."""
        fmt = self.fmt
        if not fmt.is_quantized:
            return self._load(page, offset, valid, 0, start + _iota(width))
        value, scale, rope = (fmt.locate(role) for role in ("nope", "scale", "rope"))
        if start >= fmt.d_nope:
            at = rope[1] + (start - fmt.d_nope) * rope[2].dtype.itemsize
            raw = self._load(page, offset, valid, rope[0], at + _iota(2 * width))  # [n, 2 * width]
            low, high = (x.reshape(-1, width) for x in jnp.split(raw.reshape(-1, width, 2), 2, axis=2))
            bits = low.astype(jnp.uint16) | (high.astype(jnp.uint16) << jnp.uint16(8))  # [n, width]
            return lax.bitcast_convert_type(bits, rope[2].dtype)
        raw = self._load(page, offset, valid, value[0], value[1] + start + _iota(width))  # [n, width]
        size = scale[2].dtype.itemsize if scale[2].dtype != E8M0 else 1
        at = scale[1] + start // fmt.scale_tile * size
        raw_scale = self._load(page, offset, valid, scale[0], at + _iota(size))  # [n, size]
        factor = _e8m0(raw_scale) if scale[2].dtype == E8M0 else _float32(raw_scale)  # [n, 1]
        return (_e4m3(raw, self.native_e4m3) * factor).astype(fmt.compute_dtype)

    def _load(self, page, offset, valid, record: int, column) -> jax.Array:
        """[n, columns]: elements at `column` of each row's record."""
        page, offset, column = page[:, None], offset[:, None], column[None, :]
        if len(self.data.shape) == 3:
            place = self.data.at[page, offset, column]
        else:
            first = self.fmt.area_offset_bytes(record, self.page_size)
            place = self.data.at[page, first + offset * self.fmt.record_bytes[record] + column]
        return plgpu.load(place, mask=valid[:, None], other=np.zeros((), self.data.dtype)[()])


def _iota(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)


def _e4m3(byte: jax.Array, native: bool) -> jax.Array:
    """float32 values of e4m3 bytes, exactly."""
    if native:
        return lax.bitcast_convert_type(byte, E4M3).astype(jnp.float16).astype(jnp.float32)
    # Shifted into a float16 the bits mean 2^-8 of the value, subnormals included; NaN alone is different.
    byte = byte.astype(jnp.uint16)
    magnitude = byte & jnp.uint16(0x7F)
    half = ((byte & jnp.uint16(0x80)) << jnp.uint16(8)) | (magnitude << jnp.uint16(7))
    value = lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0
    return jnp.where(magnitude == jnp.uint16(0x7F), jnp.nan, value)


def _e8m0(byte: jax.Array) -> jax.Array:
    """float32 2^(byte - 127); byte 0 is subnormal, 255 is NaN."""
    exponent = byte.astype(jnp.int32)
    bits = jnp.where(exponent == 0, 1 << 22, exponent << 23)
    return lax.bitcast_convert_type(jnp.where(exponent == 255, 0x7FC00000, bits), jnp.float32)


def _float32(raw: jax.Array) -> jax.Array:
    """float32 [n, 1] from little-endian bytes [n, 4]: a wider view of the pool would be a copy of it."""
    bits = jnp.sum(raw.astype(jnp.int32) << (8 * _iota(4))[None, :], axis=1, dtype=jnp.int32)  # [n]
    return lax.bitcast_convert_type(bits, jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of one scope of one item: `locate(key [n])` -> (page [n], offset [n], valid [n]), and how many."""

    cache: _Cache
    locate: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    count: jax.Array  # int32 []


def _from_slot(cache: _Cache, slot: jax.Array, wanted: jax.Array):
    valid = wanted & (slot >= 0) & (slot < min(cache.num_pages * cache.page_size, INT32_MAX))
    slot = jnp.where(valid, slot, 0)
    return lax.div(slot, jnp.int32(cache.page_size)), lax.rem(slot, jnp.int32(cache.page_size)), valid


def _listed_keys(cache: _Cache, indices, length, item, alive) -> _Keys:
    """Keys that `indices` [items, topk] names, the first `length` [items] (None: all) of them."""
    topk = indices.shape[1]
    count = jnp.int32(topk) if length is None else jnp.clip(length[item], 0, topk)
    count = jnp.where(alive, count, 0)

    def locate(key):
        wanted = (key >= 0) & (key < count)
        slot = plgpu.load(indices.at[item, key], mask=wanted, other=-1)
        return _from_slot(cache, slot, wanted)

    return _Keys(cache, locate, count)


def _tabled_keys(cache: _Cache, table, seqlens, item, alive) -> _Keys:
    """Keys of the pages in row `item` of `table` [items, columns]; page `item` itself if it is None."""
    capacity = min((1 if table is None else table.shape[1]) * cache.page_size, INT32_MAX)
    count = jnp.where(alive, jnp.clip(seqlens[item], 0, capacity), 0)

    def locate(key):
        valid = (key >= 0) & (key < count)
        if table is None:
            return jnp.full(key.shape, item, jnp.int32), key, valid
        column = lax.div(jnp.where(valid, key, 0), jnp.int32(cache.page_size))
        page = plgpu.load(table.at[item, column], mask=valid, other=-1)
        valid &= (page >= 0) & (page < cache.num_pages)
        return jnp.where(valid, page, 0), key - column * cache.page_size, valid

    return _Keys(cache, locate, count)


# ------------------------------------------------------------------------------------------------ attention


def _attend(scopes, q, end, first, last, scale2, *, chunks, d_v: int, block_keys: int):
    """Online softmax of rows q over blocks [first, last) of the scopes' keys, counted through all scopes.

    Args:
      scopes: `_Keys`, in order.
      q: [m, width] per chunk.
      end: int32 [m], or None: row r sees keys below end[r].
      first, last: blocks of `BLOCK_TOKENS` keys.
      scale2: float32 [], softmax scale in base 2.

    Returns:
      (acc float32 [m, width] per chunk of V, not normalised; top float32 [m] in base 2; total float32 [m]).
    """
    m = q[0].shape[0]
    values = [width for start, width in chunks if start < d_v]
    state = (
        jnp.full((m,), -jnp.inf, jnp.float32),
        jnp.zeros((m,), jnp.float32),
        *(jnp.zeros((m, width), jnp.float32) for width in values),
    )
    for keys in scopes:
        num_blocks = _ceil_div(keys.count, BLOCK_TOKENS)
        rounds = BLOCK_TOKENS // block_keys
        lower = jnp.minimum(jnp.maximum(first, 0), num_blocks) * rounds
        upper = jnp.minimum(jnp.minimum(last, num_blocks) * rounds, _ceil_div(keys.count, block_keys))

        def one_round(i, state, keys=keys):
            top, total, *acc = state
            key = i * block_keys + _iota(block_keys)  # [n]
            page, offset, valid = keys.locate(key)  # [n] each
            rows = [keys.cache.chunk(page, offset, valid, *chunk) for chunk in chunks]  # [n, width] each
            scores = sum(_dot(a, b, contract=1) for a, b in zip(q, rows, strict=True)) * scale2  # [m, n]
            seen = valid[None, :] if end is None else valid[None, :] & (key[None, :] < end[:, None])
            scores = jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))  # [m]; drops NaN, which the sum keeps
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # [m]
            weights = jnp.exp2(scores - base[:, None])  # [m, n]
            decay = jnp.exp2(top - base)  # [m]
            total = total * decay + jnp.sum(weights, axis=1)
            weights = weights.astype(rows[0].dtype)
            acc = [a * decay[:, None] + _dot(weights, v, contract=0) for a, v in zip(acc, rows, strict=False)]
            return new_top, total, *acc

        state = lax.fori_loop(lower, upper, one_round, state)
        first, last = first - num_blocks, last - num_blocks
    top, total, *acc = state
    return acc, top, total


def _dot(a: jax.Array, b: jax.Array, *, contract: int) -> jax.Array:
    """a [m, k] times b [k, n], or its transpose with `contract` 1, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _ceil_div(x: jax.Array, n: int) -> jax.Array:
    """For 0 <= x, without overflow."""
    return lax.div(x, jnp.int32(n)) + jnp.minimum(lax.rem(x, jnp.int32(n)), 1)


def _sink_factor(sink2: jax.Array, lse2: jax.Array) -> jax.Array:
    """What a sink leaves of `out`: 1 / (1 + exp(sink - lse)), 0 without keys; both in base 2."""
    empty = lse2 == -jnp.inf
    return jnp.where(empty, 0.0, 1.0 / (1.0 + jnp.exp2(sink2 - jnp.where(empty, 0.0, lse2))))


def _decode_kernel(x, out, lse, partial_out, partial_lse2, *, scopes_of, end_of, chunks, d_v, config):
    """Program (t, p): tile t of the query rows of piece p, written as a result or as a partial result.

    Refs: x: q [items, rows, d_qk], pieces and splits as in SplitPlan, scale2 float32 [1], sink float32 [rows] or None,
    and what `scopes_of` reads; out [items, rows, d_v], lse float32 [items, rows], partial_out float32
    [pieces, rows, d_v], partial_lse2 float32 [pieces, rows].
    """
    rows = x["q"].shape[1]
    piece = pl.program_id(1)
    alive = piece < x["splits"][x["splits"].shape[0] - 1]
    item, first, last, pieces_of_item = (jnp.where(alive, x["pieces"][piece, i], 0) for i in range(4))
    row = pl.program_id(0) * config.tile_rows + _iota(config.tile_rows)  # [m]
    mine = (row < rows) & alive  # [m]

    def load_q(start, width):
        place = x["q"].at[item, row[:, None], start + _iota(width)[None, :]]
        return plgpu.load(place, mask=mine[:, None], other=np.zeros((), x["q"].dtype)[()])

    q = [load_q(*chunk) for chunk in chunks]
    scopes = scopes_of(x, item, alive)
    acc, top, total = _attend(
        scopes, q, end_of(scopes, row), first, last, x["scale2"][0],
        chunks=chunks, d_v=d_v, block_keys=config.block_keys,
    )  # fmt: skip
    empty = total == 0.0  # [m]
    some = jnp.where(empty, 1.0, total)
    lse2 = jnp.where(empty, -jnp.inf, top + jnp.log2(some))  # [m]
    factor = 1.0 / some  # [m]
    final = factor
    if x["sink"] is not None:
        final = final * _sink_factor(plgpu.load(x["sink"].at[row], mask=mine, other=0.0) * LOG2_E, lse2)
    whole, part = mine & (pieces_of_item == 1), mine & (pieces_of_item > 1)
    plgpu.store(lse.at[item, row], lse2 * LN_2, mask=whole)
    plgpu.store(partial_lse2.at[piece, row], lse2, mask=part)
    for (start, width), a in zip(chunks, acc, strict=False):
        column = start + _iota(width)[None, :]
        result = (a * final[:, None]).astype(out.dtype)
        plgpu.store(out.at[item, row[:, None], column], result, mask=whole[:, None])
        plgpu.store(partial_out.at[piece, row[:, None], column], a * factor[:, None], mask=part[:, None])


def _merge_kernel(x, _out, _lse, out, lse, *, rows_each: int):
    """Program (t, i): rows of item i merged over its pieces, in their order; items of one piece are left alone."""
    item = pl.program_id(1)
    begin, behind = x["splits"][item], x["splits"][item + 1]
    _, rows, d_v = x["partial_out"].shape
    row = pl.program_id(0) * rows_each + _iota(rows_each)  # [r]
    mine = (row < rows) & (behind - begin > 1)  # [r]
    column = _iota(d_v)[None, :]

    def add(piece, state):
        top, total, acc = state
        lse2 = plgpu.load(x["partial_lse2"].at[piece, row], mask=mine, other=-jnp.inf)  # [r]
        part = plgpu.load(x["partial_out"].at[piece, row[:, None], column], mask=mine[:, None], other=0.0)
        new_top = jnp.maximum(top, lse2)
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weight, decay = jnp.exp2(lse2 - base), jnp.exp2(top - base)
        return new_top, total * decay + weight, acc * decay[:, None] + part * weight[:, None]

    state = (
        jnp.full((rows_each,), -jnp.inf, jnp.float32),
        jnp.zeros((rows_each,), jnp.float32),
        jnp.zeros((rows_each, d_v), jnp.float32),
    )
    top, total, acc = lax.fori_loop(begin, jnp.where(behind - begin > 1, behind, begin), add, state)
    empty = total == 0.0
    some = jnp.where(empty, 1.0, total)
    lse2 = jnp.where(empty, -jnp.inf, top + jnp.log2(some))
    factor = 1.0 / some
    if x["sink"] is not None:
        factor = factor * _sink_factor(plgpu.load(x["sink"].at[row], mask=mine, other=0.0) * LOG2_E, lse2)
    plgpu.store(lse.at[item, row], lse2 * LN_2, mask=mine)
    plgpu.store(out.at[item, row[:, None], column], (acc * factor[:, None]).astype(out.dtype), mask=mine[:, None])


# ------------------------------------------------------------------------------------------------ host side


def dense_decode(
    q: Float[Array, "b s_q h d_qk"],
    data: Array,
    fmt: KVFormat,
    page_size: int,
    block_table: Int32[Array, "b max_pages"] | None,
    cache_seqlens: Int32[Array, "b"],
    plan: SplitPlan,
    sm_scale: Float32[Array, ""],
    *,
    is_causal: bool = False,
    out_dtype: Any = None,
    capability: tuple[int, int] = MIN_CAPABILITY,
    config: PortableConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b s_q h d_v"], Float32[Array, "b s_q h"]]:
    """Dense decode: `(out, lse)`, as `mla_jax.mla_decode`.

    Args:
      data: the cache array of format `fmt`.
      plan: from `plan_decode` for these shapes.
      out_dtype: of `out`; None: q's.
      capability: of the GPU compiled for.
      interpret: run on the CPU, for tests.
    """
    b, s_q, h, _ = q.shape
    native = capability >= NATIVE_E4M3_CAPABILITY

    def scopes_of(x, item, alive):
        cache = _Cache(x["data"], data.shape[0], fmt, page_size, native)
        return [_tabled_keys(cache, x["table"], x["seqlens"], item, alive)]

    def end_of(scopes, row):  # [m]
        return scopes[0].count - (s_q - 1 - lax.div(row, jnp.int32(h))) if is_causal else None

    x = dict(q=q.reshape(b, s_q * h, -1), sink=None, data=data, table=block_table, seqlens=cache_seqlens)
    config = config or default_config((fmt,), s_q * h, capability)
    out, lse = _decode(x, (fmt,), plan, sm_scale, scopes_of, end_of, out_dtype, config, capability, interpret)
    return out.reshape(b, s_q, h, -1), lse.reshape(b, s_q, h)


def sparse_decode(
    q: Float[Array, "b s_q h d_qk"],
    data: Array,
    fmt: KVFormat,
    page_size: int,
    indices: Int32[Array, "b s_q topk"],
    plan: SplitPlan,
    sm_scale: Float32[Array, ""],
    *,
    topk_length: Int32[Array, "b s_q"] | None = None,
    attn_sink: Float32[Array, "h"] | None = None,
    extra_data: Array | None = None,
    extra_fmt: KVFormat | None = None,
    extra_page_size: int = 0,
    extra_indices: Int32[Array, "b s_q extra_topk"] | None = None,
    extra_topk_length: Int32[Array, "b s_q"] | None = None,
    out_dtype: Any = None,
    capability: tuple[int, int] = MIN_CAPABILITY,
    config: PortableConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b s_q h d_v"], Float32[Array, "b s_q h"]]:
    """Sparse decode: `(out, lse)`, as `mla_jax.sparse_mla_decode`; other arguments as `dense_decode`."""
    b, s_q, h, _ = q.shape
    items = b * s_q
    native = capability >= NATIVE_E4M3_CAPABILITY

    def flat(array):
        return None if array is None else array.reshape(items, *array.shape[2:])

    x = dict(q=q.reshape(items, h, -1), sink=attn_sink, data=data, indices=flat(indices), length=flat(topk_length))
    formats = [fmt]
    if extra_fmt is not None:
        formats.append(extra_fmt)
        x |= dict(extra_data=extra_data, extra_indices=flat(extra_indices), extra_length=flat(extra_topk_length))

    def scopes_of(x, item, alive):
        cache = _Cache(x["data"], data.shape[0], fmt, page_size, native)
        main = _listed_keys(cache, x["indices"], x["length"], item, alive)
        if extra_fmt is None:
            return [main]
        assert extra_data is not None
        cache = _Cache(x["extra_data"], extra_data.shape[0], extra_fmt, extra_page_size, native)
        return [main, _listed_keys(cache, x["extra_indices"], x["extra_length"], item, alive)]

    config = config or default_config(tuple(formats), h, capability)
    out, lse = _decode(
        x, tuple(formats), plan, sm_scale, scopes_of, lambda *_: None, out_dtype, config, capability, interpret
    )
    return out.reshape(b, s_q, h, -1), lse.reshape(b, s_q, h)


MERGE_ROWS = 4


def _some_gpu(capability: tuple[int, int]) -> contextlib.AbstractContextManager:
    """Names a GPU for Pallas to lower for, where the process sees none: it asks only for the compute capability."""
    try:
        plgpu.get_gpu_info()
    except ValueError:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            raise NotImplementedError(
                "Triton kernels inside shard_map cannot be lowered for CUDA over a mesh of other devices; accepted: a "
                "mesh of GPUs, or of the devices of jax.experimental.topologies"
            ) from None
        name = "NVIDIA H100" if capability >= NATIVE_E4M3_CAPABILITY else "NVIDIA A100"
        device = jax.sharding.AbstractDevice(name, None, "gpu")
        return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))
    return contextlib.nullcontext()


def _decode(x, formats, plan: SplitPlan, sm_scale, scopes_of, end_of, out_dtype, config, capability, interpret):
    """Both kernels: q [items, rows, d_qk] -> (out [items, rows, d_v], lse float32 [items, rows])."""
    items, rows, _ = x["q"].shape
    d_v = formats[0].d_v
    scale2 = (sm_scale * np.float32(LOG2_E)).reshape(1)
    x = x | dict(pieces=plan.pieces, splits=plan.splits, scale2=scale2)
    if not interpret:
        x = x | {name: with_wide_offsets(x[name]) for name in ("data", "extra_data") if name in x}
    shape = jax.ShapeDtypeStruct
    gpu = contextlib.nullcontext() if interpret else _some_gpu(capability)
    results = (shape((items, rows, d_v), out_dtype or x["q"].dtype), shape((items, rows), jnp.float32))
    partials = (
        shape((plan.max_pieces, rows, d_v), jnp.float32),
        shape((plan.max_pieces, rows), jnp.float32),
    )
    with gpu:
        out, lse, partial_out, partial_lse2 = pl.pallas_call(
            functools.partial(
                _decode_kernel, scopes_of=scopes_of, end_of=end_of, chunks=row_chunks(*formats), d_v=d_v, config=config
            ),
            out_shape=(*results, *partials),
            grid=(pl.cdiv(rows, config.tile_rows), plan.max_pieces),
            compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
            interpret=interpret,
            name=f"mla_portable_{plan.op}",
        )(x)
        merged = dict(partial_out=partial_out, partial_lse2=partial_lse2, splits=plan.splits, sink=x["sink"])
        num_operands = len(jax.tree.leaves(merged))
        return pl.pallas_call(
            functools.partial(_merge_kernel, rows_each=MERGE_ROWS),
            out_shape=results,
            grid=(pl.cdiv(rows, MERGE_ROWS), items),
            input_output_aliases={num_operands: 0, num_operands + 1: 1},
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="mla_portable_merge",
        )(merged, out, lse)
