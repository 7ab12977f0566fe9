"""Kernels with one fault each, and some with none, to see what compute-sanitizer sees. Run by tests/gpu/sanitize.py.

    python -m tests.gpu.planted KIND OFFSET_KIB

The address is that of a 4 KiB array plus an offset. Near offsets may hit what the allocator maps behind the array (its
granularity is 2 MiB), which no tool can call a fault; a far one, 1 GiB, hits nothing.
"""

import functools
import sys

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils as mosaic_utils

from pallas_kernels import mgpu

WORDS = 1024  # of the array, 4 bytes each
_OUT = jax.ShapeDtypeStruct((128,), jnp.int32)

# What thread 0 does, given the faulty address ($0), its offset in bytes ($1) and 1 KiB of shared memory ($2).
_FIRST_THREAD = "{ .reg .pred p; .reg .b32 t; .reg .b64 w; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; $BODY }"
BODIES = {
    "load": "@p ld.global.b32 t, [$0]; @p st.shared.b32 [$2], t;",
    "store": "@p st.global.b32 [$0], t;",
    "cp.async": "@p cp.async.cg.shared.global [$2], [$0], 16; cp.async.wait_all;",
    # The barrier is the first 8 bytes of the shared memory, the data go behind it.
    "bulk": (
        "@p mbarrier.init.shared.b64 [$2], 1; @p fence.mbarrier_init.release.cluster; "
        "@p mbarrier.arrive.expect_tx.shared.b64 w, [$2], 16; .reg .b32 d; add.u32 d, $2, 16; "
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [d], [$0], 16, [$2]; "
        ".reg .pred q; WAIT_BULK: mbarrier.try_wait.parity.shared.b64 q, [$2], 0; @!q bra WAIT_BULK;"
    ),
    "shared": "add.u32 t, $2, $1; .reg .b32 v; @p ld.shared.b32 v, [t]; @p st.shared.b32 [$2], v;",
}
# Unordered accesses of a block's warps to the same shared memory, for racecheck.
RACES = {
    "race": (
        "{ .reg .b32 t; mov.u32 t, %tid.x; st.shared.b32 [$2], t; ld.shared.b32 t, [$2]; st.shared.b32 [$2+4], t; }"
    ),
    # Read before the copy is awaited.
    "race cp.async": (
        "{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.ca.shared.global [$2], [$0], 4; ld.shared.b32 t, [$2]; st.shared.b32 [$2+4], t; "
        "cp.async.wait_all; }"
    ),
}
# The same without a fault: half of the warps hand something to the others and get something back, ordered by barriers
# as the kernels order it. What a tool reports here, it does not understand.
_HALVES = (
    "{ .reg .pred p; .reg .b32 t, a; mov.u32 t, %tid.x; setp.lt.u32 p, t, 64; and.b32 a, t, 63; shl.b32 a, a, 2; "
    "add.u32 a, a, $2; @!p bra SECOND_${:uid}; $FIRST bra.uni DONE_${:uid}; SECOND_${:uid}: $SECOND DONE_${:uid}: }"
)
ORDERED = {
    "named barriers": (
        "st.shared.b32 [a], t; bar.arrive 4, 128; bar.sync 5, 128; ld.shared.b32 t, [a+256]; st.shared.b32 [a+512], t;",
        "bar.sync 4, 128; ld.shared.b32 t, [a]; st.shared.b32 [a+256], t; bar.arrive 5, 128;",
    ),
    # The barrier is the last 8 bytes of the shared memory.
    "mbarrier": (
        "st.shared.b32 [a], t; bar.sync 4, 128; .reg .b64 w; mbarrier.arrive.shared.b64 w, [$2+1016];",
        "setp.eq.u32 p, t, 64; @p mbarrier.init.shared.b64 [$2+1016], 64; bar.sync 4, 128; .reg .pred q; "
        "AGAIN_${:uid}: mbarrier.try_wait.parity.shared.b64 q, [$2+1016], 0; @!q bra AGAIN_${:uid}; "
        "ld.shared.b32 t, [a]; st.shared.b32 [a+256], t;",
    ),
}
# The barrier is the last 8 bytes of the shared memory: one warpgroup makes it, the other arrives at it.
CLUSTER = "cluster barrier"
_MAKE = "{ $P mbarrier.init.shared.b64 [$0+1016], 1; @p fence.mbarrier_init.release.cluster; }"
_USE = "{ .reg .b64 w; $P mbarrier.arrive.shared.b64 w, [$0+1016]; }"
_FIRST_OF_WARPGROUP = (
    ".reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0; @p"
)
NO_FAULT = (*ORDERED, CLUSTER)
KINDS = (*BODIES, "tma", *RACES, *NO_FAULT)


