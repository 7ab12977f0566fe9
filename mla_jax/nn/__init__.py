"""The attention of DeepSeek-V3.2 and DeepSeek-V4 for JAX: one layer, its caches included (docs/modules.md).

Pure functions on explicit pytrees live in `v32` and `model1`; `config` has the published sizes, `weights` reads
checkpoints, `paging` hands out pages. `V32Attention` and `Model1Attention` are Flax NNX shells around them; naming one
imports Flax (extra `flax`), nothing else here does. `engram` is the memory beside attention (docs/engram.md).
"""

from typing import TYPE_CHECKING, Any

from mla_jax.nn import engram, model1, v32, weights
from mla_jax.nn.config import Model1Config, Model1Layer, RopeConfig, V32Config
from mla_jax.nn.engram import EngramConfig
from mla_jax.nn.model1 import Model1Cache, Model1Tables
from mla_jax.nn.paging import PagePool
from mla_jax.nn.v32 import V32Cache
from mla_jax.nn.weights import WeightError, init_params, load_layer, params_from_tensors

if TYPE_CHECKING:
    from mla_jax.nn.engram import Engram
    from mla_jax.nn.modules import Model1Attention, V32Attention

__all__ = [
    "Engram",
    "EngramConfig",
    "Model1Attention",
    "Model1Cache",
    "Model1Config",
    "Model1Layer",
    "Model1Tables",
    "PagePool",
    "RopeConfig",
    "V32Attention",
    "V32Cache",
    "V32Config",
    "WeightError",
    "engram",
    "init_params",
    "load_layer",
    "model1",
    "params_from_tensors",
    "v32",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in ("Model1Attention", "V32Attention"):
        try:
            from mla_jax.nn import modules
        except ImportError as error:
            raise ImportError(f"{name} needs the extra `flax`: pip install 'mla-jax[flax]'") from error
        return getattr(modules, name)
    if name == "Engram":
        return engram.Engram
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
