"""What test_dense.py runs under compute-sanitizer: `planted` reads out of bounds on purpose, `kernels` must not."""

import sys

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

import mla_jax
from tests.gpu import dense_cases


def planted():
    def body(x, where, y):
        y[...] = plgpu.load(x.at[where[0]], layout=plgpu.Layout.WG_STRIDED((256,), vec_size=2))

    read = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((256,), jnp.float32))
    x = jax.device_put(np.zeros((4, 256), np.float32))
    # Near and far: allocators that map whole pages hide what lies close behind an array.
    for row in (5, 1 << 20):
        print(jax.block_until_ready(jax.jit(read)(x, jnp.array([row], jnp.int32)))[:4])


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
    {"planted": planted, "kernels": kernels}[sys.argv[1]]()
