"""Results as JSON lines, and the tables made from them: the terminal's and the README's.

A results file holds one `Run` (where and how) and then its `Result`s, one JSON object a line. Files under docs/results
are the source of every number in the README: `mla-jax bench --readme` writes the part between its markers from them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from mla_jax.bench.workloads import SUITES

README_BEGIN, README_END = "<!-- results: begin -->", "<!-- results: end -->"
RESULTS = Path("docs") / "results"


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how a file's results were measured."""

    device: str
    jax: str
    command: str
    dram_gb_s: float  # read-only bandwidth, measured in this run
    matmul_tflop_s: float  # bf16 8192^3, measured in this run
    peer: str | None = None  # package and version


@dataclasses.dataclass(frozen=True)
class Result:
    """One workload, measured. Times are device microseconds of one call; see mla_jax.bench.timer for the regimes."""

    workload: str
    regime: str
    implementation: str
    us: float | None = None  # None: `error` says why
    busy_us: float | None = None
    wall_us: float | None = None
    kernels: tuple[str, ...] = ()
    in_graph: bool = False
    calls: int = 0
    sets: int = 1
    flop: int = 0
    bytes_moved: int = 0
    peer_us: float | None = None
    ratio: float | None = None  # median over rounds of peer time / our time: above 1 we are faster
    disagreement: float | None = None  # 1 - cosine between the two outputs
    error: str | None = None

    @property
    def tflop_s(self) -> float | None:
        return self.flop / self.us / 1e6 if self.us and self.flop else None

    @property
    def gb_s(self) -> float | None:
        return self.bytes_moved / self.us / 1e3 if self.us and self.bytes_moved else None

    def shares(self, run: Run) -> tuple[float | None, float | None]:
        """Achieved over ceiling: (DRAM bandwidth, matmul rate)."""
        dram = None if self.gb_s is None else self.gb_s / run.dram_gb_s
        matmul = None if self.tflop_s is None else self.tflop_s / run.matmul_tflop_s
        return dram, matmul


def dumps(run: Run, results: Iterable[Result]) -> str:
    """A results file's text."""
    lines = [{"record": "run"} | dataclasses.asdict(run)]
    lines += [{"record": "result"} | dataclasses.asdict(result) for result in results]
    return "".join(json.dumps(line) + "\n" for line in lines)


def loads(text: str) -> tuple[Run, list[Result]]:
    """The inverse of `dumps`. Raises ValueError where the text is no results file."""
    run, results = None, []
    for number, line in enumerate(text.splitlines(), 1):
        record = json.loads(line)
        match record.pop("record", None):
            case "run" if run is None:
                run = Run(**record)
            case "result":
                results.append(Result(**record | {"kernels": tuple(record["kernels"])}))
            case kind:
                raise ValueError(f"line {number} holds a {kind!r} record; a results file is one run, then results")
    if run is None:
        raise ValueError("no run record: not a results file")
    return run, results


COLUMNS = ("case", "us", "kernels us", "peer us", "ratio", "TFLOP/s", "GB/s", "of DRAM", "of matmul")


def rows(run: Run, results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row of text per result, under `COLUMNS`. "kernels us" is the sum of the kernels' own times."""
    return [
        (
            r.workload,
            _number(r.us, 1) if r.error is None else "failed",
            _number(r.busy_us, 1),
            _number(r.peer_us, 1),
            _number(r.ratio, 2),
            _number(r.tflop_s, 0),
            _number(r.gb_s, 0),
            *(_percent(share) for share in r.shares(run)),
        )
        for r in results
    ]


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"


def _table(run: Run, results: Iterable[Result]) -> str:
    """Results as a Markdown table."""
    lines = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *rows(run, results)]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def _head(run: Run) -> str:
    """A line about the run, in Markdown."""
    peer = f"; peer: {run.peer}" if run.peer else ""
    return (
        f"{run.device}, jax {run.jax}{peer}. Ceilings in the same run: DRAM reads {run.dram_gb_s:.0f} GB/s, "
        f"bf16 matmul {run.matmul_tflop_s:.0f} TFLOP/s. `{run.command}`\n"
    )


def _summary(suite: str, results: Sequence[Result]) -> str:
    """A suite in a line: how many cases, and the range and the geometric mean of the ratios."""
    ratios = [r.ratio for r in results if r.ratio is not None]
    text = f"{suite}: {len(results)} case{'' if len(results) == 1 else 's'}"
    if not ratios:
        return text
    mean = statistics.geometric_mean(ratios)
    return f"{text}, ratio {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}"


def readme_section(root: Path) -> str:
    """The README's results, from every file of docs/results in the repository at `root`: a fold for each suite."""
    files = sorted((root / RESULTS).glob("*.jsonl"))
    if not files:
        return "No results are recorded yet.\n"
    sections = []
    for file in files:
        run, results = loads(file.read_text())
        of = {(r.workload, r.regime): r for r in results}
        for regime in dict.fromkeys(r.regime for r in results):
            link = f"[{file.name}]({(RESULTS / file.name).as_posix()})"
            sections.append(f"#### {link}, regime `{regime}`\n\n{_head(run)}")
            for suite, workloads in SUITES.items():
                chosen = [of[w.name, regime] for w in workloads if (w.name, regime) in of]
                if chosen:
                    summary = f"<summary>{_summary(suite, chosen)}</summary>"
                    sections.append(f"<details>{summary}\n\n{_table(run, chosen)}\n</details>\n")
    return "\n".join(sections)


def with_results(readme: str, section: str) -> str:
    """The README with `section` between its markers. Raises ValueError where a marker is missing."""
    for marker in (README_BEGIN, README_END):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md must hold {marker} exactly once")
    before, rest = readme.split(README_BEGIN)
    after = rest.split(README_END)[1]
    return f"{before}{README_BEGIN}\n{section}{README_END}{after}"
