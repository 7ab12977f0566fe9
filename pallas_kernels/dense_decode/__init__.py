"""Dense (bf16, paged) MLA decode: one kernel a GPU architecture.

`dense_decode` picks (pallas_kernels/architectures.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import architectures
from pallas_kernels.dense_decode.config import DenseConfig as DenseConfig
from pallas_kernels.dense_decode.config import DenseSm100Config as DenseSm100Config
from pallas_kernels.dense_decode.config import choose_config as choose_config
from pallas_kernels.dense_decode.config import choose_sm100_config as choose_sm100_config
from pallas_kernels.formats import BF16_512, BF16_576

D_QK = (BF16_576.d_qk, BF16_512.d_qk)
D_V = BF16_576.d_v
MODULES = {9: "sm90", 10: "sm100"}
"""Major compute capability -> module."""
CONFIGS: dict[str, type] = {"sm90": DenseConfig, "sm100": DenseSm100Config}
"""Module -> type of its `config`."""


def check_supported(
    *, q_dtype, kv_dtype, d_qk: int, d_v: int, capability: tuple[int, int] | None = None
) -> None:
    """Raises NotImplementedError, with the reason, if no kernel here runs the call. Knows static facts only.

    `capability` is the compute capability of the GPU to lower for; None leaves it out of the question.
    """
    for name, dtype in (("q", q_dtype), ("the cache", kv_dtype)):
        if jnp.dtype(dtype) != jnp.bfloat16:
            raise NotImplementedError(f"the dense Mosaic kernel takes bfloat16, {name} is {jnp.dtype(dtype).name}")
    if d_qk not in D_QK or d_v != D_V:
        raise NotImplementedError(
            f"the dense Mosaic kernel takes d_qk in {D_QK} and d_v {D_V}, got d_qk={d_qk}, d_v={d_v}"
        )
    if capability is not None:
        architectures.module_name(MODULES, capability, "dense")


def config_type(capability: tuple[int, int]) -> type:
    """What `config` of `dense_decode` must be on such a GPU."""
    return CONFIGS[architectures.module_name(MODULES, capability, "dense")]


def dense_decode(
    q, kv, block_table, cache_seqlens, plan, sm_scale, *, capability: tuple[int, int], **options
) -> tuple[jax.Array, jax.Array]:
    """`dense_decode` of the module for `capability`, the compute capability that is compiled for."""
    kernel = architectures.module(__name__, MODULES, capability, "dense")
    return kernel.dense_decode(q, kv, block_table, cache_seqlens, plan, sm_scale, **options)
