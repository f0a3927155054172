"""Special functions: in closed form where they have one, else as the sum that converges, always in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .expressions import pointwise
from .imperative import Elements, grid, local, loop_nest
from .registry import Out, lowers

aten = torch.ops.aten

WORKING = "float64"


def _number(value: float) -> Any:
    return tirx.const(float(value), WORKING)


def _choose(*cases: Any) -> Any:
    """_choose(condition, value, condition, value, ..., otherwise): the value of the first condition that holds."""
    *pairs, result = cases
    for i in range(len(pairs) - 2, -1, -2):
        result = tirx.Select(pairs[i], pairs[i + 1], result)
    return result


def _power(base: Any, exponent: Any) -> Any:
    return ex.libm("pow", base, exponent)


def elementwise_loop(out: Out, body: Callable[..., Any], *operands: Any) -> te.Tensor:
    """result[i] = body(operands[i]...), where the body may open loops and use local variables."""
    tensors = [operand for operand in operands if isinstance(operand, te.Tensor)]

    def nest(inputs: Sequence[Elements], outs: Sequence[Elements]) -> None:
        with grid(out.shape or [1], parallel=True) as index:
            at = index if out.shape else ()
            given = iter(inputs)
            values = [
                ex.cast(_broadcast(next(given), at) if isinstance(operand, te.Tensor) else operand, WORKING)
                for operand in operands
            ]
            outs[0][at] = ex.cast(body(*values), out.dtype)

    return loop_nest([out], tensors, nest, "special")[0]


def _broadcast(source: Elements, index: Sequence[Any]) -> Any:
    offset = len(index) - len(source.shape)
    return source[tuple(0 if extent == 1 else index[offset + d] for d, extent in enumerate(source.shape))]


@lowers(aten.angle.default)
def angle(out: Out, x: te.Tensor) -> te.Tensor:
    def phase(v: Any) -> Any:
        zero = tirx.const(0, ex.dtype_of(v))
        return tirx.Select(ex.is_nan(v), v, tirx.Select(v < zero, ex.constant(math.pi, ex.dtype_of(v)), zero))

    return pointwise(out, phase, x)


@lowers(aten.special_spherical_bessel_j0.default)
def spherical_bessel_j0(out: Out, x: te.Tensor) -> te.Tensor:
    def quotient(v: Any) -> Any:
        return _choose(v.equal(_number(0)), _number(1), ex.is_inf(v), _number(0), tirx.sin(v) / v)

    return pointwise(out, quotient, x, dtype=WORKING)


def _erfcx(v: Any) -> Any:
    """exp(v^2) erfc(v); from 25 on its asymptotic series, since the factors would over- and underflow."""
    inverse = _number(1) / (v * v)
    series = _number(1) - inverse * (_number(0.5) - inverse * (_number(0.75) - inverse * _number(1.875)))
    tail = series / (v * _number(math.sqrt(math.pi)))
    return tirx.Select(v > _number(25), tail, tirx.exp(v * v) * ex.libm("erfc", v))


@lowers(aten.special_erfcx.default)
def erfcx(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, _erfcx, x, dtype=WORKING)


@lowers(aten.digamma.default)
def digamma(out: Out, x: te.Tensor) -> te.Tensor:
    return pointwise(out, _digamma, x, dtype=WORKING)


def _digamma(x: Any) -> Any:
    """psi(x): reflected to x > 0, shifted to x >= 10, then the asymptotic series (Abramowitz and Stegun 6.3.18)."""
    zero, one = _number(0), _number(1)
    positive = tirx.Select(x < zero, one - x, x)
    shift = tirx.Select(positive < _number(10), tirx.ceil(_number(10) - positive), zero)
    large = positive + shift
    total = tirx.log(large) - _number(0.5) / large
    inverse = one / (large * large)
    series = zero
    for coefficient in (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12):
        series = (series + _number(coefficient)) * inverse
    total = total - series
    for i in range(10):
        step = positive + _number(i)
        total = total - tirx.Select(step < _number(10), one / step, zero)
    fraction = x - tirx.trunc(x)
    reflected = total - _number(math.pi) / ex.libm("tan", _number(math.pi) * fraction)
    pole = tirx.all(x < zero, fraction.equal(zero))
    minus_infinity = tirx.copysign(_number(math.inf), -x)
    return _choose(x.equal(zero), minus_infinity, pole, _number(math.nan), x < zero, reflected, ex.is_inf(x), x, total)


# (2k)! / B_2k, the divisors of the Euler-Maclaurin sum (Cephes, zeta.c).
_EULER_MACLAURIN = (
    12.0,
    -720.0,
    30240.0,
    -1209600.0,
    47900160.0,
    -1.8924375803183791606e9,
    7.47242496e10,
    -2.950130727918164224e12,
    1.1646782814350067249e14,
    -4.5979787224074726105e15,
    1.8152105401943546773e17,
    -7.1661652561756670113e18,
)


def _zeta(s: Any, q: Any) -> Any:
    """Hurwitz's zeta: terms (q + k)^-s until q + k > 9, then the rest by Euler and Maclaurin."""
    terms = tirx.max(_number(9), tirx.floor(_number(9) - q) + _number(1)).astype("int64")
    # A NaN or a huge argument must not become the length of a loop.
    terms = tirx.Select(tirx.all(q > _number(-1e6), q < _number(1e6)), terms, tirx.const(9, "int64"))
    total, term = local(WORKING), local(WORKING)
    term[0] = _power(q, _number(0) - s)
    total[0] = term[0]
    with grid([terms]) as (k,):
        term[0] = _power(q + (k + 1).astype(WORKING), _number(0) - s)
        total[0] = total[0] + term[0]
    last = q + terms.astype(WORKING)
    total[0] = total[0] + term[0] * last / (s - _number(1)) - _number(0.5) * term[0]
    factor = local(WORKING)
    factor[0] = s * term[0] / last
    for k, divisor in enumerate(_EULER_MACLAURIN):
        total[0] = total[0] + factor[0] / _number(divisor)
        factor[0] = factor[0] * (s + _number(2 * k + 1)) * (s + _number(2 * k + 2)) / (last * last)
    one, zero = _number(1), _number(0)
    whole = tirx.floor(q).equal(q)
    undefined = tirx.any(s < one, tirx.all(q <= zero, tirx.any(s < tirx.floor(s), tirx.floor(s) < s)))
    return _choose(
        s.equal(one),
        _number(math.inf),
        s < one,
        _number(math.nan),
        tirx.all(q <= zero, whole),
        _number(math.inf),
        undefined,
        _number(math.nan),
        total[0],
    )


