"""What the README claims: its example runs, its table of formats matches the byte maps."""

import re
from pathlib import Path

import jax.numpy as jnp

import mla_jax

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    cache, kv = names["cache"], jnp.ones((2, 576), jnp.bfloat16)
    q = jnp.ones((2, 1, 4, 576), jnp.bfloat16)
    indices = jnp.asarray([[[5, -1]], [[70, 5]]], jnp.int32)
    cache, out = names["step"](cache, q, kv, jnp.asarray([5, 70], jnp.int32), indices)
    assert out.shape == (2, 1, 4, 512) and bool(jnp.all(out == 1))


def test_formats_table():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| ([\d, ]+) \| ([\d, ]+) \| (\d+) \|", README, re.MULTILINE)
    listed = {}
    for names, sizes, d_qk, d_v in rows:
        names, sizes, d_qk = (re.findall(r"\w+", cell) for cell in (names, sizes, d_qk))
        for name, size, width in zip(names, sizes, d_qk, strict=False):
            listed[name] = (int(size), int(width), int(d_v))
    assert listed == {f.name: (f.bytes_per_token, f.d_qk, f.d_v) for f in mla_jax.FORMATS.values()}
