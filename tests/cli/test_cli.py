"""The command line: exit codes, messages, and what the subcommands print."""

import jax.numpy as jnp
import pytest

import mla_jax
from mla_jax import cli
from mla_jax.bench import peer, report, runner, timer
from mla_jax.cli import demo, layout, table
from pallas_kernels.formats import FORMATS, MODEL1, V32


def test_demo(capsys):
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "jax     " in out and "plugin  " in out
    for row in ("V32       dense", "MODEL1    dense", "V32       sparse", "MODEL1    sparse", "BF16_576  dense"):
        assert row in out
    assert " 656 " in out and " 584 " in out and "xla" in out and "WRONG" not in out


def test_demo_finds_a_wrong_result(monkeypatch, capsys):
    right = mla_jax.sparse_mla_decode

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out.at[0, 0, 0, 0].add(jnp.bfloat16(0.5)), lse

    monkeypatch.setattr(mla_jax, "sparse_mla_decode", wrong)
    monkeypatch.setattr(demo, "steps", lambda rng: [demo._sparse(V32, rng)])
    assert cli.main(["demo"]) == 1
    assert "WRONG: V32 sparse" in capsys.readouterr().out


def test_demo_names_the_missing_extra(monkeypatch):
    monkeypatch.setattr(demo, "nvidia_gpu_present", lambda: True)
    monkeypatch.setattr(demo, "cuda_plugin", lambda: None)
    assert "pip install 'mla-jax[cuda13]'" in demo.missing_extra("cpu")
    assert demo.missing_extra("gpu") == ""
    monkeypatch.setattr(demo, "cuda_plugin", lambda: "jax-cuda13-plugin 1")
    assert "jax does not use it" in demo.missing_extra("cpu")
    monkeypatch.setattr(demo, "nvidia_gpu_present", lambda: False)
    assert demo.missing_extra("cpu") == ""


def test_layout_lists_every_format(capsys):
    assert cli.main(["layout"]) == 0
    out = capsys.readouterr().out
    for fmt in FORMATS.values():
        assert fmt.name in out and str(fmt.page_bytes(64)) in out


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_layout_decodes_a_token(name, capsys):
    assert cli.main(["layout", name.lower(), "--page-size", "4", "--token", "3"]) == 0
    out = capsys.readouterr().out
    fmt = FORMATS[name]
    assert f"{fmt.bytes_per_token} bytes a token" in out
    difference = float(out.rsplit(":", 1)[1])
    assert difference == 0 if not fmt.is_quantized else 0 < difference < 0.2


