"""The NNX shells: they compute what the pure functions compute, survive split and merge, and load checkpoints."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax.nn import Model1Attention, Model1Config, Model1Tables, V32Attention, V32Config, init_params, model1, v32
from tests.compiling import QUICK

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 64)), jnp.float32)
LENGTHS = jnp.array([5, 6], jnp.int32)


def table(columns, first=0):
    return first + jnp.arange(2 * columns, dtype=jnp.int32).reshape(2, columns)


def check(module, function, tables, start, layer):
    """Prefill and one decode step, through the module split and merged under jit, and through the pure functions."""
    graph, state = nnx.split(module)
    assert len(jax.tree.leaves(state)) == len(module.params)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def shell(state, cache):
        module = nnx.merge(graph, state)
        out, cache = module.prefill(X, cache, tables, LENGTHS)
        return out, *module.decode(X[:, :1], cache, tables, LENGTHS + 1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def pure(params, cache):
        out, cache = function.prefill(params, module.config, cache, X, tables, LENGTHS, layer=layer)
        step = function.decode(params, module.config, cache, X[:, :1], tables, LENGTHS + 1, layer=layer)
        return out, *step

    got, want = shell(state, start), pure(module.params, start)
    assert np.abs(got[0]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_v32():
    config = V32Config.small(cache="f32", num_layers=2)
    module = V32Attention(config, 1, rngs=nnx.Rngs(params=3))
    check(module, v32, table(2), module.init_cache(4, 8), 1)


@pytest.mark.slow
def test_model1():
    config = Model1Config.small(cache="f32")
    module = Model1Attention(config, 2, params=init_params(config, 2, jax.random.key(1)))
    tables = Model1Tables(table(9), table(1), jnp.array([1, 0], jnp.int32))
    cache = module.init_cache(window_pages=18, context_pages=2, rows=2, window_page_size=16)
    check(module, model1, tables, cache, config.layers[2])


def test_bad_arguments():
    config = V32Config.small()
    with pytest.raises(ValueError, match="either rngs"):
        V32Attention(config)
    params = init_params(config, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="params do not fit layer 0"):
        V32Attention(config, params={**params, "wo": params["wo"][1:]})
    with pytest.raises(ValueError, match="layer=1; accepted: 0 to 0"):
        V32Attention(config, 1, params=params)


def test_flax_is_imported_by_the_shells_alone():
    code = (
        "import sys, mla_jax, mla_jax.nn, mla_jax.nn.v32, mla_jax.nn.model1, mla_jax.nn.weights\n"
        "assert not {'flax', 'safetensors', 'tokenizers'} & set(sys.modules)\n"
        "mla_jax.nn.V32Attention\n"
        "assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
