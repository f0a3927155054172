"""Running sums, products and extremes along one axis, written as the loop they are; halves accumulate in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .imperative import Elements, grid, local, loop_nest
from .registry import Out, lowers

aten = torch.ops.aten


def _accumulator(dtype: str) -> str:
    return "int32" if dtype == "bool" else ex.compute_dtype(dtype)


def _running(combine: Callable[[Any, Any], Any], out: Out, x: te.Tensor, dim: int, *_: Any, **__: Any) -> te.Tensor:
    """out[..., k, ...] = combine(x[..., 0, ...], ..., x[..., k, ...])."""
    if not out.shape or 0 in out.shape:
        return ex.copy(out, x)
    axis = dim % len(out.shape)
    dtype = _accumulator(out.dtype)

    def body(inputs: Sequence[Elements], outs: Sequence[Elements]) -> None:
        source, target = inputs[0], outs[0]
        rest = [extent for d, extent in enumerate(out.shape) if d != axis]
        with grid(rest or [1], parallel=True) as others:
            at = _line(others, axis, bool(rest))
            total = local(dtype)
            total[0] = ex.cast(source[at(0)], dtype)
            target[at(0)] = ex.cast(total[0], out.dtype)
            with grid([out.shape[axis] - 1]) as (k,):
                total[0] = combine(total[0], ex.cast(source[at(k + 1)], dtype))
                target[at(k + 1)] = ex.cast(total[0], out.dtype)

    return loop_nest([out], [x], body, "scan")[0]


def _line(others: Sequence[Any], axis: int, has_others: bool) -> Callable[[Any], list[Any]]:
    """The index of the k-th element of the line through `others`."""
    rest = list(others) if has_others else []
    return lambda k: [*rest[:axis], k, *rest[axis:]]


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
        rest = [extent for d, extent in enumerate(values.shape) if d != axis]
        with grid(rest or [1], parallel=True) as others:
            at = _line(others, axis, bool(rest))
            best, where = local(dtype), local("int64")
            best[0], where[0] = ex.cast(source[at(0)], dtype), tirx.const(0, "int64")
            target[at(0)], places[at(0)] = ex.cast(best[0], values.dtype), where[0]
            with grid([values.shape[axis] - 1]) as (k,):
                new = ex.cast(source[at(k + 1)], dtype)
                reaches = new >= best[0] if larger else new <= best[0]
                position = (k + 1).astype("int64")
                where[0] = tirx.Select(tirx.any(ex.is_nan(new), reaches), position, where[0])
                better = tirx.all(ex.negate(ex.is_nan(best[0])), reaches)
                best[0] = tirx.Select(tirx.any(ex.is_nan(new), better), new, best[0])
                target[at(k + 1)], places[at(k + 1)] = ex.cast(best[0], values.dtype), where[0]

    results = loop_nest([values, indices], [x], body, "scan")
    return results[0], results[1]


lowers(aten.cummax.default)(functools.partial(_running_extreme, True))
lowers(aten.cummin.default)(functools.partial(_running_extreme, False))
