"""Reductions over axes: result[i] = combine over k of f(x[i, k]), half precision accumulated in float32.

`max` and `min` keep NaN, `argmax` and its kin yield the first of equal elements (a NaN counts as the extreme one).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .expressions import Scalar, pointwise
from .imperative import Elements, grid, lines, local, loop_nest
from .registry import Out, lowers

aten = torch.ops.aten

Combine = Callable[[Any, Any], Any]
Dims = int | Sequence[int] | None


def axes_of(rank: int, dims: Dims) -> tuple[int, ...]:
    """The reduced axes as sorted non-negative numbers; None or an empty list means all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    given = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted({d % rank for d in given})) if rank else ()


def shape_of(x: te.Tensor) -> tuple[int, ...]:
    """The shape in Python integers."""
    return tuple(int(extent) for extent in x.shape)


def reduce(
    x: te.Tensor,
    axes: Sequence[int],
    combine: Combine,
    identity: Scalar,
    dtype: str,
    element: Callable[..., Any] = lambda value, *_: value,
    keepdim: bool = True,
) -> te.Tensor:
    """`combine` over `axes` of element(x[index], index), accumulated in `dtype`; reduced axes stay with extent 1."""
    shape = shape_of(x)
    kept = [1 if d in axes else extent for d, extent in enumerate(shape)]
    result = tuple(kept) if keepdim else tuple(e for d, e in enumerate(shape) if d not in axes)
    if any(shape[d] == 0 for d in axes):
        return ex.filled(Out(result, dtype), identity)
    reducer = te.comm_reducer(combine, lambda t: ex.constant(identity, str(t)), name="reduced")
    over = {d: te.reduce_axis((0, shape[d]), name=f"k{d}") for d in axes}

    def position(index: Sequence[Any]) -> list[Any]:
        rest = iter(index)
        full = []
        for d in range(len(shape)):
            if d in over:
                full.append(over[d].var)
                if keepdim:
                    next(rest)
            else:
                full.append(next(rest))
        return full

    def value(*index: Any) -> Any:
        at = position(index)
        item = ex.cast(element(ex.cast(x(*at), dtype), *index), dtype)
        return reducer(item, axis=list(over.values())) if over else combine(ex.constant(identity, dtype), item)

    return te.compute(result, value, name="reduced")


def reduced_to(
    out: Out,
    x: te.Tensor,
    axes: Sequence[int],
    combine: Combine,
    identity: Scalar,
    dtype: str | None = None,
    element: Callable[..., Any] = lambda value, *_: value,
    finish: Callable[[Any], Any] | None = None,
) -> te.Tensor:
    """The reduction in the shape of `out` (which tells whether the axes are kept), then `finish` of each element."""
    working = dtype or ex.compute_dtype(out.dtype)
    keepdim = len(out.shape) == len(x.shape)
    total = reduce(x, axes, combine, identity, working, element, keepdim)
    if finish is None and working == out.dtype:
        return total
    final = finish or (lambda value: value)
    return te.compute(out.shape, lambda *i: ex.cast(final(total(*i)), out.dtype), name="finished")


def plus(a: Any, b: Any) -> Any:
    """The combiner of sums."""
    return a + b


def times(a: Any, b: Any) -> Any:
    """The combiner of products."""
    return a * b


def sum_of(x: te.Tensor, axes: Sequence[int], dtype: str, element: Callable[..., Any] | None = None) -> te.Tensor:
    """Sums with the reduced axes kept."""
    return reduce(x, axes, plus, 0, dtype, element or (lambda value, *_: value))


def max_of(x: te.Tensor, axes: Sequence[int], dtype: str) -> te.Tensor:
    """Maxima with the reduced axes kept, NaN where there is one."""
    return reduce(x, axes, ex.maximum, lowest(dtype), dtype)


def lowest(dtype: str) -> Scalar:
    """What every element of `dtype` is at least as large as."""
    return -math.inf if ex.is_float(dtype) else torch.iinfo(ex.torch_dtype(dtype)).min


def highest(dtype: str) -> Scalar:
    """What every element of `dtype` is at most as large as."""
    return math.inf if ex.is_float(dtype) else torch.iinfo(ex.torch_dtype(dtype)).max


def count(x: te.Tensor, axes: Sequence[int]) -> int:
    """How many elements are combined into one."""
    return math.prod(shape_of(x)[d] for d in axes)


@lowers(aten.sum.default, aten.sum.dim_IntList)
def sum_(out: Out, x: te.Tensor, dims: Dims = None, *_: Any, **__: Any) -> te.Tensor:
    return reduced_to(out, x, axes_of(len(x.shape), dims), plus, 0)


