"""The shapes that are measured, named once: the benchmark, the tuning scripts and the tests take them from here.

A workload is data: shapes, lengths, and the arithmetic that turns a time into TFLOP/s and GB/s. `inputs.build` makes
the arrays. Suites group workloads the way `mla-jax bench --suite` runs them:

  dense        FlashMLA's published dense shapes, and the memory- and latency-bound ones
  sparse_v32   DeepSeek-V3.2: one cache, top-k 2048
  model1       DeepSeek-V4: sliding window in the main cache, compressed entries in the extra one
  small        8, 16 and 32 heads, as tensor parallelism leaves them, one token a request
  plan         the split plans alone, which a decode step pays once per layer type
  append       writing a step's new rows into the caches
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from pallas_kernels.formats import BF16_576, MODEL1, V32, KVFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One measured call. `name` is unique over all suites and is how results files refer to it."""

    name: str
    b: int  # requests

    @property
    def flop(self) -> int:
        """Floating-point operations of one call; 0 where the call is not about arithmetic."""
        return 0

    @property
    def bytes_moved(self) -> int:
        """Bytes that one call must move at least: each KV row read once, plus q and out."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Workload):
    """`mla_decode` over a paged cache; every request has `s_k` tokens."""

    s_q: int
    h: int
    s_k: int
    fmt: KVFormat = BF16_576
    page_size: int = 64
    is_causal: bool = False

    @property
    def flop(self) -> int:
        return 2 * self.b * self.s_q * self.h * self.s_k * (self.fmt.d_qk + self.fmt.d_v)

    @property
    def bytes_moved(self) -> int:
        return self.b * self.s_k * self.fmt.bytes_per_token + _q_and_out_bytes(self.b * self.s_q * self.h, self.fmt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """One cache of a sparse call: each request owns `s_kv` tokens and selects `topk` of them at random."""

    fmt: KVFormat
    page_size: int
    s_kv: int
    topk: int
    varlen: bool = False  # each request selects between 0 and topk, both inclusive, instead of topk

    def lengths(self, b: int) -> np.ndarray:
        """Entries that count, int32 [b]: the same ones on every machine, so that FLOP counts agree."""
        if not self.varlen:
            return np.full(b, self.topk, np.int32)  # [b]
        return np.random.default_rng(b).integers(0, self.topk + 1, b, dtype=np.int32)  # [b]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Workload):
    """`sparse_mla_decode` over one cache, or over two."""

    s_q: int
    h: int
    main: Scope
    extra: Scope | None = None

    @property
    def fmt(self) -> KVFormat:
        return self.main.fmt

    @functools.cached_property
    def keys(self) -> tuple[int, int]:
        """Keys that all queries of a call read together, in the main and in the extra cache."""
        extra = 0 if self.extra is None else int(self.extra.lengths(self.b).sum())
        return self.s_q * int(self.main.lengths(self.b).sum()), self.s_q * extra

    @property
    def flop(self) -> int:
        return 2 * self.h * sum(self.keys) * (self.fmt.d_qk + self.fmt.d_v)

    @property
    def bytes_moved(self) -> int:
        rows = self.keys[0] * self.main.fmt.bytes_per_token
        if self.extra is not None:
            rows += self.keys[1] * self.extra.fmt.bytes_per_token
        return rows + _q_and_out_bytes(self.b * self.s_q * self.h, self.fmt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Workload):
    """The split plan of another workload, made from its lengths."""

    of: Dense | Sparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Append(Workload):
    """`append_kv` of one new row per request."""

    fmt: KVFormat
    page_size: int = 64

    @property
    def bytes_moved(self) -> int:
        row_bytes = self.fmt.d_qk * self.fmt.compute_dtype.itemsize
        return self.b * (row_bytes + self.fmt.bytes_per_token)


def _q_and_out_bytes(rows: int, fmt: KVFormat) -> int:
    return rows * (fmt.d_qk + fmt.d_v) * fmt.compute_dtype.itemsize


def dense(b: int, s_q: int, h: int, s_k: int) -> Dense:
    return Dense(name=f"dense-b{b}-sq{s_q}-h{h}-sk{s_k}", b=b, s_q=s_q, h=h, s_k=s_k)


def v32(b: int, s_q: int, h: int = 128, topk: int = 2048) -> Sparse:
    """DeepSeek-V3.2: 32,768 tokens of context, the indexer keeps `topk` of them."""
    main = Scope(fmt=V32, page_size=64, s_kv=32768, topk=topk)
    return Sparse(name=f"v32-b{b}-sq{s_q}-h{h}-topk{topk}", b=b, s_q=s_q, h=h, main=main)


# DeepSeek-V4's layers: heads, entries of the compressed cache, its page size, and whether lengths differ.
MODEL1_CASES = {
    "c1": (64, 512, 64, False),  # Flash, ratio 4
    "c2": (128, 1024, 64, False),  # Pro, ratio 4
    "c3": (64, 1024, 2, True),  # Flash, ratio 128: every entry, as many as the context has
    "c4": (128, 1024, 2, True),  # Pro, ratio 128
}


def model1(case: str, b: int, s_q: int, h: int | None = None) -> Sparse:
    """DeepSeek-V4: a window of 128 tokens in the main cache and `topk` compressed entries in the extra one."""
    heads, topk, page_size, varlen = MODEL1_CASES[case]
    h = heads if h is None else h
    main = Scope(fmt=MODEL1, page_size=256, s_kv=16384, topk=128)
    extra = Scope(fmt=MODEL1, page_size=page_size, s_kv=16384, topk=topk, varlen=varlen)
    return Sparse(name=f"model1-{case}-b{b}-sq{s_q}-h{h}", b=b, s_q=s_q, h=h, main=main, extra=extra)


def plan(of: Dense | Sparse) -> Plan:
    return Plan(name=f"plan-{of.name}", b=of.b, of=of)


def _varlen(of: Sparse) -> Sparse:
    """The same with lengths that differ: a plan of equal widths is a constant, which the compiler computes."""
    return dataclasses.replace(of, main=dataclasses.replace(of.main, varlen=True))


def append(fmt: KVFormat, b: int) -> Append:
    return Append(name=f"append-{fmt.name.lower()}-b{b}", b=b, fmt=fmt)


SUITES: dict[str, tuple[Workload, ...]] = {
    "dense": (
        *(dense(128, s_q, 128, s_k) for s_q in (1, 2) for s_k in (4096, 16384, 32768)),
        dense(128, 1, 16, 4096),
        dense(128, 1, 16, 16384),
        dense(128, 1, 32, 8192),
        dense(128, 1, 64, 4096),
        dense(32, 1, 16, 8192),
        dense(8, 1, 16, 8192),
        *(dense(1, 1, 128, s_k) for s_k in (1024, 8192, 65536, 131072)),
        dense(8, 1, 128, 8192),
        dense(32, 1, 128, 8192),
    ),
    "sparse_v32": (
        *(v32(b, 1) for b in (1, 8, 64, 128)),
        *(v32(b, 2) for b in (2, 64, 128)),
        v32(148, 2, topk=16384),
    ),
    "model1": tuple(
        model1(case, b, s_q) for case in MODEL1_CASES for b, s_q in ((2, 2), (64, 2), (128, 2), (256, 2), (128, 1))
    ),
    "small": (
        *(dense(b, 1, h, 4096) for b in (8, 64) for h in (8, 16, 32)),
        *(v32(b, 1, h) for b in (8, 128) for h in (8, 16, 32)),
        *(model1("c2", b, 1, h) for b in (8, 128) for h in (8, 16, 32)),
    ),
    "plan": (
        plan(dense(1, 1, 128, 8192)),
        plan(dense(128, 1, 128, 4096)),
        plan(_varlen(v32(128, 1))),
        plan(model1("c4", 128, 1)),
    ),
    "append": tuple(append(fmt, b) for fmt in (BF16_576, V32, MODEL1) for b in (1, 128)),
}

WORKLOADS: dict[str, Workload] = {w.name: w for suite in SUITES.values() for w in suite}


def select(suites: list[str], pattern: str = "") -> list[Workload]:
    """Workloads of the named suites (all of them if none is named) whose name contains `pattern`.

    Raises:
      ValueError: a suite does not exist, or nothing matches.
    """
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite {suite!r} does not exist; there are {', '.join(SUITES)}")
    found = [w for suite in (suites or SUITES) for w in SUITES[suite] if pattern in w.name]
    if not found:
        raise ValueError(f"no workload of {', '.join(suites or SUITES)} contains {pattern!r}; see mla-jax bench --list")
    return found
