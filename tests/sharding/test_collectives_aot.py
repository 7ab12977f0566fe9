"""What a decode step on two GPUs sends, compiled for them without having any: the kernels, and XLA's own choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from meshes import collectives

import mla_jax
from mla_jax import nn
from mla_jax.sharding import DecodeSharding, ModuleSharding
from pallas_kernels import aot
from tests import compiling

AXES = ("data", "heads", "context")
B, H, PAGE, COLUMNS = 4, 128, 64, 256


def two_h100s(axis):
    device = compiling.h100()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=aot._target_config(aot.TARGETS["sm_90a"]), topology="1x1x2"
    )
    sizes = [2 if name == axis else 1 for name in AXES]
    mesh = Mesh(np.array(topology.devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    return device, DecodeSharding(mesh, *AXES)


def compile_for(device, function, *args, **options):
    with jax.default_device(device):
        return jax.jit(function, **options).trace(*args).lower().compile()


@pytest.mark.aot
@pytest.mark.parametrize("axis", ["context", *(pytest.param(a, marks=pytest.mark.slow) for a in ("data", "heads"))])
def test_dense(axis):
    device, ds = two_h100s(axis)

    def on(sharding, *shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    pool = on(ds.cache_sharding(), B * COLUMNS, PAGE, 576, dtype=jnp.bfloat16)
    cache = mla_jax.PagedKVCache(pool, mla_jax.BF16_576, PAGE)
    q = on(ds.q_sharding(), B, 1, H, 576, dtype=jnp.bfloat16)
    table, lengths = on(ds.row_sharding(), B, COLUMNS), on(ds.row_sharding(), B)
    step = functools.partial(ds.mla_decode, sm_scale=0.1, implementation="mosaic")
    compiled = compile_for(device, step, q, cache, table, lengths)
    assert "mla_dense_decode" in compiled.as_text()
    sent = collectives(compiled)
    if axis != "context":
        assert sent == []
        return
    # Partial results and their log-sum-exps to the rank that merges them (one of the two started ahead, which names its
    # operand and its result), merged results to all; nobody asked for the merged log-sum-exps.
    assert sorted(name for name, _ in sent) == ["all-gather", "all-to-all", "all-to-all"]
    assert max(size for _, size in sent) <= 2 * B * H * 512 * 4


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_v32_over_context():
    device, ds = two_h100s("context")
    config = nn.V32Config.small(num_heads=H, index_heads=64, index_topk=2048)
    modules = ModuleSharding(config, ds)

    def placed(make, *shardings):
        shapes = jax.eval_shape(make)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, *shardings)

    params = placed(lambda: nn.init_params(config, 0, jax.random.key(0)), modules.param_shardings(config.param_specs()))
    cache = jax.eval_shape(lambda: nn.v32.init_cache(config, B * COLUMNS, PAGE))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ds.cache_sharding()), cache)
    row = ds.row_sharding()
    x = jax.ShapeDtypeStruct((B, 1, config.hidden_size), config.dtype, sharding=row)
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row) for shape in ((B, COLUMNS), (B,)))
    compiled = compile_for(device, modules.decode, params, cache, x, table, lengths, donate_argnums=1)
    text = compiled.as_text()
    assert "sparse_mla_v32" in text and "index_scores" in text and "index_topk" in text
    sent = collectives(compiled)
    # XLA sends the candidates' scores and positions together.
    assert sorted(name for name, _ in sent) == ["all-gather", "all-gather", "all-to-all", "all-to-all"]
    assert max(size for _, size in sent) <= max(2 * B * H * 512 * 4, B * 2 * 2 * config.index_topk * 4)
