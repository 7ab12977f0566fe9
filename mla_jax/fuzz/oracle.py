"""What the ops must return, in NumPy and float64, from the bytes up: shares no code with what it judges.

Each (request, row, head) of an attention call gets a verdict on what is promised about it:

  EXACT     the formula's value, within bounds that follow from the size of its scores
  EMPTY     no keys: out 0, lse -inf
  POISONED  its query or one of its keys holds a NaN: out and lse are NaN
  ANYTHING  infinities, or numbers that overflow float32 on the way: nothing is promised, except about its neighbours

Rows of one request of a dense call share its keys: where one reads a NaN or an inf, the others may be NaN too.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.formats import BF16, E8M0, F32, KVFormat

EXACT, EMPTY, POISONED, ANYTHING = range(4)
VERDICTS = ("exact", "empty", "poisoned", "anything")

# Of `out`, relative to sum(p * |v|): the tests' bounds. Softmax weights may be rounded to bfloat16, and so is out.
OUT_TOLERANCE = {BF16: 4e-3, F32: 1e-5}
LSE_TOLERANCE = 1e-5  # relative and absolute
_SCORE_ERROR = 2.0**-20  # of a score in float32, relative to the sum of its terms' magnitudes
_HUGE = 1e36  # intermediate results beyond this may overflow
_TINY = 2.0**-120  # float32 subnormals may be flushed to zero: weights, sink factors, and values by the hundred


# -- bytes -------------------------------------------------------------------------------------------------------------


def decode_pages(data: np.ndarray, fmt: KVFormat, page_size: int) -> np.ndarray:
    """Cache data [pages, ...] -> rows, float64 [pages, page_size, d_qk]: value * scale, rounded once to bfloat16."""
    if not fmt.is_quantized:
        return data.astype(np.float64)
    pages = data.shape[0]
    flat = data.reshape(pages, fmt.page_bytes(page_size))  # [pages, bytes]
    part: dict[str, np.ndarray] = {}
    for record, fields in enumerate(fmt.records):
        first, width = fmt.area_offset_bytes(record, page_size), fmt.record_bytes[record]
        rows = flat[:, first : first + width * page_size].reshape(pages, page_size, width)
        offset = 0
        for field in fields:
            part[field.role] = np.ascontiguousarray(rows[..., offset : offset + field.num_bytes]).view(field.dtype)
            offset += field.num_bytes
    with np.errstate(all="ignore"):
        scale = np.repeat(part["scale"].astype(np.float32), fmt.scale_tile, axis=-1)  # [pages, page_size, d_nope]
        nope = (part["nope"].astype(np.float32) * scale).astype(BF16)
        return np.concatenate([nope, part["rope"]], axis=-1).astype(np.float64)


def encode_rows(kv: np.ndarray, fmt: KVFormat, rule: str = "pow2") -> list[np.ndarray]:
    """Rows [..., d_qk] -> one array [..., record bytes or values] per area of a page, as `mla_jax.pack_kv` must."""
    if not fmt.is_quantized:
        return [kv]
    value, scale = fmt.locate("nope")[2].dtype, fmt.locate("scale")[2].dtype
    largest = float(ml_dtypes.finfo(value).max)
    x = kv[..., : fmt.d_nope].astype(np.float32).reshape(*kv.shape[:-1], fmt.num_scales, fmt.scale_tile)
    amax = np.abs(x).max(axis=-1)  # [..., tiles]
    with np.errstate(all="ignore"):
        if rule == "amax":
            factor = np.maximum(amax / np.float32(largest), np.finfo(np.float32).tiny)
            y = x / factor[..., None]
        else:
            # The least k with largest * 2^k >= amax: amax = fraction * 2^exponent, fraction in [0.5, 1).
            fraction, exponent = np.frexp(amax.astype(np.float64))
            top, top_exponent = np.frexp(largest)
            k = exponent - top_exponent + (fraction > top)
            k = np.where(amax == 0, -(10**6), k)
            k = np.maximum(k, int(np.ceil(np.log2(1e-4 if rule == "pow2" else 1e-4 / largest))))
            factor = np.ldexp(np.float32(1), k).astype(np.float32)
            y = (x.astype(np.float64) / factor[..., None]).astype(np.float32)
        values = np.clip(y, -largest, largest).astype(value).reshape(*kv.shape[:-1], fmt.d_nope)
        scales = factor.astype(scale) if scale == E8M0 else factor
    parts = {"nope": values, "scale": scales, "rope": kv[..., fmt.d_nope :]}
    records = []
    for fields in fmt.records:
        columns = []
        for field in fields:
            if field.role == "pad":
                columns.append(np.zeros((*kv.shape[:-1], field.num_bytes), np.uint8))
            else:
                columns.append(np.ascontiguousarray(parts[field.role].astype(field.dtype)).view(np.uint8))
        records.append(np.concatenate(columns, axis=-1))
    return records


def encode_pages(kv: np.ndarray, fmt: KVFormat, rule: str = "pow2") -> np.ndarray:
    """Rows [pages, page_size, d_qk] -> cache data, pad bytes and page tails 0."""
    pages, page_size, _ = kv.shape
    data = np.zeros((pages, *fmt.page_shape(page_size)), fmt.storage_dtype)
    write_rows(data, fmt, page_size, np.arange(pages * page_size), kv.reshape(pages * page_size, kv.shape[-1]), rule)
    return data


def record_view(data: np.ndarray, fmt: KVFormat, page_size: int, record: int) -> np.ndarray:
    """One area of all pages as a writable view [pages, page_size, record bytes or values]: rows are contiguous."""
    if data.ndim == 3:
        return data
    first, width = fmt.area_offset_bytes(record, page_size), fmt.record_bytes[record]
    return data[:, first : first + width * page_size].reshape(len(data), page_size, width)


def write_rows(
    data: np.ndarray, fmt: KVFormat, page_size: int, slots: np.ndarray, kv: np.ndarray, rule: str = "pow2"
) -> None:
    """Writes kv [n, d_qk] at slots [n] in place; a slot that names no place is dropped."""
    inside = (slots >= 0) & (slots < len(data) * page_size)
    page, offset = np.divmod(slots[inside].astype(np.int64), page_size)
    for record, rows in enumerate(encode_rows(kv[inside], fmt, rule)):
        if data.ndim == 3:
            data[page, offset] = rows
        else:
            first, width = fmt.area_offset_bytes(record, page_size), fmt.record_bytes[record]
            columns = first + offset[:, None] * width + np.arange(width)  # [n, width]
            data[page[:, None], columns] = rows


def as_int32(x: np.ndarray) -> np.ndarray:
    """Integers of any type as the library takes them: int64 values, -1 for what int32 cannot hold."""
    x = x.astype(np.int64)
    return np.where((x >= -(2**31)) & (x < 2**31), x, -1)


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a call must return.

    Attributes:
      out: float64 [b, s_q, h, d_v].
      lse: float64 [b, s_q, h].
      verdict: int8 [b, s_q, h], EXACT, EMPTY, POISONED or ANYTHING.
      scale: float64 [b, s_q, h]: norm of sum(p * |v|), what out's tolerance is relative to.
      slack: float64 [b, s_q, h]: how far `out` may be off because scores are, in the same norm.
      lse_slack: float64 [b, s_q, h]: how far lse may be off.
      tainted: bool [b]: requests any value of which may be NaN instead, see above.
    """

    out: np.ndarray
    lse: np.ndarray
    verdict: np.ndarray
    scale: np.ndarray
    slack: np.ndarray
    lse_slack: np.ndarray
    tainted: np.ndarray

    @property
    def counts(self) -> collections.Counter[str]:
        """How many (request, row, head) there are of each verdict."""
        return collections.Counter(VERDICTS[v] for v in self.verdict.ravel().tolist())

    def problem(self, out, lse, *, tolerance: float, nan_is_fine: bool = False) -> str | None:
        """What is wrong with a result, or None.

        Args:
          out, lse: [b, s_q, h, d_v] and [b, s_q, h].
          tolerance: of out, relative; see `OUT_TOLERANCE`.
          nan_is_fine: a request may be NaN in place of right (its plan was made for other lengths).
        """
        out, lse = np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64)
        if out.shape != self.out.shape or lse.shape != self.lse.shape:
            return f"shapes: out {out.shape} and lse {lse.shape}, not {self.out.shape} and {self.lse.shape}"
        tainted = self.tainted[:, None, None] & (self.verdict != POISONED)  # [b, s_q, h]
        out = np.where(tainted[..., None] & np.isnan(out), self.out, out)
        lse = np.where(tainted & np.isnan(lse), self.lse, lse)
        is_nan = np.isnan(out).all(-1) & np.isnan(lse)  # [b, s_q, h]
        with np.errstate(all="ignore"):
            error = np.linalg.norm(out - self.out, axis=-1)  # [b, s_q, h]
            out_right = error <= tolerance * self.scale + self.slack
            lse_right = np.abs(lse - self.lse) <= self.lse_slack
        empty = self.verdict == EMPTY
        out_right = np.where(empty, (out == 0).all(-1), out_right)
        lse_right = np.where(empty, np.isneginf(lse), lse_right)
        poisoned, unknown = self.verdict == POISONED, self.verdict == ANYTHING
        excused = unknown | (is_nan & (poisoned | nan_is_fine))
        for what, right in (("out", out_right), ("lse", lse_right)):
            wrong = ~excused & (poisoned | ~right)
            if wrong.any():
                b, s, h = np.argwhere(wrong)[0].tolist()
                where = f"request {b}, row {s}, head {h} ({VERDICTS[self.verdict[b, s, h]]}), {wrong.sum()} such rows"
                if what == "lse":
                    return f"lse: is {lse[b, s, h]!r}, expected {self.lse[b, s, h]!r}; {where}"
                bound = tolerance * self.scale[b, s, h] + self.slack[b, s, h]
                return (
                    f"out: begins {out[b, s, h, :4].tolist()}, expected {self.out[b, s, h, :4].tolist()}, off by "
                    f"{error[b, s, h]:.3g} with a bound of {bound:.3g}; {where}"
                )
        return None


