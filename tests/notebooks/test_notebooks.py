"""Every notebook runs from top to bottom, its two files hold the same cells, and the README's pictures are its own."""

import importlib.util
import os
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
SLOW = {"04_split_plan", "09_serving_loop"}  # 15 s and 50 s; the engine and the plan have tests of their own
RESET = "%reset -f\nimport matplotlib\nmatplotlib.rcdefaults()\n%matplotlib inline"

spec = importlib.util.spec_from_file_location("store", ROOT / "notebooks" / "store.py")
store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)


def _cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.fixture(scope="module")
def runner():
    """One process for all notebooks: starting jax and matplotlib takes longer than most of them. Names are cleared."""
    manager = KernelManager(kernel_name="python3")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    manager.start_kernel(cwd=str(ROOT), env=env)
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=180, km=manager)
    yield client
    client.kc.stop_channels()
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


def test_there_are_notebooks():
    assert NOTEBOOKS and {n.stem for n in NOTEBOOKS} == {n.stem for n in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_files_are_paired(path):
    script, notebook = jupytext.read(path), store.stored(path.stem)
    assert _cells(script) == _cells(notebook), f"run: uv run python notebooks/store.py {path.stem}"
    assert store.pictures(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def _slow_if_slow(path):
    return pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [])


@pytest.mark.parametrize("path", [_slow_if_slow(path) for path in NOTEBOOKS], ids=lambda p: p.stem)
def test_runs(path, runner):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RESET))
    runner.nb = notebook
    runner.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    errors = [o for cell in ran for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not errors, errors


def test_pictures_of_the_readme_are_those_of_the_notebooks():
    for image, (name, number) in store.IMAGES.items():
        picture = (ROOT / "docs" / "images" / image).read_bytes()
        assert picture == store.pictures(store.stored(name))[number], "run: uv run python notebooks/store.py --images"
