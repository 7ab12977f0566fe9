"""Flax NNX shells: a module holds one layer's parameters and calls the pure functions. Needs the extra `flax`.

Caches stay outside: explicit pytrees that go in and come out, so that a step can donate them.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import jax
from flax import nnx

from mla_jax.nn import model1, v32, weights
from mla_jax.nn.config import Model1Config, V32Config
from mla_jax.sharding import DecodeSharding, ModuleSharding


class _Attention(nnx.Module):
    """What both modules share: parameters from an `nnx.Rngs`, from arrays, or from a checkpoint."""

    _functions: ClassVar[Any]  # the module of pure functions
    config: Any
    layer: int
    sharding: DecodeSharding | None

    def __init__(
        self,
        config: Any,
        layer: int = 0,
        *,
        rngs: nnx.Rngs | None = None,
        params: weights.Params | None = None,
        sharding: DecodeSharding | None = None,
    ):
        """One layer of `config`, with random parameters (`rngs`) or given ones (`params`).

        With `sharding` the layer runs over that mesh's data, heads and context, its parameters and the caches that it
        makes placed there (`mla_jax.sharding.ModuleSharding`).

        Raises:
          ValueError: not exactly one of `rngs` and `params`, parameters of other names, shapes or dtypes, no such
            layer, or a mesh that the config does not divide over.
        """
        if (rngs is None) == (params is None):
            raise ValueError("give either rngs (random parameters) or params")
        specs = weights.param_specs(config, layer)
        if params is None:
            assert rngs is not None
            params = weights.init_params(config, layer, rngs.params())
        if {k: (v.shape, v.dtype) for k, v in params.items()} != {k: (v.shape, v.dtype) for k, v in specs.items()}:
            raise ValueError(f"params do not fit layer {layer}; accepted: {specs}")
        self.config, self.layer, self.sharding = config, layer, sharding
        if sharding is not None:
            params = ModuleSharding(config, sharding).place_params(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    @classmethod
    def from_checkpoint(
        cls, config: Any, layer: int, path: str | os.PathLike[str], *, prefix: str | None = None, **options: Any
    ) -> Self:
        """Parameters from safetensors files; see `mla_jax.nn.weights.load_layer`. `options`: of the constructor."""
        return cls(config, layer, params=weights.load_layer(config, layer, path, prefix=prefix), **options)

    @property
    def params(self) -> weights.Params:
        """The parameters as the pure functions take them."""
        return {name: getattr(self, name)[...] for name in weights.param_specs(self.config, self.layer)}

    def _init_cache(self, *args: Any, **options: Any) -> Any:
        if self.sharding is not None:
            return ModuleSharding(self.config, self.sharding).init_cache(*args, **options)
        return self._functions.init_cache(self.config, *args, **options)

    def _run(self, name: str, *args: Any, **options: Any) -> Any:
        """The module's function of that name, on the mesh if there is one."""
        if self.sharding is not None:
            return getattr(ModuleSharding(self.config, self.sharding), name)(self.params, *args, **options)
        return getattr(self._functions, name)(self.params, self.config, *args, **options)


class V32Attention(_Attention):
    """Attention of DeepSeek-V3.2 or, with `index_topk=0`, of DeepSeek-V3: `mla_jax.nn.v32` with parameters bound."""

    config: V32Config
    _functions: ClassVar[Any] = v32

    def init_cache(self, num_pages: int, page_size: int = 64, **options: Any) -> v32.V32Cache:
        """Caches of all layers of the config; see `v32.init_cache`."""
        return self._init_cache(num_pages, page_size, **options)

    def prefill(
        self, x: jax.Array, cache: v32.V32Cache, block_table: jax.Array, lengths: jax.Array, *args: Any, **options: Any
    ) -> tuple[jax.Array, v32.V32Cache]:
        """See `v32.prefill`."""
        options.setdefault("layer", self.layer)
        return self._run("prefill", cache, x, block_table, lengths, *args, **options)

    def decode(
        self, x: jax.Array, cache: v32.V32Cache, block_table: jax.Array, cache_seqlens: jax.Array, **options: Any
    ) -> tuple[jax.Array, v32.V32Cache]:
        """See `v32.decode`."""
        options.setdefault("layer", self.layer)
        return self._run("decode", cache, x, block_table, cache_seqlens, **options)


class Model1Attention(_Attention):
    """Attention of DeepSeek-V4: `mla_jax.nn.model1` with one layer's parameters bound."""

    config: Model1Config
    _functions: ClassVar[Any] = model1

    def init_cache(self, **options: Any) -> model1.Model1Cache:
        """Caches of all layers of the config; see `model1.init_cache`."""
        return self._init_cache(**options)

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
        return self._run("prefill", cache, x, tables, lengths, *args, **options)

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
        return self._run("decode", cache, x, tables, cache_seqlens, **options)
