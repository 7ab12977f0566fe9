"""The plan kernel's configurations, for ahead-of-time compilation (pallas_kernels/aot.py).

Its code is unrolled for the numbers of items and parts: one item, a usual batch, and as many as one CTA takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels import plan_kernel, schedule
from pallas_kernels.aot import capability, shape


def configurations(arch: str) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """name -> (function, arguments), for an architecture of `aot.TARGETS`; none where no kernel ships."""
    if capability(arch)[0] not in plan_kernel.CAPABILITIES:
        return {}
    num_sms = schedule.num_sms(capability(arch))

    def dense(lengths):
        return schedule.plan_decode(lengths, s_q=1, num_heads=64, page_size=64, num_sms=num_sms)

    def sparse(length, extra_length):
        return schedule.plan_sparse_decode(
            2048, batch=128, s_q=2, num_heads=128, topk_length=length, extra_topk=512, extra_topk_length=extra_length,
            num_sms=num_sms,
        )  # fmt: skip

    def i32(*extents):
        return shape(*extents, dtype=jnp.int32)

    return {
        "plan-b1": (dense, (i32(1),)),
        "plan-b128": (dense, (i32(128),)),
        "plan-b511": (dense, (i32(plan_kernel.MAX_THREADS - 1),)),
        "plan-sparse-b128-sq2": (sparse, (i32(128), i32(128, 2))),
    }
