"""Decode over a `jax.sharding.Mesh`: data, head and context parallel, and their products (docs/sharding.md).

    mesh = jax.make_mesh((2, 2, 2), ("data", "heads", "context"))
    ds = DecodeSharding(mesh, data="data", heads="heads", context="context")
    cache = mla_jax.PagedKVCache.zeros(mla_jax.BF16_576, num_pages, 64, sharding=ds.cache_sharding())
    table = ds.make_table(lengths, num_pages=num_pages, page_size=64)
    out = ds.mla_decode(q, cache, table, lengths, sm_scale=scale)

`layout` says who holds what, `ops` runs the public ops on every shard, `modules` the attention modules of `mla_jax.nn`,
`cost` counts the bytes.
"""

from mla_jax.sharding.cost import StepCost, step_cost
from mla_jax.sharding.modules import ModuleSharding
from mla_jax.sharding.ops import DecodeSharding

__all__ = ["DecodeSharding", "ModuleSharding", "StepCost", "step_cost"]
