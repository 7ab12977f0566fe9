"""Sparse decode calls over FlashMLA's own correctness matrix: a pairwise-covering list, and arrays for each."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import reference
from tests import samples

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
SM_SCALE = 0.05


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
    """A list in which every pair of values of two factors occurs: greedy, deterministic."""
    names = list(FACTORS)
    rng = np.random.default_rng(0)
    missing = {
        (i, x, j, y)
        for i, j in itertools.combinations(range(len(names)), 2)
        for x in range(len(FACTORS[names[i]]))
        for y in range(len(FACTORS[names[j]]))
    }
    cases = []
    while missing:
        best, best_new = None, set()
        order = sorted(missing)
        for _ in range(60):
            i, x, j, y = order[rng.integers(len(order))]
            picks = [int(rng.integers(len(values))) for values in FACTORS.values()]
            picks[i], picks[j] = x, y
            new = {(a, picks[a], c, picks[c]) for a, c in itertools.combinations(range(len(names)), 2)} & missing
            if len(new) > len(best_new):
                best, best_new = picks, new
        cases.append(Case(**{name: FACTORS[name][pick] for name, pick in zip(names, best, strict=True)}))
        missing -= best_new
    return tuple(cases)


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
    cache = samples.poison(samples.random_cache(rng, fmt, pages, page_size, rule), used)
    return cache, jnp.asarray(indices), None if length is None else jnp.asarray(length)


def build(case: Case, seed: int = 0) -> dict:
    """Arguments of sparse_mla_decode."""
    rng = np.random.default_rng(seed)
    cache, indices, length = _scope(rng, case, case.fmt, case.main)
    q = jax.random.normal(jax.random.key(seed), (case.b, case.s_q, case.h, case.fmt.d_qk), jnp.bfloat16)
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


def assert_close(got, want):
    """FlashMLA's tolerances; its tests draw inputs with a standard deviation of 0.1, ours of 1, hence atol."""
    (out, lse), (want_out, want_lse) = [[np.asarray(x, np.float64) for x in pair] for pair in (got, want)]
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    np.testing.assert_allclose(out, want_out, atol=8e-3, rtol=2.01 / 128)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6, rtol=8.01 / 65536)
    norm = (out**2).sum() + (want_out**2).sum()
    assert norm == 0 or 1 - 2 * (out * want_out).sum() / norm < 5e-6
