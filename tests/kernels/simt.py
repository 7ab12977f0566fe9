"""A CTA in numpy, for kernels that are written thread by thread (pallas_kernels/threads.py): the machine for tests.

Every value is an array `[threads]`. Memory notes who touched an entry since the last barrier: two threads at one entry,
one of them storing, are a race.
"""

from __future__ import annotations

import numpy as np

from pallas_kernels.plan_kernel import WARP

NOBODY = -1
GARBAGE = -(2**31) + 7  # what lies in memory before anything was stored


class Race(AssertionError):
    pass


class Memory:
    """int32 entries: `values`, or `size` of them that hold garbage."""

    def __init__(self, size=0, values=None):
        self.values = np.full(size, GARBAGE, np.int32) if values is None else np.array(values, np.int32)
        self.stored = np.zeros(self.values.shape, bool)
        self.forget()

    def forget(self):
        none = np.iinfo(np.int32).max
        self.writer = np.full(self.values.shape, NOBODY, np.int32)
        self.first_reader, self.last_reader = np.full_like(self.writer, none), np.full_like(self.writer, NOBODY)


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
        index = self._in_range(memory, np.broadcast_to(index, self.num_threads))
        writer = memory.writer[index]
        if ((writer != NOBODY) & (writer != self.thread)).any():
            raise Race("loaded what another thread stored since the last barrier")
        np.minimum.at(memory.first_reader, index, self.thread)
        np.maximum.at(memory.last_reader, index, self.thread)
        return memory.values[index]

    def store(self, memory, index, value, where):
        index, value = (np.broadcast_to(x, self.num_threads)[where] for x in (index, value))
        thread, index = self.thread[where], self._in_range(memory, index)
        writer, first, last = memory.writer[index], memory.first_reader[index], memory.last_reader[index]
        if len(set(index)) < len(index) or ((writer != NOBODY) & (writer != thread)).any():
            raise Race("two threads stored to one entry")
        if ((last != NOBODY) & ((first != thread) | (last != thread))).any():
            raise Race("stored over what another thread loaded since the last barrier")
        memory.values[index], memory.stored[index], memory.writer[index] = value, True, thread

    def _in_range(self, memory, index):
        if not ((index >= 0) & (index < len(memory.values))).all():
            raise IndexError("out of range")
        return index

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
