"""The loop of `mla-jax fuzz`: case after case, for so many minutes or until something fails."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from mla_jax.fuzz.cases import CASES_PER_SPEC, Case, Size, draw
from mla_jax.fuzz.checks import check

_SPECS_PER_CLEANING = 40  # compiled calls are forgotten after so many specs: they do not come back


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that failed: `number` draws it again."""

    number: int
    case: Case
    problem: str

    @property
    def implementation(self) -> str:
        """Who failed: an implementation's name, "reference", "pack_kv" and so on."""
        return self.problem.split(":")[0]


@dataclasses.dataclass
class Tally:
    """What has run so far: cases, judged rows and calls by `Outcome.counts`, and refusals by implementation."""

    cases: int = 0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __str__(self) -> str:
        rows = ", ".join(f"{self.counts[name]} {name}" for name in ("exact", "empty", "poisoned", "anything"))
        text = f"{self.cases} cases, {self.counts['calls']} calls; rows: {rows}"
        refused = ", ".join(f"{name} {count}" for name, count in sorted(self.refused.items()))
        return f"{text}; refused: {refused}" if refused else text


def search(
    seed: int,
    implementations: Sequence[str],
    size: Size,
    *,
    seconds: float,
    tally: Tally,
    first: int = 0,
    on_case: Callable[[int], None] = lambda _: None,
) -> Iterator[Failure]:
    """Checks cases `first`, `first` + 1, ... for `seconds`; yields those that fail, one a sort and spec.

    `tally` is kept up to date; `on_case` is called with each case's number before it runs.
    """
    end = time.monotonic() + seconds
    number, known = first, set()
    while time.monotonic() < end:
        if number % (CASES_PER_SPEC * _SPECS_PER_CLEANING) == 0:
            jax.clear_caches()
        on_case(number)
        case = draw(seed, number, size)
        outcome = check(case, implementations)
        tally.cases += 1
        tally.counts += outcome.counts
        tally.refused.update(outcome.refused)
        if outcome.problem is not None and (number // CASES_PER_SPEC, outcome.sort) not in known:
            known.add((number // CASES_PER_SPEC, outcome.sort))
            yield Failure(number, case, outcome.problem)
        number += 1
