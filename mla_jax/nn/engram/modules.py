"""Flax NNX shell: one Engram layer's parameters as `nnx.Param`, its table as `TableRows`. Needs extra `flax`."""

from __future__ import annotations

import os
from typing import Any, Self

import jax
from flax import nnx

from mla_jax.nn.engram import weights
from mla_jax.nn.engram.config import EngramConfig
from mla_jax.nn.engram.layer import Params, forward, forward_conv
from mla_jax.nn.engram.table import EngramTable, Partition, Placement, check_table, lookup


class TableRows(nnx.Variable):
    """An Engram table's arrays: no `nnx.Param`, so that filters can tell 94 GiB of rows from the other weights."""


class Engram(nnx.Module):
    """One Engram layer: `mla_jax.nn.engram` with a layer's parameters and its table bound.

    Rows are hashed for all layers at once (`hash_tokens`), outside; then, in a step,

        embeddings = [m.lookup(rows[:, :, m.layer]) for m in engrams]   # before the first layer
        x = engrams[0](x, embeddings[0], keep)                         # before that layer's attention
    """

    config: EngramConfig
    layer: int

    def __init__(
        self,
        config: EngramConfig,
        layer: int = 0,
        *,
        table: EngramTable | None = None,
        rngs: nnx.Rngs | None = None,
        params: Params | None = None,
    ):
        """Layer `config.layer_ids[layer]`, with random parameters (`rngs`) or given ones (`params`).

        Without a `table` the module cannot `lookup`; its caller hands it embeddings from elsewhere, as it must with a
        table in numpy arrays.

        Raises:
          ValueError: not exactly one of `rngs` and `params`; parameters or a table that do not fit; no such layer.
        """
        if (rngs is None) == (params is None):
            raise ValueError("give either rngs (random parameters) or params")
        config.check_layer(layer)
        specs = config.param_specs()
        if params is None:
            assert rngs is not None
            params = weights.init_params(config, rngs.params())
        if {k: (v.shape, v.dtype) for k, v in params.items()} != {k: (v.shape, v.dtype) for k, v in specs.items()}:
            raise ValueError(f"params do not fit an Engram layer; accepted: {specs}")
        self.config, self.layer = config, layer
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        if table is not None:
            check_table(table, config.num_rows[layer], config.head_dim)
            if not isinstance(table.values, jax.Array):
                raise ValueError("table is in numpy arrays; accepted: one in JAX arrays, from `place`")
        self.partition = None if table is None else table.partition
        self.where: Placement = "device" if table is None else table.where
        self.values = None if table is None else TableRows(table.values)
        self.scales = None if table is None or table.scales is None else TableRows(table.scales)

    @classmethod
    def from_checkpoint(
        cls,
        config: EngramConfig,
        layer: int,
        path: str | os.PathLike[str],
        *,
        prefix: str | None = None,
        where: Placement = "device",
        partition: Partition | None = None,
    ) -> Self:
        """Parameters and table from safetensors files; see `load_layer`, `load_table` and `place`."""
        params = weights.load_layer(config, layer, path, prefix=prefix)
        table = weights.load_table(config, layer, path, where, prefix=prefix, partition=partition)
        return cls(config, layer, params=params, table=table)

    @property
    def params(self) -> Params:
        """The parameters as the pure functions take them."""
        return {name: getattr(self, name)[...] for name in self.config.param_specs()}

    @property
    def table(self) -> EngramTable:
        """The table as the pure functions take it."""
        if self.values is None:
            raise ValueError("this Engram has no table; give it one (`table=`), or hand it embeddings")
        scales = None if self.scales is None else self.scales[...]
        return EngramTable(self.values[...], scales, self.config.num_rows[self.layer], self.partition, self.where)

    def lookup(self, rows: jax.Array) -> jax.Array:
        """Embeddings `[*n, embedding_dim]` of this layer's rows int32 `[*n, columns]`; see `lookup`."""
        return lookup(self.table, rows, dtype=self.config.dtype)

    def __call__(self, x: jax.Array, embeddings: jax.Array, *args: Any, **options: Any) -> Any:
        """`forward`, or for the paper form `forward_conv`, with the parameters bound."""
        apply = forward if self.config.form == "v41" else forward_conv
        return apply(self.params, self.config, x, embeddings, *args, **options)
