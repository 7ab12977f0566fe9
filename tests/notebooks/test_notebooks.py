"""Every notebook runs from top to bottom, and its two files, .py and .ipynb, hold the same cells."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def _cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert NOTEBOOKS and {n.stem for n in NOTEBOOKS} == {n.stem for n in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_files_are_paired(path):
    script, stored = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert _cells(script) == _cells(stored), f"run: uv run jupytext --sync --execute {path.relative_to(ROOT)}"
    assert any("image/png" in output.get("data", {}) for cell in stored.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=resources).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    errors = [o for cell in ran for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not errors, errors
