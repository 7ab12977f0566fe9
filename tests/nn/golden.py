"""The golden attention modules: config, weights, input and output of every hf_* file (FORMATS of the golden data)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mla_jax.nn.config import Model1Config, RopeConfig, V32Config
from mla_jax.nn.weights import params_from_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL1_CASES = ("ratio0", "ratio4", "ratio4_topk8", "ratio128")


@dataclasses.dataclass
class Golden:
    config: V32Config | Model1Config
    params: dict
    x: np.ndarray  # [t, hidden] float32
    out: np.ndarray  # [t, hidden] float32
    chosen: np.ndarray | None  # int32 [t, topk], -1 for none

    def same_sets(self, columns: np.ndarray) -> np.ndarray:
        """Whether columns [t, k] names the golden set in each row: bool [t]."""
        return np.array([set(a[a >= 0]) == set(b[b >= 0]) for a, b in zip(columns, self.chosen, strict=True)])


def load(name: str, cache: str = "f32", **changes) -> Golden:
    with np.load(GOLDEN / f"hf_{name}.npz") as z:
        tensors = {k.removeprefix("w/"): z[k] for k in z.files if k.startswith("w/")}
        x, out = z["hidden_states"][0], z["output"][0]
        chosen = z["indexer_output"][0] if "indexer_output" in z.files else None
    config: V32Config | Model1Config
    if name == "v32":
        rope = RopeConfig(factor=40.0, original_positions=4096, mscale=1.0)
        config = V32Config(64, 4, 32, index_heads=16, index_topk=16, rope=rope, cache=cache)
    else:
        ratio = int(name.removesuffix("_topk8").removeprefix("model1_ratio"))
        heads, topk = (16, 8) if name.endswith("topk8") else (4, 512)
        config = Model1Config(
            *(64, 16, 32, 2, 16),
            ratios=(ratio,),
            index_heads=heads,
            index_topk=topk,
            compressed_rope=RopeConfig(theta=160_000.0, factor=16.0, original_positions=65_536),
            cache=cache,
        )
    config = dataclasses.replace(config, **changes)
    return Golden(config, params_from_tensors(config, 0, tensors), x, out, chosen)
