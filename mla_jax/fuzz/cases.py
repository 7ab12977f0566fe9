"""Cases: whole calls, drawn from a seed and a number.

A case is a `Spec`, everything static about a call, and its arrays. `CASES_PER_SPEC` numbers in a row share a spec, so
that what is compiled for one serves the next; the arrays of each are drawn from (seed, number) alone, and a case can be
made again without those before it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mla_jax.fuzz import oracle
from pallas_kernels.formats import BF16_512, BF16_576, F32, F32_512, F32_576, FORMATS, MODEL1, V32, KVFormat

CASES_PER_SPEC = 100
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a call, array shapes apart.

    Attributes:
      kind: "dense" and "sparse" (the ops), "cache" (pack, append, gather, unpack, slots from arrays of rows) or "bytes"
        (unpack and gather from arbitrary bytes).
      fmt, page_size: of the (main) cache; contiguous: without a block table.
      extra_fmt, extra_page_size: of the extra cache, or None and 0.
      is_causal: dense only.
      plan: "none", "own" (for the call's lengths), "stale" (for others) or "invariant" (own, batch-invariant).
      entry: "op" or "compat", by whose arguments the call is made.
      scale_rule: of pack and append.
    """

    kind: str
    fmt: KVFormat
    page_size: int
    contiguous: bool = False
    extra_fmt: KVFormat | None = None
    extra_page_size: int = 0
    is_causal: bool = False
    plan: str = "none"
    entry: str = "op"
    scale_rule: str = "pow2"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call. `arrays` by argument name: caches as their data, "plan_lengths" what a stale plan is made for, and
    "neighbours", bool [b], the requests that batch invariance is tested by changing."""

    spec: Spec
    arrays: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """What shrinking makes smaller: elements of all arrays, and those that are not 0 once more."""
        return sum(x.size + int(np.count_nonzero(x)) for x in self.arrays.values())

    def __str__(self) -> str:
        fixed = [f"{f.name}={_show(getattr(self.spec, f.name))}" for f in dataclasses.fields(Spec)]
        return ", ".join([*fixed, *(f"{name} {x.dtype}{list(x.shape)}" for name, x in self.arrays.items())])


def _show(x: Any) -> str:
    return x.name if isinstance(x, KVFormat) else repr(x)


@dataclasses.dataclass(frozen=True)
class Size:
    """Bounds of what is drawn: sizes of a batch and the keys that a row may read."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    heads: tuple[int, ...]
    max_keys: int


SIZES = {
    "small": Size((1, 2, 3, 5), (1, 1, 2, 3), (1, 2, 3, 8, 9), 100),
    "large": Size((1, 2, 5, 16, 33), (1, 1, 2, 4), (1, 8, 16, 63, 64, 65, 128), 3000),
}
PAGE_SIZES = (1, 2, 3, 5, 7, 16, 32, 61, 64)


