"""Activation functions, each one expression of the element as torch's kernels compute it."""

from __future__ import annotations

import math
from typing import Any

import torch
from tvm import te, tirx

from ...passes import dialect
from . import expressions as ex
from .expressions import Scalar, pointwise
from .registry import Out, lowers

aten = torch.ops.aten


def _const(value: Scalar, like: Any) -> Any:
    return ex.constant(value, ex.dtype_of(like))


@lowers(aten.relu.default)
def relu(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: ex.maximum(v, _const(0, v)), x, dtype=out.dtype)


@lowers(aten.relu6.default)
def relu6(out: Out, x: te.Tensor) -> te.Tensor:
    return hardtanh(out, x, 0, 6)


@lowers(aten.hardtanh.default)
def hardtanh(out: Out, x: te.Tensor, low: Scalar = -1, high: Scalar = 1) -> te.Tensor:
    def clamped(v: Any) -> Any:
        return ex.minimum(ex.maximum(v, _const(low, v)), _const(high, v))

    return pointwise(out, clamped, x, dtype=out.dtype)


@lowers(aten.leaky_relu.default)
def leaky_relu(out: Out, x: te.Tensor, slope: Scalar = 0.01) -> te.Tensor:
    return pointwise(out, lambda v: tirx.Select(v > _const(0, v), v, ex.multiply(v, _const(slope, v))), x)


@lowers(aten.silu.default)
def silu(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: v / (_const(1, v) + tirx.exp(-v)), x)


@lowers(dialect.swish)
def swish(out: Out, x: te.Tensor, beta: Scalar) -> te.Tensor:
    return pointwise(out, lambda v: v / (_const(1, v) + tirx.exp(v * _const(-beta, v))), x)


@lowers(aten.gelu.default)
def gelu(out: Out, x: te.Tensor, *, approximate: str = "none") -> te.Tensor:
    return pointwise(out, _gelu_tanh if approximate == "tanh" else _gelu, x)


def _gelu(v: Any) -> Any:
    return v * _const(0.5, v) * (_const(1, v) + tirx.erf(v * _const(math.sqrt(0.5), v)))


def _gelu_tanh(v: Any) -> Any:
    inner = _const(math.sqrt(2 / math.pi), v) * (v + _const(0.044715, v) * v * v * v)
    return _const(0.5, v) * v * (_const(1, v) + tirx.tanh(inner))


def _relu6_of_shifted(v: Any) -> Any:
    return ex.minimum(ex.maximum(v + _const(3, v), _const(0, v)), _const(6, v))


@lowers(aten.hardsigmoid.default)
def hardsigmoid(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: _relu6_of_shifted(v) / _const(6, v), x)


@lowers(aten.hardswish.default)
def hardswish(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: v * _relu6_of_shifted(v) / _const(6, v), x)


@lowers(aten.elu.default)
def elu(out: Out, x: te.Tensor, alpha: Scalar = 1, scale: Scalar = 1, input_scale: Scalar = 1) -> te.Tensor:
    def exponential(v: Any) -> Any:
        negative = ex.libm("expm1", v * _const(input_scale, v)) * _const(float(alpha) * float(scale), v)
        return tirx.Select(v <= _const(0, v), negative, v * _const(scale, v))

    return pointwise(out, exponential, x)


@lowers(aten.celu.default)
def celu(out: Out, x: te.Tensor, alpha: Scalar = 1) -> te.Tensor:
    return elu(out, x, alpha, 1, 1 / float(alpha))


@lowers(aten.selu.default)
def selu(out: Out, x: te.Tensor) -> te.Tensor:
    return elu(out, x, 1.6732632423543772, 1.0507009873554805)


def _softplus(v: Any) -> Any:
    return ex.libm("log1p", tirx.exp(v))


@lowers(aten.softplus.default)
def softplus(out: Out, x: te.Tensor, beta: Scalar = 1, threshold: Scalar = 20) -> te.Tensor:
    def smooth(v: Any) -> Any:
        scaled = v * _const(beta, v)
        return tirx.Select(scaled > _const(threshold, v), v, _softplus(scaled) / _const(beta, v))

    return pointwise(out, smooth, x)


@lowers(aten.mish.default)
def mish(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: v * tirx.tanh(_softplus(v)), x)
