"""Adding a format and adding a kernel, done: docs/add-a-format.md and docs/add-a-kernel.md show this code."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import mla_jax
from mla_jax import implementations, reference
from mla_jax.dispatch import Implementation
from pallas_kernels.formats import BF16, E4M3, E8M0, FORMATS, Field, KVFormat

# The entry, as it would stand at the end of pallas_kernels/formats.py.
TOY = KVFormat(
    name="TOY",
    d_qk=192,
    d_v=128,
    records=((Field("nope", E4M3, 128), Field("scale", E8M0, 4), Field("rope", BF16, 64)),),
    scale_tile=32,
)


def test_a_new_format(monkeypatch):
    monkeypatch.setitem(FORMATS, TOY.name, TOY)  # its place in the list of FORMATS
    assert TOY.bytes_per_token == 128 + 4 + 2 * 64 and TOY.page_shape(16) == (16, TOY.bytes_per_token)

    # Rows survive a round trip: within e4m3's rounding, the rotary part exactly.
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((6, 16, TOY.d_qk)), jnp.bfloat16)  # [pages, page_size, d_qk]
    cache = mla_jax.pack_kv(rows, TOY)
    back = np.asarray(mla_jax.unpack_kv(cache), np.float32)
    exact = np.asarray(rows, np.float32)
    np.testing.assert_allclose(back[..., : TOY.d_nope], exact[..., : TOY.d_nope], rtol=2**-4, atol=1e-3)
    np.testing.assert_array_equal(back[..., TOY.d_nope :], exact[..., TOY.d_nope :])

    # Appending token by token writes the same bytes as packing.
    one_by_one = mla_jax.PagedKVCache.zeros(TOY, num_pages=6, page_size=16)
    one_by_one = mla_jax.append_kv(one_by_one, rows.reshape(-1, TOY.d_qk), jnp.arange(96, dtype=jnp.int32))
    np.testing.assert_array_equal(one_by_one.data, cache.data)

    # Both ops read it.
    q = jnp.asarray(rng.standard_normal((2, 1, 3, TOY.d_qk)), jnp.bfloat16)  # [b, s_q, h, d_qk]
    table, lengths = jnp.asarray([[4, 1, 0], [2, 5, 3]], jnp.int32), jnp.asarray([40, 17], jnp.int32)
    out = mla_jax.mla_decode(q, cache, table, lengths, sm_scale=0.1)  # [b, s_q, h, d_v]
    want, _ = reference.mla_decode(q, cache, table, lengths, sm_scale=0.1)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)
    slots = jnp.asarray(rng.permutation(96)[:40].reshape(2, 1, 20), jnp.int32)  # [b, s_q, topk]
    out = mla_jax.sparse_mla_decode(q, cache, slots, sm_scale=0.1)  # [b, s_q, h, d_v]
    want, _ = reference.sparse_mla_decode(q, cache, slots, sm_scale=0.1)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)

    # An exported program knows it by name.
    exported = jax.export.export(jax.jit(mla_jax.unpack_kv))(cache)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(np.asarray(loaded.call(cache), np.float32), back)


def toy_kernel(q, rows, length, scale, out, lse):
    """One request: q [h, d_qk], rows [n, d_qk], length [1], scale [1] -> out [h, d_v], lse [h]. All keys at once."""
    keys = rows[...].astype(jnp.float32)  # [n, d_qk]
    scores = scale[0] * jnp.dot(q[...].astype(jnp.float32), keys.T)  # [h, n]
    scores = jnp.where(jnp.arange(keys.shape[0])[None] < length[0], scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=1, keepdims=True), -1e30)  # [h, 1]; finite without keys too
    weights = jnp.exp(scores - top)  # [h, n]
    total = weights.sum(axis=1)  # [h]
    keys = jnp.where(jnp.isnan(keys), jnp.zeros_like(keys), keys)  # 0 * NaN is NaN: rows behind the end may hold any
    values = jnp.dot(weights, keys[:, : out.shape[1]])  # [h, d_v]
    out[...] = (values / jnp.where(total == 0, 1, total)[:, None]).astype(out.dtype)
    lse[...] = top[:, 0] + jnp.log(total)


def run_toy(call, target, config, x):
    """From a call's description and operands (mla_jax/calls.py) to (out, lse)."""
    fmt, cache = call.fmt, x.cache
    rows = cache.data[jnp.clip(x.block_table, 0, cache.num_pages - 1)].reshape(call.b, -1, fmt.d_qk)  # [b, n, d_qk]
    lengths = jnp.clip(x.cache_seqlens, 0, rows.shape[1])[:, None]  # [b, 1]
    out, lse = pl.pallas_call(
        toy_kernel,
        grid=(call.b,),
        in_specs=[
            pl.BlockSpec((None, call.h, fmt.d_qk), lambda i: (i, 0, 0)),
            pl.BlockSpec((None, rows.shape[1], fmt.d_qk), lambda i: (i, 0, 0)),
            pl.BlockSpec((None, 1), lambda i: (i, 0)),
            pl.BlockSpec((1,), lambda i: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((None, call.h, fmt.d_v), lambda i: (i, 0, 0)),
            pl.BlockSpec((None, call.h), lambda i: (i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((call.b, call.h, fmt.d_v), x.q.dtype),
            jax.ShapeDtypeStruct((call.b, call.h), jnp.float32),
        ],
        interpret=True,
    )(x.q[:, 0], rows, lengths, x.sm_scale[None])
    return out[:, None], lse[:, None]


def check_toy(call, target, config):
    """Legal calls that this kernel cannot serve: say why."""
    if call.fmt.is_quantized or call.s_q != 1 or call.is_causal:
        raise NotImplementedError(f"takes one query row over plain rows, not s_q {call.s_q}, {call.fmt.name}")


def test_a_new_kernel(monkeypatch):
    row = Implementation("toy", check_toy, run_toy)
    monkeypatch.setattr(implementations, "DENSE", (row, *implementations.DENSE))

    rng = np.random.default_rng(1)
    kv = jnp.asarray(rng.standard_normal((8, 16, 576)), jnp.bfloat16)  # [pages, page_size, d_qk]
    kv = kv.at[3, 9:].set(jnp.asarray(np.nan, ml_dtypes.bfloat16))  # behind request 0's end
    table, lengths = jnp.asarray([[5, 0, 3], [7, 1, 2]], jnp.int32), jnp.asarray([41, 0], jnp.int32)
    q = jnp.asarray(rng.standard_normal((2, 1, 5, 576)), jnp.bfloat16)  # [b, s_q, h, d_qk]
    call = q, mla_jax.pack_kv(kv, mla_jax.BF16_576), table, lengths

    assert mla_jax.explain(*call).implementation == "toy"
    out, lse = mla_jax.mla_decode(*call, sm_scale=0.04, return_lse=True)
    want, want_lse = reference.mla_decode(*call, sm_scale=0.04)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)

    fp8 = q, mla_jax.pack_kv(jnp.nan_to_num(kv), mla_jax.V32), table, lengths  # refused: the next one runs
    explanation = mla_jax.explain(*fp8)
    assert explanation.implementation == "xla" and "plain rows" in explanation.refusals["toy"]
