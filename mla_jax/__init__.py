"""MLA decoding for JAX on NVIDIA GPUs: multi-head latent attention over paged KV caches, for inference.

    cache = mla_jax.pack_kv(kv, mla_jax.V32)
    out = mla_jax.mla_decode(q, cache, block_table, cache_seqlens, sm_scale=scale)

Importing this touches jax, numpy and ml_dtypes only; `mla_jax.nn` (Flax modules) is imported by name.
"""

from mla_jax import compat, reference
from mla_jax.cache import PagedKVCache, append_kv, gather_kv, pack_kv, slots_from_positions, unpack_kv
from mla_jax.decode import (
    Explanation,
    explain,
    mla_decode,
    plan_decode,
    plan_sparse_decode,
    sparse_mla_decode,
)
from mla_jax.lse import merge_partials
from pallas_kernels.formats import BF16_512, BF16_576, F32_512, F32_576, FORMATS, MODEL1, V32, KVFormat
from pallas_kernels.schedule import SplitPlan

__version__ = "0.1.0"

__all__ = [
    "BF16_512",
    "BF16_576",
    "F32_512",
    "F32_576",
    "FORMATS",
    "MODEL1",
    "V32",
    "Explanation",
    "KVFormat",
    "PagedKVCache",
    "SplitPlan",
    "append_kv",
    "compat",
    "explain",
    "gather_kv",
    "merge_partials",
    "mla_decode",
    "pack_kv",
    "plan_decode",
    "plan_sparse_decode",
    "reference",
    "slots_from_positions",
    "sparse_mla_decode",
    "unpack_kv",
]
