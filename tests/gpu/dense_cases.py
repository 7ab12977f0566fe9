"""Dense decode calls over the product of shapes a server may send: a pairwise-covering list, and arrays for each."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import reference
from tests.gpu import cases

FACTORS = {
    "b": (1, 2, 6, 64, 128),
    "s_q": (1, 2, 3, 4),
    "s_k": (0, 1, 20, 140, 4096, 65536),
    "h": (1, 3, 8, 9, 16, 63, 64, 126, 128),
    "page_size": (1, 16, 32, 61, 64, 128, 256),
    "d_qk": (576, 512),
    "is_causal": (False, True),
    "contiguous": (False, True),  # no block table
}
SM_SCALE = 7.0  # logits with a standard deviation of 1.7 at INPUT_STD
POOL_TOKENS = 2**17  # requests share full pages beyond this many


@dataclasses.dataclass(frozen=True)
class Case:
    """Static shapes of a call; `s_k` is what the table can hold."""

    b: int
    s_q: int
    s_k: int
    h: int
    page_size: int
    d_qk: int
    is_causal: bool
    contiguous: bool

    def __str__(self) -> str:
        flags = ("-causal" if self.is_causal else "") + ("-contiguous" if self.contiguous else "")
        return f"b{self.b}-q{self.s_q}-k{self.s_k}-h{self.h}-page{self.page_size}-d{self.d_qk}{flags}"

    @property
    def fmt(self) -> mla_jax.KVFormat:
        return {576: mla_jax.BF16_576, 512: mla_jax.BF16_512}[self.d_qk]

    @property
    def is_small_enough(self) -> bool:
        """A contiguous cache cannot share pages: keep it, and the reference's work, within minutes and gigabytes."""
        return self.b * self.s_k <= 2**20 if self.contiguous else True


@functools.cache
def pairwise() -> tuple[Case, ...]:
    """A list in which every pair of values of two factors occurs."""
    return tuple(Case(**values) for values in cases.pairwise(FACTORS, lambda v: Case(**v).is_small_enough))


def _normal(key, *shape):
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(cases.INPUT_STD)


def build(case: Case, lengths: np.ndarray, seed: int = 0) -> dict:
    """Arguments of mla_decode. NaN in every token that no request reaches, garbage in table entries of no use."""
    rng = np.random.default_rng(seed)
    fmt, size = case.fmt, case.page_size
    key_q, key_kv = jax.random.split(jax.random.key(seed))
    q = _normal(key_q, case.b, case.s_q, case.h, case.d_qk)
    if case.contiguous:
        capacity = max(1, case.s_k)
        data = _normal(key_kv, case.b, capacity, case.d_qk)
        unused = np.arange(capacity)[None] >= np.clip(lengths, 0, capacity)[:, None]  # [b, capacity]
        data = jnp.where(unused[..., None], jnp.bfloat16(jnp.nan), data)
        cache = mla_jax.PagedKVCache(data, fmt, capacity)
        return dict(q=q, cache=cache, block_table=None, cache_seqlens=jnp.asarray(lengths))
    width = max(1, -(-case.s_k // size))
    shared = max(1, min(case.b * width, POOL_TOKENS // size))
    tail = np.clip(lengths, 0, width * size) % size  # [b]: tokens of the last, partial page
    full = np.clip(lengths, 0, width * size) // size  # [b]
    pages = shared + case.b
    table = rng.integers(-(2**31), 2**31, (case.b, width)).astype(np.int32)
    for i in range(case.b):
        table[i, : full[i]] = rng.choice(shared, full[i], replace=full[i] > shared)
        if tail[i]:
            table[i, full[i]] = shared + i
    unused = np.ones((pages, size), bool)
    unused[table[np.arange(width)[None] < full[:, None]]] = False
    unused[shared:] = np.arange(size)[None] >= tail[:, None]
    data = _normal(key_kv, pages, size, case.d_qk)
    data = jnp.where(unused[..., None], jnp.bfloat16(jnp.nan), data)
    cache = mla_jax.PagedKVCache(data, fmt, size)
    return dict(q=q, cache=cache, block_table=jnp.asarray(table), cache_seqlens=jnp.asarray(lengths))


@functools.partial(jax.jit, static_argnames=("is_causal",))
def expected(q, cache, block_table, cache_seqlens, *, sm_scale, is_causal):
    """The reference, one request after the other: it gathers a request's keys in float32."""

    def one(x):
        q, data, table, length = x
        own, row = cache, table[None]
        if block_table is None:
            own, row = mla_jax.PagedKVCache(data[None], cache.format, cache.page_size), None
        return reference.mla_decode(q[None], own, row, length[None], sm_scale=sm_scale, is_causal=is_causal)

    none = jnp.zeros(q.shape[0])
    xs = (q, cache.data if block_table is None else none, none if block_table is None else block_table, cache_seqlens)
    out, lse = jax.lax.map(one, xs)
    return out[:, 0], lse[:, 0]
