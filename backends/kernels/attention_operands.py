"""Where the operands of attention lie, and how a mask is applied to scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx

from .attention_plan import Placement
from .loops import Shape, constant, span, spread, view

# score, batch, head, query, key, lanes[, unit of the score] -> masked score
Bias = Callable[..., Any]


@dataclass(frozen=True)
class Heads:
    """A flat buffer read as [batch, head, position, channel]."""

    buffer: Any
    placement: Placement
    rows: Any = None  # buffer [batch, position] of numbers in the place of positions, or None

    def place(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The index of an element, or of neighbouring channels."""
        p = self.placement
        row = b * p.batch + s * p.position if self.rows is None else self.rows[b, s] * p.position
        return p.offset + row + h * p.head + d

    def at(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The element, or a vector of channels."""
        return self.buffer[self.place(b, h, s, d)]


def located(
    buffers: Sequence[Any], shapes: Sequence[Shape], places: Sequence[Placement], tables: tuple[bool, bool]
) -> tuple[Heads, Heads, Heads, Heads]:
    """q, k, v and the result in flat views of the first three buffers and the last.

    `tables`: whether rows of q, k and v, and of the result, are numbered by buffers just before the last.
    """
    given = iter(buffers[len(buffers) - 1 - sum(tables) : -1])
    read, written = (next(given) if table else None for table in tables)
    q, k, v, out = (
        Heads(view(buffer, (prod(shape),)), place, rows)
        for buffer, shape, place, rows in zip(
            (*buffers[:3], buffers[-1]), shapes, places, (read, read, read, written), strict=True
        )
    )
    return q, k, v, out


@dataclass(frozen=True)
class Rows:
    """The rows of one unit: group `h` of the heads of batch `b`, with key head `kh`."""

    q: Heads
    k: Heads
    v: Heads
    out: Heads
    b: Any
    h: Any
    kh: Any


def masking(buffer: Any, dtype: str, fill: float | None) -> Bias:
    """The function that adds a float32 mask, or puts `fill` (None: -inf) where a bool one is false; 1s broadcast."""
    shape = tuple(int(n) for n in buffer.shape)
    hidden = -math.inf if fill is None else fill

    def apply(score: Any, b: Any, h: Any, query: Any, key: Any, lanes: int, unit: Any = None) -> Any:
        where = [0 if extent == 1 else at for extent, at in zip(shape, (b, h, query, key), strict=True)]
        value = buffer[(*where[:3], where[3] if shape[3] == 1 else span(key, lanes))]
        if shape[3] == 1:
            value = spread(value, lanes)
        if dtype != "float32":
            return tirx.Select(value, score if unit is None else score * unit, constant(hidden, lanes))
        if unit is None:
            return score + value
        floats = "float32" if lanes == 1 else f"float32x{lanes}"
        return tirx.call_llvm_pure_intrin(floats, "llvm.fma", score, unit, value)

    return apply
