"""The example of docs/modules.md runs as it stands."""

import re
from pathlib import Path

import numpy as np

DOC = Path(__file__).parents[2] / "docs" / "modules.md"


def test_the_decode_loop_of_the_document():
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    x = np.asarray(names["x"], np.float32)
    assert x.shape == (8, 1, 64) and np.isfinite(x).all()
    assert (x[2:] == 1).all() and (x[:2] != 1).any()  # padded rows pass through the residual stream as they are
