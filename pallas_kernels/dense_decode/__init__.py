"""Dense (bf16, paged) MLA decode kernels: one module an architecture, `dense_decode` picks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dense_decode.config import DenseConfig as DenseConfig
from pallas_kernels.dense_decode.config import choose_config as choose_config

D_QK = (576, 512)
D_V = 512
CAPABILITIES = ((9, 0),)
"""Compute capabilities that a kernel exists for."""


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
    if capability is not None and tuple(capability) not in CAPABILITIES:
        accepted = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise NotImplementedError(
            f"the dense Mosaic kernel exists for compute capability {accepted}, not for {capability[0]}.{capability[1]}"
        )


def dense_decode(q, kv, block_table, cache_seqlens, plan, sm_scale, **options) -> tuple[jax.Array, jax.Array]:
    """`sm90.dense_decode`, imported when it is first called: Mosaic GPU takes a while to load."""
    from pallas_kernels.dense_decode import sm90

    return sm90.dense_decode(q, kv, block_table, cache_seqlens, plan, sm_scale, **options)
