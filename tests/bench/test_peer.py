"""The peer is never a dependency: it is imported in one module, on demand, and its absence is explained."""

import ast
import importlib
from pathlib import Path

import pytest

from mla_jax.bench import peer

ROOT = Path(__file__).parents[2]


def test_absence_is_explained(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(peer.PeerUnavailable, match=r"pip install torch sgl-flash-mla.*No module named 'torch'"):
        peer.load("flash_mla")


def test_unknown_peer():
    with pytest.raises(ValueError, match="'triton' does not exist; there is flash_mla"):
        peer.load("triton")


def test_torch_is_imported_by_the_peer_alone():
    importers = set()
    for package in ("mla_jax", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    modules = [node.module or ""]
                if {m.split(".")[0] for m in modules} & {"torch", "flash_mla"}:
                    importers.add(file.relative_to(ROOT).as_posix())
    assert importers == {"mla_jax/bench/peer.py"}
