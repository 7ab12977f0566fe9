"""`mla-jax verify`, on what runs here: processes that end in every way, and the report."""

import json
import sys

import pytest

from mla_jax.bench import verify, workloads
from mla_jax.cli import main


def python(code):
    return [sys.executable, "-c", code]


def test_every_way_a_process_can_end():
    ended = verify.run_isolated(python(f"print('noise'); print({verify.MARK!r} + '{{\"status\": \"refused\"}}')"), 60)
    assert ended["status"] == "refused" and ended["seconds"] >= 0
    assert verify.run_isolated(python("print('fine')"), 60)["status"] == "passed"
    failed = verify.run_isolated(python("raise SystemExit(86)"), 60)
    assert failed["status"] == "failed" and "exit status 86" in failed["text"]
    crashed = verify.run_isolated(python("import os; print('last words', flush=True); os.abort()"), 60)
    assert crashed["status"] == "crashed" and "last words" in crashed["text"]


def test_a_hang_costs_its_time_limit():
    hung = verify.run_isolated(python("import time; print('waits', flush=True); time.sleep(600)"), 2)
    assert hung["status"] == "hung" and "waits" in hung["text"] and hung["seconds"] < 60


def test_checks_draw_what_they_say():
    assert set(verify.SANITIZED) <= set(verify.CHECKS) and set(verify.SUITES) <= set(workloads.SUITES)
    for check in list(verify.CHECKS.values())[::4]:
        case = check.case(0)
        assert case.arrays["q"].shape == (check.shapes["b"], check.shapes["s_q"], check.shapes["h"], case.spec.fmt.d_qk)
        for name, x in check.case(0).arrays.items():  # again: the same
            assert x.tobytes() == case.arrays[name].tobytes()
        assert check.case(1).arrays["q"].tobytes() != case.arrays["q"].tobytes()


def test_wrong_results_are_noticed(monkeypatch):
    from mla_jax.fuzz import checks

    right = checks.run
    monkeypatch.setattr(checks, "run", lambda *args: tuple(2 * x for x in right(*args)))
    record = verify.run_check(verify.CHECKS["dense-h1"], "xla", draws=1, repeats=2)
    assert record["status"] == "wrong" and record["text"].startswith("draw 0: xla:")


@pytest.mark.slow
def test_report_of_one_check(tmp_path, capsys):
    """The command, a check in a process of its own, the files."""
    assert main(["verify", "--filter", "sparse-v32-h1-nothing", "--out", str(tmp_path)]) == 2
    assert "no check has" in capsys.readouterr().err
    assert main(["verify", "--filter", "dense-h1-only", "--list"]) == 2
    assert main(["verify", "--filter", "sparse-v32-h16", "--implementation", "xla", "--out", str(tmp_path)]) == 0
    assert "1 records, 0 failed, 0 refused" in capsys.readouterr().out
    report = json.loads((tmp_path / "verify.json").read_text())
    (record,) = report["records"]
    assert record["name"] == "sparse-v32-h16-page61" and record["status"] == "passed"
    assert report["environment"]["packages"]["jax"]
    text = (tmp_path / "verify.md").read_text()
    assert "Implementation: xla." in text and "| check | sparse-v32-h16-page61 | passed |" in text


def test_no_kernel_is_no_success(tmp_path, capsys):
    """A CPU has no Mosaic kernel: refused, which a report of nothing else must not call a success."""
    records = [dict(kind="check", name="dense-h1", status="refused", seconds=1.0, text="no kernel here")]
    report = dict(environment={"device": "none"}, implementation="mosaic", records=records)
    assert verify.failures(report) == []
    assert "| check | dense-h1 | refused | 1.0 | no kernel here |" in verify.markdown(report)


@pytest.mark.parametrize("status", ["wrong", "hung", "crashed", "failed"])
def test_what_did_not_work_is_a_failure(status):
    records = [dict(kind="check", name="x", status=status, seconds=0.0, text="a | b\nc")]
    report = dict(environment={}, implementation="mosaic", records=records)
    assert verify.failures(report) == records
    assert f"| check | x | {status} | 0.0 | a / b c |" in verify.markdown(report)


def test_benchmark_results_become_a_table():
    run = dict(record="run", device="gpu", jax="0.12", command="bench", dram_gb_s=7000.0, matmul_tflop_s=1500.0)
    result = dict(record="result", workload="v32-b1", regime="graph", implementation="mosaic", us=12.5, kernels=["a"],
                  flop=10**9, bytes_moved=10**7)  # fmt: skip
    records = [dict(kind="benchmark", name="sparse_v32", status="passed", seconds=9.0, text="", results=[run, result])]
    text = verify.markdown(dict(environment={}, implementation="mosaic", records=records))
    assert "DRAM reads 7000 GB/s" in text and "| v32-b1 | 12.5 |" in text
