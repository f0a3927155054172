"""Where the operands of attention lie, and how a mask is applied to scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .attention_plan import Placement
from .loops import constant, span, spread

# score, batch, head, query, key, lanes -> masked score
Bias = Callable[[Any, Any, Any, Any, Any, int], Any]


@dataclass(frozen=True)
class Heads:
    """A flat buffer read as [batch, head, position, channel]."""

    buffer: Any
    placement: Placement

    def place(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The index of an element, or of neighbouring channels."""
        p = self.placement
        return p.offset + b * p.batch + h * p.head + s * p.position + d

    def at(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The element, or a vector of channels."""
        return self.buffer[self.place(b, h, s, d)]


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


def masking(buffer: Any, dtype: str) -> Bias:
    """The function that adds a float32 mask, or puts -inf where a bool mask is false; extents of 1 broadcast."""
    shape = tuple(int(n) for n in buffer.shape)

    def apply(score: Any, b: Any, h: Any, query: Any, key: Any, lanes: int) -> Any:
        where = [0 if extent == 1 else at for extent, at in zip(shape, (b, h, query, key), strict=True)]
        value = buffer[(*where[:3], where[3] if shape[3] == 1 else span(key, lanes))]
        if shape[3] == 1:
            value = spread(value, lanes)
        return score + value if dtype == "float32" else tirx.Select(value, score, constant(float("-inf"), lanes))

    return apply
