"""The largest or smallest element of each row, and where it is first: a block reads its rows with all of its threads.

    a block      256 threads: `across` neighbouring rows, `down` threads a row
    a thread     every `down`-th element of its row: the best so far and its place
    the block    16 threads of a row read what 16 each have found, and one of them what they found (shared memory)

Rows of fewer than 64 elements take one thread each. A NaN is beyond every number; of equals the first one counts, so
that the result does not depend on the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb.cost import Work
from ...passes.rewrite import shape_of
from ..kernels.loops import Shape, flat, typed_kernel
from ..lowering import expressions as ex
from ..lowering.index_math import axis_of
from ..lowering.kernels_matmul import bind, refuse_large
from ..lowering.registry import Kernel, KernelCall, Refusal

aten = torch.ops.aten

_THREADS = 256
_SHORT = 64  # elements of a row that one thread reads
_ACROSS = 32  # neighbours in memory that one request of a warp takes


@dataclass(frozen=True)
class Rows:
    """A tensor as [outer, length, inner], of which `length` is reduced."""

    outer: int
    length: int
    inner: int

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.outer * self.inner

    @property
    def down(self) -> int:
        """Threads of a row."""
        if self.length < _SHORT:
            return 1
        across = next(n for n in (1, 2, 4, 8, 16, _ACROSS) if n >= min(self.inner, _ACROSS))
        down = _THREADS // across
        while down > self.length:
            down //= 2
        return down

    @property
    def across(self) -> int:
        """Rows of a block."""
        return _THREADS // self.down if self.inner > 1 or self.down == 1 else 1

    @property
    def blocks(self) -> int:
        """Of the launch."""
        return -(-self.count // self.across)


def extreme(rows: Rows, larger: bool, source: tuple[Shape, str], value: Shape | None, index: Shape) -> Any:
    """The kernel: `source` is shape and dtype; the results are the extremes in shape `value`, unless that is None, and
    their places in int64."""
    shape, dtype = source
    results = [] if value is None else [(value, dtype)]

    def body(x: Any, *outs: Any) -> None:
        with (
            T.launch_thread("blockIdx.x", rows.blocks) as block,
            T.launch_thread("threadIdx.x", rows.across * rows.down) as thread,
        ):
            _Block(rows, larger, dtype, x, outs).emit(block, thread)

    return typed_kernel("extreme", [(shape, dtype)], [*results, (index, "int64")], body)


class _Block:
    """What one block does."""

    def __init__(self, rows: Rows, larger: bool, dtype: str, x: Any, outs: tuple[Any, ...]) -> None:
        self.rows, self.larger = rows, larger
        # TVM compares unsigned numbers by their difference, which it takes for negative.
        self.dtype = {"bool": "int8", "uint8": "int32"}.get(dtype, ex.compute_dtype(dtype))
        self.stored = dtype
        self.x, self.outs = flat(x), [flat(out) for out in outs]
        self.best = T.alloc_buffer((1,), self.dtype, scope="local")
        self.place = T.alloc_buffer((1,), "int32", scope="local")

    def emit(self, block: Any, thread: Any) -> None:
        """The statements."""
        rows = self.rows
        row = block * rows.across + tirx.floormod(thread, rows.across)
        first = tirx.floordiv(thread, rows.across)
        read = row if rows.count % rows.across == 0 else tirx.min(row, rows.count - 1)
        start = tirx.floordiv(read, rows.inner) * (rows.length * rows.inner) + tirx.floormod(read, rows.inner)
        self._take(start, first)
        with T.serial(1, -(-rows.length // rows.down)) as turn:
            place = turn * rows.down + first
            if rows.length % rows.down:
                with T.If(place < rows.length), T.Then():
                    self._compare(ex.cast(self.x[start + place * rows.inner], self.dtype), place, False)
            else:
                self._compare(ex.cast(self.x[start + place * rows.inner], self.dtype), place, False)
        self._share(thread, first)
        with T.If(tirx.all(first == 0, row < rows.count)), T.Then():
            if len(self.outs) == 2:
                T.buffer_store(self.outs[0], ex.cast(self.best[0], self.stored), [row])
            T.buffer_store(self.outs[-1], tirx.Cast("int64", self.place[0]), [row])

    def _take(self, start: Any, place: Any) -> None:
        T.buffer_store(self.best, ex.cast(self.x[start + place * self.rows.inner], self.dtype), [0])
        T.buffer_store(self.place, place, [0])

    def _compare(self, value: Any, place: Any, any_order: bool) -> None:
        """Take `value` where it is beyond the best, or its equal and, with `any_order`, earlier."""
        new, old = T.bind(value), T.bind(self.best[0])
        beyond = new > old if self.larger else new < old
        better = tirx.any(beyond, tirx.all(ex.is_nan(new), ex.negate(ex.is_nan(old))))
        if any_order:
            alike = tirx.any(ex.equal(new, old), tirx.all(ex.is_nan(new), ex.is_nan(old)))
            better = tirx.any(better, tirx.all(alike, place < self.place[0]))
        with T.If(better), T.Then():
            T.buffer_store(self.best, new, [0])
            T.buffer_store(self.place, place, [0])

    def _share(self, thread: Any, first: Any) -> None:
        """Some 16 threads of a row read what 16 each have found, and the first of them what they found."""
        across, down = self.rows.across, self.rows.down
        while down > 1:
            left = 2 ** (int(log2(down)) // 2) if down > 16 else 1
            bests = T.alloc_buffer((down * across,), self.dtype, scope="shared")
            places = T.alloc_buffer((down * across,), "int32", scope="shared")
            with T.If(first < down), T.Then():
                T.buffer_store(bests, self.best[0], [thread])
                T.buffer_store(places, self.place[0], [thread])
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.If(first < left), T.Then(), T.serial(1, down // left) as i:
                other = thread + i * (left * across)
                self._compare(bests[other], T.bind(places[other]), True)
            down = left


def _call(larger: bool, with_value: bool, node: fx.Node) -> KernelCall | Refusal:
    x, dim, _keepdim = bind(node)
    shape = shape_of(x)
    if not shape or not prod(shape):
        return Refusal(f"{x.name} has shape {shape}: nothing to compare")
    if refusal := refuse_large(x):
        return refusal
    axis = None if dim is None else axis_of(dim, len(shape))
    outer, inner = (1, 1) if axis is None else (prod(shape[:axis]), prod(shape[axis + 1 :]))
    rows = Rows(outer, prod(shape) // (outer * inner), inner)
    reduced = tuple(node.meta["val"][0].shape if with_value else node.meta["val"].shape)
    dtype = str(x.meta["val"].dtype).removeprefix("torch.")
    func = extreme(rows, larger, (shape, dtype), reduced if with_value else None, reduced)
    size = x.meta["val"].element_size()
    written = (8.0 + (size if with_value else 0)) * rows.count
    work = Work(bytes_read=float(size * prod(shape)), bytes_written=written, launches=1, tasks=rows.blocks)
    threads = "a thread a row" if rows.down == 1 else f"{rows.down} threads a row"
    return KernelCall(func, (x,), "first extreme", f"{threads}, {rows.blocks} blocks", work)


def _kernel(larger: bool, with_value: bool) -> Kernel:
    return lambda node, _hw: _call(larger, with_value, node)


EXTREMES: dict[torch._ops.OpOverload, Kernel] = {
    aten.argmax.default: _kernel(larger=True, with_value=False),
    aten.argmin.default: _kernel(larger=False, with_value=False),
    aten.max.dim: _kernel(larger=True, with_value=True),
    aten.min.dim: _kernel(larger=False, with_value=True),
}
