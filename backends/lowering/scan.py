"""Running sums, products and extremes along one axis, written as the loop they are; halves accumulate in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .imperative import Elements, grid, lines, local, loop_nest
from .registry import Out, lowers

aten = torch.ops.aten


def _accumulator(dtype: str) -> str:
    """As wide as PyTorch adds up: what one step rounds, all later ones would keep."""
    return {"bool": "int32", "float32": "float64"}.get(dtype) or ex.compute_dtype(dtype)


def _running(combine: Callable[[Any, Any], Any], out: Out, x: te.Tensor, dim: int, *_: Any, **__: Any) -> te.Tensor:
    """out[..., k, ...] = combine(x[..., 0, ...], ..., x[..., k, ...])."""
    if not out.shape or 0 in out.shape:
        return ex.copy(out, x)
    axis = dim % len(out.shape)
    dtype = _accumulator(out.dtype)

    def body(inputs: Sequence[Elements], outs: Sequence[Elements]) -> None:
        source, target = inputs[0], outs[0]
        with lines(out.shape, [axis]) as index:
            total = local(dtype, len(index))
            for u, line in enumerate(index):
                total[u] = ex.cast(source[_at(line, axis, 0)], dtype)
                target[_at(line, axis, 0)] = ex.cast(total[u], out.dtype)
            with grid([out.shape[axis] - 1]) as (k,):
                for u, line in enumerate(index):
                    total[u] = combine(total[u], ex.cast(source[_at(line, axis, k + 1)], dtype))
                for u, line in enumerate(index):
                    target[_at(line, axis, k + 1)] = ex.cast(total[u], out.dtype)

    return loop_nest([out], [x], body, "scan")[0]


def _at(line: Sequence[Any], axis: int, k: Any) -> list[Any]:
    """The index of the k-th element of a line."""
    return [*line[:axis], k, *line[axis + 1 :]]


def _log_add(a: Any, b: Any) -> Any:
    dtype = ex.dtype_of(a)
    high, low = ex.maximum(a, b), ex.minimum(a, b)
    both = high + ex.libm("log1p", tirx.exp(low - high))
    # Equal infinities: their difference would be NaN.
    same = tirx.all(a.equal(b), ex.is_inf(a))
    return tirx.Select(same, a, tirx.Select(low <= tirx.const(-math.inf, dtype), high, both))


lowers(aten.cumsum.default)(functools.partial(_running, lambda a, b: a + b))
lowers(aten.cumprod.default)(functools.partial(_running, lambda a, b: a * b))
lowers(aten.logcumsumexp.default)(functools.partial(_running, _log_add))


def _running_extreme(larger: bool, out: tuple[Out, Out], x: te.Tensor, dim: int) -> tuple[te.Tensor, te.Tensor]:
    """The extreme so far and where it is: the last of equal elements; from the first NaN on, the last NaN."""
    values, indices = out
    if not values.shape or 0 in values.shape:
        return ex.copy(values, x), ex.filled(indices, 0)
    axis = dim % len(values.shape)
    dtype = "int8" if values.dtype == "bool" else ex.compute_dtype(values.dtype)

    def body(inputs: Sequence[Elements], outs: Sequence[Elements]) -> None:
        source, (target, places) = inputs[0], outs
        with lines(values.shape, [axis]) as index:
            best, where = local(dtype, len(index)), local("int64", len(index))
            for u, line in enumerate(index):
                at = _at(line, axis, 0)
                best[u], where[u] = ex.cast(source[at], dtype), tirx.const(0, "int64")
                target[at], places[at] = ex.cast(best[u], values.dtype), where[u]
            with grid([values.shape[axis] - 1]) as (k,):
                for u, line in enumerate(index):
                    at = _at(line, axis, k + 1)
                    new = ex.cast(source[at], dtype)
                    reaches = new >= best[u] if larger else new <= best[u]
                    position = (k + 1).astype("int64")
                    where[u] = tirx.Select(tirx.any(ex.is_nan(new), reaches), position, where[u])
                    better = tirx.all(ex.negate(ex.is_nan(best[u])), reaches)
                    best[u] = tirx.Select(tirx.any(ex.is_nan(new), better), new, best[u])
                    target[at], places[at] = ex.cast(best[u], values.dtype), where[u]

    results = loop_nest([values, indices], [x], body, "scan")
    return results[0], results[1]


lowers(aten.cummax.default)(functools.partial(_running_extreme, True))
lowers(aten.cummin.default)(functools.partial(_running_extreme, False))
