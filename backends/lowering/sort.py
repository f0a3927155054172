"""sort, argsort, topk, kthvalue, median: stable merges of rows of any length, insertion for a small topk.

NaN counts as greater than every number. Equal elements keep their order, also where torch promises none
(`stable=False`, topk), so that results can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from . import expressions as ex
from .imperative import Elements, grid, local, loop_nest, when
from .index_math import Expr, Index, axis_of, define, replace, sizes
from .registry import Out, lowers

aten = torch.ops.aten

# Up to this many best elements are kept by insertion. Of more, only if their square is less than the row: random
# rows need about k ln(n / k) insertions of k / 2 moves, but a row in the wrong order needs n of them.
INSERTION_LIMIT = 32


def comes_first(descending: bool) -> Callable[[Expr, Expr], Expr]:
    """Of two elements: whether the first must come before the second."""

    def ascends(x: Expr, y: Expr) -> Expr:
        if str(x.ty) == "bool":
            x, y = ex.cast(x, "int8"), ex.cast(y, "int8")
        if not ex.is_float(str(x.ty)):
            return x < y
        return tirx.any(x < y, tirx.all(ex.is_nan(y), ex.negate(ex.is_nan(x))))

    return (lambda x, y: ascends(y, x)) if descending else ascends


def sorted_rows(source: te.Tensor, axis: int, descending: bool) -> tuple[te.Tensor, te.Tensor]:
    """The values along `axis` in order, and the int32 positions they come from: merges of runs of 1, 2, 4, ..."""
    shape, dtype = sizes(source), str(source.dtype)
    length = shape[axis] if shape else 1
    outs = [Out(shape, d) for d in (dtype, "int32", dtype, "int32")]
    if 0 in shape:
        return tuple(define(out, lambda *i: 0, "sort") for out in outs[:2])
    before = comes_first(descending)
    widths = [1 << p for p in range((length - 1).bit_length())]

    def body(ins: Sequence[Elements], results: Sequence[Elements]) -> None:
        pairs = (results[0], results[1]), (results[2], results[3])
        with grid([*shape[:axis], *shape[axis + 1 :]], parallel=True, each=length) as rest:

            def at(k: Expr) -> Index:
                return (*rest[:axis], k, *rest[axis:]) if shape else ()

            # Passes alternate between two pairs of buffers; the last one writes the results.
            here = len(widths) % 2
            with T.serial(0, length) as k:
                pairs[here][0][at(k)] = ins[0][at(k)]
                pairs[here][1][at(k)] = k
            for width in widths:
                _merge_runs(pairs[here], pairs[1 - here], at, length, width, before)
                here = 1 - here

    values, places, _, _ = loop_nest(outs, [source], body, "sort")
    return values, places


def _merge_runs(
    old: tuple[Elements, Elements],
    new: tuple[Elements, Elements],
    at: Callable[[Expr], Index],
    length: int,
    width: int,
    before: Callable[[Expr, Expr], Expr],
) -> None:
    """Merge neighbouring sorted runs of `width` elements of `old` into `new`."""
    left, right, step = local("int32"), local("int32"), local("int32")
    with T.serial(0, -(-length // (2 * width))) as run:
        start = run * (2 * width)
        middle = tirx.min(start + width, length)
        end = tirx.min(start + 2 * width, length)
        left[0], right[0] = start, middle
        with T.serial(0, end - start) as k:
            # Read in bounds even where a run is used up: the comparison is evaluated either way.
            a = old[0][at(tirx.min(left[0], length - 1))]
            b = old[0][at(tirx.min(right[0], length - 1))]
            take_right = tirx.any(left[0] >= middle, tirx.all(right[0] < end, before(b, a)))
            # Without a branch: which run is next is a coin toss, and every other toss would be mispredicted.
            step[0] = tirx.Cast("int32", take_right)
            _move(old, new, at(tirx.Select(step[0] != 0, right[0], left[0])), at(start + k))
            right[0] = right[0] + step[0]
            left[0] = left[0] + (1 - step[0])


def _move(old: tuple[Elements, Elements], new: tuple[Elements, Elements], source: Index, target: Index) -> None:
    for a, b in zip(old, new, strict=True):
        b[target] = a[source]


@lowers(aten.sort.default, aten.sort.stable)
def sort(
    outs: tuple[Out, Out],
    source: te.Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    stable: bool | None = None,
) -> tuple[te.Tensor, te.Tensor]:
    """Values in order and where they come from."""
    values, places = sorted_rows(source, axis_of(dim, len(source.shape)), descending)
    return values, define(outs[1], lambda *i: places(*i), "sort_indices")


@lowers(aten.argsort.default, aten.argsort.stable)
def argsort(out: Out, source: te.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = False) -> te.Tensor:
    """Where the values in order come from."""
    _, places = sorted_rows(source, axis_of(dim, len(source.shape)), descending)
    return define(out, lambda *i: places(*i), "argsort")


@lowers(aten.msort.default)
def msort(out: Out, source: te.Tensor) -> te.Tensor:
    """Values in order along dim 0."""
    return sorted_rows(source, 0, False)[0]


@lowers(aten.topk.default)
def topk(
    outs: tuple[Out, Out],
    source: te.Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[te.Tensor, te.Tensor]:
    """The k largest or smallest along a dim, in order."""
    axis = axis_of(dim, len(source.shape))
    few = k <= max(INSERTION_LIMIT, math.isqrt(sizes(source)[axis])) if source.shape else False
    if few and 0 not in outs[0].shape:
        values, places = _inserted(source, axis, k, largest)
    else:
        values, places = sorted_rows(source, axis, largest)
    return (
        define(outs[0], lambda *i: values(*i), "topk"),
        define(outs[1], lambda *i: places(*i), "topk_indices"),
    )


def _inserted(source: te.Tensor, axis: int, k: int, largest: bool) -> tuple[te.Tensor, te.Tensor]:
    """The best k of every row: each element in turn moves up among the best so far."""
    shape = sizes(source)
    before = comes_first(largest)
    best = (*shape[:axis], k, *shape[axis + 1 :])

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        values, places = outs
        with grid([*shape[:axis], *shape[axis + 1 :]], parallel=True, each=shape[axis] if shape else 1) as rest:

            def at(position: Expr) -> Index:
                return (*rest[:axis], position, *rest[axis:])

            place, count = local("int32"), local("int32")
            count[0] = 0
            with T.serial(0, shape[axis]) as j:
                element = ins[0][at(j)]
                worst = values[at(tirx.max(count[0] - 1, 0))]
                with when(tirx.any(count[0] < k, before(element, worst))):
                    place[0] = tirx.min(count[0], k - 1)
                    above = at(tirx.max(place[0] - 1, 0))
                    with T.While(tirx.all(place[0] > 0, before(element, values[above]))):
                        values[at(place[0])] = values[above]
                        places[at(place[0])] = places[above]
                        place[0] = place[0] - 1
                    values[at(place[0])] = element
                    places[at(place[0])] = j
                    count[0] = tirx.min(count[0] + 1, k)

    outs = [Out(best, str(source.dtype)), Out(best, "int32")]
    values, places = loop_nest(outs, [source], body, "topk")
    return values, places


def _one_of(outs: tuple[Out, Out], source: te.Tensor, dim: int, rank: Callable[..., Any]) -> tuple[te.Tensor, ...]:
    """The element that comes `rank(last)`-th along a dim, which the results have with extent 1 or not at all."""
    axis = axis_of(dim, len(source.shape))
    values, places = sorted_rows(source, axis, False)
    kept = len(outs[0].shape) == len(source.shape)

    def pick(tensor: te.Tensor, index: Sequence[Expr]) -> Expr:
        if not source.shape:
            return tensor()
        line = tuple(index) if kept else (*index[:axis], 0, *index[axis:])
        last = values(*replace(line, axis, sizes(source)[axis] - 1))
        return tensor(*replace(line, axis, rank(last)))

    return (
        define(outs[0], lambda *i: pick(values, i), "pick"),
        define(outs[1], lambda *i: pick(places, i), "pick_indices"),
    )


@lowers(aten.kthvalue.default)
def kthvalue(
    outs: tuple[Out, Out], source: te.Tensor, k: int, dim: int = -1, keepdim: bool = False
) -> tuple[te.Tensor, ...]:
    """The k-th smallest along a dim, counted from 1."""
    return _one_of(outs, source, dim, lambda last: k - 1)


@lowers(aten.median.dim)
def median(outs: tuple[Out, Out], source: te.Tensor, dim: int, keepdim: bool = False) -> tuple[te.Tensor, ...]:
    """The lower of the two middle elements along a dim, NaN if there is one."""
    length = sizes(source)[axis_of(dim, len(source.shape))] if source.shape else 1
    return _one_of(outs, source, dim, lambda last: tirx.Select(ex.is_nan(last), length - 1, (length - 1) // 2))
