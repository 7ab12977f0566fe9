"""Runs notebooks and stores them with their outputs; copies the README's pictures out of them.

    uv run python notebooks/store.py                  all of them
    uv run python notebooks/store.py 04_split_plan    this one
    uv run python notebooks/store.py --images         only docs/images, from what is stored

A notebook is edited as NN_name.py (jupytext, py:percent). Its pair, NN_name.ipynb, is made here and not edited.
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).parents[1]
# Picture in docs/images -> (notebook, which of its pictures, counted from 0).
IMAGES = {
    "layouts.png": ("01_cache_layouts", 0),
    "split_plan.png": ("04_split_plan", 0),
    "serving.png": ("09_serving_loop", 0),
    "roofline.png": ("10_roofline", 0),
}


def stored(name: str) -> nbformat.NotebookNode:
    """A notebook as it lies in the repository, outputs included."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The PNG pictures of a notebook's outputs, in order."""
    outputs = (output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def execute(name: str) -> None:
    """Runs NN_name.py from top to bottom and writes NN_name.ipynb."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    os.environ["PYTHONPATH"] = str(ROOT)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    for number, cell in enumerate(notebook.cells):  # nothing that changes from run to run
        cell.id, cell.metadata = f"{name[:2]}-{number:02d}", {}
    nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, without .py; all of them if none is named")
    parser.add_argument("--images", action="store_true", help="run nothing, only write docs/images")
    args = parser.parse_args()
    every = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py"))
    for name in [] if args.images else args.names or every:
        print(f"running {name}")
        execute(name)
    for image, (name, number) in IMAGES.items():
        (ROOT / "docs" / "images").mkdir(exist_ok=True)
        (ROOT / "docs" / "images" / image).write_bytes(pictures(stored(name))[number])


if __name__ == "__main__":
    main()
