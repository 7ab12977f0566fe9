"""Checkpoints: both name tables, FP8 blocks, files as other tools write them, and reports of what does not fit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mla_jax.nn import Model1Config, V32Config, WeightError, init_params, load_layer, params_from_tensors
from mla_jax.nn.weights import MODEL1_TENSORS, V32_TENSORS, dequantize, layer_prefix

V32_NAMES = [
    *("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight"),
    *("kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight", "indexer.wq_b.weight", "indexer.wk.weight"),
    *("indexer.k_norm.weight", "indexer.k_norm.bias", "indexer.weights_proj.weight"),
]
MODEL1_NAMES = [
    *("wq_a.weight", "q_norm.weight", "wq_b.weight", "wkv.weight", "kv_norm.weight", "attn_sink", "wo_a.weight"),
    *("wo_b.weight", "compressor.wkv.weight", "compressor.wgate.weight", "compressor.ape", "compressor.norm.weight"),
    *("indexer.wq_b.weight", "indexer.weights_proj.weight", "indexer.compressor.wkv.weight"),
    *("indexer.compressor.wgate.weight", "indexer.compressor.ape", "indexer.compressor.norm.weight"),
]


def to_tensors(config, params, layer, which=0):
    """The inverse of loading: parameters under a checkpoint's names, [heads, rows, in] as [heads * rows, in]."""
    table = V32_TENSORS if isinstance(config, V32Config) else MODEL1_TENSORS
    out = {}
    for tensor in table:
        if tensor.params[0] in params:
            parts = [np.asarray(params[p]) for p in tensor.params]
            array = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            name = tensor.names[min(which, len(tensor.names) - 1)]
            out[layer_prefix(config, layer) + name] = array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array
    return out


@pytest.fixture(params=["v32", "dense", "model1"])
def case(request):
    config = {
        "v32": V32Config.small(num_layers=2),
        "dense": V32Config.small(num_layers=2, index_topk=0, cache="bf16"),
        "model1": Model1Config.small(ratios=(0, 4, 128)),
    }[request.param]
    return config, 1, init_params(config, 1, jax.random.key(0))


def check(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(*(np.asarray(p[name], np.float32) for p in (got, want)), err_msg=name)


def test_the_tables_hold_the_published_names():
    assert [t.names[0] for t in V32_TENSORS] == V32_NAMES
    assert [t.names[0] for t in MODEL1_TENSORS] == MODEL1_NAMES


@pytest.mark.parametrize("which", [0, 1])
def test_a_file(case, which, tmp_path):
    config, layer, params = case
    tensors = to_tensors(config, params, layer, which)
    tensors["model.embed_tokens.weight"] = np.zeros((4, 4), np.float32)  # another part of the model
    save_file(tensors, tmp_path / "layer.safetensors")
    check(load_layer(config, layer, tmp_path / "layer.safetensors"), params)


def test_a_directory_with_an_index(case, tmp_path):
    config, layer, params = case
    tensors = to_tensors(config, params, layer)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / "unrelated.safetensors").write_bytes(b"not one")
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(load_layer(config, layer, tmp_path), params)


def test_a_directory_without_an_index(case, tmp_path):
    config, layer, params = case
    save_file(to_tensors(config, params, layer), tmp_path / "model.safetensors")
    check(load_layer(config, layer, tmp_path), params)
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        load_layer(config, layer, tmp_path / "nowhere")


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_fp8_blocks_are_dequantised(case, scale_dtype, tmp_path):
    config, layer, params = case
    tensors, expected = {}, {}
    rng = np.random.default_rng(0)
    for name, array in to_tensors(config, params, layer).items():
        if array.ndim < 2 or name.endswith("ape"):
            tensors[name] = expected[name] = array
            continue
        o, i = array.shape
        scale = 2.0 ** rng.integers(-6, 3, (-(-o // 128), -(-i // 128)))
        weight = (rng.standard_normal(array.shape) * 100).astype(ml_dtypes.float8_e4m3fn)
        tensors[name] = weight
        suffix = name + "_scale_inv" if isinstance(config, V32Config) else name.removesuffix(".weight") + ".scale"
        tensors[suffix] = scale.astype(scale_dtype)
        value = np.array([[float(weight[r, c]) * scale[r // 128, c // 128] for c in range(i)] for r in range(0, o, 37)])
        np.testing.assert_array_equal(dequantize(weight, scale.astype(scale_dtype))[::37], value.astype(np.float32))
        expected[name] = dequantize(weight, scale)
    save_file(tensors, tmp_path / "fp8.safetensors")
    check(load_layer(config, layer, tmp_path / "fp8.safetensors"), params_from_tensors(
        config, layer, expected, prefix=layer_prefix(config, layer)
    ))  # fmt: skip


def test_a_report_names_every_misfit(case):
    config, layer, params = case
    prefix = layer_prefix(config, layer)
    tensors = to_tensors(config, params, layer)
    names = [n for n in tensors if n.endswith(".weight")]
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][1:]
    tensors[prefix + "rotary.inv_freq"] = np.zeros(3, np.float32)
    tensors[names[2]] = tensors[names[2]].astype(ml_dtypes.float8_e4m3fn)  # no scale
    tensors["elsewhere.weight"] = np.zeros(3, np.float32)  # not under the prefix: no business of ours
    with pytest.raises(WeightError) as error:
        params_from_tensors(config, layer, tensors, prefix=prefix)
    text = str(error.value)
    missing, rest = text.split("unexpected (1):")
    assert "missing (2):" in missing and names[0] in missing
    assert names[2] + "_scale_inv" in missing or names[2].removesuffix(".weight") + ".scale" in missing
    unexpected, misshaped = rest.split("mis-shaped (1):")
    assert prefix + "rotary.inv_freq" in unexpected and names[1] in misshaped and "expected" in misshaped
    assert "elsewhere" not in text


def test_a_scale_of_another_shape_is_reported():
    config = V32Config.small()
    tensors = to_tensors(config, init_params(config, 0, jax.random.key(0)), 0)
    name = layer_prefix(config, 0) + "o_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[name + "_scale_inv"] = np.ones((1, 5), np.float32)
    with pytest.raises(WeightError, match=r"o_proj.weight_scale_inv \(1, 5\), expected \(1, 4\)"):
        params_from_tensors(config, 0, tensors, prefix=layer_prefix(config, 0))


def test_unknown_dtypes_are_named(tmp_path):
    config = V32Config.small()
    tensors = to_tensors(config, init_params(config, 0, jax.random.key(0)), 0)
    name = layer_prefix(config, 0) + "q_a_layernorm.weight"
    tensors[name] = np.zeros(32, np.int64)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match=r"q_a_layernorm.weight has dtype I64; accepted: F32"):
        load_layer(config, 0, tmp_path / "x.safetensors")


def test_random_parameters_keep_activations_at_scale():
    config = V32Config.small(cache="f32")
    params = init_params(config, 0, jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (256, 64))
    assert 0.8 < float(jnp.std(x @ params["wq_a"].T)) < 1.2
    assert params["wo"].dtype == jnp.float32 and params["q_norm"].shape == (32,)
