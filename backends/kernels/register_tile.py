"""The innermost loop of the convolutions: a block of accumulators that LLVM keeps in vector registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm.tirx.script import builder as T

from .loops import constant, span, spread


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
) -> None:
    """Add left(row, k) (scalars) times right(k, vector) (vectors), for k in range(steps), to `acc`."""
    with T.serial(0, steps) as k:
        loaded = [T.bind(right(k, v)) for v in range(vectors)]
        for row in rows:
            value = T.bind(spread(left(row, k), lanes))
            for v in range(vectors):
                at = span((row * vectors + v) * lanes, lanes)
                T.buffer_store(acc, acc[at] + value * loaded[v], [at])