def test_byte_map():
    roles, tokens = layout.byte_map(MODEL1, 2)
    assert roles.size == MODEL1.page_bytes(2)
    counts = {role: int(((roles == i) & (tokens == 1)).sum()) for i, role in enumerate(layout.ROLES)}
    assert counts == {"nope": MODEL1.d_nope, "rope": 2 * MODEL1.d_rope, "scale": 7, "pad": 1}
    assert (tokens == -1).sum() == MODEL1.page_bytes(2) - 2 * MODEL1.bytes_per_token
    roles, tokens = layout.byte_map(V32, 3)
    assert (tokens == -1).sum() == 0 and (roles[512:528] == layout.ROLES.index("scale")).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["layout", "fp4"], "format 'fp4' does not exist; there are BF16_576"),
        (["layout", "v32", "--page-size", "0"], "--page-size is 0"),
        (["layout", "v32", "--token", "64"], "a page of 64 has tokens 0 to 63"),
        (["bench", "--suite", "huge"], "suite 'huge' does not exist"),
        (["bench", "--filter", "b77"], "contains 'b77'"),
        (["bench", "--plot", "x.png"], "name them with --results"),
    ],
)
def test_refusals(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_usage_errors_exit_with_2():
    for argv in ([], ["fly"], ["bench", "--regime", "warm"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        assert exit_.value.code == 2


def test_bench_lists(capsys):
    assert cli.main(["bench", "--list", "--suite", "plan", "--suite", "append"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_bench_refuses_without_a_gpu(monkeypatch, capsys):
    def no_gpu():
        raise RuntimeError("jax sees none here")

    monkeypatch.setattr(timer, "require_gpu", no_gpu)
    assert cli.main(["bench", "--suite", "dense"]) == 2
    assert "jax sees none here" in capsys.readouterr().err


def test_bench_says_how_to_get_the_peer(monkeypatch, capsys):
    def absent(name):
        raise peer.PeerUnavailable(peer.INSTALL)

    monkeypatch.setattr(peer, "load", absent)
    assert cli.main(["bench", "--suite", "dense", "--peer", "flash_mla"]) == 2
    assert "pip install torch sgl-flash-mla" in capsys.readouterr().err


RUN = report.Run(device="GPU", jax="1", command="mla-jax bench", dram_gb_s=3000.0, matmul_tflop_s=700.0)


@pytest.mark.parametrize("broken", [False, True])
def test_bench_reports_and_stores(monkeypatch, capsys, tmp_path, broken):
    def measure(compiled, **options):
        if broken:
            raise timer.TimingError("kernels were lost")
        assert options == {"label": "xla", "regime": "graph", "peer": None, "rounds": 2}
        w = compiled
        return report.Result(w.name, "graph", "xla", us=100.0, flop=w.flop, bytes_moved=w.bytes_moved)

    monkeypatch.setattr(runner, "describe_run", lambda command, peer: RUN)
    monkeypatch.setattr(runner, "compile_chain", lambda workload, **_: workload)
    monkeypatch.setattr(runner, "measure", measure)
    out = tmp_path / "new" / "results.jsonl"
    argv = ["bench", "--suite", "dense", "--filter", "sk32768", "--implementation", "xla", "--rounds", "2"]
    assert cli.main([*argv, "--jobs", "1", "--out", str(out)]) == (1 if broken else 0)
    captured = capsys.readouterr()
    run, results = report.loads(out.read_text())
    assert run == RUN and [r.workload for r in results] == [f"dense-b128-sq{s}-h128-sk32768" for s in (1, 2)]
    assert ("kernels were lost" in captured.err) == broken
    assert ("failed" in captured.out) == broken


def test_bench_fails_when_outputs_differ(monkeypatch):
    def measure(compiled, **options):
        return report.Result(compiled.name, "graph", "best", us=1.0, disagreement=0.1)

    monkeypatch.setattr(runner, "compile_chain", lambda workload, **_: workload)
    monkeypatch.setattr(runner, "measure", measure)
    from mla_jax.bench.workloads import SUITES

    (result,) = runner.measure_all(SUITES["dense"][:1])
    assert "outputs differ from the peer's: 1 - cosine = 1.0e-01" in result.error


def test_bench_plots_stored_results(tmp_path, capsys):
    results = [
        report.Result(w, "graph", "best", us=us, flop=flop, bytes_moved=10**9, peer_us=1.1 * us)
        for w, us, flop in (("dense-b128-sq1-h128-sk4096", 300.0, 10**11), ("v32-b1-sq1-h128-topk2048", 20.0, 10**10))
    ]
    stored, picture = tmp_path / "r.jsonl", tmp_path / "roofline.png"
    stored.write_text(report.dumps(RUN, results))
    assert cli.main(["bench", "--plot", str(picture), "--results", str(stored)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    stored.write_text(report.dumps(RUN, []))
    assert cli.main(["bench", "--plot", str(picture), "--results", str(stored)]) == 2
    assert "none of these results has a FLOP rate" in capsys.readouterr().err


def test_bench_rewrites_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--readme"]) == 2
    assert "repository's root" in capsys.readouterr().err
    (tmp_path / "mla_jax").mkdir()
    (tmp_path / "README.md").write_text(f"{report.README_BEGIN}\n{report.README_END}\n")
    assert cli.main(["bench", "--readme"]) == 0
    assert "No results are recorded yet." in (tmp_path / "README.md").read_text()
    assert cli.main(["bench", "--readme"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_plain_table():
    text = table.plain_table("t", ("name", "x"), [("a", "1"), ("bc", "22")])
    assert text == "t\n\nname   x\n----  --\na      1\nbc    22"
