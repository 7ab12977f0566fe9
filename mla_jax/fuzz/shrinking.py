"""Makes a failing case smaller while it keeps failing the same way: greedy, by what it costs to try.

First what is static (plan, extra scope), then whole requests, rows and heads, then integers become -1 and pages that
nothing names go, then values become 0. Every array's axes have names, so that dropping request 2 drops it everywhere.
Whatever still shows a problem of the same sort is kept. A new shape compiles anew, which takes most of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mla_jax.fuzz import oracle
from mla_jax.fuzz.cases import Case
from mla_jax.fuzz.checks import check

# Names of the leading axes; axes without one (bytes of a page, columns of a query) stay as they are.
_AXES: dict[str, tuple[str, ...]] = {
    "q": ("b", "s_q", "h"),
    "block_table": ("b", "max_pages"),
    "cache_seqlens": ("b",),
    "plan_lengths": ("b", "s_q"),
    "neighbours": ("b",),
    "indices": ("b", "s_q", "topk"),
    "topk_length": ("b", "s_q"),
    "extra_indices": ("b", "s_q", "extra_topk"),
    "extra_topk_length": ("b", "s_q"),
    "attn_sink": ("h",),
    "cache": ("pages",),
    "extra_cache": ("extra_pages",),
    "kv": ("pages",),
    "new_kv": ("n",),
    "slots": ("n",),
    "positions": ("b", "n"),
}
_MAX_RUNS = 16  # into so many runs at most an axis or an array is cut
_ROUNDS = 2  # what became simple late may let go of what was needed before


class _OutOfTime(Exception):
    pass


class _Search:
    def __init__(self, case, check, sort, end, on_step):
        self.case: Case = case
        self._check, self._sort, self._end, self._on_step = check, sort, end, on_step

    def accept(self, candidate: Case) -> bool:
        """Makes `candidate` the case if it fails as the case does; whether it did."""
        if time.monotonic() > self._end:
            raise _OutOfTime
        if self._check(candidate).sort != self._sort:
            return False
        self.case = candidate
        self._on_step(candidate)
        return True


def shrink(
    case: Case,
    implementations: Sequence[str] = ("xla",),
    *,
    seconds: float = 60.0,
    on_step: Callable[[Case], None] = lambda _: None,
) -> Case:
    """The smallest case found within `seconds` whose problem is of the same sort as the given one's.

    `on_step` is called with every smaller case. A case without a problem comes back unchanged.
    """
    sort = check(case, implementations).sort
    if sort is None:
        return case
    judge = functools.partial(check, implementations=implementations, reference=sort.startswith("reference"))
    search = _Search(case, judge, sort, time.monotonic() + seconds, on_step)
    try:
        for _ in range(_ROUNDS):
            _simplify_spec(search)
            for axis in ("b", "s_q", "h", "n"):
                _shorten(search, axis)
            _clear(search, kinds="iu", value=-1)
            _compact(search)
            for axis in ("max_pages", "topk", "extra_topk", "pages", "extra_pages"):
                _shorten(search, axis)
            _clear(search, kinds="ufV", value=0)
    except _OutOfTime:
        pass
    return search.case


def _simplify_spec(search: _Search) -> None:
    for change in (dict(plan="none"), dict(entry="op"), dict(is_causal=False)):
        spec, arrays = search.case.spec, search.case.arrays
        if any(getattr(spec, name) != value for name, value in change.items()):
            gone = ("plan_lengths", "neighbours") if "plan" in change else ()
            kept = {name: x for name, x in arrays.items() if name not in gone}
            search.accept(Case(dataclasses.replace(spec, **change), kept))
    if search.case.spec.extra_fmt is not None:
        kept = {name: x for name, x in search.case.arrays.items() if not name.startswith("extra_")}
        search.accept(Case(dataclasses.replace(search.case.spec, extra_fmt=None, extra_page_size=0), kept))
    for unneeded in ("attn_sink", "topk_length", "extra_topk_length"):
        if unneeded in search.case.arrays:
            kept = {name: x for name, x in search.case.arrays.items() if name != unneeded}
            search.accept(Case(search.case.spec, kept))


def _axes(case: Case, name: str) -> tuple[str, ...]:
    if name == "cache" and case.spec.contiguous:
        return ("b",)
    return _AXES.get(name, ())[: case.arrays[name].ndim]


def _extent(case: Case, axis: str) -> int:
    sizes = [
        case.arrays[name].shape[_axes(case, name).index(axis)] for name in case.arrays if axis in _axes(case, name)
    ]
    return sizes[0] if sizes else 0


def _without(case: Case, axis: str, first: int, count: int) -> Case:
    arrays = dict(case.arrays)
    for name, x in case.arrays.items():
        if axis in _axes(case, name):
            arrays[name] = np.delete(x, slice(first, first + count), axis=_axes(case, name).index(axis))
    return Case(case.spec, arrays)


def _shorten(search: _Search, axis: str) -> None:
    """Drops runs of an axis: halves, quarters and so on."""
    extent = _extent(search.case, axis)
    run = extent // 2
    while run and run * _MAX_RUNS >= extent:
        first = 0
        while first < _extent(search.case, axis) and _extent(search.case, axis) > run:
            if not search.accept(_without(search.case, axis, first, run)):
                first += run
        run //= 2


def _clear(search: _Search, *, kinds: str, value: int) -> None:
    """Sets runs of arrays of these dtype kinds to a value, the whole array first."""
    for name, x in list(search.case.arrays.items()):
        if x.dtype.kind not in kinds or (value and x.dtype == np.uint8 and name.endswith("cache")):
            continue
        fill = np.array(value).astype(x.dtype)
        run = x.size
        while run and run * _MAX_RUNS >= x.size:
            for first in range(0, x.size, run):
                flat = search.case.arrays[name].reshape(-1).copy()
                before = flat.tobytes()
                flat[first : first + run] = fill
                if flat.tobytes() != before:
                    search.accept(Case(search.case.spec, search.case.arrays | {name: flat.reshape(x.shape)}))
            run //= 2


def _compact(search: _Search) -> None:
    """Renumbers the pages that are named and drops the others; drops columns of indices that name nothing."""
    for candidate in _compacted(search.case):
        search.accept(candidate)


def _compacted(case: Case) -> Iterator[Case]:
    for prefix, size in (("", case.spec.page_size), ("extra_", case.spec.extra_page_size)):
        pages, indices = case.arrays.get(f"{prefix}cache"), case.arrays.get(f"{prefix}indices")
        if indices is not None and pages is not None:
            slots = oracle.as_int32(indices)
            valid = (slots >= 0) & (slots < len(pages) * size)
            page = np.where(valid, slots // size, 0)
            used = np.unique(page[valid])
            if used.size:
                moved = np.where(valid, np.searchsorted(used, page) * size + slots % size, slots)
                columns = valid.any((0, 1))
                short = {
                    f"{prefix}indices": moved[..., columns].astype(indices.dtype),
                    f"{prefix}cache": pages[used],
                }
                case = Case(case.spec, case.arrays | short)
                yield case
        table = case.arrays.get("block_table") if not prefix else None
        if table is not None and pages is not None and case.spec.kind == "dense":
            page = oracle.as_int32(table)
            valid = (page >= 0) & (page < len(pages))
            used = np.unique(page[valid])
            if used.size:
                moved = np.where(valid, np.searchsorted(used, np.where(valid, page, 0)), page).astype(table.dtype)
                yield Case(case.spec, case.arrays | {"block_table": moved, "cache": pages[used]})
