"""The innermost loop of the convolutions: a block of accumulators that LLVM keeps in vector registers.

    broadcast     for k: load V vectors of the right operand; per row one value of the left, in every lane
    by element    for k in steps of a vector: per row one vector of the left, whose lanes are factors in turn

By element, four k of a row are one load rather than four; what k has beyond whole vectors is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .loops import between, constant, span, spread

# left(row, k, n): the values of k, k + 1, ... k + n - 1 in a row.
Left = Callable[[int, Any, int], Any]

LINE_BYTES = 64  # where it is 128, every other prefetch is one too many


def clear(acc: Any, rows: int, vectors: int, lanes: int) -> None:
    """Zero the accumulators of rows x vectors."""
    for i in range(rows * vectors):
        T.buffer_store(acc, constant(0.0, lanes), [span(i * lanes, lanes)])


def multiply_add(
    acc: Any,
    rows: Sequence[int],
    vectors: int,
    lanes: int,
    steps: Any,
    left: Left,
    right: Callable[[Any, int], Any],
    first: Any = 0,
    by_element: bool = False,
) -> None:
    """Add left(row, k, 1) (scalars) times right(k, vector) (vectors), for `steps` k from `first` on, to `acc`."""

    def step(k: Any, values: Callable[[int], Any]) -> None:
        loaded = [T.bind(right(k, v)) for v in range(vectors)]
        for row in rows:
            value = T.bind(spread(values(row), lanes))
            for v in range(vectors):
                at = span((row * vectors + v) * lanes, lanes)
                T.buffer_store(acc, acc[at] + value * loaded[v], [at])

    done: Any = 0
    if by_element:
        blocks = steps // lanes
        done = blocks * lanes
        with T.serial(0, blocks) as block:
            start = T.bind(first + block * lanes)
            several = {row: T.bind(left(row, start, lanes)) for row in rows}
            for i in range(lanes):
                step(start + i, lambda row, i=i: tirx.Shuffle([several[row]], [tirx.const(i, "int32")]))  # type: ignore[misc]
    if not isinstance(steps, int) or done < steps:
        with between(first + done, first + steps) as k:
            step(k, lambda row: left(row, k, 1))


def prefetch(buffer: Any, start: Any, floats: int) -> None:
    """Ask for `floats` elements of the flat `buffer` from `start` on to come to L2; beyond its end nothing happens.

    Not inside a loop over accumulators: LLVM takes it for a store that may reach them, and keeps them in memory.
    """
    with T.serial(0, -(-floats * 4 // LINE_BYTES)) as line:
        read, second_level, data = (tirx.const(n, "int32") for n in (0, 2, 1))
        address = T.address_of(buffer[start + line * (LINE_BYTES // 4)])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, second_level, data))
