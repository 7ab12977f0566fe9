"""What tests/gpu/sanitize.py runs of the dense kernel: each way to fetch rows, lengths that end inside blocks."""

import jax
import numpy as np

import mla_jax
from tests.gpu import dense_cases


def kernels():
    for page_size, contiguous in ((64, False), (16, False), (61, False), (64, True)):
        case = dense_cases.Case(
            b=3, s_q=2, s_k=300, h=9, page_size=page_size, d_qk=576, is_causal=True, contiguous=contiguous
        )
        args = dense_cases.build(case, np.array([300, 0, 130], np.int32))
        jax.block_until_ready(
            mla_jax.mla_decode(**args, sm_scale=0.07, is_causal=True, implementation="mosaic", return_lse=True)
        )


if __name__ == "__main__":
    print(jax.devices(), flush=True)
    kernels()
