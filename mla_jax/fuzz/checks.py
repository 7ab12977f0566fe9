"""Runs a case and judges what comes back: by the float64 oracle, by the library's reference, and against itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import reference
from mla_jax.fuzz import oracle
from mla_jax.fuzz.cases import Case, Spec
from pallas_kernels.formats import F32, MODEL1

_TINY = 2.0**-117  # float32 subnormals, and the products of e4m3 values with one, may be flushed to zero


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What checking a case found.

    Attributes:
      problem: what is wrong, or None; begins with the name of what failed and a colon.
      counts: how many rows were judged by what verdict (`oracle.VERDICTS`), and how many calls were made.
      refused: implementations that cannot serve the call here, by their own word.
    """

    problem: str | None
    counts: collections.Counter[str]
    refused: tuple[str, ...] = ()

    @property
    def sort(self) -> str | None:
        """The problem's first words: two problems of one sort are taken for the same one."""
        return None if self.problem is None else ":".join(self.problem.split(":")[:2])


def check(case: Case, implementations: Sequence[str] = ("xla",), *, reference: bool = True) -> Outcome:
    """Judges what each implementation, and (if asked) the reference, make of a case."""
    if case.spec.kind in ("dense", "sparse"):
        return _check_attention(case, (*implementations, *(["reference"] if reference else [])))
    problem = None
    try:
        with np.errstate(all="ignore"):
            problem = (_check_cache if case.spec.kind == "cache" else _check_bytes)(case)
    except Exception as error:
        problem = f"{case.spec.kind}: raised {type(error).__name__}: {error}"
    return Outcome(problem, collections.Counter({"calls": 1}))


# -- attention ---------------------------------------------------------------------------------------------------------


def expected(case: Case) -> oracle.Expected:
    """What the oracle says about an attention case."""
    spec, x = case.spec, case.arrays
    with np.errstate(all="ignore"):
        keys = oracle.decode_pages(x["cache"], spec.fmt, spec.page_size)
        if spec.kind == "dense":
            return oracle.dense(
                x["q"], keys, x.get("block_table"), x["cache_seqlens"], x["sm_scale"], is_causal=spec.is_causal,
                d_v=spec.fmt.d_v,
            )  # fmt: skip
        scopes = [(keys, x["indices"], x.get("topk_length"))]
        if spec.extra_fmt is not None:
            extra_keys = oracle.decode_pages(x["extra_cache"], spec.extra_fmt, spec.extra_page_size)
            scopes.append((extra_keys, x["extra_indices"], x.get("extra_topk_length")))
        return oracle.sparse(x["q"], scopes, x["sm_scale"], x.get("attn_sink"), d_v=spec.fmt.d_v)


def _check_attention(case: Case, names: Sequence[str]) -> Outcome:
    spec = case.spec
    want = expected(case)
    counts = want.counts
    refused: list[str] = []
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items() if name != "neighbours"}

    def outcome(problem: str | None) -> Outcome:
        return Outcome(problem, counts, tuple(refused))

    for name in names:
        try:
            out, lse = jax.device_get(run(spec, name, arrays))
        except NotImplementedError:
            refused.append(name)
            continue
        except Exception as error:  # whatever it is: no call that passed the checks may raise
            return outcome(f"{name}: raised {type(error).__name__}: {error}")
        counts["calls"] += 1
        own = name != "reference"
        if out.dtype != (spec.fmt.compute_dtype if own else F32) or lse.dtype != F32:
            return outcome(f"{name}: dtypes: out {out.dtype}, lse {lse.dtype}")
        tolerance = oracle.OUT_TOLERANCE[spec.fmt.compute_dtype if own else F32]
        problem = want.problem(out, lse, tolerance=tolerance, nan_is_fine=own and spec.plan == "stale")
        if problem is None and own and spec.plan == "invariant":
            problem = _neighbours_matter(case, name, arrays, (out, lse))
            counts["calls"] += 1
        if problem is not None:
            return outcome(f"{name}: {problem}")
    return outcome(None)


