"""What the data-moving families share: index arithmetic, and tensor expressions that are right without elements too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .registry import Out

Expr = Any  # tirx.PrimExpr or a Python number; tvm carries no types
Index = tuple[Expr, ...]


def sizes(tensor: te.Tensor) -> tuple[int, ...]:
    """The static shape of a te.Tensor as Python ints."""
    return tuple(int(extent) for extent in tensor.shape)


def axis_of(dim: int, rank: int) -> int:
    """A dim counted from the front; a 0-dim tensor has the one dim 0, as torch has it."""
    return dim % max(rank, 1)


def define(out: Out, value: Callable[..., Expr], name: str) -> te.Tensor:
    """The tensor out[i] = value(*i), converted to out.dtype; `value` is not asked when there are no elements."""
    if 0 in out.shape:
        return te.compute(out.shape, lambda *i: ex.constant(0, out.dtype), name=name)
    return te.compute(out.shape, lambda *i: ex.cast(value(*i), out.dtype), name=name)


def ravel(index: Sequence[Expr], shape: Sequence[int]) -> Expr:
    """The position of `index` in row-major order."""
    flat: Expr = 0
    for i, extent in zip(index, shape, strict=True):
        flat = flat * extent + i
    return flat


def unravel(flat: Expr, shape: Sequence[int]) -> Index:
    """The index at row-major position `flat`."""
    index: list[Expr] = []
    inner = math.prod(shape)
    for extent in shape:
        outer, inner = inner, inner // extent
        rest = flat if outer == math.prod(shape) else flat % outer
        index.append(0 if extent == 1 else rest // inner if inner != 1 else rest)
    return tuple(index)


def reshape_index(index: Sequence[Expr], shape: Sequence[int], source: Sequence[int]) -> Index:
    """Where element `index` of the reshape of a `source`-shaped tensor to `shape` lies in that tensor.

    Both shapes are cut into the shortest runs of equal product, so that dims which the reshape leaves alone keep
    their own variable and the division stays within a run.
    """
    result: list[Expr] = []
    i = 0
    for start, end, low, high in _runs(shape, source):
        assert i == low
        flat = ravel(index[start:end], shape[start:end])
        result.extend(unravel(flat, source[low:high]))
        i = high
    return tuple(result)


def _runs(shape: Sequence[int], source: Sequence[int]) -> list[tuple[int, int, int, int]]:
    runs = []
    start = low = i = j = 0
    left = right = 1
    while i < len(shape) or j < len(source):
        if (left <= right and i < len(shape)) or j == len(source):
            left, i = left * shape[i], i + 1
        else:
            right, j = right * source[j], j + 1
        if left == right:
            runs.append((start, i, low, j))
            start, low, left, right = i, j, 1, 1
    return runs


def replace(index: Sequence[Expr], axis: int, value: Expr) -> Index:
    """`index` with the coordinate at `axis` exchanged."""
    return (*index[:axis], value, *index[axis + 1 :])


def within(position: Expr, low: int, high: int, reach: tuple[int, int]) -> list[Expr]:
    """The conditions low <= position < high, less those that hold wherever `reach` (both ends included) goes."""
    conditions = []
    if reach[0] < low:
        conditions.append(position >= low)
    if reach[1] >= high:
        conditions.append(position < high)
    return conditions


def guarded(conditions: Sequence[Expr], value: Expr, otherwise: Expr) -> Expr:
    """`value` where all conditions hold; where one does not, nothing in `value` is read."""
    if not conditions:
        return value
    return tirx.if_then_else(tirx.all(*conditions), value, otherwise)


def address(value: Expr, extent: int, wrap: bool = False) -> Expr:
    """A computed index as a safe address: out-of-range ones, for which torch raises, read the nearest element.

    `wrap` counts negative ones from the end first.
    """
    if str(value.ty) not in ("int32", "int64"):
        value = tirx.Cast("int32", value)
    if wrap:
        value = tirx.Select(value < 0, value + extent, value)
    return tirx.max(tirx.min(value, extent - 1), 0)


def argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of a node, wherever it was passed, or its default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if name in node.kwargs:
        return node.kwargs[name]
    for place, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            return node.args[place] if place < len(node.args) else formal.default_value
    raise AssertionError(f"{node.target} has no argument {name}")


def spread(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """An int[n] argument, which may be one int for all, as n ints."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces begins."""
    return [0, *itertools.accumulate(lengths)][: len(lengths)]
