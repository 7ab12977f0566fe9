"""The golden files: bytes, and both ops through reference, xla and compat."""

import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax import compat, reference
from tests import golden_files as gf


def _call_dense(how, g):
    q = gf.bf16(g["q"])
    kv = gf.bf16(g["kv"])  # [pages, page_size, 1, d]
    d = q.shape[-1]
    fmt = {576: mla_jax.BF16_576, 512: mla_jax.BF16_512}[d]
    cache = mla_jax.pack_kv(kv[:, :, 0], fmt)
    table, lengths, causal = jnp.asarray(g["block_table"]), jnp.asarray(g["cache_seqlens"]), bool(g["causal"])
    if how == "compat":
        return compat.flash_mla_with_kvcache(
            q, kv, table, lengths, fmt.d_v, *compat.get_mla_metadata(lengths, 4, 1), causal=causal
        )
    scale = d**-0.5
    if how == "reference":
        out, lse = reference.mla_decode(q, cache, table, lengths, sm_scale=scale, is_causal=causal)
    else:
        out, lse = mla_jax.mla_decode(
            q, cache, table, lengths, sm_scale=scale, is_causal=causal, implementation=how, return_lse=True
        )
    return out, gf.flash_lse(lse)


def _sparse_arguments(name, g):
    fmt = gf.sparse_format(name)
    arguments = {
        "q": gf.bf16(g["q"]),
        "cache": mla_jax.PagedKVCache(jnp.asarray(g["cache"]), fmt, int(g["page_size"])),
        "indices": jnp.asarray(g["indices"]),
        "sm_scale": float(g["softmax_scale"]),
    }
    for key in ("topk_length", "attn_sink", "extra_indices", "extra_topk_length"):
        if key in g:
            arguments[key] = jnp.asarray(g[key])
    if "extra_cache" in g:
        arguments["extra_cache"] = mla_jax.PagedKVCache(jnp.asarray(g["extra_cache"]), fmt, int(g["extra_page_size"]))
    return arguments


def _call_sparse(how, name, g):
    x = _sparse_arguments(name, g)
    if how == "compat":
        shaped = lambda c: c.data if c.format is mla_jax.MODEL1 else c.data[:, :, None]  # noqa: E731
        extra = x.get("extra_cache")
        return compat.flash_mla_with_kvcache(
            x["q"],
            shaped(x["cache"]),
            None,
            None,
            x["cache"].format.d_v,
            compat.get_mla_metadata()[0],
            softmax_scale=x["sm_scale"],
            is_fp8_kvcache=True,
            indices=x["indices"],
            attn_sink=x.get("attn_sink"),
            extra_k_cache=None if extra is None else shaped(extra),
            extra_indices_in_kvcache=x.get("extra_indices"),
            topk_length=x.get("topk_length"),
            extra_topk_length=x.get("extra_topk_length"),
        )
    if how == "reference":
        out, lse = reference.sparse_mla_decode(**x)
    else:
        out, lse = mla_jax.sparse_mla_decode(**x, implementation=how, return_lse=True)
    return out, gf.flash_lse(lse)


@pytest.mark.parametrize("how", ["reference", "xla", "compat"])
@pytest.mark.parametrize("name", gf.DENSE)
def test_dense(name, how):
    g = gf.load(name)
    gf.assert_close(*_call_dense(how, g), g["out"], g["lse"], f"{name} {how}")


@pytest.mark.parametrize("how", ["reference", "xla", "compat"])
@pytest.mark.parametrize("name", gf.SPARSE)
def test_sparse(name, how):
    g = gf.load(name)
    gf.assert_close(*_call_sparse(how, name, g), g["out"], g["lse"], f"{name} {how}")


def _without_padding(data: np.ndarray, fmt: mla_jax.KVFormat, page_size: int) -> np.ndarray:
    """Cache bytes with pad bytes and page tails, which writers leave as they like, set to 0."""
    data = np.array(data)
    if data.ndim == 2:
        data[:, fmt.bytes_per_token * page_size :] = 0
        record, offset, pad = fmt.locate("pad")
        first = fmt.area_offset_bytes(record, page_size)
        for token in range(page_size):
            at = first + token * fmt.record_bytes[record] + offset
            data[:, at : at + pad.num_bytes] = 0
    return data


PACKED = [(n, "") for n in gf.SPARSE if "garbage" not in n] + [("edges_v32", ""), ("edges_model1", "")]
PACKED += [("model1_extra", "extra_"), ("model1_lonely", "extra_")]


@pytest.mark.parametrize(("name", "scope"), PACKED)
def test_cache_bytes(name, scope):
    g = gf.load(name)
    fmt, page_size = gf.sparse_format(name), int(g[f"{scope}page_size"])
    cache = mla_jax.pack_kv(gf.bf16(g[f"{scope}kv"]), fmt)
    assert cache.page_size == page_size
    want = _without_padding(g[f"{scope}cache"], fmt, page_size)
    np.testing.assert_array_equal(_without_padding(cache.data, fmt, page_size), want)


@pytest.mark.parametrize("name", ["edges_v32", "edges_model1"])
def test_unpacked_values(name):
    g = gf.load(name)
    cache = mla_jax.PagedKVCache(jnp.asarray(g["cache"]), gf.sparse_format(name), int(g["page_size"]))
    got = np.asarray(mla_jax.unpack_kv(cache)).view(np.uint16)
    np.testing.assert_array_equal(got, g["unpacked"])