def _neighbours_matter(case: Case, name: str, arrays: dict[str, jax.Array], before: tuple) -> str | None:
    """With a batch-invariant plan: whether a request's bits change when its neighbours do."""
    changes = case.arrays["neighbours"]  # [b]
    changed = dict(arrays)
    for what in ("q", "cache_seqlens", "topk_length", "extra_topk_length", "indices", "extra_indices"):
        if what in arrays:
            x = np.array(case.arrays[what])
            x[changes] = 1
            changed[what] = jnp.asarray(x)
    after = jax.device_get(run(case.spec, name, changed))
    for what, x, y in zip(("out", "lse"), before, after, strict=True):
        bits = np.uint16 if x.dtype.itemsize == 2 else np.uint32
        different = (x.view(bits) != y.view(bits)).reshape(len(x), -1).any(-1) & ~changes & ~_is_nan_pair(x, y)
        if different.any():
            return f"invariance: {what} of request {int(np.argmax(different))} changed with its neighbours {changes}"
    return None


def _is_nan_pair(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[b]: requests where both hold NaN; which bits a NaN has is nobody's promise."""
    return np.isnan(x.astype(np.float32)).reshape(len(x), -1).any(-1) & np.isnan(y.astype(np.float32)).reshape(
        len(y), -1
    ).any(-1)


@functools.partial(jax.jit, static_argnames=("spec", "name"))
def run(spec: Spec, name: str, x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A case through an implementation, or through "reference": (out, lse) in the library's conventions."""
    cache = mla_jax.PagedKVCache(x["cache"], spec.fmt, spec.page_size)
    more: dict[str, Any] = {}
    if spec.kind == "sparse":
        names = ("topk_length", "attn_sink", "extra_indices", "extra_topk_length")
        more |= {what: x.get(what) for what in names}
        if spec.extra_fmt is not None:
            more["extra_cache"] = mla_jax.PagedKVCache(x["extra_cache"], spec.extra_fmt, spec.extra_page_size)
    if name == "reference":
        x, more = _int32(x), _int32(more)
        if spec.kind == "dense":
            return reference.mla_decode(
                x["q"], cache, x.get("block_table"), x["cache_seqlens"], sm_scale=x["sm_scale"],
                is_causal=spec.is_causal,
            )  # fmt: skip
        return reference.sparse_mla_decode(x["q"], cache, x["indices"], sm_scale=x["sm_scale"], **more)
    plan = make_plan(spec, x)
    if spec.entry == "compat":
        return _through_compat(spec, name, x, plan)
    common: dict[str, Any] = dict(sm_scale=x["sm_scale"], plan=plan, implementation=name, return_lse=True)
    if spec.kind == "dense":
        return mla_jax.mla_decode(
            x["q"], cache, x.get("block_table"), x["cache_seqlens"], is_causal=spec.is_causal, **common
        )
    return mla_jax.sparse_mla_decode(x["q"], cache, x["indices"], **more, **common)


def _int32(x: dict[str, Any]) -> dict[str, Any]:
    """The reference takes int32: what int32 cannot hold names nothing."""

    def one(name, value):
        if name in ("cache", "extra_cache", "plan_lengths") or value is None:
            return value
        if not jnp.issubdtype(value.dtype, jnp.integer):
            return value
        if value.dtype == jnp.uint32:
            return jnp.where(value < jnp.uint32(2**31), value.astype(jnp.int32), -1)
        return value.astype(jnp.int32)

    return {name: one(name, value) for name, value in x.items()}


def make_plan(spec: Spec, x: dict[str, jax.Array]) -> Any:
    """The plan of a case, or None."""
    if spec.plan == "none":
        return None
    b, s_q, h, _ = x["q"].shape
    invariant = spec.plan == "invariant"
    if spec.kind == "dense":
        lengths = _int32(x)["cache_seqlens"] if spec.plan != "stale" else x["plan_lengths"]
        return mla_jax.plan_decode(
            lengths, s_q=s_q, num_heads=h, page_size=spec.page_size, batch_invariant=invariant
        )
    extra = x["extra_indices"].shape[-1] if spec.extra_fmt else 0
    if spec.plan == "stale":
        lengths, extra_lengths = x["plan_lengths"], None
    else:
        own = _int32(x)
        lengths, extra_lengths = own.get("topk_length"), own.get("extra_topk_length") if extra else None
    return mla_jax.plan_sparse_decode(
        x["indices"].shape[-1], batch=b, s_q=s_q, num_heads=h, topk_length=lengths, extra_topk=extra,
        extra_topk_length=extra_lengths, batch_invariant=invariant,
    )  # fmt: skip


def _through_compat(spec: Spec, name: str, x: dict[str, jax.Array], plan: Any) -> tuple[jax.Array, jax.Array]:
    def flash(data, fmt):
        return data if fmt is MODEL1 else data[:, :, None]

    more: dict[str, Any] = {}
    scale: Any = x["sm_scale"]
    if spec.kind == "dense":
        more = dict(block_table=x.get("block_table"), cache_seqlens=x["cache_seqlens"], causal=spec.is_causal)
    else:
        names = ("indices", "attn_sink", "topk_length", "extra_topk_length")
        more = {what: x.get(what) for what in names} | dict(block_table=None, cache_seqlens=None)
        if spec.extra_fmt is not None:
            more["extra_k_cache"] = flash(x["extra_cache"], spec.extra_fmt)
            more["extra_indices_in_kvcache"] = x["extra_indices"]
    out, lse = mla_jax.compat.flash_mla_with_kvcache(
        x["q"], flash(x["cache"], spec.fmt), head_dim_v=spec.fmt.d_v, tile_scheduler_metadata=plan,
        softmax_scale=scale, implementation=name, **more,
    )  # fmt: skip
    lse = jnp.swapaxes(lse, 1, 2)  # [b, s_q, h]
    return out, jnp.where(lse == jnp.inf, -jnp.inf, lse)


# -- caches ------------------------------------------------------------------------------------------------------------


def _rows_differ(got: Any, want: np.ndarray, exact: np.ndarray | None = None) -> str | None:
    """Where rows differ: bitwise but for the sign of zero, which NaN it is, and subnormals.

    With `exact`, the rows before quantisation, a value that is as near to those as the wanted one is fine too: XLA's
    division by a scale may be off in the last bit, and what lies halfway between two e4m3 values then goes either way.
    """
    got = np.asarray(got).astype(np.float64)
    fine = (np.abs(got - want) <= _TINY) | (got == want) | (np.isnan(got) & np.isnan(want))
    if exact is not None:
        exact = exact.astype(np.float64)
        fine |= np.abs(got - exact) <= np.abs(want - exact) + 2.0**-8 * np.abs(exact)
    wrong = ~fine
    if not wrong.any():
        return None
    at = tuple(np.argwhere(wrong)[0].tolist())
    return f"{got[at]!r} at {at}, expected {want[at]!r}; {wrong.sum()} such values"


def _check_bytes(case: Case) -> str | None:
    spec, x = case.spec, case.arrays
    cache = mla_jax.PagedKVCache(jnp.asarray(x["cache"]), spec.fmt, spec.page_size)
    want = oracle.decode_pages(x["cache"], spec.fmt, spec.page_size)
    if found := _rows_differ(mla_jax.unpack_kv(cache), want):
        return f"unpack_kv: decodes: {found}"
    if found := _rows_differ(mla_jax.gather_kv(cache, jnp.asarray(x["slots"])), _gathered(want, x["slots"])):
        return f"gather_kv: reads: {found}"
    return None


def _gathered(rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Rows [pages, page_size, d_qk] at slots [n]; zeros where a slot names no place."""
    flat, slots = rows.reshape(-1, rows.shape[-1]), oracle.as_int32(slots)
    inside = (slots >= 0) & (slots < len(flat))
    return np.where(inside[:, None], flat[np.where(inside, slots, 0)], 0)


def _check_cache(case: Case) -> str | None:
    spec, x = case.spec, case.arrays
    fmt, size = spec.fmt, spec.page_size
    rule: Any = spec.scale_rule
    packed = mla_jax.pack_kv(jnp.asarray(x["kv"]), fmt, scale_rule=rule)
    rows = _finite_rows(x["kv"], oracle.decode_pages(oracle.encode_pages(x["kv"], fmt, rule), fmt, size), fmt)
    kv, new_kv = (x[name] if rule == "amax" else None for name in ("kv", "new_kv"))
    if found := _rows_differ(_finite_rows(x["kv"], mla_jax.unpack_kv(packed), fmt), rows, kv):
        return f"pack_kv: stores: {found}"
    data = np.array(packed.data)
    if data.ndim == 2:
        pads = data.copy()
        for record, fields in enumerate(fmt.records):
            used = fmt.record_bytes[record] - sum(f.num_bytes for f in fields if f.role == "pad")
            oracle.record_view(pads, fmt, size, record)[..., :used] = 0
        if pads.any():
            return "pack_kv: pads: pad bytes or page tails are not 0"
    after = mla_jax.append_kv(packed, jnp.asarray(x["new_kv"]), jnp.asarray(x["slots"]), scale_rule=rule)
    slots = oracle.as_int32(x["slots"])
    inside = (slots >= 0) & (slots < packed.num_slots)
    got = np.array(after.data)
    twice = np.unique(slots[inside], return_counts=True)
    again = np.isin(slots, twice[0][twice[1] > 1])  # which of several rows a slot keeps is unspecified
    fresh = oracle.decode_pages(oracle.encode_pages(x["new_kv"][None], fmt, rule), fmt, len(slots))[0]
    stored = oracle.decode_pages(got, fmt, size)
    read = _finite_rows(x["new_kv"], _gathered(stored, x["slots"]), fmt)
    wrote = np.where(inside[:, None], _finite_rows(x["new_kv"], fresh, fmt), read)
    if found := _rows_differ(read[~again], wrote[~again], None if new_kv is None else new_kv[~again]):
        return f"append_kv: stores: {found}"
    named = np.zeros(packed.num_slots, bool)
    named[slots[inside]] = True
    touched = named.reshape(-1, size)
    for record in range(len(fmt.records) if data.ndim == 2 else 1):
        old, new = (oracle.record_view(d, fmt, size, record)[~touched] for d in (data, got))
        if not np.array_equal(old, new, equal_nan=old.dtype.kind not in "iu"):
            return "append_kv: spills: a row that no slot names has changed"
    if found := _rows_differ(mla_jax.gather_kv(after, jnp.asarray(x["slots"])), _gathered(stored, x["slots"])):
        return f"gather_kv: reads: {found}"
    made = mla_jax.slots_from_positions(jnp.asarray(x["positions"]), jnp.asarray(x["block_table"]), size)
    want = slots_from_positions(x["positions"], x["block_table"], size)
    if not np.array_equal(np.asarray(made), want):
        at = tuple(np.argwhere(np.asarray(made) != want)[0].tolist())
        return f"slots_from_positions: gives: {int(made[at])} at {at}, expected {int(want[at])}"
    return None


def _finite_rows(kv: np.ndarray, rows: Any, fmt) -> np.ndarray:
    """Decoded rows, 0 where what was packed holds NaN or inf in the tile: the scale of such a tile is unspecified."""
    rows = np.asarray(rows).astype(np.float64)
    bad = ~np.isfinite(kv.astype(np.float64))
    if fmt.is_quantized:
        tiles = bad[..., : fmt.d_nope].reshape(*bad.shape[:-1], fmt.num_scales, fmt.scale_tile)
        bad[..., : fmt.d_nope] = np.repeat(tiles.any(-1), fmt.scale_tile, axis=-1)
    return np.where(bad, 0, rows)


def slots_from_positions(positions: np.ndarray, block_table: np.ndarray, page_size: int) -> np.ndarray:
    """The documented rule, one position after the other."""
    out = np.full(positions.shape, -1, np.int64)
    positions, block_table = oracle.as_int32(positions), oracle.as_int32(block_table)
    for at, position in np.ndenumerate(positions):
        column = int(position) // page_size
        if position >= 0 and column < block_table.shape[1]:
            page = int(block_table[at[0], column])
            if page >= 0 and (page + 1) * page_size <= 2**31 - 1:
                out[at] = page * page_size + int(position) % page_size
    return out
