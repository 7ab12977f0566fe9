"""The documents: their code runs as it stands, their links lead somewhere, pages on extending show tested code."""

import functools
import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_extending

import mla_jax
from mla_jax import cli, tuning
from mla_jax.bench import accuracy
from mla_jax.nn import V32Config, init_params
from mla_jax.sharding import DecodeSharding, ModuleSharding

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Pages whose code another test runs.
ELSEWHERE = {"README.md": "test_readme.py", "docs/modules.md": "nn/test_modules_page.py"}
SHOWN = {"docs/add-a-format.md": test_extending, "docs/add-a-kernel.md": test_extending}  # pages that show tests


def _name(path):
    return path.relative_to(ROOT).as_posix()


def _code(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


WITH_CODE = [p for p in PAGES if _code(p) and _name(p) not in ELSEWHERE | SHOWN]


def _before(page):
    """Names that a page's code takes as given."""
    if page == "docs/tuning.md":
        tuning.Table(jax.devices()[0].device_kind, mla_jax.__version__, jax.__version__, {}).save("h200.json")
        return dict(jax=jax, mla_jax=mla_jax, scale=0.1)
    if page != "docs/sharding.md":
        return {}
    lengths = np.array([40, 7, 0, 130, 5, 64, 200, 1], np.int32)
    given = dict(jax=jax, jnp=jnp, mla_jax=mla_jax, partial=functools.partial)
    given |= dict(num_pages=32, lengths=lengths, scale=0.05)
    given |= dict(DecodeSharding=DecodeSharding, ModuleSharding=ModuleSharding)
    config = V32Config.small(num_layers=1)
    table = jnp.asarray([[0], [1], [16], [17]], jnp.int32)  # [b, max_pages], each data group's own pages
    return given | dict(
        config=config, params=init_params(config, 0, jax.random.key(0)), page_size=64, block_table=table,
        x=jnp.ones((4, 1, config.hidden_size), config.dtype), cache_seqlens=jnp.ones(4, jnp.int32),
    )  # fmt: skip


def _after_sharding(names):
    assert names["out"].shape == names["x"].shape
    b, ds = 8, names["ds"]
    cache = mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, 32, 64, sharding=ds.cache_sharding())
    row, q = jnp.ones((b, 576), jnp.bfloat16), jnp.ones((b, 1, 4, 576), jnp.bfloat16)
    positions = jnp.maximum(jnp.asarray(names["lengths"]) - 1, 0)
    arguments = (row, positions, jnp.asarray(names["table"]), jnp.minimum(jnp.asarray(names["lengths"]), 1))
    q = jax.device_put(q, ds.q_sharding())
    out, _ = names["step"](cache, q, *(jax.device_put(x, ds.row_sharding()) for x in arguments))
    assert out.shape == (b, 1, 4, 512)


@pytest.mark.parametrize("path", WITH_CODE, ids=_name)
def test_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = _before(_name(path))
    for code in _code(path):
        exec(code, names)
    if _name(path) == "docs/sharding.md":
        _after_sharding(names)
    if _name(path) == "docs/tuning.md":
        cache, q = mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, 2, 16), jnp.ones((1, 1, 2, 576), jnp.bfloat16)
        out = names["step"](q, cache, jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32))
        assert out.shape == (1, 1, 2, 512)


def test_every_page_with_code_is_tested():
    assert {_name(p) for p in PAGES if _code(p)} == {_name(p) for p in WITH_CODE} | set(ELSEWHERE) | set(SHOWN)


@pytest.mark.parametrize("page", SHOWN)
def test_page_shows_the_test_as_it_is(page):
    source = inspect.getsource(SHOWN[page])
    blocks = _code(ROOT / page)
    assert blocks and all(block in source for block in blocks), "the page's code differs from tests/test_extending.py"


def _anchors(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_resolve(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{target} does not exist"
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_files_that_are_named_exist(path):
    named = re.findall(r"`((?:docs|notebooks|tests|mla_jax|pallas_kernels|\.ci)/[\w./-]*\w)`", path.read_text())
    named += [f"notebooks/{n}" for n in re.findall(r"`(\d\d_\w+)`", path.read_text())]
    for name in named:
        if "NN_name" in name:  # stands for any notebook
            continue
        candidates = (ROOT / name, ROOT / f"{name}.py", ROOT / f"{name}.ipynb")
        assert any(c.exists() for c in candidates), f"{_name(path)} names {name}, which does not exist"


def test_support_matrix_is_what_dispatch_does():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "docs" / "matrix.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    text = matrix.PAGE.read_text()
    assert matrix.with_table(text) == text, "run: uv run python docs/matrix.py"


def test_accuracy_table_is_what_is_measured():
    """Two of its rows, measured again; to 5 %, since sums are cut elsewhere on other machines."""
    rows = re.findall(r"^\| (\w+) \| (\w+|-) \| (\w+) \| ([\d. |]+) \|$", (ROOT / "docs/accuracy.md").read_text(), re.M)
    assert len(rows) == len(accuracy.CASES) * len(accuracy.SOURCES)
    for row in rows[3], rows[-1]:
        fmt, rule, source, numbers = mla_jax.FORMATS[row[0]], row[1], row[2], [float(x) for x in row[3].split("|")]
        measured = [accuracy.value_error(fmt, rule, source)]
        measured += [accuracy.attention_error(fmt, rule, source, s) for s in accuracy.SHARPNESS]
        np.testing.assert_allclose(100 * np.asarray(measured), numbers, rtol=0.05)


def test_readme_lists_every_notebook_document_and_command():
    text = (ROOT / "README.md").read_text()
    for command in cli.SUBCOMMANDS:
        assert f"| `mla-jax {command.replace('_', '-')}" in text, f"README.md has no line on mla-jax {command}"
    notebooks = [p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")]
    documents = [p.name for p in (ROOT / "docs").glob("*.md") if p.stem != "index"]
    for name in itertools.chain(notebooks, documents):
        assert name in text, f"README.md does not name {name}"
