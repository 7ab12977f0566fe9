"""The site: `uv run --group docs sphinx-build -W -b html docs site`. Nothing is fetched while it builds."""

import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mla_jax

project = "mla-jax"
author = "The mla-jax authors"
version = release = mla_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {"description": "MLA decoding for JAX on NVIDIA GPUs", "page_width": "1100px"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes stand in the docstrings
napoleon_google_docstring = True
napoleon_use_rtype = False
templates_path: list[str] = []
# "dtype" in a property's docstring is a word, not a reference; tests/test_docs.py looks after pages and links.
suppress_warnings = ["ref.python", "toc.not_included", "myst.xref_missing"]


def escape(app, what, name, obj, options, lines):
    """Docstrings are plain text: stars and bars are themselves, and a module's indented passages stay as they are."""
    if what == "module":
        passages = "\n".join(lines).split("\n\n")
        shown = ["::\n\n" + textwrap.indent(p, "    ") if "\n " in f"\n{p}" else p for p in passages]
        lines[:] = "\n\n".join(shown).split("\n")
    else:
        for number, line in enumerate(lines):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", text) for text in parts[::2]]  # outside of backticks
            lines[number] = "".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon
