"""Arithmetic, comparisons, logic: result[i] = f(a[i], b[i], ...), broadcast and promoted as torch does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .expressions import Scalar, pointwise
from .registry import Out, lowers

aten = torch.ops.aten
prims = torch.ops.prims

Operand: TypeAlias = Any  # a te.Tensor or a number


# Arithmetic


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(out: Out, a: Operand, b: Operand, alpha: Scalar = 1) -> te.Tensor:
    return pointwise(out, lambda x, y: ex.add(x, _scaled(y, alpha)), a, b)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(out: Out, a: Operand, b: Operand, alpha: Scalar = 1) -> te.Tensor:
    return pointwise(out, lambda x, y: ex.subtract(x, _scaled(y, alpha)), a, b)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(out: Out, a: Operand, b: Operand, alpha: Scalar = 1) -> te.Tensor:
    return sub(out, b, a, alpha)


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def mul(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, ex.multiply, a, b)


def _scaled(y: Any, alpha: Scalar) -> Any:
    return y if alpha == 1 else ex.multiply(y, ex.constant(alpha, ex.dtype_of(y)))


def _dtype(operand: Any) -> torch.dtype:
    value = operand.meta["val"] if isinstance(operand, fx.Node) else torch.tensor(operand)
    dtype: torch.dtype = value.dtype
    return dtype


def _divisor_not_zero(node: fx.Node) -> str | None:
    """Integers are divided only by a constant: torch raises on a zero divisor, machine code would trap."""
    if any(_dtype(arg).is_floating_point for arg in node.args[:2]):
        return None
    if isinstance(node.args[1], (int, bool)) and node.args[1] not in (0, False):
        return None
    return "integer division by a tensor (a zero must raise) is left to PyTorch"


@lowers(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def div(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, ex.divide, a, b)


def _can_divide_mode(node: fx.Node) -> str | None:
    return None if node.kwargs.get("rounding_mode") is None else _divisor_not_zero(node)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode, can=_can_divide_mode)
def div_mode(out: Out, a: Operand, b: Operand, rounding_mode: str | None = None) -> te.Tensor:
    if rounding_mode is None:
        return div(out, a, b)
    if rounding_mode == "floor":
        return floor_divide(out, a, b)
    if ex.is_float(out.dtype):
        return pointwise(out, lambda x, y: tirx.trunc(ex.divide(x, y)), a, b)
    return pointwise(out, lambda x, y: _by_constant(tirx.truncdiv, x, y), a, b)


@lowers(aten.floor_divide.default, can=_divisor_not_zero)
def floor_divide(out: Out, a: Operand, b: Operand) -> te.Tensor:
    if ex.is_float(out.dtype):
        return pointwise(out, _floor_divide, a, b)
    return pointwise(out, lambda x, y: _by_constant(tirx.floordiv, x, y), a, b)


def _by_constant(divide: Callable[..., Any], x: Any, y: Any) -> Any:
    # The smallest integer / -1 traps on x86; its negation wraps as torch's does.
    return ex.negative(x) if isinstance(y, tirx.IntImm) and y.value == -1 else divide(x, y)


def _floor_divide(x: Any, y: Any) -> Any:
    """c10::div_floor_floating: divides x less its remainder, which is exact where floor(x / y) is not."""
    zero, one = ex.constant(0, ex.dtype_of(x)), ex.constant(1, ex.dtype_of(x))

    def rounded(quotient: Any) -> Any:
        floor = tirx.floor(quotient)
        nearest = tirx.Select(quotient - floor > 0.5, floor + one, floor)
        return tirx.Select(quotient.equal(zero), tirx.copysign(zero, ex.divide(x, y)), nearest)

    def finish(modulus: Any) -> Any:
        wrong_sign = tirx.all(ex.not_equal(modulus, zero), ex.not_equal(y < zero, modulus < zero))
        quotient = ex.divide(x - modulus, y)
        return rounded(tirx.Select(wrong_sign, quotient - one, quotient))

    return tirx.Select(y.equal(zero), ex.divide(x, y), finish(ex.libm("fmod", x, y)))


@lowers(aten.fmod.Tensor, aten.fmod.Scalar, can=_divisor_not_zero)
def fmod(out: Out, a: Operand, b: Operand) -> te.Tensor:
    if ex.is_float(out.dtype):
        return pointwise(out, functools.partial(ex.libm, "fmod"), a, ex.rounded(b, out.dtype))
    return pointwise(out, lambda x, y: _remainder_by_constant(tirx.truncmod, x, y), a, b)


@lowers(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor, can=_divisor_not_zero)
def remainder(out: Out, a: Operand, b: Operand) -> te.Tensor:
    if not ex.is_float(out.dtype):
        return pointwise(out, lambda x, y: _remainder_by_constant(tirx.floormod, x, y), a, b)

    def modulo(x: Any, y: Any) -> Any:
        zero = ex.constant(0, ex.dtype_of(x))

        def signed(modulus: Any) -> Any:
            wrong = tirx.all(ex.not_equal(modulus, zero), ex.not_equal(y < zero, modulus < zero))
            return tirx.Select(wrong, modulus + y, modulus)

        return signed(ex.libm("fmod", x, y))

    return pointwise(out, modulo, ex.rounded(a, out.dtype), ex.rounded(b, out.dtype))


def _remainder_by_constant(modulo: Callable[..., Any], x: Any, y: Any) -> Any:
    return tirx.const(0, ex.dtype_of(x)) if isinstance(y, tirx.IntImm) and y.value == -1 else modulo(x, y)


def _can_raise(node: fx.Node) -> str | None:
    exponent = node.args[1]
    if node.meta["val"].dtype.is_floating_point or (isinstance(exponent, int) and 0 <= exponent <= 64):
        return None
    return "an integer power whose exponent is not a constant up to 64"


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, can=_can_raise)
def power(out: Out, base: Operand, exponent: Operand) -> te.Tensor:
    if isinstance(exponent, te.Tensor):
        return pointwise(out, _pow, base, exponent)
    if not ex.is_float(out.dtype):
        assert isinstance(exponent, int)
        return pointwise(out, lambda x: _integer_power(x, exponent), base)
    special: dict[float, Callable[..., Any]] = {  # those torch's kernel treats apart
        0.0: lambda x: ex.constant(1, ex.dtype_of(x)),
        0.5: tirx.sqrt,
        1.0: lambda x: x,
        2.0: lambda x: x * x,
        3.0: lambda x: x * x * x,
        -0.5: lambda x: _reciprocal(tirx.sqrt(x)),
        -1.0: _reciprocal,
        -2.0: lambda x: _reciprocal(x * x),
    }
    if exponent in special:
        return pointwise(out, special[exponent], base)
    return pointwise(out, lambda x: _pow(x, ex.constant(exponent, ex.dtype_of(x))), base)


@lowers(aten.pow.Scalar, can=_can_raise)
def power_of_number(out: Out, base: Scalar, exponent: te.Tensor) -> te.Tensor:
    return pointwise(out, _pow, base, exponent)


def _pow(x: Any, y: Any) -> Any:
    return ex.libm("pow", x, y)


def _integer_power(x: Any, exponent: int) -> Any:
    if exponent == 0:
        return ex.constant(1, ex.dtype_of(x))
    if exponent == 1:
        return x
    root = _integer_power(ex.multiply(x, x), exponent // 2)
    return ex.multiply(root, x) if exponent % 2 else root


def _reciprocal(x: Any) -> Any:
    return ex.constant(1, ex.dtype_of(x)) / x


@lowers(aten.maximum.default)
def maximum(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, ex.maximum, a, b, dtype=out.dtype)


@lowers(aten.minimum.default)
def minimum(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, ex.minimum, a, b, dtype=out.dtype)


@lowers(aten.fmax.default)
def fmax(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, lambda x, y: tirx.Select(tirx.any(y < x, ex.is_nan(y)), x, y), a, b)


@lowers(aten.fmin.default)
def fmin(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return pointwise(out, lambda x, y: tirx.Select(tirx.any(x < y, ex.is_nan(y)), x, y), a, b)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(out: Out, x: Operand, low: Operand | None = None, high: Operand | None = None) -> te.Tensor:
    bounds = [(bound, f) for bound, f in ((low, ex.maximum), (high, ex.minimum)) if bound is not None]

    def clamped(value: Any, *limits: Any) -> Any:
        for limit, (_, choose) in zip(limits, bounds, strict=True):
            value = choose(value, limit)
        return value

    return pointwise(out, clamped, x, *(bound for bound, _ in bounds), dtype=out.dtype)


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(out: Out, x: Operand, low: Operand) -> te.Tensor:
    return clamp(out, x, low)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(out: Out, x: Operand, high: Operand) -> te.Tensor:
    return clamp(out, x, None, high)


@lowers(aten.addcmul.default)
def addcmul(out: Out, x: Operand, a: Operand, b: Operand, value: Scalar = 1) -> te.Tensor:
    return pointwise(out, lambda x, a, b: ex.add(x, ex.multiply(_scaled(a, value), b)), x, a, b)


@lowers(aten.addcdiv.default)
def addcdiv(out: Out, x: Operand, a: Operand, b: Operand, value: Scalar = 1) -> te.Tensor:
    return pointwise(out, lambda x, a, b: x + _scaled(a, value) / b, x, a, b)


@lowers(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(out: Out, start: Operand, end: Operand, weight: Operand) -> te.Tensor:
    def mix(a: Any, b: Any, w: Any) -> Any:
        one, half = ex.constant(1, ex.dtype_of(a)), ex.constant(0.5, ex.dtype_of(a))
        near = tirx.all(w < half, -half < w)  # from the nearer end, so that weight 1 gives `end` exactly
        return tirx.Select(near, a + w * (b - a), b - (b - a) * (one - w))

    return pointwise(out, mix, start, end, weight)


# Comparisons and logic


def _comparison(compare: Callable[..., Any], out: Out, a: Operand, b: Operand) -> te.Tensor:
    common = ex.result_type(a, b)
    return pointwise(out, compare, a, b, dtype="int8" if common == "bool" else common)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": ex.equal,
    "ne": ex.not_equal,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
for _name, _compare in COMPARISONS.items():
    lowers(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(functools.partial(_comparison, _compare))


@lowers(aten.logical_and.default)
def logical_and(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return _logical(tirx.all, out, a, b)


@lowers(aten.logical_or.default)
def logical_or(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return _logical(tirx.any, out, a, b)


@lowers(aten.logical_xor.default)
def logical_xor(out: Out, a: Operand, b: Operand) -> te.Tensor:
    return _logical(ex.not_equal, out, a, b)


@lowers(aten.logical_not.default)
def logical_not(out: Out, a: Operand) -> te.Tensor:
    return _logical(ex.negate, out, a)


def _logical(combine: Callable[..., Any], out: Out, *operands: Operand) -> te.Tensor:
    return pointwise(out, combine, *operands, dtype="bool")


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(out: Out, condition: te.Tensor, a: Operand, b: Operand) -> te.Tensor:
    def element(*index: Any) -> Any:
        chosen = ex.cast(ex.read(condition, index), "bool")
        return tirx.Select(chosen, *(ex.cast(ex.read(x, index), out.dtype) for x in (a, b)))

    return te.compute(out.shape, element, name="where")


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(out: Out, x: te.Tensor, mask: te.Tensor, value: Operand) -> te.Tensor:
    return where(out, mask, value, x)


# Copies


@lowers(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.expand.default,
    prims.convert_element_type.default,
)
def copy(out: Out, x: te.Tensor, *_: Any, **__: Any) -> te.Tensor:
    return ex.copy(out, x)


@lowers(aten.fill.Scalar, aten.fill.Tensor, aten.copy.default)
def fill(out: Out, x: te.Tensor, value: Operand, *_: Any) -> te.Tensor:
    return te.compute(out.shape, lambda *i: ex.cast(ex.read(value, i), out.dtype), name="fill")


@lowers(aten.nan_to_num.default)
def nan_to_num(
    out: Out, x: te.Tensor, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> te.Tensor:
    if not ex.is_float(out.dtype):
        return ex.copy(out, x)
    limits = torch.finfo(ex.torch_dtype(out.dtype))
    number, high, low = (
        ex.constant(value if value is not None else default, out.dtype)
        for value, default in ((nan, 0.0), (posinf, limits.max), (neginf, limits.min))
    )

    def replaced(v: Any) -> Any:
        infinity = tirx.const(math.inf, out.dtype)
        finite = tirx.Select(v >= infinity, high, tirx.Select(v <= -infinity, low, v))
        return tirx.Select(ex.is_nan(v), number, finite)

    return pointwise(out, replaced, x, dtype=out.dtype)
