"""Flax NNX shells: a module holds one layer's parameters and calls the pure functions. Needs the extra `flax`.

Caches stay outside: explicit pytrees that go in and come out, so that a step can donate them.
"""

from __future__ import annotations

import os
from typing import Any, Self

import jax
from flax import nnx

from mla_jax.nn import model1, v32, weights
from mla_jax.nn.config import Model1Config, V32Config


class _Attention(nnx.Module):
    """What both modules share: parameters from an `nnx.Rngs`, from arrays, or from a checkpoint."""

    config: Any
    layer: int

    def __init__(
        self, config: Any, layer: int = 0, *, rngs: nnx.Rngs | None = None, params: weights.Params | None = None
    ):
        """One layer of `config`, with random parameters (`rngs`) or given ones (`params`).

        Raises:
          ValueError: not exactly one of `rngs` and `params`, parameters of other names, shapes or dtypes, or no such
            layer.
        """
        if (rngs is None) == (params is None):
            raise ValueError("give either rngs (random parameters) or params")
        specs = weights.param_specs(config, layer)
        if params is None:
            assert rngs is not None
            params = weights.init_params(config, layer, rngs.params())
        if {k: (v.shape, v.dtype) for k, v in params.items()} != {k: (v.shape, v.dtype) for k, v in specs.items()}:
            raise ValueError(f"params do not fit layer {layer}; accepted: {specs}")
        self.config, self.layer = config, layer
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    @classmethod
    def from_checkpoint(
        cls, config: Any, layer: int, path: str | os.PathLike[str], *, prefix: str | None = None
    ) -> Self:
        """Parameters from safetensors files; see `mla_jax.nn.weights.load_layer`."""
        return cls(config, layer, params=weights.load_layer(config, layer, path, prefix=prefix))

    @property
    def params(self) -> weights.Params:
        """The parameters as the pure functions take them."""
        return {name: getattr(self, name)[...] for name in weights.param_specs(self.config, self.layer)}


class V32Attention(_Attention):
    """Attention of DeepSeek-V3.2 or, with `index_topk=0`, of DeepSeek-V3: `mla_jax.nn.v32` with parameters bound."""

    config: V32Config

    def init_cache(self, num_pages: int, page_size: int = 64, **options: Any) -> v32.V32Cache:
        """Caches of all layers of the config; see `v32.init_cache`."""
        return v32.init_cache(self.config, num_pages, page_size, **options)

    def prefill(
        self, x: jax.Array, cache: v32.V32Cache, block_table: jax.Array, lengths: jax.Array, *args: Any, **options: Any
    ) -> tuple[jax.Array, v32.V32Cache]:
        """See `v32.prefill`."""
        options.setdefault("layer", self.layer)
        return v32.prefill(self.params, self.config, cache, x, block_table, lengths, *args, **options)

    def decode(
        self, x: jax.Array, cache: v32.V32Cache, block_table: jax.Array, cache_seqlens: jax.Array, **options: Any
    ) -> tuple[jax.Array, v32.V32Cache]:
        """See `v32.decode`."""
        options.setdefault("layer", self.layer)
        return v32.decode(self.params, self.config, cache, x, block_table, cache_seqlens, **options)


class Model1Attention(_Attention):
    """Attention of DeepSeek-V4: `mla_jax.nn.model1` with one layer's parameters bound."""

    config: Model1Config

    def init_cache(self, **options: Any) -> model1.Model1Cache:
        """Caches of all layers of the config; see `model1.init_cache`."""
        return model1.init_cache(self.config, **options)

    def prefill(
        self,
        x: jax.Array,
        cache: model1.Model1Cache,
        tables: model1.Model1Tables,
        lengths: jax.Array,
        *args: Any,
        **options: Any,
    ) -> tuple[jax.Array, model1.Model1Cache]:
        """See `model1.prefill`."""
        options.setdefault("layer", self.config.layers[self.layer])
        return model1.prefill(self.params, self.config, cache, x, tables, lengths, *args, **options)

    def decode(
        self,
        x: jax.Array,
        cache: model1.Model1Cache,
        tables: model1.Model1Tables,
        cache_seqlens: jax.Array,
        **options: Any,
    ) -> tuple[jax.Array, model1.Model1Cache]:
        """See `model1.decode`."""
        options.setdefault("layer", self.config.layers[self.layer])
        return model1.decode(self.params, self.config, cache, x, tables, cache_seqlens, **options)
