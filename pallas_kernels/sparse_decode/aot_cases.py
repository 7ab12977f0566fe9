"""The sparse kernel's configurations, for ahead-of-time compilation (pallas_kernels/aot.py).

What a shape changes in the machine code: the formats of the one or two scopes, and how many heads a tile holds. Batch,
top-k, page sizes and lengths only change loop bounds and strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import schedule, sparse_decode
from pallas_kernels.aot import capability, shape
from pallas_kernels.formats import BF16_512, BF16_576, MODEL1, V32, KVFormat


def configurations(arch: str) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """name -> (function, arguments), for an architecture of `aot.TARGETS`; none where no kernel ships."""
    if capability(arch)[0] not in sparse_decode.MODULES:
        return {}
    _case = functools.partial(_call, capability(arch))
    # SM100 has a kernel of its own for 128 heads, SM90 for 16 and fewer.
    own = {
        10: {"sparse-v32-h64": _case(V32, None, 64), "sparse-model1-model1-h128": _case(MODEL1, MODEL1, 128)},
        9: {
            "sparse-v32-h8": _case(V32, None, 8),
            "sparse-model1-h16": _case(MODEL1, None, 16),
            "sparse-bf16-v32-h3": _case(BF16_576, V32, 3),
            "sparse-v32-bf16-h64": _case(V32, BF16_576, 64),
            "sparse-model1-bf16-h64": _case(MODEL1, BF16_512, 64),
        },
    }
    return own[capability(arch)[0]] | {
        "sparse-v32-h128": _case(V32, None, 128),
        "sparse-model1-model1-h64": _case(MODEL1, MODEL1, 64),
        "sparse-v32-bf16-h16": _case(V32, BF16_576, 16),
        "sparse-bf16-v32-h96": _case(BF16_576, V32, 96),
        "sparse-model1-bf16-h1": _case(MODEL1, BF16_512, 1),
        "sparse-bf16-h64": _case(BF16_512, None, 64),
    }


def _call(
    capability: tuple[int, int], fmt: KVFormat, extra_fmt: KVFormat | None, heads: int
) -> tuple[Callable, tuple[Any, ...]]:
    batch, s_q, pages, topk, extra_topk = 4, 2, 64, 300, 130
    page_size, extra_page_size = 64, 2

    def make_plan(length):
        return schedule.plan_sparse_decode(
            topk, batch=batch, s_q=s_q, num_heads=heads, topk_length=length,
            extra_topk=0 if extra_fmt is None else extra_topk, num_sms=schedule.num_sms(capability),
        )  # fmt: skip

    def call(q, data, indices, length, sm_scale, attn_sink, plan, *extra):
        more = {}
        if extra:
            more = dict(
                extra_data=extra[0], extra_fmt=extra_fmt, extra_page_size=extra_page_size, extra_indices=extra[1]
            )
        return sparse_decode.sparse_decode(
            q, data, fmt, page_size, indices, plan, sm_scale, topk_length=length, attn_sink=attn_sink,
            capability=capability, **more,
        )  # fmt: skip

    def cache(scope: KVFormat, size: int):
        return shape(pages, *scope.page_shape(size), dtype=scope.storage_dtype)

    i32, f32 = (functools.partial(shape, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    args: tuple[Any, ...] = (
        shape(batch, s_q, heads, fmt.d_qk),
        cache(fmt, page_size),
        i32(batch, s_q, topk),
        i32(batch, s_q),
        f32(),
        f32(heads),
        jax.eval_shape(make_plan, i32(batch, s_q)),
    )
    if extra_fmt is not None:
        args += (cache(extra_fmt, extra_page_size), i32(batch, s_q, extra_topk))
    return call, args
