"""What tests/gpu/sanitize.py runs of the sparse kernel: garbage in indices and lengths, each format."""

import dataclasses

import jax

import mla_jax
from tests.gpu import sparse_cases
from tests.gpu.test_sparse import BASE

for fmt in (mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576):
    args = sparse_cases.build(dataclasses.replace(BASE, fmt=fmt, b=3, h=9))
    jax.block_until_ready(mla_jax.sparse_mla_decode(**args, implementation="mosaic", return_lse=True))
