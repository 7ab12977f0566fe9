"""What tests/gpu/sanitize.py runs of each kernel: `python -m tests.gpu.memcheck NAME`, a name of `KERNELS`."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax.nn import engram
from pallas_kernels.indexer import topk
from tests.gpu import dense_cases, sparse_cases
from tests.gpu.test_row_gather_gpu import ROWS, VALUES
from tests.gpu.test_sparse import BASE
from tests.kernels.test_indexer import check_scores


def dense():
    """Each way to fetch rows, lengths that end inside blocks; the plan's kernel and combine."""
    for page_size, contiguous in ((64, False), (16, False), (61, False), (64, True)):
        case = dense_cases.Case(
            b=3, s_q=2, s_k=300, h=9, page_size=page_size, d_qk=576, is_causal=True, contiguous=contiguous
        )
        args = dense_cases.build(case, np.array([300, 0, 130], np.int32))
        jax.block_until_ready(
            mla_jax.mla_decode(**args, sm_scale=0.07, is_causal=True, implementation="mosaic", return_lse=True)
        )


def sparse(fmt):
    """Garbage in indices and lengths; with the kernel for few heads, one tile, a cluster of two."""
    for heads in (9, 64, 128):
        args = sparse_cases.build(dataclasses.replace(BASE, fmt=fmt, b=3, h=heads))
        jax.block_until_ready(mla_jax.sparse_mla_decode(**args, implementation="mosaic", return_lse=True))


def others():
    """The indexer's two kernels, garbage in the counts; rows from pinned memory, garbage in their numbers."""
    values = jnp.asarray(np.random.default_rng(0).standard_normal((5, 1000)), jnp.float32)
    visible = jnp.asarray([1000, 37, 0, -5, 2**31 - 1], jnp.int32)
    jax.block_until_ready(jax.jit(topk.topk, static_argnums=2)(values, visible, 130))
    check_scores(3, 16, 16, interpret=False)
    table = engram.place(engram.EngramTable.quantize(VALUES), "pinned_host")
    jax.block_until_ready(jax.jit(engram.lookup)(table, jnp.asarray(ROWS)))


KERNELS = {
    **{f"sparse_{fmt.name}": functools.partial(sparse, fmt) for fmt in (mla_jax.V32, mla_jax.MODEL1, mla_jax.BF16_576)},
    "dense": dense,
    "others": others,
}

if __name__ == "__main__":
    print(jax.devices(), flush=True)
    KERNELS[sys.argv[1]]()