@lowers(aten.special_zeta.default, aten.special_zeta.self_scalar, aten.special_zeta.other_scalar)
def zeta(out: Out, s: Any, q: Any) -> te.Tensor:
    return elementwise_loop(out, _zeta, s, q)


def _trigamma(x: Any) -> Any:
    """As torch's kernel does it, in the same dtype: near the poles that decides which large number comes out."""
    dtype = ex.dtype_of(x)
    one = ex.constant(1, dtype)
    reflected = x < ex.constant(0.5, dtype)
    sine = tirx.sin(ex.constant(math.pi, dtype) * x)
    at = tirx.Select(reflected, one - x, x)
    total = tirx.Select(reflected, ex.constant(-(math.pi**2), dtype) / (sine * sine), ex.constant(0, dtype))
    for _ in range(6):
        total = total + one / (at * at)
        at = at + one
    inverse = one / (at * at)
    series = ex.constant(1 / 6, dtype) - inverse * (ex.constant(1 / 30, dtype) - inverse * ex.constant(1 / 42, dtype))
    total = total + (one + one / (ex.constant(2, dtype) * at) + inverse * series) / at
    return tirx.Select(reflected, -total, total)


@lowers(aten.polygamma.default)
def polygamma(out: Out, n: int, x: te.Tensor) -> te.Tensor:
    if n == 0:
        return digamma(out, x)
    if n == 1:
        return pointwise(out, _trigamma, x)
    scale = math.factorial(n) * (1 if n % 2 else -1)
    return elementwise_loop(out, lambda v: _number(scale) * _zeta(_number(n + 1), v), x)


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's scheme, highest power first."""
    total = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _number(coefficient)
    return total


def _erfinv(y: Any) -> Any:
    """Rational approximations in the centre and the tails, then two Newton steps, as torch's calc_erfinv."""
    one = _number(1)
    square, z, root = local(WORKING), local(WORKING), local(WORKING)
    square[0] = y * y
    z[0] = tirx.sqrt(-tirx.log((one - tirx.abs(y)) / _number(2)))
    centre = y * (
        _polynomial(square[0], (-0.140543331, 0.914624893, -1.645349621, 0.886226899))
        / _polynomial(square[0], (0.012229801, -0.329097515, 1.442710462, -2.118377725, 1.0))
    )
    tail = tirx.copysign(
        _polynomial(z[0], (1.641345311, 3.429567803, -1.624906493, -1.970840454))
        / _polynomial(z[0], (1.637067800, 3.543889200, 1.0)),
        y,
    )
    root[0] = tirx.Select(tirx.abs(y) <= _number(0.7), centre, tail)
    for _ in range(2):
        slope = _number(2 / math.sqrt(math.pi)) * tirx.exp(_number(0) - root[0] * root[0])
        root[0] = root[0] - (tirx.erf(root[0]) - y) / slope
    size = tirx.abs(y)
    edge = tirx.copysign(_number(math.inf), y)
    return _choose(ex.is_nan(y), y, size > one, _number(math.nan), size.equal(one), edge, root[0])


@lowers(aten.erfinv.default)
def erfinv(out: Out, x: te.Tensor) -> te.Tensor:
    return elementwise_loop(out, _erfinv, x)


