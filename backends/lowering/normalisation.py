"""Softmax and the normalisations, each as its passes over the rows; statistics in float32 for half precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .expressions import pointwise
from .reduction import axes_of, max_of, shape_of, sum_of, variance
from .registry import Out, lowers

aten = torch.ops.aten


def _shifted(out: Out, x: te.Tensor, dim: int) -> tuple[te.Tensor, tuple[int, ...], str]:
    """x less its maximum along `dim`, the axes reduced over, and the dtype computed in."""
    dtype = ex.compute_dtype(out.dtype)
    axes = axes_of(len(x.shape), dim)
    largest = max_of(x, axes, dtype)
    shifted = te.compute(shape_of(x), lambda *i: ex.cast(x(*i), dtype) - ex.read(largest, i), name="shifted")
    return shifted, axes, dtype


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(out: Out, x: te.Tensor, dim: int, *_: Any, **__: Any) -> te.Tensor:
    shifted, axes, dtype = _shifted(out, x, dim)
    powers = pointwise(Out(shape_of(x), dtype), tirx.exp, shifted)
    total = sum_of(powers, axes, dtype)
    return pointwise(out, lambda power, whole: power / whole, powers, total)


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(out: Out, x: te.Tensor, dim: int, *_: Any, **__: Any) -> te.Tensor:
    shifted, axes, dtype = _shifted(out, x, dim)
    total = sum_of(shifted, axes, dtype, lambda value, *_: tirx.exp(value))
    return pointwise(out, lambda value, whole: value - tirx.log(whole), shifted, total)


def _kept(shape: Sequence[int], axes: Sequence[int], dtype: str) -> Out:
    return Out(tuple(1 if d in axes else extent for d, extent in enumerate(shape)), dtype)


def _moments(x: te.Tensor, axes: Sequence[int], dtype: str, eps: float) -> tuple[te.Tensor, te.Tensor]:
    """Mean and 1 / sqrt(variance + eps) over `axes`, which are kept."""
    spread, average = variance(_kept(shape_of(x), axes, dtype), x, axes, 0)
    inverse = pointwise(Out(shape_of(spread), dtype), lambda v: _inverse_root(v, eps), spread)
    return average, inverse


def _inverse_root(v: Any, eps: float) -> Any:
    one, epsilon = ex.constant(1, ex.dtype_of(v)), ex.constant(eps, ex.dtype_of(v))
    return one / tirx.sqrt(v + epsilon)


def _layer_norm(
    out: Out, x: te.Tensor, extents: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    dtype = ex.compute_dtype(out.dtype)
    rank = len(x.shape)
    average, inverse = _moments(x, tuple(range(rank - len(extents), rank)), dtype, eps)

    def normalised(*index: Any) -> Any:
        value = (ex.cast(x(*index), dtype) - ex.read(average, index)) * ex.read(inverse, index)
        return ex.cast(_affine(value, weight, bias, index, dtype), out.dtype)

    return te.compute(out.shape, normalised, name="layer_norm"), average, inverse


def _affine(value: Any, weight: Any, bias: Any, index: Sequence[Any], dtype: str) -> Any:
    if weight is not None:
        value = value * ex.cast(ex.read(weight, index), dtype)
    if bias is not None:
        value = value + ex.cast(ex.read(bias, index), dtype)
    return value


@lowers(aten.layer_norm.default)
def layer_norm(
    out: Out,
    x: te.Tensor,
    normalized_shape: Sequence[int],
    weight: te.Tensor | None = None,
    bias: te.Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> te.Tensor:
    return _layer_norm(out, x, normalized_shape, weight, bias, eps)[0]


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    out: tuple[Out, Out, Out],
    x: te.Tensor,
    normalized_shape: Sequence[int],
    weight: Any,
    bias: Any,
    eps: float,
) -> tuple[te.Tensor, ...]:
    result, average, inverse = _layer_norm(out[0], x, normalized_shape, weight, bias, eps)
    return result, ex.copy(out[1], average), ex.copy(out[2], inverse)


@lowers(aten.rms_norm.default, aten._fused_rms_norm.default)
def rms_norm(
    out: Any,
    x: te.Tensor,
    normalized_shape: Sequence[int],
    weight: te.Tensor | None = None,
    eps: float | None = None,
) -> Any:
    result = out[0] if isinstance(out, tuple) else out
    dtype = ex.compute_dtype(result.dtype)
    rank = len(x.shape)
    axes = tuple(range(rank - len(normalized_shape), rank))
    size = ex.constant(math.prod(normalized_shape), dtype)
    smallest = torch.finfo(ex.torch_dtype(dtype)).eps if eps is None else eps
    squares = sum_of(x, axes, dtype, lambda value, *_: value * value)
    inverse = pointwise(_kept(shape_of(x), axes, dtype), lambda v: _inverse_root(v / size, smallest), squares)

    def normalised(*index: Any) -> Any:
        value = ex.cast(x(*index), dtype) * ex.read(inverse, index)
        return ex.cast(_affine(value, weight, None, index, dtype), result.dtype)

    scaled = te.compute(result.shape, normalised, name="rms_norm")
    return (scaled, ex.copy(out[1], inverse)) if isinstance(out, tuple) else scaled


def _group_norm(
    out: Out, x: te.Tensor, weight: Any, bias: Any, groups: int, eps: float
) -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    """x is [N, C, ...]; a view [N, groups, C / groups, ...] is normalised over all but the first two axes."""
    dtype = ex.compute_dtype(out.dtype)
    batch, channels, *spatial = shape_of(x)
    width = channels // groups
    grouped = te.compute(
        (batch, groups, width, *spatial),
        lambda n, g, c, *s: ex.cast(x(n, g * width + c, *s), dtype),
        name="grouped",
    )
    average, inverse = _moments(grouped, tuple(range(2, len(x.shape) + 1)), dtype, eps)
    ones = [0] * (len(x.shape) - 1)

    def normalised(n: Any, c: Any, *s: Any) -> Any:
        group = tirx.floordiv(c, width)
        value = (ex.cast(x(n, c, *s), dtype) - average(n, group, *ones)) * inverse(n, group, *ones)
        return ex.cast(_affine(value, weight, bias, (c,), dtype), out.dtype)

    return te.compute(out.shape, normalised, name="group_norm"), average, inverse


@lowers(aten.group_norm.default)
def group_norm(
    out: Out,
    x: te.Tensor,
    num_groups: int,
    weight: te.Tensor | None = None,
    bias: te.Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> te.Tensor:
    return _group_norm(out, x, weight, bias, num_groups, eps)[0]


@lowers(aten.native_group_norm.default)
def native_group_norm(
    out: tuple[Out, Out, Out],
    x: te.Tensor,
    weight: Any,
    bias: Any,
    n: int,
    c: int,
    hw: int,
    group: int,
    eps: float,
) -> tuple[te.Tensor, ...]:
    result, average, inverse = _group_norm(out[0], x, weight, bias, group, eps)
    ones = [0] * (len(x.shape) - 1)

    def squeezed(kind: Out, statistic: te.Tensor) -> te.Tensor:
        return te.compute(kind.shape, lambda i, g: ex.cast(statistic(i, g, *ones), kind.dtype), name="squeezed")

    return result, squeezed(out[1], average), squeezed(out[2], inverse)


# Batch normalisation


def _batch_norm(out: Out, x: te.Tensor, weight: Any, bias: Any, average: te.Tensor, inverse: te.Tensor) -> te.Tensor:
    """(x - average[c]) * inverse[c] * weight[c] + bias[c], in float32 for half precision."""
    dtype = ex.compute_dtype(out.dtype)

    def normalised(*index: Any) -> Any:
        channel = (index[1],)
        value = (ex.cast(x(*index), dtype) - ex.cast(average(*channel), dtype)) * inverse(*channel)
        return ex.cast(_affine(value, weight, bias, channel, dtype), out.dtype)

    return te.compute(out.shape, normalised, name="batch_norm")


def _with_running_statistics(
    out: Out, x: te.Tensor, weight: Any, bias: Any, mean: te.Tensor, var: te.Tensor, eps: float
) -> te.Tensor:
    dtype = ex.compute_dtype(out.dtype)
    inverse = pointwise(Out(shape_of(var), dtype), lambda v: _inverse_root(v, eps), var)
    return _batch_norm(out, x, weight, bias, mean, inverse)


def _inference_only(node: fx.Node) -> str | None:
    training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
    if training:
        return "batch normalisation that updates its statistics"
    return None if node.args[3] is not None else "batch normalisation without running statistics"


@lowers(aten.batch_norm.default, can=_inference_only)
def batch_norm(
    out: Out,
    x: te.Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> te.Tensor:
    return _with_running_statistics(out, x, weight, bias, mean, var, eps)


@lowers(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm_no_training(
    out: tuple[Out, Out, Out],
    x: te.Tensor,
    weight: Any,
    bias: Any,
    mean: te.Tensor,
    var: te.Tensor,
    momentum: float,
    eps: float,
) -> tuple[te.Tensor, ...]:
    result = _with_running_statistics(out[0], x, weight, bias, mean, var, eps)
    return result, ex.filled(out[1], 0), ex.filled(out[2], 0)  # the two are empty
