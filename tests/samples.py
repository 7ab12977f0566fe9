"""Random calls of both ops, shared by the tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import mla_jax

FORMATS = list(mla_jax.FORMATS.values())


def rows(rng, *shape, fmt, std=1.0):
    return jnp.asarray(std * rng.standard_normal((*shape, fmt.d_qk)), fmt.compute_dtype)


def random_cache(rng, fmt, pages, page_size, scale_rule=None, std=1.0):
    rule = scale_rule or "pow2"
    return mla_jax.pack_kv(rows(rng, pages, page_size, fmt=fmt, std=std), fmt, scale_rule=rule)


def poison(cache, used_slots):
    """NaN in every slot not in `used_slots`: all bytes 0xff (e4m3, e8m0, bf16 and float32 NaN), or NaN values."""
    fmt, size = cache.format, cache.page_size
    keep = np.zeros(cache.num_slots, bool)
    keep[np.asarray(used_slots, np.int64)] = True
    keep = keep.reshape(cache.num_pages, size)
    data = np.array(cache.data)
    if not fmt.is_quantized:
        data[~keep] = np.nan
    elif data.ndim == 3:
        data[~keep] = 0xFF
    else:
        data[:, fmt.bytes_per_token * size :] = 0xFF
        for record, width in enumerate(fmt.record_bytes):
            first = fmt.area_offset_bytes(record, size)
            data[:, first : first + width * size].reshape(-1, size, width)[~keep] = 0xFF
    return cache.replace(jnp.asarray(data))


def dense_call(rng, fmt, *, b=3, s_q=2, h=4, page_size=5, max_pages=4, lengths=None, spare_pages=3):
    """Arguments of mla_decode: shuffled pages, NaN wherever no key of the call lies."""
    pages = b * max_pages + spare_pages
    table = rng.permutation(pages)[: b * max_pages].reshape(b, max_pages).astype(np.int32)
    if lengths is None:
        lengths = rng.integers(0, max_pages * page_size + 1, b)
    lengths = np.asarray(lengths, np.int32)
    position = np.arange(max_pages * page_size)
    slot = table[:, position // page_size] * page_size + position % page_size  # [b, n]
    used = slot[position[None] < lengths[:, None]]
    cache = poison(random_cache(rng, fmt, pages, page_size), used)
    q = rows(rng, b, s_q, h, fmt=fmt)
    return dict(q=q, cache=cache, block_table=jnp.asarray(table), cache_seqlens=jnp.asarray(lengths), sm_scale=0.07)


def _scope(rng, fmt, b, s_q, topk, page_size, pages):
    slots = pages * page_size
    indices = np.stack([rng.choice(slots, topk, replace=topk > slots) for _ in range(b * s_q)])
    indices = indices.reshape(b, s_q, topk).astype(np.int32)
    drop = rng.random(indices.shape)
    indices = np.where(drop < 0.2, -1, indices)
    indices = np.where(drop > 0.9, rng.integers(-(2**31), 2**31, indices.shape), indices).astype(np.int32)
    length = rng.integers(-3, topk + 4, (b, s_q)).astype(np.int32)
    counted = np.arange(topk) < length[..., None]
    used = indices[counted & (indices >= 0) & (indices < slots)]
    cache = poison(random_cache(rng, fmt, pages, page_size), used)
    return cache, jnp.asarray(indices), jnp.asarray(length)


def sparse_call(rng, fmt, extra_fmt=None, *, b=3, s_q=2, h=4, topk=37, extra_topk=19, page_size=7, extra_page_size=2):
    """Arguments of sparse_mla_decode: garbage indices and lengths, sinks of every kind, NaN where nothing is named."""
    cache, indices, length = _scope(rng, fmt, b, s_q, topk, page_size, 9)
    call = dict(q=rows(rng, b, s_q, h, fmt=fmt), cache=cache, indices=indices, topk_length=length, sm_scale=0.05)
    sink = rng.standard_normal(h).astype(np.float32)
    sink[: min(h, 2)] = [np.inf, -np.inf][: min(h, 2)]
    call["attn_sink"] = jnp.asarray(sink)
    if extra_fmt is not None:
        extra = _scope(rng, extra_fmt, b, s_q, extra_topk, extra_page_size, 30)
        call |= dict(zip(("extra_cache", "extra_indices", "extra_topk_length"), extra, strict=True))
    return call


def relative_error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


def assert_equal_results(got, want, fmt, what=""):
    """(out, lse) pairs of an implementation and of the reference."""
    (out, lse), (want_out, want_lse) = got, want
    tolerance = 1e-5 if fmt.compute_dtype == np.float32 else 4e-3
    assert out.dtype == fmt.compute_dtype and lse.dtype == jnp.float32
    assert np.isfinite(np.asarray(out, np.float32)).all(), what
    assert relative_error(out, want_out) < tolerance, what
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5, err_msg=what)


def assert_equal_before_rounding(got, want):
    """(out, lse) in float32, for merging with others, and the usual (out, lse) of the same call."""
    (out, lse), (rounded, want_lse) = got, want
    assert out.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out.astype(rounded.dtype)), np.asarray(rounded))
    np.testing.assert_array_equal(lse, want_lse)
    values = np.asarray(out)
    values = values[values != 0]
    assert (values != np.asarray(rounded, np.float32)[np.asarray(out) != 0]).mean() > 0.9
