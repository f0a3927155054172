"""Functions of one element: result[i] = f(x[i]); integers become float32 first where f is a real function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .expressions import Scalar, pointwise
from .registry import Out, lowers

aten = torch.ops.aten

Function = Callable[..., Any]


def _unary(function: Function, out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, function, x)


def _libm(name: str) -> Function:
    return functools.partial(ex.libm, name)


def _one(x: Any) -> Any:
    return ex.constant(1, ex.dtype_of(x))


# TVM's expansions of the hyperbolic functions and their inverses lose all digits near 0: those are libm's.
REAL_FUNCTIONS: dict[torch._ops.OpOverload, Function] = {
    aten.acos.default: _libm("acos"),
    aten.acosh.default: _libm("acosh"),
    aten.asin.default: _libm("asin"),
    aten.asinh.default: _libm("asinh"),
    aten.atan.default: _libm("atan"),
    aten.atanh.default: _libm("atanh"),
    aten.cos.default: tirx.cos,
    aten.cosh.default: _libm("cosh"),
    aten.erf.default: tirx.erf,
    aten.erfc.default: _libm("erfc"),
    aten.exp.default: tirx.exp,
    aten.exp2.default: _libm("exp2"),
    aten.expm1.default: _libm("expm1"),
    aten.lgamma.default: _libm("lgamma"),
    aten.log.default: tirx.log,
    aten.log10.default: _libm("log10"),
    aten.log1p.default: _libm("log1p"),
    aten.log2.default: _libm("log2"),
    aten.reciprocal.default: lambda x: _one(x) / x,
    aten.rsqrt.default: lambda x: _one(x) / tirx.sqrt(x),
    aten.sigmoid.default: tirx.sigmoid,
    aten.sin.default: tirx.sin,
    aten.sinh.default: _libm("sinh"),
    aten.sqrt.default: tirx.sqrt,
    aten.tan.default: _libm("tan"),
    aten.tanh.default: tirx.tanh,
}
for _operator, _function in REAL_FUNCTIONS.items():
    lowers(_operator)(functools.partial(_unary, _function))


# Functions that keep the dtype, and are the identity (or simple) on integers


def _rounding(function: Function, out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, function, x) if ex.is_float(out.dtype) else ex.copy(out, x)


ROUNDINGS: dict[torch._ops.OpOverload, Function] = {
    aten.ceil.default: tirx.ceil,
    aten.floor.default: tirx.floor,
    aten.round.default: tirx.nearbyint,  # to even, as torch; tirx.round goes away from zero
    aten.trunc.default: tirx.trunc,
}
for _operator, _function in ROUNDINGS.items():
    lowers(_operator)(functools.partial(_rounding, _function))


@lowers(aten.round.decimals)
def round_decimals(out: Out, x: te.Tensor, *, decimals: int) -> te.Tensor:
    if not ex.is_float(out.dtype):
        return ex.copy(out, x)

    def rounded(v: Any) -> Any:
        scale = ex.constant(10.0 ** abs(decimals), ex.dtype_of(v))
        return tirx.nearbyint(v / scale) * scale if decimals < 0 else tirx.nearbyint(v * scale) / scale

    return pointwise(out, rounded, x)


@lowers(aten.frac.default)
def frac(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: v - tirx.trunc(v), x)


@lowers(aten.neg.default)
def neg(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, ex.negative, x)


@lowers(aten.abs.default)
def absolute(out: Out, x: te.Tensor) -> te.Tensor:
    if out.dtype in ("bool", "uint8"):
        return ex.copy(out, x)
    if not ex.is_float(out.dtype):  # not tirx.abs: the simplifier knows that no number is below 0, and one is
        return pointwise(out, lambda v: tirx.Select(v < tirx.const(0, out.dtype), ex.negative(v), v), x)
    return pointwise(out, tirx.abs, x)


@lowers(aten.sign.default, aten.sgn.default)
def sign(out: Out, x: te.Tensor) -> te.Tensor:
    if out.dtype == "bool":
        return ex.copy(out, x)

    def sign_of(v: Any) -> Any:
        zero, one = tirx.const(0, ex.dtype_of(v)), tirx.const(1, ex.dtype_of(v))
        negative = zero if out.dtype == "uint8" else zero - one
        return tirx.Select(v > zero, one, tirx.Select(v < zero, negative, zero))

    return pointwise(out, sign_of, x)


@lowers(aten.signbit.default)
def signbit(out: Out, x: te.Tensor) -> te.Tensor:
    dtype = ex.compute_dtype(ex.dtype_of(x))
    if not ex.is_float(dtype):
        return pointwise(out, lambda v: v < tirx.const(0, dtype), x, dtype=dtype)
    integer = dtype.replace("float", "int")
    return pointwise(out, lambda v: tirx.reinterpret(integer, v) < tirx.const(0, integer), x, dtype=dtype)


@lowers(aten.isnan.default)
def isnan(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, ex.is_nan, x, dtype=ex.dtype_of(x))


@lowers(aten.isinf.default)
def isinf(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, ex.is_inf, x, dtype=_widened(x))


@lowers(aten.isfinite.default)
def isfinite(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, lambda v: ex.negate(tirx.any(ex.is_nan(v), ex.is_inf(v))), x, dtype=_widened(x))


@lowers(aten.isposinf.default)
def isposinf(out: Out, x: te.Tensor) -> te.Tensor:
    return _is_infinity(out, x, math.inf)


@lowers(aten.isneginf.default)
def isneginf(out: Out, x: te.Tensor) -> te.Tensor:
    return _is_infinity(out, x, -math.inf)


def _is_infinity(out: Out, x: te.Tensor, infinity: float) -> te.Tensor:
    dtype = _widened(x)
    if not ex.is_float(dtype):
        return ex.filled(out, False)
    return pointwise(out, lambda v: v.equal(tirx.const(infinity, dtype)), x, dtype=dtype)


def _widened(x: te.Tensor) -> str:
    return ex.compute_dtype(ex.dtype_of(x))


# Functions of two elements that C's library has


def _binary(function: Function, out: Out, a: Any, b: Any) -> te.Tensor:
    return pointwise(out, function, a, b)


lowers(aten.atan2.default)(functools.partial(_binary, _libm("atan2")))
lowers(aten.hypot.default)(functools.partial(_binary, _libm("hypot")))
lowers(aten.copysign.Tensor, aten.copysign.Scalar)(functools.partial(_binary, tirx.copysign))


@lowers(aten.nextafter.default)
def nextafter(out: Out, a: te.Tensor, b: te.Tensor) -> te.Tensor:
    return pointwise(out, functools.partial(ex.libm, "nextafter"), a, b, dtype=out.dtype)


@lowers(aten.heaviside.default)
def heaviside(out: Out, x: te.Tensor, values: te.Tensor) -> te.Tensor:
    def step(v: Any, at_zero: Any) -> Any:
        zero, one = tirx.const(0, ex.dtype_of(v)), tirx.const(1, ex.dtype_of(v))
        return tirx.Select(v.equal(zero), at_zero, tirx.Select(v > zero, one, zero))

    return pointwise(out, step, x, values)


@lowers(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
def xlogy(out: Out, x: Any, y: Any) -> te.Tensor:
    return pointwise(out, functools.partial(_times_log, tirx.log), x, y)


@lowers(aten.special_xlog1py.default, aten.special_xlog1py.other_scalar, aten.special_xlog1py.self_scalar)
def xlog1py(out: Out, x: Any, y: Any) -> te.Tensor:
    return pointwise(out, functools.partial(_times_log, _libm("log1p")), x, y)


def _times_log(log: Function, x: Any, y: Any) -> Any:
    zero = ex.constant(0, ex.dtype_of(x))
    product = tirx.Select(x.equal(zero), zero, x * log(y))
    return tirx.Select(ex.is_nan(y), y, product)


@lowers(aten.logaddexp.default)
def logaddexp(out: Out, a: te.Tensor, b: te.Tensor) -> te.Tensor:
    def combined(x: Any, y: Any) -> Any:
        equal_infinities = tirx.all(ex.is_inf(x), x.equal(y))
        log_sum = ex.maximum(x, y) + ex.libm("log1p", tirx.exp(-tirx.abs(x - y)))
        return tirx.Select(equal_infinities, x, log_sum)

    return pointwise(out, combined, a, b)


@lowers(aten.logit.default)
def logit(out: Out, x: te.Tensor, eps: Scalar | None = None) -> te.Tensor:
    def odds(v: Any) -> Any:
        if eps is not None:
            v = ex.minimum(ex.maximum(v, ex.constant(eps, ex.dtype_of(v))), ex.constant(1 - eps, ex.dtype_of(v)))
        return tirx.log(v / (_one(v) - v))

    return pointwise(out, odds, x)
