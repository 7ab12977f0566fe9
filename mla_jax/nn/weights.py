"""Weights by the names that checkpoints give them: the tables, FP8 dequantisation, and a report of what does not fit.

`params_from_tensors` turns named arrays into a layer's parameters and needs nothing but numpy. `load_layer` reads them
from safetensors files. FP8 weights come with a scale per 128 x 128 block and are dequantised here:
weight = fp8 * scale (DeepSeek-V3 and V4 checkpoints; the scale tensor's own dtype decides how it is read).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.nn.config import Model1Config, V32Config
from pallas_kernels.formats import BF16, E4M3, E8M0, F32

Params = dict[str, jax.Array]

HEAD_AXIS = {"wq_b": 0, "w_uk": 0, "w_uv": 0, "wo": 1, "sink": 0, "wo_a": 0, "wo_b": 1}
"""The parameters that belong to heads (or the output's groups of heads), and the axis that counts them. Where heads are
spread over devices these are cut; all others are copied."""

SCALE_BLOCK = 128  # rows and columns that share a scale in an FP8 checkpoint


class WeightError(ValueError):
    """Tensors do not match a config. The message lists every missing, unexpected and mis-shaped one."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      params: the parameters it holds. More than one: stacked along the rows of each head.
      names: accepted names without prefix, the checkpoint's own first.
    """

    params: tuple[str, ...]
    names: tuple[str, ...]


def _table(*rows: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(tuple(params.split()), names) for params, *names_ in rows for names in [tuple(names_)])


V32_TENSORS = _table(
    ("wq_a", "q_a_proj.weight"),
    ("q_norm", "q_a_layernorm.weight"),
    ("wq_b", "q_b_proj.weight"),
    ("wkv_a", "kv_a_proj_with_mqa.weight"),
    ("kv_norm", "kv_a_layernorm.weight"),
    ("w_uk w_uv", "kv_b_proj.weight"),
    ("wo", "o_proj.weight"),
    ("index_wq_b", "indexer.wq_b.weight"),
    ("index_wk", "indexer.wk.weight"),
    ("index_k_norm_weight", "indexer.k_norm.weight"),
    ("index_k_norm_bias", "indexer.k_norm.bias"),
    ("index_weights", "indexer.weights_proj.weight"),
)
"""DeepSeek-V3.2, `model.layers.{i}.self_attn.`; transformers uses the same names."""

MODEL1_TENSORS = _table(
    ("wq_a", "wq_a.weight", "q_a_proj.weight"),
    ("q_norm", "q_norm.weight", "q_a_norm.weight"),
    ("wq_b", "wq_b.weight", "q_b_proj.weight"),
    ("wkv", "wkv.weight", "kv_proj.weight"),
    ("kv_norm", "kv_norm.weight"),
    ("sink", "attn_sink", "sinks"),
    ("wo_a", "wo_a.weight", "o_a_proj.weight"),
    ("wo_b", "wo_b.weight", "o_b_proj.weight"),
    ("compress_wkv", "compressor.wkv.weight", "compressor.kv_proj.weight"),
    ("compress_wgate", "compressor.wgate.weight", "compressor.gate_proj.weight"),
    ("compress_ape", "compressor.ape", "compressor.position_bias"),
    ("compress_norm", "compressor.norm.weight", "compressor.kv_norm.weight"),
    ("index_wq_b", "indexer.wq_b.weight", "compressor.indexer.q_b_proj.weight"),
    ("index_weights", "indexer.weights_proj.weight", "compressor.indexer.scorer.weights_proj.weight"),
    ("index_compress_wkv", "indexer.compressor.wkv.weight", "compressor.indexer.kv_proj.weight"),
    ("index_compress_wgate", "indexer.compressor.wgate.weight", "compressor.indexer.gate_proj.weight"),
    ("index_compress_ape", "indexer.compressor.ape", "compressor.indexer.position_bias"),
    ("index_compress_norm", "indexer.compressor.norm.weight", "compressor.indexer.kv_norm.weight"),
)
"""DeepSeek-V4, `layers.{i}.attn.`; the second name is the one transformers uses in memory."""


def layer_prefix(config: V32Config | Model1Config, layer: int) -> str:
    """What the checkpoint's tensor names of that layer's attention begin with."""
    return f"model.layers.{layer}.self_attn." if isinstance(config, V32Config) else f"layers.{layer}.attn."


def param_specs(config: V32Config | Model1Config, layer: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of layer `layer`."""
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layer={layer}; accepted: 0 to {config.num_layers - 1}")
    return config.param_specs() if isinstance(config, V32Config) else config.param_specs(config.ratios[layer])


def init_params(config: V32Config | Model1Config, layer: int, key: jax.Array) -> Params:
    """Random parameters of one layer: projections normal with variance 1 / fan-in, norms 1, biases and sinks small."""
    return _random(tuple(param_specs(config, layer).items()), key)


@functools.partial(jax.jit, static_argnames="specs")
def _random(specs: tuple[tuple[str, jax.ShapeDtypeStruct], ...], key: jax.Array) -> Params:
    sizes = [math.prod(spec.shape) for _, spec in specs]
    noise = jax.random.normal(key, sum(sizes), jnp.float32)  # all at once: one kernel to compile
    parts = jnp.split(noise, np.cumsum(sizes[:-1]).tolist())
    params = {}
    for (name, spec), flat in zip(specs, parts, strict=True):
        value = flat.reshape(spec.shape)
        if name.endswith(("norm", "norm_weight")):
            value = 1.0 + 0.1 * value
        elif len(spec.shape) == 1 or name.endswith("_ape"):
            value = 0.1 * value
        else:  # fan-in is the last axis, but for w_uk [heads, nope, latent], which maps nope to latent
            value = value * spec.shape[1 if name == "w_uk" else -1] ** -0.5
        params[name] = value.astype(spec.dtype)
    return params


def params_from_tensors(
    config: V32Config | Model1Config, layer: int, tensors: Mapping[str, np.ndarray], *, prefix: str = ""
) -> Params:
    """One layer's parameters from named tensors.

    Args:
      config: sizes; its dtype is the parameters'.
      layer: which layer, for configs whose layers differ.
      tensors: arrays by name. Names that do not begin with `prefix` are ignored, the rest must all be known.
      prefix: see `layer_prefix`.

    Raises:
      WeightError: tensors missing, unexpected, of another shape, or FP8 without a scale; all of them listed.
    """
    specs = param_specs(config, layer)
    table = V32_TENSORS if isinstance(config, V32Config) else MODEL1_TENSORS
    given = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    missing: list[str] = []
    misshaped: list[str] = []
    used: set[str] = set()
    params: Params = {}
    for tensor in table:
        if tensor.params[0] not in specs:
            continue
        name = next((n for n in tensor.names if n in given), None)
        if name is None:
            missing.append(prefix + " or ".join(tensor.names))
            continue
        used.add(name)
        array = tensors[given[name]]
        expected = _file_shape(tensor, specs)
        if array.shape != expected:
            misshaped.append(f"{given[name]} {array.shape}, expected {expected}")
            continue
        if array.dtype == E4M3:
            scale_name = next((n for n in _scale_names(name) if n in given), None)
            if scale_name is None:
                missing.append(prefix + " or ".join(_scale_names(name)))
                continue
            used.add(scale_name)
            scale = tensors[given[scale_name]]
            blocks = tuple(-(-size // SCALE_BLOCK) for size in expected)
            if scale.shape != blocks:
                misshaped.append(f"{given[scale_name]} {scale.shape}, expected {blocks}")
                continue
            array = dequantize(array, scale)
        params |= _split(tensor, array, specs)
    unexpected = [given[name] for name in given if name not in used]
    if missing or unexpected or misshaped:
        lines = [f"tensors do not fit layer {layer} of {type(config).__name__}"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)] if names else []
        raise WeightError("\n".join(lines))
    return params


def dequantize(weight: np.ndarray, scale: np.ndarray, block: int = SCALE_BLOCK) -> np.ndarray:
    """weight e4m3 `[o, i]` times scale `[ceil(o / block), ceil(i / block)]`, one per block -> float32 `[o, i]`."""
    o, i = weight.shape
    rows = np.repeat(scale.astype(np.float32), block, axis=0)[:o]  # [o, ceil(i / block)]
    return weight.astype(np.float32) * np.repeat(rows, block, axis=1)[:, :i]  # [o, i]


def load_layer(
    config: V32Config | Model1Config, layer: int, path: str | os.PathLike[str], *, prefix: str | None = None
) -> Params:
    """One layer's parameters from safetensors: a file, or a directory of them (its index file is used if there).

    Reads only the tensors whose names begin with `prefix` (by default `layer_prefix(config, layer)`).

    Raises:
      FileNotFoundError: no safetensors file at `path`.
      WeightError: see `params_from_tensors`.
    """
    prefix = layer_prefix(config, layer) if prefix is None else prefix
    tensors: dict[str, np.ndarray] = {}
    for file in checkpoint_files(Path(path), prefix):
        tensors |= read_safetensors(file, prefix)
    return params_from_tensors(config, layer, tensors, prefix=prefix)


def _scale_names(name: str) -> tuple[str, ...]:
    return (name + "_scale_inv", name.removesuffix(".weight") + ".scale")


def _file_shape(tensor: Tensor, specs: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, ...]:
    shapes = [specs[p].shape for p in tensor.params]
    if len(shapes[0]) < 3:  # vectors and plain projections: as they are
        return shapes[0]
    return (shapes[0][0] * sum(s[1] for s in shapes), shapes[0][2])  # heads or groups stacked on the first axis


def _split(tensor: Tensor, array: np.ndarray, specs: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    shapes = [specs[p].shape for p in tensor.params]
    if len(shapes[0]) == 3:
        array = array.reshape(shapes[0][0], -1, shapes[0][2])  # [heads, rows of a head, in]
    parts = np.split(array, np.cumsum([s[1] for s in shapes[:-1]]), axis=1) if len(shapes) > 1 else [array]
    return {p: jnp.asarray(part).astype(specs[p].dtype) for p, part in zip(tensor.params, parts, strict=True)}


def checkpoint_files(path: Path, prefix: str) -> Iterable[Path]:
    """The safetensors files at `path` (a file or a directory) that can hold tensors whose names begin with `prefix`."""
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return sorted({path / file for name, file in names.items() if name.startswith(prefix)})
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file at {path}")
    return files


def read_safetensors(file: str | os.PathLike[str], prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of a safetensors file whose names begin with `prefix`, as views of the mapped file.

    The format: a little-endian uint64 n, n bytes of JSON (name -> dtype, shape, byte range of the rest), then the data.
    Read here because the safetensors package (0.8) gives numpy users no 8-bit floats.
    """
    data = np.memmap(file, np.uint8, mode="r")  # [bytes of the file]
    start = 8 + int(data[:8].view("<u8")[0])
    tensors = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__" or not name.startswith(prefix):
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightError(f"{name} has dtype {entry['dtype']}; accepted: {', '.join(_SAFETENSORS_DTYPES)}")
        first, end = entry["data_offsets"]
        flat = data[start + first : start + end].view(_SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


_SAFETENSORS_DTYPES = {"F32": F32, "F16": np.dtype(np.float16), "BF16": BF16, "F8_E4M3": E4M3, "F8_E8M0": E8M0}
