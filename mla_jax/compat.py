"""FlashMLA's own call, for code that is being ported: its argument names, defaults and conventions.

What differs from `mla_jax.mla_decode` and `mla_jax.sparse_mla_decode`:
  - softmax_scale defaults to d_qk^-0.5, which is wrong for absorbed MLA: pass yours.
  - lse is [b, h, s_q], and +inf for rows without keys.
  - One function serves both ops: with `indices` it is the sparse one.
  - Caches are arrays, and their format is told by dtype and shape.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.decode import mla_decode, sparse_mla_decode
from pallas_kernels.formats import BF16, BF16_512, BF16_576, F32, F32_512, F32_576, MODEL1, U8, V32, KVFormat
from pallas_kernels.schedule import SplitPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SchedMeta:
    """Stands where FlashMLA's scheduler metadata does. Empty: the op makes its plan from the lengths."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[SchedMeta, None]:
    """Accepts FlashMLA's arguments, old and new, and returns (placeholder, None): plans never go stale here."""
    return SchedMeta(), None


_ROWS: dict[tuple[Any, int], KVFormat] = {
    (BF16, BF16_576.d_qk): BF16_576,
    (BF16, BF16_512.d_qk): BF16_512,
    (F32, F32_576.d_qk): F32_576,
    (F32, F32_512.d_qk): F32_512,
    (U8, V32.bytes_per_token): V32,
}
_BYTE_DTYPES = (jnp.uint8, jnp.int8, jnp.float8_e4m3fn)


def _cache(k_cache: Any, name: str, is_fp8: bool | None) -> PagedKVCache:
    accepted = (
        f"accepted: bfloat16 [pages, page_size, 1, {BF16_576.d_qk} or {BF16_512.d_qk}]; V32 as uint8, int8 or "
        f"float8_e4m3fn [pages, page_size, 1, {V32.bytes_per_token}]; MODEL1 as uint8 [pages, stride], stride = "
        f"{MODEL1.bytes_per_token} * page_size rounded up to a multiple of {MODEL1.page_align_bytes}"
    )
    if not hasattr(k_cache, "shape") or not hasattr(k_cache, "dtype"):
        raise ValueError(f"{name} is {checks.describe(k_cache)}; {accepted}")
    data = lax.bitcast_convert_type(k_cache, jnp.uint8) if k_cache.dtype in _BYTE_DTYPES else k_cache
    cache = None
    if data.ndim == 4 and data.shape[2] == 1 and (fmt := _ROWS.get((data.dtype, data.shape[3]))):
        cache = PagedKVCache(data.reshape(data.shape[0], data.shape[1], data.shape[3]), fmt, data.shape[1])
    elif data.ndim == 2 and data.dtype == U8 and data.shape[1] >= MODEL1.page_bytes(1):
        size = data.shape[1] // MODEL1.bytes_per_token
        if data.shape[1] == MODEL1.page_bytes(size):
            cache = PagedKVCache(data, MODEL1, size)
    if cache is None:
        raise ValueError(f"{name} is {checks.describe(k_cache)}; {accepted}")
    if is_fp8 is not None and is_fp8 != cache.format.is_quantized:
        raise ValueError(
            f"is_fp8_kvcache is {is_fp8}, but {name} is {checks.describe(k_cache)}, format {cache.format.name}; "
            f"accepted: {cache.format.is_quantized}, or None to tell by the cache"
        )
    return cache


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    *,
    implementation: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """FlashMLA's decode.

    Args:
      q: bfloat16 [b, s_q, h, d_qk].
      k_cache: bfloat16 [pages, page_size, 1, d_qk]; V32 bytes [pages, page_size, 1, n], n = V32.bytes_per_token; MODEL1
        uint8 [pages, stride], page_size = stride // MODEL1.bytes_per_token (FlashMLA's strided view of it,
        [pages, page_size, 1, bytes_per_token], cannot exist in JAX).
      block_table: int32 [b, max_pages]; ignored with `indices`.
      cache_seqlens: int32 [b]; ignored with `indices`.
      head_dim_v: must be the format's d_v.
      tile_scheduler_metadata: what `get_mla_metadata` returned, None, or a `SplitPlan`.
      num_splits: ignored.
      softmax_scale: default d_qk^-0.5.
      causal: dense only.
      is_fp8_kvcache: None tells by the cache; True and False are checked against it.
      indices: int32 [b, s_q, topk]: selects the sparse op.
      attn_sink: float32 [h]; sparse only, like the arguments after it.
      extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: as in `mla_jax.sparse_mla_decode`.
      implementation: as in `mla_jax.mla_decode`.

    Returns:
      out [b, s_q, h, head_dim_v] and lse float32 [b, h, s_q], natural log, +inf for rows without keys.

    Raises:
      ValueError: as the ops do, and for arguments of the one op given to the other.
    """
    cache = _cache(k_cache, "k_cache", is_fp8_kvcache)
    if head_dim_v != cache.format.d_v:
        raise ValueError(f"head_dim_v is {head_dim_v!r}; accepted: {cache.format.d_v}, for format {cache.format.name}")
    scale = cache.format.d_qk**-0.5 if softmax_scale is None else softmax_scale
    plan = tile_scheduler_metadata if isinstance(tile_scheduler_metadata, SplitPlan) else None
    common = dict(sm_scale=scale, plan=plan, implementation=implementation, return_lse=True)
    if indices is None:
        for value, name in (
            (attn_sink, "attn_sink"),
            (extra_k_cache, "extra_k_cache"),
            (extra_indices_in_kvcache, "extra_indices_in_kvcache"),
            (topk_length, "topk_length"),
            (extra_topk_length, "extra_topk_length"),
        ):
            if value is not None:
                raise ValueError(f"{name} is given without indices; accepted: None in dense decoding")
        out, lse = mla_decode(q, cache, block_table, cache_seqlens, is_causal=causal, **common)  # type: ignore[arg-type]
    else:
        checks.static(causal, "causal", (bool,))
        if causal:
            raise ValueError("causal is True with indices; accepted: False, since indices say what each row sees")
        out, lse = sparse_mla_decode(
            q,
            cache,
            indices,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_cache=None if extra_k_cache is None else _cache(extra_k_cache, "extra_k_cache", None),
            extra_indices=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
            **common,  # type: ignore[arg-type]
        )
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # [b, s_q, h]
    return out, jnp.swapaxes(lse, 1, 2)