@lowers(aten.nansum.default)
def nansum(out: Out, x: te.Tensor, dims: Dims = None, *_: Any, **__: Any) -> te.Tensor:
    def number(value: Any, *_: Any) -> Any:
        return tirx.Select(ex.is_nan(value), ex.constant(0, ex.dtype_of(value)), value)

    return reduced_to(out, x, axes_of(len(x.shape), dims), plus, 0, element=number)


@lowers(aten.mean.default, aten.mean.dim)
def mean(out: Out, x: te.Tensor, dims: Dims = None, *_: Any, **__: Any) -> te.Tensor:
    axes = axes_of(len(x.shape), dims)
    size = ex.constant(count(x, axes), ex.compute_dtype(out.dtype))
    return reduced_to(out, x, axes, plus, 0, finish=lambda total: ex.divide(total, size))


@lowers(aten.prod.default, aten.prod.dim_int)
def prod(out: Out, x: te.Tensor, dims: Dims = None, *_: Any, **__: Any) -> te.Tensor:
    return reduced_to(out, x, axes_of(len(x.shape), dims), times, 1)


@lowers(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_nonzero(out: Out, x: te.Tensor, dims: Dims = None) -> te.Tensor:
    counted = pointwise(Out(shape_of(x), "int64"), ex.is_true, x, dtype=str(x.dtype))
    return reduced_to(out, counted, axes_of(len(x.shape), dims), plus, 0)


def _extreme_dtype(dtype: str) -> str:
    return "int8" if dtype == "bool" else ex.compute_dtype(dtype)


@lowers(aten.amax.default, aten.max.default)
def amax(out: Out, x: te.Tensor, dims: Dims = None, keepdim: bool = False) -> te.Tensor:
    dtype = _extreme_dtype(out.dtype)
    return reduced_to(out, x, axes_of(len(x.shape), dims), ex.maximum, lowest(dtype), dtype)


@lowers(aten.amin.default, aten.min.default)
def amin(out: Out, x: te.Tensor, dims: Dims = None, keepdim: bool = False) -> te.Tensor:
    dtype = _extreme_dtype(out.dtype)
    return reduced_to(out, x, axes_of(len(x.shape), dims), ex.minimum, highest(dtype), dtype)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_(out: Out, x: te.Tensor, dims: Dims = None, keepdim: bool = False) -> te.Tensor:
    return _logical(out, x, dims, ex.maximum, 0)


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_(out: Out, x: te.Tensor, dims: Dims = None, keepdim: bool = False) -> te.Tensor:
    return _logical(out, x, dims, ex.minimum, 1)


def _logical(out: Out, x: te.Tensor, dims: Dims, combine: Combine, identity: int) -> te.Tensor:
    truth = pointwise(Out(shape_of(x), "int8"), ex.is_true, x, dtype=str(x.dtype))
    return reduced_to(out, truth, axes_of(len(x.shape), dims), combine, identity, "int8")


def arg_extreme(
    larger: bool, value: Out | None, index: Out, x: te.Tensor, axes: Sequence[int]
) -> tuple[te.Tensor, ...]:
    """The extreme elements over `axes`, unless `value` is None, and their row-major positions, in the shapes given.

    A loop, since no reduction of pairs in TVM reads bfloat16. A result that nobody reads would be memory that a kernel
    on a GPU cannot have.
    """
    dtype, shape = _extreme_dtype(str(x.dtype)), shape_of(x)
    counted = "int32" if count(x, axes) < 2**31 else "int64"
    keepdim = len(index.shape) == len(shape)

    def body(inputs: Sequence[Elements], outs: Sequence[Elements]) -> None:
        source, (*values, indices) = inputs[0], outs
        with lines(shape, axes) as places:
            best, where = local(dtype, len(places)), local(counted, len(places))
            for u, line in enumerate(places):
                best[u] = ex.cast(source[line], dtype)
                where[u] = tirx.const(0, counted)
            with grid([shape[d] for d in axes]) as k:
                linear: Any = tirx.const(0, counted)
                for d, position in zip(axes, k, strict=True):
                    linear = linear * shape[d] + ex.cast(position, counted)
                for u, line in enumerate(places):
                    at = list(line)
                    for d, position in zip(axes, k, strict=True):
                        at[d] = position
                    new = ex.cast(source[at], dtype)
                    beyond = new > best[u] if larger else new < best[u]
                    first_nan = tirx.all(ex.is_nan(new), ex.negate(ex.is_nan(best[u])))
                    where[u] = tirx.Select(tirx.any(beyond, first_nan), linear, where[u])
                    best[u] = tirx.Select(tirx.any(beyond, first_nan), new, best[u])
            for u, line in enumerate(places):
                target = line if keepdim else [i for d, i in enumerate(line) if d not in axes]
                if value is not None:
                    values[0][target] = ex.cast(best[u], value.dtype)
                indices[target] = ex.cast(where[u], "int64")

    return loop_nest([index] if value is None else [value, index], [x], body, "extreme")


def _arg(larger: bool, out: Out, x: te.Tensor, dim: int | None = None, keepdim: bool = False) -> te.Tensor:
    if not x.shape or 0 in out.shape:
        return ex.filled(out, 0)
    return arg_extreme(larger, None, out, x, axes_of(len(x.shape), dim))[0]


def _extreme_with_index(
    larger: bool, out: tuple[Out, Out], x: te.Tensor, dim: int, keepdim: bool = False
) -> tuple[te.Tensor, ...]:
    if not x.shape or 0 in out[0].shape:
        return ex.copy(out[0], x), ex.filled(out[1], 0)
    return arg_extreme(larger, *out, x, axes_of(len(x.shape), dim))


lowers(aten.argmax.default)(functools.partial(_arg, True))
lowers(aten.argmin.default)(functools.partial(_arg, False))
lowers(aten.max.dim)(functools.partial(_extreme_with_index, True))
lowers(aten.min.dim)(functools.partial(_extreme_with_index, False))


@lowers(aten.aminmax.default)
def aminmax(
    out: tuple[Out, Out], x: te.Tensor, *, dim: int | None = None, keepdim: bool = False
) -> tuple[te.Tensor, te.Tensor]:
    return amin(out[0], x, dim), amax(out[1], x, dim)


def variance(out: Out, x: te.Tensor, axes: Sequence[int], correction: Scalar | None) -> tuple[te.Tensor, te.Tensor]:
    """Variance in the shape and dtype of `out`, and the mean with its axes kept.

    Nothing cancels: what is squared is the distance from the mean, and from the mean of that, which is not 0 where the
    mean itself was rounded (values around 1e6 that vary by 1).
    """
    dtype = ex.compute_dtype(out.dtype)
    size = count(x, axes)

    def mean_of(values: te.Tensor) -> te.Tensor:
        return pointwise(
            Out(tuple(1 if d in axes else e for d, e in enumerate(shape_of(x))), dtype),
            lambda total: ex.divide(total, ex.constant(size, dtype)),
            sum_of(values, axes, dtype),
        )

    def less(values: te.Tensor, means: te.Tensor) -> te.Tensor:
        def subtracted(*i: Any) -> Any:
            return ex.subtract(ex.cast(values(*i), dtype), ex.read(means, i))

        return te.compute(shape_of(x), subtracted, name="centred")

    average = mean_of(x)
    centred = less(x, average)
    centred = less(centred, mean_of(centred))
    degrees = ex.constant(max(0.0, size - (1 if correction is None else correction)), dtype)
    squares = reduced_to(
        out,
        centred,
        axes,
        plus,
        0,
        dtype,
        element=lambda value, *_: value * value,
        finish=lambda total: ex.divide(total, degrees),
    )
    return squares, average


@lowers(aten.var.correction)
def var(
    out: Out, x: te.Tensor, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False
) -> te.Tensor:
    return variance(out, x, axes_of(len(x.shape), dim), correction)[0]


@lowers(aten.std.correction)
def std(
    out: Out, x: te.Tensor, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False
) -> te.Tensor:
    wide = Out(out.shape, "float64")  # as in PyTorch: a variance is out of float32's range where its root is not
    squares = var(wide, x, dim, correction=correction, keepdim=keepdim)
    return pointwise(out, tirx.sqrt, squares, dtype="float64")


@lowers(aten.var_mean.correction)
def var_mean(
    out: tuple[Out, Out],
    x: te.Tensor,
    dim: Dims = None,
    *,
    correction: Scalar | None = None,
    keepdim: bool = False,
) -> tuple[te.Tensor, te.Tensor]:
    axes = axes_of(len(x.shape), dim)
    return variance(out[0], x, axes, correction)[0], mean(out[1], x, axes)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    out: Out, x: te.Tensor, ord: Scalar = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> te.Tensor:
    axes = axes_of(len(x.shape), dim)
    working = ex.compute_dtype(out.dtype)
    exponent = float(ord)

    def reduced(combine: Combine, identity: Scalar, element: Any, finish: Any = None) -> te.Tensor:
        return reduced_to(
            out, x, axes, combine, identity, working, element=lambda value, *_: element(value), finish=finish
        )

    if exponent == math.inf:
        return reduced(ex.maximum, 0, tirx.abs)
    if exponent == -math.inf:
        return reduced(ex.minimum, math.inf, tirx.abs)
    if exponent == 0:
        return reduced(plus, 0, lambda v: ex.cast(ex.is_true(v), working))
    if exponent == 1:
        return reduced(plus, 0, tirx.abs)
    if exponent == 2:
        return reduced(plus, 0, lambda v: v * v, tirx.sqrt)

    def to_the(power: float) -> Callable[[Any], Any]:
        return lambda v: ex.libm("pow", v, ex.constant(power, working))

    return reduced(plus, 0, lambda v: to_the(exponent)(tirx.abs(v)), to_the(1 / exponent))
