"""The golden Engram file: configs, and its flat requests as the padded batches the functions take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mla_jax.nn.engram import EngramConfig, EngramTable
from pallas_kernels.formats import E4M3

with np.load(Path(__file__).parents[1] / "golden" / "engram.npz") as _file:
    G = {name: _file[name] for name in _file.files}

CONFIG = EngramConfig.small(image_token_id=239)
PAPER = EngramConfig(
    *(24, 240, 150, 101, (1, 15)),
    max_ngram=3,
    heads=4,
    head_dim=16,
    form="paper",
    norm_eps=float(G["p_eps"][0]),
    conv_eps=float(G["p_eps"][1]),
    precision="f32",
)
MAP = G["token_map"].astype(np.int32)  # [vocab]
LENGTHS = G["req_lens"].astype(np.int32)  # [4]
STARTS = np.cumsum(LENGTHS) - LENGTHS  # [4]
BACK = CONFIG.max_ngram - 1


def request(i: int) -> np.ndarray:
    """Token ids of request i: int32 [length]."""
    return G["ids"][STARTS[i] : STARTS[i] + LENGTHS[i]].astype(np.int32)


def batch() -> np.ndarray:
    """All requests, padded with -1: int32 [4, longest]."""
    tokens = np.full((len(LENGTHS), LENGTHS.max()), -1, np.int32)
    for i, length in enumerate(LENGTHS):
        tokens[i, :length] = request(i)
    return tokens


def flat(padded) -> np.ndarray:
    """[4, longest, ...] back to the golden file's [tokens, ...]."""
    return np.concatenate([np.asarray(padded)[i, :length] for i, length in enumerate(LENGTHS)])


def table() -> EngramTable:
    """The golden table, of layer index 1, in numpy arrays."""
    values = G["table_e4m3"].view(E4M3)
    return EngramTable(values, G["table_e8m0"], len(values))


def params(config: EngramConfig = CONFIG) -> dict[str, np.ndarray]:
    return {name: G[name].astype(config.dtype) for name in ("wkv", "q_weight", "k_weight")}


def paper_params() -> dict[str, np.ndarray]:
    """Keys and value fused, the paper's norm weights under V4.1's names."""
    hc, d = PAPER.hc_mult, PAPER.hidden_size
    return {
        "wkv": np.concatenate([G["p_key_w"].reshape(hc * d, -1), G["p_value_w"]]).astype(np.float32),
        "wkv_bias": np.concatenate([G["p_key_b"].reshape(-1), G["p_value_b"]]).astype(np.float32),
        "q_weight": G["p_norm_query"].astype(np.float32),
        "k_weight": G["p_norm_key"].astype(np.float32),
        "conv_norm": G["p_conv_norm"].astype(np.float32),
        "conv_weight": G["p_conv_w"].reshape(hc, d, -1).astype(np.float32),
    }


def replace(**changes) -> EngramConfig:
    return dataclasses.replace(CONFIG, **changes)
