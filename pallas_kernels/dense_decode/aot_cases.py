"""The dense kernel's configurations, for ahead-of-time compilation (pallas_kernels/aot.py).

What a shape changes in the machine code: how rows of a block are fetched (one TMA box, several, row by row), d_qk, the
causal mask, whether there is a table, and, on SM100, the rows of a tile, which the head count decides. Batch and
lengths only change loop bounds and strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dense_decode, schedule
from pallas_kernels.aot import capability, shape

SM90_ALONE = ("dense-page128", "dense-page32", "dense-page61-causal")


def configurations(arch: str) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """name -> (function, arguments), for an architecture of `aot.TARGETS`; none where no kernel ships."""
    if capability(arch)[0] not in dense_decode.MODULES:
        return {}
    _case = functools.partial(_call, capability(arch))
    cases = {
        "dense": _case(),
        "dense-causal": _case(s_q=2, is_causal=True),
        "dense-d512": _case(d_qk=512),
        "dense-h3": _case(heads=3),
        "dense-h16-d512-causal": _case(s_q=3, heads=16, d_qk=512, is_causal=True),
        "dense-page128": _case(page_size=128),
        "dense-page32": _case(page_size=32),
        "dense-page16-causal": _case(s_q=2, page_size=16, is_causal=True),
        "dense-page1": _case(page_size=1),
        "dense-page1-h8": _case(page_size=1, heads=8),
        "dense-page61-causal": _case(s_q=2, page_size=61, is_causal=True),
        "dense-contiguous": _case(page_size=1024, has_table=False),
        "dense-float32": _case(out_dtype=jnp.float32),
    }
    if arch == "sm_90a":
        return cases
    # Another page size changes the producer alone, and that in the same way as those that are left.
    return {name: case for name, case in cases.items() if name not in SM90_ALONE}


def _call(
    capability, *, batch=4, s_q=1, heads=128, d_qk=576, page_size=64, is_causal=False, has_table=True,
    out_dtype=jnp.bfloat16,
):  # fmt: skip
    def call(q, kv, block_table, cache_seqlens, sm_scale, plan):
        return dense_decode.dense_decode(
            q, kv, block_table, cache_seqlens, plan, sm_scale, is_causal=is_causal, d_v=512, out_dtype=out_dtype,
            capability=capability,
        )  # fmt: skip

    i32 = functools.partial(shape, dtype=jnp.int32)
    make_plan = functools.partial(
        schedule.plan_decode, s_q=s_q, num_heads=heads, page_size=page_size, num_sms=schedule.num_sms(capability)
    )
    return call, (
        shape(batch, s_q, heads, d_qk),
        shape(batch if not has_table else 100, page_size, d_qk),
        i32(batch, 40) if has_table else None,
        i32(batch),
        shape(dtype=jnp.float32),
        jax.eval_shape(make_plan, i32(batch)),
    )
