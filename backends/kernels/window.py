"""Sliding windows without a padded copy: which taps of which output pixels read an element that exists.

One axis of a convolution or pooling, and a row of outputs cut into register tiles:

    input    . . 0 1 2 3 4 5 6 . .      a tap that falls on a dot reads nothing and is left out
    tile       [ 0 1 2 ] [ 3 4 5 ]      tiles that see the same taps are one loop (a `Run`)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import tirx


@dataclass(frozen=True)
class Axis:
    """One spatial axis: `size` inputs, `out` outputs, a window of `kernel` taps."""

    size: int
    out: int
    kernel: int
    stride: int = 1
    before: int = 0  # elements of padding ahead of the first input
    dilation: int = 1

    def first(self, position: Any) -> Any:
        """The input under tap 0 of output `position`; negative inside the padding."""
        return position * self.stride - self.before

    def taps(self, position: int) -> tuple[int, int]:
        """The taps [first, last) of output `position` that read an input."""
        start = self.first(position)
        low = min(max(0, -(start // self.dilation)), self.kernel)
        high = min(self.kernel, max(0, -((start - self.size) // self.dilation)))
        return low, max(low, high)

    def readers(self, tap: int) -> tuple[int, int]:
        """The outputs [first, last) for which `tap` reads an input."""
        under = self.before - tap * self.dilation  # of the padding ahead, what is left in front of this tap
        first = min(self.out, max(0, -(-under // self.stride)))
        last = min(self.out, max(0, -(-(under + self.size) // self.stride)))
        return first, max(first, last)

    @cached_property
    def interior(self) -> tuple[int, int]:
        """The outputs [first, last) that read all taps; (0, 0) where there are none."""
        readers = [self.readers(tap) for tap in (0, self.kernel - 1)]
        first, last = max(r[0] for r in readers), min(r[1] for r in readers)
        return (first, last) if first < last else (0, 0)

    def dynamic_taps(self, position: Any) -> tuple[Any, Any]:
        """`taps` of an output known only at run time: the first tap, and how many."""
        if self.interior == (0, self.out):
            return 0, self.kernel
        start = self.first(position)
        low: Any = 0
        if self.taps(0)[0]:
            low = tirx.min(tirx.max(0, tirx.floordiv(self.dilation - 1 - start, self.dilation)), self.kernel)
        high: Any = self.kernel
        if self.taps(self.out - 1)[1] < self.kernel:
            high = tirx.min(self.kernel, tirx.floordiv(self.size - start + self.dilation - 1, self.dilation))
        return low, tirx.max(high - low, 0)

    def union_of_taps(self, position: Any, outputs: int) -> tuple[Any, Any]:
        """From the first tap to the last that one of `outputs` neighbours from `position` reads: first, how many."""
        least, most = (min, max) if isinstance(position, int) else (tirx.min, tirx.max)
        last, start = self.first(position + outputs - 1), self.first(position)
        low = least(most((self.dilation - 1 - last) // self.dilation, 0), self.kernel)
        high = least((self.size - start + self.dilation - 1) // self.dilation, self.kernel)
        return low, most(high - low, 0)


@dataclass(frozen=True)
class Placement:
    """Where the outputs lie in the image that is written: output (r, c) at start + (r, c) * step."""

    height: int
    width: int
    start: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Span:
    """Taps [tap, tap + taps) that read an input for exactly the tile's pixels [low, high)."""

    tap: int
    taps: int
    low: int
    high: int


@dataclass(frozen=True)
class Run:
    """`count` tiles of `pixels` outputs, at start, start + pixels, ..., that all see the same taps."""

    start: int
    pixels: int
    count: int
    valid: tuple[tuple[int, int], ...]  # for each tap, the tile's pixels [low, high) for which it reads an input

    @property
    def spans(self) -> tuple[Span, ...]:
        """Neighbouring taps of equal validity joined; taps that read nothing left out."""
        spans: list[Span] = []
        for tap, (low, high) in enumerate(self.valid):
            if low == high:
                continue
            last = spans[-1] if spans else None
            if last and last.tap + last.taps == tap and (last.low, last.high) == (low, high):
                spans[-1] = Span(last.tap, last.taps + 1, low, high)
            else:
                spans.append(Span(tap, 1, low, high))
        return tuple(spans)

    @property
    def full(self) -> bool:
        """Whether every tap reads an input for every pixel."""
        return all(v == (0, self.pixels) for v in self.valid)


def balanced(total: int, most: int) -> list[int]:
    """`total` cut into the fewest pieces of at most `most`; sizes differ by at most one, larger first."""
    count = -(-total // most)
    small, larger = divmod(total, count)
    return [small + 1] * larger + [small] * (count - larger)


def runs(axis: Axis, pixels: int) -> list[Run]:
    """The outputs of `axis` in tiles of at most `pixels`, equal neighbours joined."""
    found: list[Run] = []
    start = 0
    readers = [axis.readers(tap) for tap in range(axis.kernel)]
    inside, outside = axis.interior
    for size in balanced(axis.out, pixels):
        if inside <= start and start + size <= outside:
            valid = [(0, size)] * axis.kernel
        else:
            shares = [(max(0, begin - start), min(size, end - start)) for begin, end in readers]
            valid = [share if share[0] < share[1] else (0, 0) for share in shares]
        last = found[-1] if found else None
        if last and last.pixels == size and last.valid == tuple(valid):
            found[-1] = Run(last.start, size, last.count + 1, last.valid)
        else:
            found.append(Run(start, size, 1, tuple(valid)))
        start += size
    return found


def pieces(channels: int, lanes: int) -> list[tuple[int, int]]:
    """`channels` neighbours as (offset, width) stores: whole vectors, then halves down to one."""
    pieces = [(offset, lanes) for offset in range(0, channels - lanes + 1, lanes)]
    offset, width = len(pieces) * lanes, lanes // 2
    while offset < channels:
        if channels - offset >= width:
            pieces.append((offset, width))
            offset += width
        else:
            width //= 2
    return pieces