def dense(
    q: np.ndarray, keys: np.ndarray, block_table: np.ndarray | None, cache_seqlens: np.ndarray, sm_scale: Any,
    *, is_causal: bool, d_v: int,
) -> Expected:  # fmt: skip
    """`mla_jax.mla_decode`; keys float64 [pages, page_size, d_qk] from `decode_pages`."""
    b, s_q = q.shape[:2]
    pages, page_size, _ = keys.shape
    rows, tainted = [], np.zeros(b, bool)
    for request in range(b):
        table = np.array([request]) if block_table is None else as_int32(block_table[request])
        length = min(max(int(as_int32(cache_seqlens[request])), 0), table.size * page_size)
        for row in range(s_q):
            end = max(0, length - (s_q - 1 - row) if is_causal else length)
            read = [
                keys[page, : max(0, end - i * page_size)] for i, page in enumerate(table.tolist()) if 0 <= page < pages
            ]
            found = np.concatenate(read) if read else np.zeros((0, keys.shape[-1]))
            tainted[request] |= not np.isfinite(found).all()
            rows.append(_attend(q[request, row], found, sm_scale, d_v, None))
    return _stack(rows, q.shape[:3], d_v, tainted)


def sparse(
    q: np.ndarray, scopes: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]], sm_scale: Any,
    attn_sink: np.ndarray | None, *, d_v: int,
) -> Expected:  # fmt: skip
    """`mla_jax.sparse_mla_decode`; scopes of (keys, indices [b, s_q, topk], length [b], [b, s_q] or None)."""
    b, s_q = q.shape[:2]
    rows = []
    for request in range(b):
        for row in range(s_q):
            found = []
            for keys, indices, length in scopes:
                flat = keys.reshape(-1, keys.shape[-1])  # [slots, d_qk]
                slots = as_int32(indices[request, row])
                if length is not None:
                    most = int(as_int32(length[request] if length.ndim == 1 else length[request, row]))
                    slots = slots[: max(0, most)]
                found.append(flat[slots[(slots >= 0) & (slots < len(flat))]])
            rows.append(_attend(q[request, row], np.concatenate(found), sm_scale, d_v, attn_sink))
    return _stack(rows, q.shape[:3], d_v, np.zeros(b, bool))


