"""A way around 32-bit offsets in Pallas' Triton lowering, for kernels that read pools of bytes."""

from __future__ import annotations

import math

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

# Pallas computes offsets of 32 bits into arrays of up to 4 GiB, and the GPU takes them as signed: byte 2^31 would be
# read in front of the array. A pool of bytes in between therefore claims to be larger.
_claim_p = Primitive("mla_claim_pages")
_claim_p.def_abstract_eval(lambda x, *, pages: x.update(shape=(pages, *x.shape[1:])))
mlir.register_lowering(_claim_p, lambda ctx, x, *, pages: [x])


def with_wide_offsets(data: jax.Array) -> jax.Array:
    """`data [pages, ...]` for a Triton-lowered kernel, which must compare page ids with the real number of pages.

    Pools of 2 to 4 GiB come back with more pages than there are; nothing is copied. Compiled only, never interpreted.
    """
    if data.size <= 2**31 or data.size * data.dtype.itemsize > 2**32:
        return data
    return _claim_p.bind(data, pages=2**32 // math.prod(data.shape[1:]) + 1)
