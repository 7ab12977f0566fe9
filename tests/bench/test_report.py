"""Results files, the tables made from them, and that the README shows what docs/results holds."""

from pathlib import Path

import pytest

from mla_jax.bench import report
from mla_jax.bench.report import Result, Run

ROOT = Path(__file__).parents[2]
RUN = Run(
    device="NVIDIA H100", jax="0.11.2", command="mla-jax bench", dram_gb_s=3000.0, matmul_tflop_s=750.0, peer="p 1"
)  # fmt: skip
RESULTS = [
    Result(
        workload="dense-b128-sq1-h16-sk4096", regime="graph", implementation="best", us=200.0, busy_us=199.0,
        wall_us=201.0, kernels=("decode", "combine"), in_graph=True, calls=20, sets=1, flop=18_253_611_008,
        bytes_moved=608_000_000, peer_us=210.0, ratio=1.05, disagreement=1e-7,
    ),
    Result(workload="dense-b1-sq1-h128-sk1024", regime="graph", implementation="best", error="ValueError: no"),
]  # fmt: skip


def test_round_trip():
    assert report.loads(report.dumps(RUN, RESULTS)) == (RUN, RESULTS)


def test_bad_files():
    text = report.dumps(RUN, RESULTS)
    with pytest.raises(ValueError, match="no run record"):
        report.loads("")
    with pytest.raises(ValueError, match="line 4 holds a 'run' record"):
        report.loads(text + text.splitlines()[0])


def test_rates_and_shares():
    result = RESULTS[0]
    assert result.tflop_s == pytest.approx(91.268, rel=1e-4)
    assert result.gb_s == 3040.0
    assert result.shares(RUN) == (pytest.approx(3040 / 3000), pytest.approx(91.268 / 750, rel=1e-4))
    assert RESULTS[1].shares(RUN) == (None, None)


def test_rows():
    good, failed = report.rows(RUN, RESULTS)
    assert good == ("dense-b128-sq1-h16-sk4096", "200.0", "199.0", "210.0", "1.05", "91", "3040", "101 %", "12 %")
    assert failed == ("dense-b1-sq1-h128-sk1024", "failed", *["-"] * 7)
    assert all(len(row) == len(report.COLUMNS) for row in (good, failed))


def test_readme_section(tmp_path):
    assert "No results" in report.readme_section(tmp_path)
    folder = tmp_path / report.RESULTS
    folder.mkdir(parents=True)
    (folder / "h100.jsonl").write_text(report.dumps(RUN, RESULTS))
    section = report.readme_section(tmp_path)
    assert "NVIDIA H100, jax 0.11.2; peer: p 1" in section and "3000 GB/s" in section
    assert "| dense-b128-sq1-h16-sk4096 | 200.0 | 199.0 | 210.0 | 1.05 | 91 | 3040 | 101 % | 12 % |" in section
    assert "docs/results/h100.jsonl" in section
    assert "<summary>dense: 2 cases, ratio 1.05 to 1.05, geometric mean 1.05</summary>" in section


def test_markers():
    readme = f"a\n{report.README_BEGIN}\nold\n{report.README_END}\nb\n"
    new = report.with_results(readme, "new\n")
    assert new == f"a\n{report.README_BEGIN}\nnew\n{report.README_END}\nb\n"
    assert report.with_results(new, "new\n") == new
    with pytest.raises(ValueError, match="exactly once"):
        report.with_results("no markers", "new\n")


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text()
    assert report.with_results(readme, report.readme_section(ROOT)) == readme, "run: uv run mla-jax bench --readme"