def _bessel_of_libm(name: str, x: Any) -> Any:
    """C's function (POSIX has the double one only), but NaN at infinity, as torch has it."""
    return tirx.Select(ex.is_inf(x), _number(math.nan), tirx.call_pure_extern(WORKING, name, x))


# Modified Bessel functions


def _scaled_i(order: int, x: Any) -> Any:
    """exp(-|x|) I_order(x): its power series up to 30, then the asymptotic one (Abramowitz and Stegun, 9.7.1)."""
    size = tirx.abs(x)
    near = tirx.min(size, _number(30))
    quarter = near * near * _number(0.25)
    term, total = local(WORKING), local(WORKING)
    term[0] = tirx.exp(_number(0) - near)
    if order == 1:
        term[0] = term[0] * near * _number(0.5)
    total[0] = term[0]
    with grid([80]) as (k,):
        n = (k + 1).astype(WORKING)
        term[0] = term[0] * quarter / (n * (n + _number(order)))
        total[0] = total[0] + term[0]
    far = tirx.max(size, _number(30))
    tail = local(WORKING)
    term[0] = _number(1) / tirx.sqrt(_number(2 * math.pi) * far)
    tail[0] = term[0]
    for k in range(1, 16):
        term[0] = term[0] * (_number(((2 * k - 1) ** 2 - 4 * order) / (8 * k)) / far)
        tail[0] = tail[0] + term[0]
    result = tirx.Select(size < _number(30), total[0], tail[0])
    if order == 1:
        result = tirx.copysign(result, x)
    return tirx.Select(ex.is_nan(x), x, result)


def _scaled_k(order: int, x: Any) -> Any:
    """exp(x) K_order(x).

    Up to 30 the integral of exp(-x (cosh t - 1)) cosh(order t) by the trapezoidal rule, to all digits; then the
    asymptotic series (Abramowitz and Stegun, 9.7.2).
    """
    steps = 256
    near = tirx.min(x, _number(30))
    # Where the integrand has fallen to exp(-45).
    end = ex.libm("acosh", _number(1) + _number(45) / near) + _number(0.5)
    width = end / _number(steps)
    total, term, tail = local(WORKING), local(WORKING), local(WORKING)
    total[0] = _number(0.5)
    with grid([steps]) as (k,):
        t = (k + 1).astype(WORKING) * width
        half = ex.libm("sinh", t * _number(0.5))
        weight = ex.libm("cosh", t) if order == 1 else _number(1)
        total[0] = total[0] + tirx.exp(_number(-2) * near * half * half) * weight
    far = tirx.max(x, _number(30))
    term[0] = tirx.sqrt(_number(math.pi / 2) / far)
    tail[0] = term[0]
    for j in range(1, 16):
        term[0] = term[0] * (_number((4 * order - (2 * j - 1) ** 2) / (8 * j)) / far)
        tail[0] = tail[0] + term[0]
    zero, value = _number(0), tirx.Select(x < _number(30), total[0] * width, tail[0])
    return _choose(x.equal(zero), _number(math.inf), x < zero, _number(math.nan), ex.is_nan(x), x, value)


BESSEL: dict[torch._ops.OpOverload, Callable[[Any], Any]] = {
    aten.special_bessel_j0.default: functools.partial(_bessel_of_libm, "j0"),
    aten.special_bessel_j1.default: functools.partial(_bessel_of_libm, "j1"),
    aten.special_bessel_y0.default: functools.partial(_bessel_of_libm, "y0"),
    aten.special_bessel_y1.default: functools.partial(_bessel_of_libm, "y1"),
    aten.i0.default: lambda x: _scaled_i(0, x) * tirx.exp(tirx.abs(x)),
    aten.special_i0e.default: lambda x: _scaled_i(0, x),
    aten.special_i1.default: lambda x: _scaled_i(1, x) * tirx.exp(tirx.abs(x)),
    aten.special_i1e.default: lambda x: _scaled_i(1, x),
    aten.special_modified_bessel_i0.default: lambda x: _scaled_i(0, x) * tirx.exp(tirx.abs(x)),
    aten.special_modified_bessel_i1.default: lambda x: _scaled_i(1, x) * tirx.exp(tirx.abs(x)),
    aten.special_modified_bessel_k0.default: lambda x: _scaled_k(0, x) * tirx.exp(_number(0) - x),
    aten.special_modified_bessel_k1.default: lambda x: _scaled_k(1, x) * tirx.exp(_number(0) - x),
    aten.special_scaled_modified_bessel_k0.default: lambda x: _scaled_k(0, x),
    aten.special_scaled_modified_bessel_k1.default: lambda x: _scaled_k(1, x),
}


def _bessel(function: Callable[[Any], Any], out: Out, x: te.Tensor) -> te.Tensor:
    return elementwise_loop(out, function, x)


for _operator, _function in BESSEL.items():
    lowers(_operator)(functools.partial(_bessel, _function))
