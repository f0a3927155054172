"""Tensor expressions written as loop nests, for what no formula per element says: scatters, sorts, searches.

The body is built with TVM's IR builder, sequentially where the order of writes is the meaning. Such a function is
never part of a kernel of several operators.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .registry import Out

Expr: TypeAlias = Any

# Below this many elements a second thread costs more than it brings (a wake-up is a few microseconds).
PARALLEL_ELEMENTS = 1 << 15
_FAR_LINES, _NEAR_LINES = 4, 8
INDEPENDENT = "independent"  # the annotation of a loop whose steps may be taken in any order, or at once


class Elements:
    """A buffer read and written by index: `x[i, j]`, `x[i, j] = value`."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.shape = tuple(int(extent) for extent in buffer.shape)
        self.dtype = str(buffer.dtype)

    def __getitem__(self, index: Expr | Sequence[Expr]) -> Expr:
        return tirx.BufferLoad(self.buffer, _listed(index))

    def __setitem__(self, index: Expr | Sequence[Expr], value: Expr) -> None:
        T.buffer_store(self.buffer, value, _listed(index))


def _listed(index: Any) -> list[Expr]:
    return list(index) if isinstance(index, (tuple, list)) else [index]


def loop_nest(
    outs: Sequence[Out],
    inputs: Sequence[te.Tensor],
    body: Callable[[Sequence[Elements], Sequence[Elements]], None],
    name: str,
) -> tuple[te.Tensor, ...]:
    """The tensors that `body(inputs, outs)` writes; it is called inside an IR builder, unless all are empty."""
    if all(0 in out.shape for out in outs):
        return tuple(_empty(out, name) for out in outs)
    # Buffers of our own: te.extern's default ones carry a symbolic offset that a plain C call does not pass.
    sources = [tirx.decl_buffer(t.shape, t.dtype, t.op.name, layout=None) for t in inputs]
    names = [name] if len(outs) == 1 else [f"{name}_{n}" for n in range(len(outs))]
    results = [tirx.decl_buffer(o.shape, o.dtype, own, layout=None) for o, own in zip(outs, names, strict=True)]

    def build(*_: Any) -> Any:
        # The attribute has no meaning; it is the parent that consecutive statements need.
        with IRBuilder() as builder, T.attr(0, "sequence", 0):
            body([Elements(b) for b in sources], [Elements(b) for b in results])
        return builder.get()

    tensors = te.extern(
        [out.shape for out in outs],
        list(inputs),
        build,
        name=name,
        dtype=[out.dtype for out in outs],
        in_buffers=sources,
        out_buffers=results,
    )
    return (tensors,) if len(outs) == 1 else tuple(tensors)


def _empty(out: Out, name: str) -> te.Tensor:
    return te.compute(out.shape, lambda *_: tirx.const(0, out.dtype), name=name)


def local(dtype: str, count: int = 1) -> Elements:
    """`count` scalars on the stack of the running thread."""
    return Elements(T.decl_buffer([count], dtype, scope="local"))


@contextlib.contextmanager
def grid(
    shape: Sequence[int | Expr], parallel: bool = False, each: int = 1, independent: Collection[int] = ()
) -> Iterator[tuple[Expr, ...]]:
    """Nested loops over `shape`; the outermost one runs on all threads if `parallel` and the work is worth it.

    `each` elements are the work of one position. Extents may be known at run time only where nothing is parallel. The
    steps of all loops of a parallel nest, and of those with the numbers `independent`, may be taken in any order.
    """
    outermost = next((level for level, extent in enumerate(shape) if not isinstance(extent, int) or extent > 1), None)
    with contextlib.ExitStack() as stack:
        index = []
        for level, extent in enumerate(shape):
            spread = parallel and level == outermost and math.prod(shape) * each >= PARALLEL_ELEMENTS
            index.append(stack.enter_context(_loop(extent, spread, parallel or level in independent)))
        yield tuple(index)


def _loop(extent: int | Expr, parallel: bool, independent: bool) -> Any:
    return (T.parallel if parallel else T.serial)(0, extent, annotations={INDEPENDENT: True} if independent else None)


@contextlib.contextmanager
def lines(shape: Sequence[int], axes: Sequence[int]) -> Iterator[list[list[Expr]]]:
    """Lines along `axes`, several at a time; the value is an index for each, whose places at `axes` are the caller's.

    What is carried along a line waits for itself: independent lines fill the time. Neighbours in memory make a vector
    and are taken eight at a time, rows that lie apart only four: a source and a result of each share the ways of L1.
    The last few repeat lines of those before, so their statements must be idempotent.
    """
    kept = [1 if d in axes else extent for d, extent in enumerate(shape)]
    count = math.prod(kept)
    width = min(count, _FAR_LINES if kept[-1] == 1 else _NEAR_LINES)
    batches = -(-count // width)
    spread = math.prod(shape) >= PARALLEL_ELEMENTS
    with _loop(batches, spread, True) as batch:
        first = batch * width if count % width == 0 else tirx.min(batch * width, count - width)
        index: list[list[Expr]] = []
        for u in range(width):
            place, inner, line = first + u, count, []
            for extent in kept:
                inner //= extent
                line.append(tirx.floormod(tirx.floordiv(place, inner), extent) if extent > 1 else 0)
            index.append(line)
        yield index


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the statements inside only where `condition` holds."""
    with T.If(condition), T.Then():
        yield


def copy(target: Elements, source: Elements) -> None:
    """target[...] = source[...], equal shapes."""
    with grid(target.shape, parallel=True) as i:
        target[i] = source[i]
