"""Kernels written thread by thread: int32 arithmetic, shared memory and warp instructions of one CTA.

A kernel is a function of a machine `m` and of arrays. It never branches: what only some threads shall do is a `where`.
On a GPU `m` is `Threads`, inside a `plgpu.inline_mgpu` function, and every value is a register of the calling thread.
In tests it is a machine in numpy, where the same value is an array `[threads]` (tests/kernels/simt.py):

| operation | on the GPU | in numpy |
|---|---|---|
| `m.thread` | the thread's number | all numbers |
| + - * // & or < <= > >= == != of values and Python ints; // of numbers that are not negative | `Value` | numpy's |
| `m.where`, `m.minimum`, `m.maximum` | select, min, max | numpy's |
| `m.load`, `m.store`, `m.store_row` | of shared and global memory, by predicate | indexing, with a check for races |
| `m.load_bytes`, `m.store_bytes` | of rows of bytes, at 64-bit addresses, by predicate | the same |
| `m.sync` | `bar.sync` | what was stored before may be loaded |
| `m.warp_scan`, `m.warp_max` | shuffles, `redux.sync` | cumsum and max of 32 |
"""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mgpu import WARP, asm

_BARRIER_ID = 15  # Mosaic uses the ids up to the number of warpgroups, 16 at most
_IS = arith.CmpIPredicate