def draw(seed: int, number: int, size: Size = SIZES["small"]) -> Case:
    """Case `number` of a seed."""
    spec, shapes = draw_spec(np.random.default_rng([seed, number // CASES_PER_SPEC]), size)
    return make(spec, shapes, np.random.default_rng([seed, number // CASES_PER_SPEC, number % CASES_PER_SPEC]))


def make(spec: Spec, shapes: dict[str, Any], rng: np.random.Generator) -> Case:
    """A case of a spec and of the axes' sizes that `draw_spec` names."""
    arrays = {"dense": _dense, "sparse": _sparse, "cache": _cache_arrays, "bytes": _bytes_arrays}[spec.kind]
    with np.errstate(all="ignore"):
        return Case(spec, arrays(rng, spec, shapes))


def draw_spec(rng: np.random.Generator, size: Size) -> tuple[Spec, dict[str, Any]]:
    """A spec and the shapes of its arrays, by the names of their axes."""

    def pick(values):
        return values[rng.integers(len(values))]

    kind = pick(("dense",) * 4 + ("sparse",) * 5 + ("cache", "bytes"))
    page_size = pick(PAGE_SIZES)
    keys = pick((size.max_keys // 5, size.max_keys // 5, *[size.max_keys] * 5, 7 * size.max_keys))  # the last: chunks
    shapes = dict(b=pick(size.batch), s_q=pick(size.rows), h=pick(size.heads), ints=pick(("int32",) * 5 + _NARROW))
    if kind == "dense":
        fmt = pick(list(FORMATS.values()))
        shapes["max_pages"] = max(1, keys // page_size)
        shapes["pages"] = max(1, shapes["b"] * shapes["max_pages"] * pick((1, 1, 2)) // pick((1, 3))) + pick((0, 3))
        contiguous = rng.random() < 0.15
        if contiguous:
            page_size, shapes["pages"] = max(1, keys // 2), shapes["b"]
        spec = Spec(
            kind, fmt, page_size, contiguous=contiguous, is_causal=rng.random() < 0.5,
            plan=pick(("none", "none", "own", "stale", "invariant")), entry=pick(("op", "op", "compat")),
        )  # fmt: skip
    elif kind == "sparse":
        fmt = pick((V32, V32, MODEL1, MODEL1, BF16_576, BF16_512, F32_576, F32_512))
        family = {fmt} if fmt.compute_dtype == F32 else {BF16_576, V32} if fmt.d_qk == V32.d_qk else {BF16_512, MODEL1}
        others = sorted(family, key=lambda f: f.name)
        extra_fmt = pick((None, pick(others)))
        shapes |= dict(topk=keys, pages=keys // page_size + pick((1, 9)), length_rank=pick((0, 1, 2)))
        shapes |= dict(extra_topk=pick((keys // 3, keys)), extra_length_rank=pick((0, 1, 2)), sink=pick((True, False)))
        extra_page_size = pick(PAGE_SIZES) if extra_fmt else 0
        shapes["extra_pages"] = keys // max(1, extra_page_size) + pick((1, 9))
        if rng.random() < 0.05:
            shapes[pick(("topk", "extra_topk", "pages", "extra_pages"))] = 0
        spec = Spec(
            kind, fmt, page_size, extra_fmt=extra_fmt, extra_page_size=extra_page_size,
            plan=pick(("none", "none", "own", "stale", "invariant")), entry=pick(("op", "op", "compat")),
        )  # fmt: skip
    else:
        fmt = pick([f for f in FORMATS.values() if f.is_quantized or kind == "cache"])
        rules = ["pow2", "pow2_low"] + (["amax"] if fmt is V32 else [])
        shapes |= dict(pages=pick((1, 4, 9)), n=pick((1, 6, 30)), max_pages=pick((1, 5)))
        spec = Spec(kind, fmt, page_size, scale_rule=pick(rules) if fmt.is_quantized else "pow2")
    return spec, shapes


_NARROW = ("uint32", "int16", "int8", "uint8")


# -- values ------------------------------------------------------------------------------------------------------------


def integers(rng, shape, below: int, dtype: str, *, garbage: float) -> np.ndarray:
    """Integers of which most lie in [0, below) and a share is anything at all: -1, the bounds, the int32 extremes."""
    good = rng.integers(0, max(1, below), shape)
    odd = np.array([-1, -2, below, below - 1, below + 1, INT_MIN, INT_MIN + 1, INT_MAX, INT_MAX - 1, 2**30, 10**9])
    bad = np.where(rng.random(shape) < 0.3, rng.integers(INT_MIN, INT_MAX, shape), rng.choice(odd, shape))
    return np.where(rng.random(shape) < garbage, bad, good).astype(dtype)  # wraps, as garbage may


def _garbage(rng) -> float:
    """The share of garbage in an array: none, some, all."""
    return float(rng.choice([0, 0.1, 0.5, 1], p=[0.35, 0.4, 0.15, 0.1]))


def _magnitude(rng) -> float:
    return float(rng.choice([1, 1, 1, 1, 0.01, 30, 1e3, 0]))


def normal(rng, *shape: int, dtype) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def queries(rng, b: int, s_q: int, h: int, fmt: KVFormat) -> np.ndarray:
    """Queries of several magnitudes, up to those where softmax picks a single key; now and then a NaN or an inf."""
    q = normal(rng, b, s_q, h, fmt.d_qk, dtype=np.float32) * np.float32(_magnitude(rng))
    if rng.random() < 0.2:
        q *= 10.0 ** rng.integers(-6, 7, (b, s_q, h, 1)).astype(np.float32)
    if rng.random() < 0.1:
        q[rng.integers(b), rng.integers(s_q), rng.integers(h), rng.integers(fmt.d_qk)] = rng.choice([np.nan, np.inf])
    return q.astype(fmt.compute_dtype)


def scale(rng) -> np.ndarray:
    """A softmax scale: usual ones, zero, negative, large."""
    return np.asarray(rng.choice([0.07, 0.1352338, 1.0, 0.0, -0.05, 1e-4, 25.0]), np.float32)


def pool(rng, fmt: KVFormat, pages: int, page_size: int, used: np.ndarray) -> np.ndarray:
    """Cache data. `used`: the slots that valid keys name, of which few hold NaN; the others hold anything."""
    kv = normal(rng, pages, page_size, fmt.d_qk, dtype=np.float32) * np.float32(_magnitude(rng))
    if rng.random() < 0.3:
        kv *= 10.0 ** rng.integers(-5, 4, (pages, page_size, 1)).astype(np.float32)
    rule = "amax" if fmt is V32 and rng.random() < 0.5 else "pow2"
    data = oracle.encode_pages(kv.astype(fmt.compute_dtype), fmt, rule)
    if fmt.is_quantized and rng.random() < 0.4:
        record, offset, field = fmt.locate("scale")
        view = oracle.record_view(data, fmt, page_size, record)[..., offset : offset + field.num_bytes]
        view[...] = scale_bytes(rng, fmt, (pages, page_size))
    is_free = np.ones(pages * page_size, bool)
    is_free[used] = False
    if rng.random() < 0.1 and used.size:  # garbage in a slot that counts: its readers suffer, and nobody else
        is_free[rng.choice(used)] = True
    free = is_free.reshape(pages, page_size)
    fill = rng.choice(["nan", "random", "kept"], p=[0.6, 0.2, 0.2])
    for record in range(len(fmt.records)):
        view = oracle.record_view(data, fmt, page_size, record)
        if fill == "nan":
            view[free] = 0xFF if fmt.is_quantized else np.nan
        elif fill == "random" and fmt.is_quantized:
            view[free] = rng.integers(0, 256, view[free].shape)
        if data.ndim == 3:  # one record, or values
            break
    if data.ndim == 2:
        data[:, fmt.bytes_per_token * page_size :] = rng.integers(0, 256, 1)
    return data


def scale_bytes(rng, fmt: KVFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of scales, uint8 [*shape, bytes]: every e8m0 byte, float32 of either sign and any magnitude."""
    field = fmt.locate("scale")[2]
    wild = rng.random() < 0.3  # most calls: finite products, so that there is a value to compare
    if field.dtype == F32:
        values = normal(rng, *shape, field.count, dtype=np.float32)
        values *= np.float32(10.0) ** rng.integers(-12, 4, values.shape).astype(np.float32)
        if wild:
            odd = np.array([0, -0.0, 1e-40, 1e38, -3e38, np.inf, -np.inf, np.nan, 2.0**-126], np.float32)
            values = np.where(rng.random(values.shape) < 0.02, rng.choice(odd, values.shape), values)
        return values.view(np.uint8)
    low, high = (0, 256) if wild else (0, 140)
    middle = rng.integers(110, 135, (*shape, field.count))
    return np.where(rng.random(middle.shape) < 0.9, middle, rng.integers(low, high, middle.shape)).astype(np.uint8)


def _valid(slots: np.ndarray, num_slots: int) -> np.ndarray:
    slots = oracle.as_int32(slots).ravel()
    return slots[(slots >= 0) & (slots < num_slots)]


# -- calls -------------------------------------------------------------------------------------------------------------


def _dense(rng, spec: Spec, n: dict[str, Any]) -> dict[str, np.ndarray]:
    b, pages, size = n["b"], n["pages"], spec.page_size
    width = 1 if spec.contiguous else n["max_pages"]
    table = integers(rng, (b, width), pages, n["ints"], garbage=_garbage(rng))
    if rng.random() < 0.3:  # as a server has it: every page once
        table = rng.permutation(max(pages, b * width))[: b * width].reshape(b, width).astype(n["ints"])
    # Lengths beyond what an integer type holds would be garbage each time: let many be whole tables.
    lengths = integers(rng, (b,), width * size + 2, n["ints"], garbage=_garbage(rng) / 2)
    page = np.arange(b)[:, None] if spec.contiguous else oracle.as_int32(table)
    position = np.arange(width * size)
    end = np.clip(oracle.as_int32(lengths), 0, width * size)
    slot = page[:, position // size] * size + position % size  # [b, n]
    known = (page >= 0) & (page < pages)
    used = slot[(position[None] < end[:, None]) & known[:, position // size]]
    arrays = dict(
        q=queries(rng, b, n["s_q"], n["h"], spec.fmt),
        cache=pool(rng, spec.fmt, pages, size, used),
        cache_seqlens=lengths,
        sm_scale=scale(rng),
    )
    if not spec.contiguous:
        arrays["block_table"] = table
    if spec.plan == "stale":
        arrays["plan_lengths"] = integers(rng, (b,), width * size + 2, "int32", garbage=0.2)
    if spec.plan == "invariant":
        arrays["neighbours"] = rng.random(b) < 0.5
    return arrays


def _sparse(rng, spec: Spec, n: dict[str, Any]) -> dict[str, np.ndarray]:
    b, s_q = n["b"], n["s_q"]
    arrays = dict(q=queries(rng, b, s_q, n["h"], spec.fmt), sm_scale=scale(rng))
    scopes: list[tuple[str, KVFormat, int]] = [("", spec.fmt, spec.page_size)]
    if spec.extra_fmt is not None:
        scopes.append(("extra_", spec.extra_fmt, spec.extra_page_size))
    for prefix, fmt, size in scopes:
        topk, pages, rank = n[f"{prefix}topk"], n[f"{prefix}pages"], n[f"{prefix}length_rank"]
        indices = integers(rng, (b, s_q, topk), pages * size, n["ints"], garbage=_garbage(rng))
        if rng.random() < 0.3:
            indices[..., topk // 2 :] = np.array(-1).astype(indices.dtype)  # wraps, to a large slot
        length = None
        if rank:
            length = integers(rng, (b, s_q)[:rank], topk + 1, n["ints"], garbage=_garbage(rng) / 2)
            arrays[f"{prefix}topk_length"] = length
        most = np.full((b, s_q), topk) if length is None else oracle.as_int32(length).reshape(b, -1)
        counted = np.arange(topk) < most[..., None]  # [b, s_q or 1, topk]
        used = _valid(indices[np.broadcast_to(counted, indices.shape)], pages * size)
        arrays[f"{prefix}indices"] = indices
        arrays[f"{prefix}cache"] = pool(rng, fmt, pages, size, used)
    if n["sink"]:
        sink = normal(rng, n["h"], dtype=np.float32) * np.float32(rng.choice([1, 5, 100]))
        odd = rng.choice(np.array([np.inf, -np.inf, 0, 3e38, -3e38], np.float32), n["h"])
        arrays["attn_sink"] = np.where(rng.random(n["h"]) < 0.3, odd, sink).astype(np.float32)
    if spec.plan == "stale":
        arrays["plan_lengths"] = integers(rng, (b, s_q), n["topk"] + 1, "int32", garbage=0.2)
    if spec.plan == "invariant":
        arrays["neighbours"] = rng.random(b) < 0.5
    return arrays


def _cache_arrays(rng, spec: Spec, n: dict[str, Any]) -> dict[str, np.ndarray]:
    pages, size, fmt = n["pages"], spec.page_size, spec.fmt
    return dict(
        kv=rows_to_pack(rng, (pages, size), fmt),
        new_kv=rows_to_pack(rng, (n["n"],), fmt),
        slots=integers(rng, (n["n"],), pages * size, n["ints"], garbage=_garbage(rng)),
        positions=integers(rng, (n["b"], n["n"]), n["max_pages"] * size, n["ints"], garbage=_garbage(rng)),
        block_table=integers(rng, (n["b"], n["max_pages"]), pages, n["ints"], garbage=_garbage(rng)),
    )


def rows_to_pack(rng, shape: tuple[int, ...], fmt: KVFormat) -> np.ndarray:
    """Rows at the quantiser's edges: zero tiles, amax at, just under or just over the largest value * 2^k, extremes."""
    kv = normal(rng, *shape, fmt.d_qk, dtype=np.float32)
    kv *= 10.0 ** rng.choice([0, 0, 0, -3, -6, -20, 4, 20, 37], (*shape, 1)).astype(np.float32)
    if fmt.is_quantized and rng.random() < 0.7:
        tiles = kv[..., : fmt.d_nope].reshape(*shape, fmt.num_scales, fmt.scale_tile)
        edge = np.float32(fmt.largest_value) * 2.0 ** rng.integers(-20, 30, (*shape, fmt.num_scales)).astype(np.float32)
        edge *= rng.choice([1, 1 - 2**-8, 1 + 2**-7], edge.shape).astype(np.float32)
        tiles = np.clip(tiles, -1, 1) * edge[..., None]
        tiles[..., 0] = edge
        tiles *= rng.random((*shape, fmt.num_scales, 1)) > 0.1
        kv[..., : fmt.d_nope] = tiles.reshape(*shape, fmt.d_nope)
    if rng.random() < 0.1:
        kv.reshape(-1)[rng.integers(kv.size)] = rng.choice([np.inf, -np.inf, np.nan])
    return kv.astype(fmt.compute_dtype)


def _bytes_arrays(rng, spec: Spec, n: dict[str, Any]) -> dict[str, np.ndarray]:
    slots = n["pages"] * spec.page_size
    return dict(
        cache=rng.integers(0, 256, (n["pages"], *spec.fmt.page_shape(spec.page_size))).astype(np.uint8),
        slots=integers(rng, (n["n"],), slots, n["ints"], garbage=_garbage(rng)),
    )


