"""`mla-jax aot`: what it prints and how it exits. That kernels compile is tested in tests/kernels."""

import dataclasses

import pytest

from mla_jax import cli
from pallas_kernels import aot

GOOD = aot.Report(
    kernel="decode", arch="sm_90a", registers=168, spill_store_bytes=8, spill_load_bytes=4, smem_bytes=1000,
    tmem_columns=0, instructions=500, counts={"HGMMA": 40, "UTMALDG": 3, "LDL": 1},
    loops=(aot.Loop(200, {"HGMMA": 20}),), warnings=(),
)  # fmt: skip
SPILLS = aot.MAX_SPILLS_IN_LOOP + 1
SPILLING = dataclasses.replace(GOOD, kernel="combine", loops=(aot.Loop(300, {"HGMMA": 20, "STL": SPILLS}),))


@pytest.fixture
def compiles(monkeypatch):
    """Sets what each configuration compiles to: a list of reports, or an exception."""

    def use(**outcomes):
        def compile_report(function, arguments, arch):
            assert arch == "sm_90a"
            if isinstance(outcomes[function], Exception):
                raise outcomes[function]
            return outcomes[function]

        monkeypatch.setattr(aot, "configurations", lambda arch: {name: (name, ()) for name in outcomes})
        monkeypatch.setattr(aot, "compile_report", compile_report)

    return use


def test_good_kernels(compiles, capsys):
    compiles(dense=[GOOD], sparse=[GOOD])
    assert cli.main(["aot"]) == 0
    out = capsys.readouterr().out
    assert "2 kernels, no problem" in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("dense"))
    assert row == ["dense", "decode", "168", "8/4", "1000", "0", "500", "40", "3", "0", "200"]


def test_spills_fail(compiles, capsys):
    compiles(dense=[GOOD, SPILLING])
    assert cli.main(["aot"]) == 1
    assert f"dense, combine: a loop of 300 instructions spills: {SPILLS} STL" in capsys.readouterr().out


def test_what_does_not_compile_fails(compiles, capsys):
    compiles(dense=RuntimeError("is jax's CUDA plugin installed?"), sparse=[GOOD])
    assert cli.main(["aot"]) == 1
    out = capsys.readouterr().out
    assert "dense: RuntimeError: is jax's CUDA plugin installed?" in out and "sparse" in out


def test_choice(compiles, capsys):
    compiles(dense=[GOOD], sparse=[SPILLING])
    assert cli.main(["aot", "--filter", "dens"]) == 0
    assert cli.main(["aot", "--list"]) == 0
    assert capsys.readouterr().out.endswith("dense\nsparse\n")
    assert cli.main(["aot", "--filter", "huge"]) == 2
    assert "no configuration for sm_90a has 'huge'" in capsys.readouterr().err


def test_unknown_architecture(capsys):
    assert cli.main(["aot", "--arch", "sm_75"]) == 2
    assert "--arch is 'sm_75'; accepted: sm_90a" in capsys.readouterr().err
