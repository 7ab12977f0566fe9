"""A CTA in numpy, for kernels that are written thread by thread (pallas_kernels/threads.py): the machine for tests.

Every value is an array `[threads]`. Memory is arrays of a class of their own, which notes who touched an entry since the
last barrier: two threads at one entry, one of them storing, is a race, and so is the load of an entry never stored.
"""

from __future__ import annotations

import numpy as np

from pallas_kernels.mgpu import WARP

NOBODY = -1
SEVERAL = -2


class Race(AssertionError):
    pass


class Memory:
    """int32 entries. What has `values` is initialised, for loading alone."""

    def __init__(self, size=0, values=None):
        self.values = np.zeros(size, np.int32) if values is None else np.array(values, np.int32)
        self.known = np.full(self.values.shape, values is not None)
        self.forget()

    def forget(self):
        self.readers = np.full(self.values.shape, NOBODY)
        self.writers = np.full(self.values.shape, NOBODY)


class Machine:
    def __init__(self, num_threads, memories):
        self.num_threads = num_threads
        self.thread = np.arange(num_threads, dtype=np.int32)
        self.barriers = 0
        self._memories = memories

    where = staticmethod(lambda condition, x, y: np.where(condition, np.int32(x), np.int32(y)))
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)

    def load(self, memory, index):
        index = np.broadcast_to(index, self.num_threads)
        assert (0 <= index).all() and (index < len(memory.values)).all(), "a load out of range"
        if not ((memory.writers[index] == NOBODY) | (memory.writers[index] == self.thread)).all():
            raise Race("loaded what another thread stored since the last barrier")
        for i, thread in zip(index, self.thread, strict=True):
            memory.readers[i] = thread if memory.readers[i] in (NOBODY, thread) else SEVERAL
        return np.where(memory.known[index], memory.values[index], np.int32(-(2**31) + 7))  # garbage

    def store(self, memory, index, value, where):
        assert where.dtype == bool
        index, value = np.broadcast_to(index, self.num_threads)[where], np.broadcast_to(value, self.num_threads)[where]
        thread = self.thread[where]
        assert (0 <= index).all() and (index < len(memory.values)).all(), "a store out of range"
        if len(set(index)) < len(index):
            raise Race("two threads store to one entry")
        if not np.isin(memory.writers[index], (NOBODY,)).all() and (memory.writers[index] != thread).any():
            raise Race("two threads store to one entry between barriers")
        readers = memory.readers[index]
        if ((readers != NOBODY) & (readers != thread)).any():
            raise Race("stored over what another thread loaded since the last barrier")
        memory.values[index], memory.known[index], memory.writers[index] = value, True, thread

    def store_row(self, memory, index, values, where):
        for k, value in enumerate(values):
            self.store(memory, index * 4 + k, value, where)

    def sync(self):
        self.barriers += 1
        for memory in self._memories:
            memory.forget()

    def warp_scan(self, x):
        return np.cumsum(x.reshape(-1, WARP), axis=1, dtype=np.int32).reshape(-1)

    def warp_max(self, x):
        return np.repeat(x.reshape(-1, WARP).max(axis=1), WARP)
