"""Engram: a memory of N-grams beside attention, as DeepSeek-V4.1 has it (docs/engram.md).

Each token's last N ids are hashed to rows of a very large table; a gate adds what was found to the residual streams.

    rows, keep = hash_tokens(config, token_map, tokens, history, positions, lengths)   # all layers, before the first
    embeddings = [lookup(table, rows[..., i, :]) for i, table in enumerate(tables)]    # no layer needed for it
    ...
    x = forward(params, config, x, embeddings[i], keep)                                # before a layer's attention
    history = advance(history, tokens, lengths)                                        # once it is known what stays

`Engram` is the Flax NNX shell (extra `flax`); `build_token_map` needs the extra `engram`.
"""

from typing import TYPE_CHECKING, Any

from mla_jax.nn.engram.config import EngramConfig
from mla_jax.nn.engram.hashing import (
    advance,
    check_token_map,
    check_tokens,
    hash_tokens,
    hash_windows,
    init_history,
    token_windows,
)
from mla_jax.nn.engram.layer import forward, forward_conv, gate, init_conv
from mla_jax.nn.engram.table import EngramTable, Partition, check_table, lookup, place
from mla_jax.nn.engram.weights import (
    init_params,
    layer_prefix,
    load_layer,
    load_table,
    params_from_tensors,
    table_from_tensors,
)

if TYPE_CHECKING:
    from mla_jax.nn.engram.modules import Engram
    from mla_jax.nn.engram.token_map import build_token_map

__all__ = [
    "Engram",
    "EngramConfig",
    "EngramTable",
    "Partition",
    "advance",
    "build_token_map",
    "check_table",
    "check_token_map",
    "check_tokens",
    "forward",
    "forward_conv",
    "gate",
    "hash_tokens",
    "hash_windows",
    "init_conv",
    "init_history",
    "init_params",
    "layer_prefix",
    "load_layer",
    "load_table",
    "lookup",
    "params_from_tensors",
    "place",
    "table_from_tensors",
    "token_windows",
]


def __getattr__(name: str) -> Any:
    if name == "Engram":
        try:
            from mla_jax.nn.engram import modules
        except ImportError as error:
            raise ImportError("Engram needs the extra `flax`: pip install 'mla-jax[flax]'") from error
        return modules.Engram
    if name == "build_token_map":  # not above: its module is also a program, which Python wants to load itself
        from mla_jax.nn.engram.token_map import build_token_map

        return build_token_map
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
