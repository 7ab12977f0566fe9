"""Engram weights by the names DeepSeek-V4.1's checkpoint gives them, `layers.{layer id}.engram.`:

    embed.weight  e4m3 [rows, head_dim]          embed.scale  e8m0 [rows, head_dim / 32]
    wkv.weight    e4m3 [(hc + 1) d, columns head_dim]   wkv.scale  e8m0, a scale per 32 x 32 block
    q_weight, k_weight  bfloat16 [hc, d]

A layer's table is read through a memory map: each device gets its own part and nothing else is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.nn.engram.config import EngramConfig
from mla_jax.nn.engram.layer import Params
from mla_jax.nn.engram.table import SCALE_TILE, EngramTable, Partition, Placement, place
from mla_jax.nn.weights import WeightError, checkpoint_files, dequantize, read_safetensors
from pallas_kernels.formats import E4M3, E8M0

_TABLE = ("embed.weight", "embed.scale")
_WKV_SCALE = "wkv.scale"
_NAMES = {"wkv": "wkv.weight", "q_weight": "q_weight", "k_weight": "k_weight"}


def layer_prefix(config: EngramConfig, layer: int) -> str:
    """What the checkpoint's names of a layer's Engram begin with."""
    config.check_layer(layer)
    return f"layers.{config.layer_ids[layer]}.engram."


def init_params(config: EngramConfig, key: jax.Array) -> Params:
    """Random parameters of one layer: `wkv` normal with variance 1 / fan-in, norm weights 1, biases 0, and the
    convolution 0, so that the paper form starts without it."""
    params = {name: jnp.ones(spec.shape, spec.dtype) for name, spec in config.param_specs().items()}
    noise = jax.random.normal(key, params["wkv"].shape, jnp.float32) * config.embedding_dim**-0.5
    params["wkv"] = noise.astype(config.dtype)
    for name in {"wkv_bias", "conv_weight"} & set(params):
        params[name] = jnp.zeros_like(params[name])
    return params


def params_from_tensors(config: EngramConfig, tensors: Mapping[str, np.ndarray], *, prefix: str = "") -> Params:
    """One layer's parameters from named arrays; `wkv` may be e4m3 with scales, or unquantised.

    Args:
      config: sizes; its dtype is the parameters'.
      tensors: by name. Names without `prefix` and the table's are ignored, the rest must be known.
      prefix: see `layer_prefix`.

    Raises:
      WeightError: tensors missing, unexpected, or of another shape or dtype; all of them listed.
      NotImplementedError: the paper form, of which no checkpoint is known.
    """
    if config.form != "v41":
        raise NotImplementedError("no checkpoint of the paper form is known; build its parameters by hand")
    given = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    expected = {_NAMES[name]: spec.shape for name, spec in config.param_specs().items()}
    if "wkv.weight" in given and given["wkv.weight"].dtype == E4M3:
        rows, columns = expected["wkv.weight"]
        expected[_WKV_SCALE] = (-(-rows // SCALE_TILE), -(-columns // SCALE_TILE))
    _refuse(
        prefix,
        missing=[name for name in expected if name not in given],
        unexpected=[name for name in given if name not in expected and name not in _TABLE],
        unfit=[
            f"{name} {given[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in given and given[name].shape != shape
        ],
    )
    params = {}
    for name, spec in config.param_specs().items():
        array = given[_NAMES[name]]
        if name == "wkv" and _WKV_SCALE in expected:
            array = dequantize(array, given[_WKV_SCALE], SCALE_TILE)
        params[name] = jnp.asarray(array.astype(spec.dtype))
    return params


def table_from_tensors(
    config: EngramConfig, layer: int, tensors: Mapping[str, np.ndarray], *, prefix: str = ""
) -> EngramTable:
    """One layer's table from named arrays, e4m3 with e8m0 scales; numpy's, as views.

    Raises:
      WeightError: a tensor missing, or of another shape or dtype: the number of rows must be the config's.
    """
    config.check_layer(layer)
    rows = config.num_rows[layer]
    shapes = {_TABLE[0]: ((rows, config.head_dim), E4M3), _TABLE[1]: ((rows, config.head_dim // SCALE_TILE), E8M0)}
    given = {name: tensors.get(prefix + name) for name in _TABLE}
    _refuse(
        prefix,
        missing=[name for name, x in given.items() if x is None],
        unexpected=[],
        unfit=[
            f"{name} {x.dtype} {x.shape}, expected {shapes[name][1]} {shapes[name][0]}"
            for name, x in given.items()
            if x is not None and (x.shape, x.dtype) != shapes[name]
        ],
    )
    values, scales = (tensors[prefix + name] for name in _TABLE)
    return EngramTable(values, scales.view(np.uint8), rows)


def load_layer(
    config: EngramConfig, layer: int, path: str | os.PathLike[str], *, prefix: str | None = None
) -> Params:
    """One layer's parameters from safetensors: a file, or a directory of them (its index file is used if there).

    Raises:
      FileNotFoundError: no safetensors file at `path`.
      WeightError: see `params_from_tensors`.
    """
    prefix = layer_prefix(config, layer) if prefix is None else prefix
    return params_from_tensors(config, _read(path, prefix), prefix=prefix)


def load_table(
    config: EngramConfig,
    layer: int,
    path: str | os.PathLike[str],
    where: Placement | None = "device",
    *,
    prefix: str | None = None,
    partition: Partition | None = None,
) -> EngramTable:
    """One layer's table from safetensors, placed (see `place`); with `where=None` left in the mapped files.

    Raises:
      FileNotFoundError: no safetensors file at `path`.
      WeightError: see `table_from_tensors`.
    """
    prefix = layer_prefix(config, layer) if prefix is None else prefix
    table = table_from_tensors(config, layer, _read(path, prefix), prefix=prefix)
    return table if where is None else place(table, where, partition=partition)


def _read(path: str | os.PathLike[str], prefix: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in checkpoint_files(Path(path), prefix):
        tensors |= read_safetensors(file, prefix)
    return tensors


def _refuse(prefix: str, **problems: list[str]) -> None:
    """Raises WeightError if there are any problems."""
    if any(problems.values()):
        lines = [f"tensors do not fit this Engram layer (names begin with {prefix!r})"]
        for title, names in problems.items():
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)] if names else []
        raise WeightError("\n".join(lines))
