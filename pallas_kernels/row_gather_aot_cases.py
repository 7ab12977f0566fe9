"""The row gather's configurations, for ahead-of-time compilation (aot.py): a published Engram table, whole
or cut into columns for 8 devices; rows of one token and of a prefill chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels import row_gather
from pallas_kernels.aot import capability, shape
from pallas_kernels.formats import E4M3

ROWS, COLUMNS = 384_006_168, 24  # of DeepSeek-V4.1-Flash's first table, of a token


def configurations(arch: str) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """name -> (function, arguments), for an architecture of `aot.TARGETS`; none where no kernel ships."""
    if capability(arch)[0] not in row_gather.CAPABILITIES:
        return {}

    def case(tokens: int, shards: int) -> tuple[Callable, tuple[Any, ...]]:
        values = shape(ROWS, 256 // shards, dtype=E4M3)
        scales = shape(ROWS, 8 // shards, dtype=jnp.uint8)
        return row_gather.launch, (values, scales, shape(tokens, COLUMNS, dtype=jnp.int32))

    return {
        "rows-1": case(1, 1),
        "rows-4096": case(4096, 1),
        "rows-1-of-8": case(1, 8),
    }
