"""What Pallas' GPU interpreter (jax 0.11.2 to 0.12.0) lacks, for tests only.

`extended()` patches, for the time of a `with` block:

1. `pl.run_state(f)(plgpu.ACC.init(x))`: becomes x plus what `f` adds to an accumulator of zeros.
2. `plgpu.wgmma` with its left operand in registers.
3. TMA gather, `plgpu.copy_gmem_to_smem(rows.at[indices, columns], ...)`: a row out of range is zeros, as on hardware.
4. TMA of an array with an axis of length 1: as Mosaic GPU does, the place along it is left out, and so not checked.
5. Race checks of what wgmma reads from shared memory (upstream checks TMA and plain accesses only). A product is taken
   to be awaited at once: overlap that `wgmma_wait(n > 0)` allows is not modelled.

`run()` calls a kernel under it with race detection on, and fails if a race was seen.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    shared_memory,
)
from jax._src.state import indexing
from jax._src.state import types as state_types

# Runs in which a planted race must be seen once: one is seen in two runs of three only, since in the others a later
# handoff happens to order it.
TRIES = 8


class RaceFound(AssertionError):
    pass


def parameters() -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def extended():
    interpreter = jaxpr_interpret.JaxprInterpreter
    with (
        mock.patch.object(pl, "run_state", functools.partial(_run_state, pl.run_state)),
        mock.patch.object(interpreter, "_interpret_wgmma_ref_p", _interpret_wgmma),
        mock.patch.object(
            gpu_callbacks,
            "copy_gmem_to_smem",
            functools.partial(_copy_gmem_to_smem, gpu_callbacks.copy_gmem_to_smem),
        ),
    ):
        yield


def run(function, *args):
    """function(*args), compiled and interpreted; raises RaceFound if two accesses were not ordered."""
    detectors = []  # one a kernel: jax itself remembers the last kernel's only
    make = gpu_callbacks.GPURaceDetectionState

    def remember(*args, **kwargs):
        detectors.append(make(*args, **kwargs))
        return detectors[-1]

    try:
        with extended(), mock.patch.object(gpu_callbacks, "GPURaceDetectionState", remember):
            result = jax.block_until_ready(jax.jit(function)(*args))
        if any(detector.races_found for detector in detectors):
            raise RaceFound("the interpreter saw a race")
        return result
    except Exception as error:
        if "RACE DETECTED" in str(error) and not isinstance(error, RaceFound):  # jax 0.12 raises by itself
            raise RaceFound(str(error)) from error
        raise
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def _run_state(original, function):
    def run(initial):
        refs = jax.tree.leaves(initial, is_leaf=lambda x: isinstance(x, gpu_core.WGMMAAccumulatorRef))
        if not all(isinstance(ref, gpu_core.WGMMAAccumulatorRef) for ref in refs):
            return original(function)(initial)
        several = isinstance(initial, tuple)

        def body(*accumulators):
            function(accumulators if several else accumulators[0])
            return tuple(accumulator[...] for accumulator in accumulators)

        added = pl.run_scoped(body, *[plgpu.ACC(ref.shape, jnp.float32) for ref in refs])
        results = tuple(ref._init + x for ref, x in zip(refs, added, strict=True))
        return results if several else results[0]

    return run


class _Gather(gpu_callbacks.AsyncCopyGmemToSmemTask):
    """A TMA load whose rows are named one by one."""

    rows: np.ndarray  # [n]
    columns: slice

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        source, _, _ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=self.logging_info
        )
        in_range = (self.rows >= 0) & (self.rows < source.shape[0])  # [n]
        values = source[np.where(in_range, self.rows, 0), self.columns]  # [n, columns]
        values[~in_range] = np.zeros((), values.dtype)
        self.post_read(tma_thread_id, memory)
        memory.store_buffer_content(
            self.dst_allocation_key, self.dst_access, values, self.thread, logging_info=self.logging_info
        )
        self.post_write(tma_thread_id, memory)


def _without_unit_axes(transform):
    if not isinstance(transform, indexing.NDIndexer):
        return transform
    indices = [
        np.int32(0) if extent == 1 and not isinstance(index, indexing.Slice) and np.ndim(index) == 0 else index
        for index, extent in zip(transform.indices, transform.shape, strict=True)
    ]
    return dataclasses.replace(transform, indices=tuple(indices))


def _copy_gmem_to_smem(original, *, src_transforms, **kwargs):
    src_transforms = tuple(_without_unit_axes(t) for t in src_transforms)
    indexers = [t for t in src_transforms if isinstance(t, indexing.NDIndexer)]
    if not any(np.ndim(index) == 1 for t in indexers for index in t.indices if not isinstance(index, indexing.Slice)):
        return original(src_transforms=src_transforms, **kwargs)
    return _gather(indexers, **kwargs)


@gpu_callbacks.fail_on_exception
def _gather(
    indexers, *, token, mesh_location, thread, src_allocation_key_as_array, dst_allocation_key_as_array,
    dst_transforms, barrier_allocation_key_as_array, source_info=None,
):  # fmt: skip
    (indexer,) = indexers
    rows, columns = indexer.indices
    assert columns.stride == 1
    memory = gpu_callbacks._get_shared_memory()
    source = gpu_callbacks.HostAllocationKey.from_array(src_allocation_key_as_array)
    target = gpu_callbacks.HostAllocationKey.from_array(dst_allocation_key_as_array)
    dst_transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(dst_transforms))
    task = _Gather(
        mesh_location=mesh_location, thread=thread, src_allocation_key=source, src_access=memory.access(source, ()),
        dst_allocation_key=target, dst_access=memory.access(target, dst_transforms),
        barrier_allocation_key=gpu_callbacks.HostAllocationKey.from_array(barrier_allocation_key_as_array),
        source_info=source_info, clock=memory.incr_clock(thread) if memory.detect_races else None,
    )  # fmt: skip
    task.rows = np.asarray(rows).astype(np.int64)
    first = int(columns.start)
    task.columns = slice(first, first + columns.size)
    memory.execute_async_task(task)
    return token


def _read(memory, key, transforms, thread, logging_info, source_info):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    access = memory.access(key, transforms)
    value, _, _ = memory.get_buffer_content(key, access, thread, logging_info=logging_info)
    if memory.detect_races:
        clock = memory.get_clock(thread)
        clock.inc(memory.get_next_tma_thread_id())
        gpu_callbacks.get_races().check_read(
            thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
        )
        with memory.lock:
            memory.clocks[thread].update(clock)
    return value


@gpu_callbacks.fail_on_exception
def _wgmma(
    *, token, mesh_location, thread, acc_key, acc_transforms, a, a_transforms, a_is_ref, b_key, b_transforms,
    source_info,
):  # fmt: skip
    memory = gpu_callbacks._get_shared_memory()
    logging_info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    read = functools.partial(
        _read, memory, thread=thread, logging_info=logging_info, source_info=source_info
    )
    a_value = read(a, a_transforms) if a_is_ref else np.asarray(a)
    b_value = read(b_key, b_transforms)
    acc_key = gpu_callbacks.HostAllocationKey.from_array(acc_key)
    access = memory.access(acc_key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(acc_transforms)))
    acc, _, _ = memory.get_buffer_content(acc_key, access, thread, logging_info=logging_info)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN garbage is legal input
        product = np.matmul(a_value.astype(np.float32), b_value.astype(np.float32)).astype(acc.dtype)
        acc = acc + product
    memory.store_buffer_content(acc_key, access, acc, thread, logging_info=logging_info)
    return token


def _interpret_wgmma(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    empty = jax.tree.structure([])
    trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
    acc_transforms, a_transforms, b_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(tuple(trees)), leaves
    )
    acc_aval, a_aval, b_aval = (var.aval for var in eqn.invars[:3])
    a_is_ref = isinstance(a_aval, state_types.AbstractRef | gpu_core.AbstractRefUnion)
    acc, acc_transforms = jaxpr_interpret.resolve_ref(acc_aval, acc, acc_transforms)
    if a_is_ref:
        a, a_transforms = jaxpr_interpret.resolve_ref(a_aval, a, a_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(b_aval, b, b_transforms)
    call = functools.partial(_wgmma, source_info=eqn.source_info, a_is_ref=a_is_ref)
    result = callback.io_callback(
        call, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, mesh_location=self.mesh_location, thread=self.thread,
        acc_key=acc, acc_transforms=acc_transforms, a=a, a_transforms=a_transforms, b_key=b, b_transforms=b_transforms,
    )  # fmt: skip
    return result, []
