"""Start and end of every kernel, copy and fill that ran on the GPU, through CUPTI's activity API.

JAX's own profiler for Mosaic GPU gives durations alone, and durations do not add up: a kernel launched early
(programmatic dependent launch) counts its waiting, and the gaps between kernels are nobody's. The timing rule needs
timestamps.

CUPTI has one client per process: no other profiler may run in it. Only `ctypes` is needed; the library comes with JAX's
CUDA plugin. Records are read at fixed offsets, which all versions of their structs since CUDA 11 share.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import site
from collections.abc import Iterator
from typing import NamedTuple

# CUpti_ActivityKind. Each record begins with its kind; the timestamps of all three stand at the same offset.
_MEMCPY, _MEMSET, _CONCURRENT_KERNEL = 1, 2, 10
_KIND, _START, _END = 0, 16, 24  # byte offsets: uint32, uint64 ns, uint64 ns
_KERNEL_NAME, _KERNEL_GRAPH_ID = 104, 156  # byte offsets: const char*, uint32 (0 = not launched by a CUDA graph)
_KERNEL_DEVICE, _OTHER_DEVICE = 40, 32  # byte offsets: uint32; of copies and fills the second
_MAX_LIMIT_REACHED = 12  # CUptiResult: the buffer holds no further record
_MULTIPLE_SUBSCRIBERS = 39
_FLUSH_FORCED = 1
_BUFFER_BYTES = 8 << 20  # about 40,000 kernel records


class Activity(NamedTuple):
    """One kernel, copy or fill on a device. Times are CUPTI's, in nanoseconds; only differences mean anything."""

    name: str
    start_ns: int
    end_ns: int
    in_graph: bool
    device: int = 0


class CuptiError(RuntimeError):
    """CUPTI is missing, or refused a call."""


def span_us(activities: list[Activity]) -> float:
    """From the start of the first to the end of the last, in microseconds: kernels, copies and the gaps between."""
    return (max(a.end_ns for a in activities) - min(a.start_ns for a in activities)) / 1e3


def busy_us(activities: list[Activity]) -> float:
    """Sum of the durations in microseconds; above `span_us` where kernels overlap."""
    return sum(a.end_ns - a.start_ns for a in activities) / 1e3


def _candidates() -> Iterator[str]:
    # The one that is loaded already comes first: two copies in a process would each see half of the activity.
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        yield from {line.split()[-1] for line in maps if "/libcupti.so" in line}
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        yield from sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcupti.so.*")), reverse=True)
    yield from ("libcupti.so.13", "libcupti.so.12", "libcupti.so")
    if cuda := os.environ.get("CUDA_HOME"):
        yield os.path.join(cuda, "extras", "CUPTI", "lib64", "libcupti.so")


class _Cupti:
    """The library, its two buffer callbacks, and the records that came back since `collected` was last emptied."""

    def __init__(self) -> None:
        self._lib = self._load()
        self.collected: list[Activity] = []
        self._buffers: dict[int, ctypes.Array] = {}  # by address: lent to CUPTI, which writes into them
        self._free = [_new_buffer(), _new_buffer()]  # made ahead: clearing one takes longer than many a kernel
        byte_p = ctypes.POINTER(ctypes.c_uint8)
        size_p = ctypes.POINTER(ctypes.c_size_t)
        # The callback objects are kept for good: CUPTI calls them from its own thread.
        self._on_request = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p), size_p, size_p)(self._request)
        self._on_complete = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_uint32, byte_p, ctypes.c_size_t, ctypes.c_size_t
        )(self._complete)
        self.call("cuptiActivityRegisterCallbacks", self._on_request, self._on_complete)

    @staticmethod
    def _load() -> ctypes.CDLL:
        for path in _candidates():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(path)
        raise CuptiError("libcupti was not found; it comes with JAX's CUDA plugin: pip install 'mla-jax[cuda13]'")

    def call(self, function: str, *args) -> None:
        status = getattr(self._lib, function)(*args)
        if status == 0:
            return
        message = ctypes.c_char_p()
        self._lib.cuptiGetResultString(status, ctypes.byref(message))
        hint = "; another profiler is active in this process" if status == _MULTIPLE_SUBSCRIBERS else ""
        raise CuptiError(f"{function}: {(message.value or b'unknown error').decode()} ({status}){hint}")

    def _request(self, buffer, size, max_records) -> None:
        memory = self._free.pop() if self._free else _new_buffer()
        address = ctypes.addressof(memory)
        self._buffers[address] = memory
        buffer[0], size[0], max_records[0] = address, _BUFFER_BYTES, 0

    def _complete(self, _context, _stream, buffer, _size, valid_bytes) -> None:
        record = ctypes.c_void_p(None)
        while valid_bytes:
            status = self._lib.cuptiActivityGetNextRecord(
                buffer, ctypes.c_size_t(valid_bytes), ctypes.byref(record)
            )
            if status == _MAX_LIMIT_REACHED or status != 0 or not record.value:
                break
            self.collected.append(_read(record.value))
        self._free.append(self._buffers.pop(ctypes.addressof(buffer.contents)))


def _new_buffer() -> ctypes.Array:
    return (ctypes.c_uint64 * (_BUFFER_BYTES // 8))()  # CUPTI wants 8-byte alignment


def _read(address: int) -> Activity:
    kind = ctypes.c_uint32.from_address(address + _KIND).value
    start = ctypes.c_uint64.from_address(address + _START).value
    end = ctypes.c_uint64.from_address(address + _END).value
    if kind != _CONCURRENT_KERNEL:
        device = ctypes.c_uint32.from_address(address + _OTHER_DEVICE).value
        return Activity("memcpy" if kind == _MEMCPY else "memset", start, end, False, device)
    name = ctypes.c_char_p.from_address(address + _KERNEL_NAME).value or b"?"
    graph = ctypes.c_uint32.from_address(address + _KERNEL_GRAPH_ID).value
    device = ctypes.c_uint32.from_address(address + _KERNEL_DEVICE).value
    return Activity(name.decode(errors="replace"), start, end, graph != 0, device)


@functools.cache
def _cupti() -> _Cupti:
    return _Cupti()


@contextlib.contextmanager
def trace() -> Iterator[list[Activity]]:
    """Collects what runs on the GPU inside the block, in order of start. The list is filled when the block ends.

    The caller waits for its work inside the block (`jax.block_until_ready`).

    Raises:
      CuptiError: libcupti is missing, another profiler is active, or records were lost.
    """
    cupti = _cupti()
    activities: list[Activity] = []
    cupti.call("cuptiActivityFlushAll", _FLUSH_FORCED)
    cupti.collected.clear()
    kinds = (_CONCURRENT_KERNEL, _MEMCPY, _MEMSET)
    for kind in kinds:
        cupti.call("cuptiActivityEnable", kind)
    try:
        yield activities
    finally:
        for kind in kinds:
            cupti.call("cuptiActivityDisable", kind)
        cupti.call("cuptiActivityFlushAll", _FLUSH_FORCED)
    activities += sorted(cupti.collected, key=lambda a: (a.start_ns, a.end_ns))
    if not activities or any(a.end_ns < a.start_ns or a.start_ns == 0 for a in activities):
        raise CuptiError(f"CUPTI gave {len(activities)} usable records; some activity was lost")