def _text(kind: str) -> str:
    if kind in BODIES:
        return _FIRST_THREAD.replace("$BODY", BODIES[kind])
    if kind in ORDERED:
        first, second = ORDERED[kind]
        return _HALVES.replace("$FIRST", first).replace("$SECOND", second)
    return RACES[kind]


def _body(kind: str, x, offset_kib, out, smem):
    if kind == "tma":  # a box that lies outside of the array: the hardware clips it, and nothing is read

        def copy(barrier):
            plgpu.copy_gmem_to_smem(x.at[offset_kib[0]], smem, barrier)
            plgpu.barrier_wait(barrier)

        pl.run_scoped(copy, plgpu.Barrier())
    else:
        text = _text(kind)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def fault(_, x, smem, offset):
            i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
            offset = offset.registers[()]
            kib = arith.ConstantOp(i32, ir.IntegerAttr.get(i32, 1024)).result
            num_bytes = arith.muli(offset, kib)
            address = arith.addi(llvm.ptrtoint(i64, mosaic_utils.memref_ptr(x)), arith.extsi(i64, num_bytes))
            shared = llvm.ptrtoint(i32, mosaic_utils.memref_ptr(smem))
            mgpu.asm(text, "l,r,r", address, num_bytes, shared)

        fault(x, smem, offset_kib[0])
    plgpu.commit_smem()
    out[...] = plgpu.load(smem.at[pl.ds(0, 128)], layout=plgpu.Layout.WG_STRIDED((128,), vec_size=1))


def _cluster_body(x, offset_kib, out, smem, ready):
    """What one warpgroup of a CTA makes, the other uses once both CTAs of the cluster have it."""
    del x, offset_kib

    def run(text):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def once(_, smem):
            shared = llvm.ptrtoint(ir.IntegerType.get_signless(32), mosaic_utils.memref_ptr(smem))
            mgpu.asm(text.replace("$P", _FIRST_OF_WARPGROUP), "r", shared)

        once(smem)
        plgpu.commit_smem()

    @pl.when(lax.axis_index("group") == 0)
    def _():
        run(_MAKE)
        plgpu.barrier_arrive(ready)

    @pl.when(lax.axis_index("group") == 1)
    def _():
        plgpu.barrier_wait(ready)
        run(_USE)
        out[...] = plgpu.load(smem.at[pl.ds(0, 128)], layout=plgpu.Layout.WG_STRIDED((128,), vec_size=1))


def kernel(kind: str):
    """(x int32 [4, 256], offset_kib int32 [1]) -> int32 [128]; offsets count KiB from x's beginning."""
    if kind == CLUSTER:
        ready = plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=1)
        return plgpu.kernel(
            _cluster_body, out_type=_OUT, scratch_types=dict(smem=plgpu.SMEM((256,), jnp.int32), ready=ready),
            cluster=(2,), cluster_names=("cta",), num_threads=2, thread_name="group",
        )  # fmt: skip
    return plgpu.kernel(
        functools.partial(_body, kind), out_type=_OUT, scratch_types=dict(smem=plgpu.SMEM((256,), jnp.int32))
    )


def arguments(offset_kib: int):
    return np.zeros((4, WORDS // 4), np.int32), np.array([offset_kib], np.int32)


if __name__ == "__main__":
    print(jax.devices(), flush=True)
    print(jax.block_until_ready(jax.jit(kernel(sys.argv[1]))(*arguments(int(sys.argv[2]))))[:4], flush=True)
