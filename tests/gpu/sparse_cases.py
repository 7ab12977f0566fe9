"""Sparse decode calls over FlashMLA's own correctness matrix: a pairwise-covering list, and arrays for each."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import reference
from tests import samples
from tests.gpu import cases

SCOPES = ((512, 64, 2), (512, 64, 64), (1024, 576, 61), (700, 100, 37), (2046, 2048, 576))  # s_k, top-k, page size
FACTORS = {
    "fmt": (mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576, mla_jax.BF16_512),
    "main": SCOPES,
    "extra": (None, *SCOPES),
    "extra_quantized": (False, True),
    "b": (4, 74, 321),
    "s_q": (1, 3),
    "h": (1, 8, 16, 32, 48, 64, 96, 128),
    "keys": ("all", "some", "varlen", "zero", "invalid"),
    "sink": (False, True),
    "batch_invariant": (False, True),
}
SM_SCALE = 5.0  # logits with a standard deviation of 1.2 at cases.INPUT_STD


@dataclasses.dataclass(frozen=True)
class Case:
    """Static shapes of a call, and what its indices and lengths are like."""

    fmt: mla_jax.KVFormat
    main: tuple[int, int, int]
    extra: tuple[int, int, int] | None
    extra_quantized: bool
    b: int
    s_q: int
    h: int
    keys: str
    sink: bool
    batch_invariant: bool

    def __str__(self) -> str:
        extra = f"+{self.extra_fmt.name}{self.extra}" if self.extra else ""
        flags = ("-sink" if self.sink else "") + ("-invariant" if self.batch_invariant else "")
        return f"{self.fmt.name}{self.main}{extra}-b{self.b}-q{self.s_q}-h{self.h}-{self.keys}{flags}".replace(" ", "")

    @property
    def extra_fmt(self) -> mla_jax.KVFormat:
        pairs = {576: (mla_jax.BF16_576, mla_jax.V32), 512: (mla_jax.BF16_512, mla_jax.MODEL1)}
        return pairs[self.fmt.d_qk][self.extra_quantized]


@functools.cache
def pairwise() -> tuple[Case, ...]:
    """A list in which every pair of values of two factors occurs."""
    return tuple(Case(**values) for values in cases.pairwise(FACTORS))


def _scope(rng, case: Case, fmt, shape):
    """A cache that requests share, indices with garbage, lengths; NaN in every slot that no valid index names."""
    s_k, topk, page_size = shape
    pages = -(-s_k * min(case.b, 8) // page_size)
    slots = pages * page_size
    indices = rng.integers(0, slots, (case.b, case.s_q, topk)).astype(np.int32)
    if case.keys == "invalid":
        indices[:] = rng.choice(np.array([-1, slots, 2**31 - 1, -(2**31)]), indices.shape)
    elif case.keys != "all":
        drop = rng.random(indices.shape)
        indices = np.where(drop < 0.2, -1, indices)
        indices = np.where(drop > 0.9, rng.integers(-(2**31), 2**31, indices.shape), indices).astype(np.int32)
        indices[0] = -1
    length = None
    if case.keys in ("varlen", "zero"):
        length = rng.integers(-3, topk + 4, (case.b, case.s_q)).astype(np.int32)
        length[-1] = 0
        if case.keys == "zero":
            length[:] = 0
    counted = np.arange(topk) < (topk if length is None else length[..., None])
    used = indices[counted & (indices >= 0) & (indices < slots)]
    rule = "amax" if fmt is mla_jax.V32 else None  # arbitrary float32 scales
    cache = samples.poison(samples.random_cache(rng, fmt, pages, page_size, rule, std=cases.INPUT_STD), used)
    return cache, jnp.asarray(indices), None if length is None else jnp.asarray(length)


def build(case: Case, seed: int = 0) -> dict:
    """Arguments of sparse_mla_decode."""
    rng = np.random.default_rng(seed)
    cache, indices, length = _scope(rng, case, case.fmt, case.main)
    q = samples.rows(rng, case.b, case.s_q, case.h, fmt=case.fmt, std=cases.INPUT_STD)
    args = dict(q=q, cache=cache, indices=indices, topk_length=length, sm_scale=SM_SCALE)
    if case.sink:
        sink = 3 * rng.standard_normal(case.h).astype(np.float32)
        sink[: min(case.h, 2)] = [np.inf, -np.inf][: min(case.h, 2)]
        args["attn_sink"] = jnp.asarray(sink)
    if case.extra:
        extra = _scope(rng, case, case.extra_fmt, case.extra)
        args |= dict(zip(("extra_cache", "extra_indices", "extra_topk_length"), extra, strict=True))
    return args


@jax.jit
def expected(q, cache, indices, **more):
    """The reference, one request after the other: it gathers a request's keys in float32."""
    by_request = ("topk_length", "extra_indices", "extra_topk_length")
    rows = {k: v for k, v in more.items() if k in by_request and v is not None}
    fixed = {k: v for k, v in more.items() if k not in by_request}

    def one(x):
        own = {k: v[None] for k, v in x.items()}
        return reference.sparse_mla_decode(own.pop("q"), cache, own.pop("indices"), **own, **fixed)

    out, lse = jax.lax.map(one, dict(q=q, indices=indices, **rows))
    return out[:, 0], lse[:, 0]
