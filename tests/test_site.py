"""The documents' site: nothing public is missing from the API reference, and it builds without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

import mla_jax

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_in_the_api_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    formats = {*mla_jax.FORMATS, "FORMATS"}  # instances, described by KVFormat
    missing = [name for name in mla_jax.__all__ if name not in text and name not in formats]
    assert not missing


@pytest.mark.slow  # 20 s of CPU
def test_the_site_builds(tmp_path):
    pytest.importorskip("myst_parser", reason="needs the docs group: uv run --group docs pytest -m slow")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "ops.html").read_text()
    assert "mla_jax.sparse_mla_decode" in api and "extra_topk_length" in api
