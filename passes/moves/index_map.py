"""Moves of elements as mixed-radix index maps: what any chain of reshapes and permutes comes to.

A map reads the elements of a contiguous source in another order. The source's linear index is written as
digits of mixed radix; a digit has an extent and the stride it has in the source. The result's linear index
is the same digits in another order, and a shape on top that says how they are grouped:

    reshape  changes the shape alone
    permute  regroups digits so that each dim of the shape is a run of whole digits, and reorders the runs

Regrouping may split a digit (extent 6 into 2 x 3). It fails where a dim would end inside a digit at a
place that does not divide it, and then the chain is no single reshape-permute-reshape. Two neighbouring
digits that are neighbours in the source too are one digit, which makes the form unique.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of the source's linear index: `extent` > 1 values, `stride` elements apart."""

    extent: int
    stride: int


@dataclass(frozen=True, slots=True)
class IndexMap:
    """The elements of a contiguous source of `source` shape in the order of `digits`, seen as `shape`."""

    source: tuple[int, ...]
    digits: tuple[Digit, ...]  # outermost first; no two neighbours can be merged
    shape: tuple[int, ...]

    @property
    def keeps_order(self) -> bool:
        """Whether the map is at most a change of shape."""
        return len(self.digits) <= 1 or not math.prod(self.source)

    def reshape(self, shape: Sequence[int]) -> IndexMap:
        """The map followed by a reshape."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        return IndexMap(self.source, self.digits, tuple(shape))

    def permute(self, dims: Sequence[int]) -> IndexMap | None:
        """The map followed by a permute, or None where that is no single reshape-permute-reshape."""
        shape = tuple(self.shape[d] for d in dims)
        if not math.prod(self.shape):
            return IndexMap(self.source, (), shape)
        runs = _grouped(self.digits, self.shape)
        if runs is None:
            return None
        return IndexMap(self.source, _merged([digit for d in dims for digit in runs[d]]), shape)

    def runs(self, shape: Sequence[int]) -> list[list[Digit]] | None:
        """The digits cut so that each dim of `shape` is a run of whole digits; None where a cut does not divide."""
        return _grouped(self.digits, shape)

    def moves(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(in_shape, dims, out_shape) such that reshape(in_shape).permute(dims).reshape(out_shape) is the map."""
        order = sorted(range(len(self.digits)), key=lambda i: -self.digits[i].stride)
        place = {i: p for p, i in enumerate(order)}
        in_shape = tuple(self.digits[i].extent for i in order)
        return in_shape, tuple(place[i] for i in range(len(self.digits))), self.shape


def identity(shape: Sequence[int]) -> IndexMap:
    """The map that moves nothing."""
    count = math.prod(shape)
    return IndexMap(tuple(shape), (Digit(count, 1),) if count > 1 else (), tuple(shape))


def from_moves(
    source: Sequence[int], in_shape: Sequence[int], dims: Sequence[int], out_shape: Sequence[int]
) -> IndexMap:
    """The map of source.reshape(in_shape).permute(dims).reshape(out_shape)."""
    permuted = identity(source).reshape(in_shape).permute(dims)
    assert permuted is not None  # the digits of a source in order can be grouped in every way
    return permuted.reshape(out_shape)


def factored(order: torch.Tensor) -> tuple[Digit, ...] | None:
    """The digits of the map whose element i is the source's element order[i]; None where it has none.

    From the innermost digit outwards: a digit is the longest run of equal steps, and must repeat.
    """
    digits: list[Digit] = []
    rest = order
    while len(rest) > 1:
        step = int(rest[1] - rest[0])
        apart = (rest != rest[0] + step * torch.arange(len(rest))).nonzero()
        extent = int(apart[0]) if len(apart) else len(rest)
        if step < 1 or len(rest) % extent:
            return None
        runs = rest.reshape(-1, extent)
        if bool((runs != runs[:, :1] + step * torch.arange(extent)).any()):
            return None
        digits.insert(0, Digit(extent, step))
        rest = runs[:, 0]
    if rest.tolist() not in ([], [0]) or not _covers(digits):
        return None
    return _merged(digits)


def _covers(digits: Sequence[Digit]) -> bool:
    """Whether every index of the source has one place: each stride is what the smaller ones span."""
    span = 1
    for digit in sorted(digits, key=lambda digit: digit.stride):
        if digit.stride != span:
            return False
        span *= digit.extent
    return True


def _merged(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    result: list[Digit] = []
    for digit in digits:
        if result and result[-1].stride == digit.stride * digit.extent:
            result[-1] = Digit(result[-1].extent * digit.extent, digit.stride)
        else:
            result.append(digit)
    return tuple(result)


def _grouped(digits: Sequence[Digit], shape: Sequence[int]) -> list[list[Digit]] | None:
    """The digits cut so that each dim of `shape` is a run of whole digits; None where a cut does not divide."""
    waiting = list(reversed(digits))
    runs: list[list[Digit]] = []
    for extent in shape:
        run: list[Digit] = []
        while extent > 1:
            digit = waiting.pop()
            if extent % digit.extent == 0:
                run.append(digit)
                extent //= digit.extent
            elif digit.extent % extent == 0:
                inner = digit.extent // extent
                run.append(Digit(extent, digit.stride * inner))
                waiting.append(Digit(inner, digit.stride))
                extent = 1
            else:
                return None
        runs.append(run)
    return runs