def _attend(q, keys, sm_scale, d_v, attn_sink):
    """One row: q [h, d_qk], keys [n, d_qk] -> fields of `Expected` for each head."""
    h = q.shape[0]
    q, sm_scale = q.astype(np.float64), float(np.float32(sm_scale))
    zeros = np.zeros(h)
    if not len(keys):
        return np.zeros((h, d_v)), np.full(h, -np.inf), np.full(h, EMPTY), zeros, zeros, zeros
    poisoned = np.isnan(q).any(-1) | np.isnan(keys).any()  # [h]
    infinite = np.isinf(q).any(-1) | np.isinf(keys).any()  # [h]
    q, keys = (np.where(np.isfinite(x), x, 0) for x in (q, keys))
    # einsum, not matmul: on a busy machine the threads of a BLAS wait for each other, at 30 times the price.
    terms = np.einsum("hd,nd->hn", np.abs(q), np.abs(keys)).max(-1)  # [h]: of the unscaled product
    size = terms * abs(sm_scale)  # [h]
    largest = np.abs(keys).max() * len(keys)
    overflows = (terms > _HUGE) | (size > _HUGE) | (largest > _HUGE)  # [h]
    verdict = np.where(poisoned, POISONED, np.where(infinite | overflows, ANYTHING, EXACT))

    scores = np.einsum("hd,nd->hn", q, keys) * sm_scale  # [h, n]
    top = scores.max(-1)  # [h]
    weights = np.exp(scores - top[:, None])  # [h, n]
    total = weights.sum(-1)  # [h]
    p, lse = weights / total[:, None], top + np.log(total)
    values = keys[:, :d_v]  # [n, d_v]
    out = np.einsum("hn,nd->hd", p, values)  # [h, d_v]
    scale = np.linalg.norm(np.einsum("hn,nd->hd", p, np.abs(values)), axis=-1)  # [h]
    noise = _SCORE_ERROR * size  # [h]
    spread = np.stack([np.einsum("n,nd->d", p[i], np.abs(values - out[i])) for i in range(h)])  # [h, d_v]
    with np.errstate(over="ignore"):
        slack = np.expm1(np.minimum(2 * noise, 80)) * np.linalg.norm(spread, axis=-1)
        lse_slack = LSE_TOLERANCE * (1 + np.abs(lse)) + noise
        if attn_sink is not None:
            factor = 1 / (1 + np.exp(attn_sink.astype(np.float64) - lse))  # [h]
            slack = slack * factor + lse_slack * (1 - factor) * factor * np.linalg.norm(out, axis=-1)
            out, scale = out * factor[:, None], scale * factor
    return out, lse, verdict, scale, slack + _TINY * (1 + np.linalg.norm(np.abs(values).sum(0))), lse_slack


def _stack(rows, shape, d_v, tainted) -> Expected:
    if not rows:
        rows = [(np.zeros((0, d_v)), *[np.zeros(0)] * 5)]
    fields = [np.concatenate(x) for x in zip(*rows, strict=True)]
    out, lse, verdict, scale, slack, lse_slack = (x.reshape(*shape, *x.shape[1:]) for x in fields)
    return Expected(out, lse, verdict.astype(np.int8), scale, slack, lse_slack, tainted)
