"""What the hand-written loop nests share: the function's frame, flat views, vector access, even splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

Shape = tuple[int, ...]


def kernel_function(name: str, operands: Sequence[Shape], results: Sequence[Shape], body: Callable[..., None]) -> Any:
    """Return the PrimFunc over float32 buffers `operands`, `results`; `body(*buffers)` emits its statements.

    It is opaque to operator fusion and promises that its buffers do not overlap: without that promise every
    accumulator is stored in every iteration (85 instead of 213 GFLOP/s).
    """
    return typed_kernel(name, [(s, "float32") for s in operands], [(s, "float32") for s in results], body)


def typed_kernel(
    name: str,
    operands: Sequence[tuple[Shape, str]],
    results: Sequence[tuple[Shape, str]],
    body: Callable[..., None],
) -> Any:
    """As `kernel_function`, each buffer with its own dtype."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            reads = [T.arg(f"in{i}", T.Buffer(s, d)) for i, (s, d) in enumerate(operands)]
            writes = [T.arg(f"out{i}", T.Buffer(s, d)) for i, (s, d) in enumerate(results)]
            T.func_attr({"tirx.noalias": True, "op_pattern": 8})
            with T.sblock("root"):
                T.reads(*[whole(b) for b in reads])
                T.writes(*[whole(b) for b in writes])
                body(*reads, *writes)
        return builder.get()


def whole(buffer: Any) -> Any:
    """The region that is all of `buffer`."""
    if not len(buffer.shape):
        return tirx.BufferRegion(buffer, [])
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def view(buffer: Any, shape: Shape) -> Any:
    """The dense `buffer` seen as `shape`."""
    if tuple(int(n) for n in buffer.shape) == tuple(shape):
        return buffer
    return T.decl_buffer(shape, buffer.dtype, data=buffer.data)


def flat(buffer: Any) -> Any:
    """The dense `buffer` seen as one dimension."""
    return view(buffer, (math.prod(int(extent) for extent in buffer.shape),))


def constant(value: float, lanes: int = 1) -> Any:
    """A float32 constant, `lanes` wide."""
    scalar = tirx.const(float(value), "float32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def spread(scalar: Any, lanes: int) -> Any:
    """`scalar` in every lane."""
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def span(start: Any, lanes: int) -> Any:
    """The index of `lanes` neighbours from `start`."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def share(total: Any, parts: int, part: Any) -> tuple[Any, Any]:
    """Where `part` of `parts` nearly equal shares of `range(total)` begins and ends."""
    size, rest = total // parts, total % parts
    if isinstance(rest, int) and not rest:
        return part * size, (part + 1) * size

    def start(part: Any) -> Any:
        # part * total // parts, whose product may pass 32 bits.
        return part * size + tirx.floordiv(part * rest, parts)

    return start(part), start(part + 1)


@contextmanager
def between(start: Any, stop: Any) -> Iterator[Any]:
    """A serial loop over range(start, stop); its value is the index.

    The loop itself counts from zero: TVM's CanonicalizeLoop (0.27) rebases a loop that does not, but forgets
    its variable in the bounds of loops inside it.
    """
    if isinstance(start, int) and start == 0:
        with T.serial(0, stop) as index:
            yield index
    else:
        with T.serial(0, stop - start) as index:
            yield start + index
