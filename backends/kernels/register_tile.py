"""The innermost loop of the convolutions: a block of accumulators that LLVM keeps in vector registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .loops import between, constant, span, spread

LINE_BYTES = 64  # where it is 128, every other prefetch is one too many


def clear(acc: Any, rows: int, vectors: int, lanes: int) -> None:
    """Zero the accumulators of rows x vectors."""
    for i in range(rows * vectors):
        T.buffer_store(acc, constant(0.0, lanes), [span(i * lanes, lanes)])


def multiply_add(
    acc: Any,
    rows: Iterable[int],
    vectors: int,
    lanes: int,
    steps: int,
    left: Callable[[int, Any], Any],
    right: Callable[[Any, int], Any],
    first: Any = 0,
) -> None:
    """Add left(row, k) (scalars) times right(k, vector) (vectors), for `steps` k from `first` on, to `acc`."""
    with between(first, first + steps) as k:
        loaded = [T.bind(right(k, v)) for v in range(vectors)]
        for row in rows:
            value = T.bind(spread(left(row, k), lanes))
            for v in range(vectors):
                at = span((row * vectors + v) * lanes, lanes)
                T.buffer_store(acc, acc[at] + value * loaded[v], [at])


def prefetch(buffer: Any, start: Any, floats: int) -> None:
    """Ask for `floats` elements of the flat `buffer` from `start` on to come to L2; beyond its end nothing happens.

    Not inside a loop over accumulators: LLVM takes it for a store that may reach them, and keeps them in memory.
    """
    with T.serial(0, -(-floats * 4 // LINE_BYTES)) as line:
        read, second_level, data = (tirx.const(n, "int32") for n in (0, 2, 1))
        address = T.address_of(buffer[start + line * (LINE_BYTES // 4)])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, second_level, data))
