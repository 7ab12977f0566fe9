"""One of two processes of a job, for test_processes.py: two CPU devices each, a mesh over all four.

    python two_processes.py PROCESS_ID COORDINATOR
"""

from __future__ import annotations

import sys

import jax

process, coordinator = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, num_processes=2, process_id=process, initialization_timeout=60)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import mla_jax  # noqa: E402
from mla_jax.sharding import DecodeSharding  # noqa: E402

assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
rng = np.random.default_rng(0)  # the same everywhere
fmt, page_size, num_pages = mla_jax.F32_576, 4, 16
lengths = np.array([30, 5], np.int32)
q = rng.standard_normal((2, 1, 4, fmt.d_qk), np.float32)
kv = rng.standard_normal((num_pages, page_size, fmt.d_qk), np.float32)
new = rng.standard_normal((2, fmt.d_qk), np.float32)

for names in (("data", "context"), ("context", "data")):  # the context group within a process, and across both
    mesh = jax.make_mesh((2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    ds = DecodeSharding(mesh, data="data", context="context")

    def put(x, sharding):
        """Every process brings what its own devices hold."""
        return jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])

    table = ds.make_table(lengths, num_pages=num_pages, page_size=page_size)
    slots = table[[0, 1], (lengths - 1) // page_size] * page_size + (lengths - 1) % page_size
    cache = mla_jax.PagedKVCache(put(kv, ds.cache_sharding()), fmt, page_size)
    row = ds.row_sharding()

    @jax.jit
    def step(q, cache, new, slots, table, lengths, ds=ds):
        cache = ds.append_kv(cache, new, slots)
        return ds.mla_decode(q, cache, table, lengths, sm_scale=0.1, return_lse=True)

    got = step(put(q, ds.q_sharding()), cache, put(new, row), put(slots, row), put(table, row), put(lengths, row))
    whole = mla_jax.append_kv(mla_jax.pack_kv(jnp.asarray(kv), fmt), jnp.asarray(new), jnp.asarray(slots))
    want = mla_jax.mla_decode(
        jnp.asarray(q), whole, jnp.asarray(table), jnp.asarray(lengths), sm_scale=0.1, return_lse=True
    )
    for x, y in zip(got, want, strict=True):
        assert len({shard.device for shard in x.addressable_shards}) == 2
        for shard in x.addressable_shards:
            np.testing.assert_allclose(shard.data, np.asarray(y)[shard.index], rtol=1e-4, atol=1e-5)
print(f"process {process}: equal")