class Value:
    """An int32, or a truth value, of the calling thread."""

    def __init__(self, register: ir.Value):
        self.register = register

    def _binary(self, operation: Any, other: Value | int) -> Value:
        return Value(operation(self.register, _register(other, self.register.type)))

    def _compare(self, predicate: Any, other: Value | int) -> Value:
        return Value(arith.cmpi(predicate, self.register, _register(other, self.register.type)))

    def __add__(self, other: Value | int) -> Value:
        return self._binary(arith.addi, other)

    def __sub__(self, other: Value | int) -> Value:
        return self._binary(arith.subi, other)

    def __mul__(self, other: Value | int) -> Value:
        return self._binary(arith.muli, other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary(arith.divui, other)  # no negative numbers, so the unsigned one: it takes fewer instructions

    def __and__(self, other: Value | int) -> Value:
        return self._binary(arith.andi, other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary(arith.ori, other)

    def __lt__(self, other: Value | int) -> Value:
        return self._compare(_IS.slt, other)

    def __le__(self, other: Value | int) -> Value:
        return self._compare(_IS.sle, other)

    def __gt__(self, other: Value | int) -> Value:
        return self._compare(_IS.sgt, other)

    def __ge__(self, other: Value | int) -> Value:
        return self._compare(_IS.sge, other)

    def __eq__(self, other: Value | int) -> Value:  # type: ignore[override]
        return self._compare(_IS.eq, other)

    def __ne__(self, other: Value | int) -> Value:  # type: ignore[override]
        return self._compare(_IS.ne, other)

    __hash__ = None  # type: ignore[assignment]


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _register(x: Value | int, like: ir.Type | None = None) -> ir.Value:
    return x.register if isinstance(x, Value) else mosaic_utils.c(x, like or _i32())


class Threads:
    """The machine on a GPU. Arrays are int32 memrefs in global or shared memory, indexed as if they were flat."""

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        self.thread = Value(mosaic_utils.thread_idx())
        self._addresses: dict[Any, tuple[str, ir.Value]] = {}

    def where(self, condition: Value, x: Value | int, y: Value | int) -> Value:
        return Value(arith.select(condition.register, _register(x), _register(y)))

    def minimum(self, x: Value, y: Value | int) -> Value:
        return Value(arith.minsi(x.register, _register(y)))

    def maximum(self, x: Value, y: Value | int) -> Value:
        return Value(arith.maxsi(x.register, _register(y)))

    def load(self, array: ir.Value, index: Value | int) -> Value:
        """array[index]; the index must be in range, for all threads."""
        space, address = self._address(array, index, 4)
        constraint = "r" if space == "shared" else "l"
        return Value(asm(f"ld.{space}.b32 $0, [$1];", f"=r,{constraint}", address, result="i32"))

    def store(self, array: ir.Value, index: Value, value: Value | int, where: Value) -> None:
        """array[index] = value, by the threads for which `where` holds."""
        space, address = self._address(array, index, 4)
        constraint = "r" if space == "shared" else "l"
        asm(f"@$2 st.{space}.b32 [$0], $1;", f"{constraint},r,b", address, _register(value), where.register)

    def store_row(self, array: ir.Value, index: Value, values: list[Value], where: Value) -> None:
        """array[index] = values, in a global array of rows of four, by the threads for which `where` holds."""
        space, address = self._address(array, index, 16)
        assert space == "global" and len(values) == 4
        registers = [value.register for value in values]
        asm("@$5 st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r,b", address, *registers, where.register)

    def load_bytes(
        self, array: ir.Value, row: Value, row_bytes: int, offset: Value, size: int, where: Value
    ) -> list[Value]:
        """`size` bytes (1, 2, 4, 8 or 16) of a row of a global array, or zeros for threads for which `where` fails."""
        kind, words = self._words(size)
        names = [f"${k}" for k in range(words)]
        text = "{ " + " ".join(f"mov.b32 {name}, 0;" for name in names)
        text += f" @${words} ld.global.nc.L1::no_allocate.{kind} {self._vector(names)}, [${words + 1}]; }}"
        result = "i32" if words == 1 else f"!llvm.struct<({', '.join(['i32'] * words)})>"
        constraints = "=&r," * words + "b,l"
        found = asm(text, constraints, where.register, self._row_address(array, row, row_bytes, offset), result=result)
        if words == 1:
            return [Value(found)]
        return [Value(llvm.extractvalue(_i32(), found, [k])) for k in range(words)]

    def store_bytes(
        self, array: ir.Value, row: Value, row_bytes: int, offset: Value, data: list[Value], size: int, where: Value
    ) -> None:
        """What `load_bytes` gave to a row of a global array, by the threads for which `where` holds."""
        kind, words = self._words(size)
        names = [f"${k + 2}" for k in range(words)]
        text = f"@$0 st.global.{kind} [$1], {self._vector(names)};"
        address = self._row_address(array, row, row_bytes, offset)
        asm(text, "b,l" + ",r" * words, where.register, address, *(x.register for x in data))

    def _words(self, size: int) -> tuple[str, int]:
        """PTX type of `size` bytes, and how many registers it is."""
        kinds = {1: ("u8", 1), 2: ("u16", 1), 4: ("b32", 1), 8: ("v2.b32", 2), 16: ("v4.b32", 4)}
        return kinds[size]

    def _vector(self, names: list[str]) -> str:
        return names[0] if len(names) == 1 else f"{{{', '.join(names)}}}"

    def _row_address(self, array: ir.Value, row: Value, row_bytes: int, offset: Value) -> ir.Value:
        space, base = self._address(array, 0, 1)
        assert space == "global"
        start = arith.muli(arith.extui(base.type, row.register), mosaic_utils.c(row_bytes, base.type))
        return arith.addi(arith.addi(base, start), arith.extui(base.type, offset.register))

    def _address(self, array: ir.Value, index: Value | int, item_bytes: int) -> tuple[str, ir.Value]:
        if array not in self._addresses:
            pointer = mosaic_utils.memref_ptr(array)
            is_shared = llvm.PointerType(pointer.type).address_space == 3
            kind = _i32() if is_shared else ir.IntegerType.get_signless(64)
            self._addresses[array] = ("shared" if is_shared else "global", llvm.ptrtoint(kind, pointer))
        space, base = self._addresses[array]
        offset = arith.muli(_register(index), _register(item_bytes))
        return space, arith.addi(base, offset if space == "shared" else arith.extui(base.type, offset))

    def sync(self) -> None:
        """Waits for all threads; afterwards they see what any of them stored to shared memory before."""
        asm(f"bar.sync {_BARRIER_ID}, {self.num_threads};", "~{memory}")

    def warp_scan(self, x: Value) -> Value:
        """Sum of x over the threads of this warp up to and with this one."""
        step = 1
        while step < WARP:
            text = (
                "{ .reg .pred some; .reg .b32 y; "
                f"shfl.sync.up.b32 y|some, $1, {step}, 0, 0xffffffff; "
                "selp.b32 y, y, 0, some; add.s32 $0, $1, y; }"
            )
            x = Value(asm(text, "=r,r", x.register, result="i32"))
            step *= 2
        return x

    def warp_max(self, x: Value) -> Value:
        """Largest x of this warp's threads."""
        return Value(asm("redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", x.register, result="i32"))
