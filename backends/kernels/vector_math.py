"""Transcendental functions as straight-line arithmetic on float32 expressions, scalar or vector.

LLVM has no vector exp, so `T.exp` in a vectorised loop becomes a libm call per lane (8 to 48 times slower). The
functions here are branch free: range reduction by bit tricks, one minimax polynomial, `Select` for the edges. They
follow IEEE (infinities, NaN, signed zero, overflow to inf, gradual underflow) except where a docstring says otherwise.

Each is an intrinsic of its own, `graphwright.exp(x)`, which TVM's last lowering pass replaces by the arithmetic: TVM's
simplifier substitutes every let it meets, so that a polynomial written out early grows exponentially in each pass.

The polynomials come from `benchmarks/fit_polynomials.py`, which prints them with their error bound. The bounds in ulp
are measured with fused multiply-add by benchmarks/vector_math_grid.py (docs/measurements/vector_math.json), and
tests/backends/test_vector_math.py holds them.

A magic constant M = 1.5 * 2^23 (plus a bias) rounds to the nearest integer: in `t = x + M` the low bits of t's pattern
hold that integer, and `t - M` is the integer as a float. It needs no rounding instruction and no conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from tvm import ir, tirx

PrimExpr = Any  # tvm.ir expression of dtype float32 or float32xN

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 9 bits: exact when multiplied by an exponent
_LN2_LOW = -2.12194440054690583e-4
_ROUND = 12582912.0  # 1.5 * 2^23
_SMALLEST_NORMAL = 2.0**-126
_INFINITY = float("inf")

# e^r = 1 + r + r^2 q(r), |r| <= ln2 / 2; 0.05 ulp
_EXP = (
    0.4999999403953552,
    0.1666652113199234,
    0.04166826233267784,
    0.008368670009076595,
    0.0013820987660437822,
)
# as above, but relative to e^r - 1; 0.01 ulp
_EXPM1 = (
    *(0.5, 0.1666666567325592, 0.04166649281978607),
    *(0.008333546109497547, 0.0013932320289313793, 0.00019761716248467565),
)
# log(1 + f) = f - f^2/2 + f^3 p(f), 1/sqrt(2) <= 1 + f <= sqrt(2); 0.1 ulp
_LOG = (
    *(0.3333333134651184, -0.2500081956386566, 0.2000124156475067, -0.166234090924263),
    *(0.14201581478118896, -0.1315961331129074, 0.12762197852134705, -0.0763639509677887),
)
# erf(x) = x + x p(x^2), |x| <= 0.8; 0.06 ulp
_ERF = (
    *(0.12837916612625122, -0.37612608075141907, 0.11283162236213684),
    *(-0.026822242885828018, 0.005086865741759539, -0.000654224946629256),
)
# log(erfc(t)) = p(t), 0.8 <= t <= 3.93, beyond which erf rounds to 1; 0.04 ulp of erf
_LOG_ERFC = (
    *(-5.684188363375142e-05, -1.1282713413238525, -0.6361422538757324, -0.10487610101699829),
    *(0.02269711345434189, -0.0031647805590182543, 0.00020868220599368215),
)
# 2^f, |f| <= 0.5; 0.05 ulp
_EXP2 = (
    *(1.0, 0.6931471824645996, 0.24022647738456726, 0.05550359562039375),
    *(0.00961849931627512, 0.0013390969252213836, 0.0001532926398795098),
)
# normal_cdf(-t) = e^(-t^2/2) p(t) / q(t); 1.1 ulp for t <= 3, 4 for t <= 5, 20 for t <= 8, 350 for t <= 13.27
_TAIL_P = (0.4999999701976776, 0.3358994424343109, 0.10505405068397522, 0.013736557215452194)
_TAIL_Q = (1.0, 1.4696801900863647, 0.8827751278877258, 0.2628241181373596, 0.03445005044341087)
_TAIL_END = 13.2686  # where e^(-t^2/2) = 2^-127

# The functions by name, as the intrinsics that `expand_math` and the kernels call.
INTRINSICS: dict[str, Callable[[PrimExpr], PrimExpr]] = {}


def _intrinsic(formula: Callable[[PrimExpr], PrimExpr]) -> Callable[[PrimExpr], PrimExpr]:
    """Make `formula` an intrinsic of its name; what is returned builds a call of it."""
    name = f"graphwright.{formula.__name__}"
    pure = 1  # CallEffectKind.kPure
    ir.register_op_attr(name, "TCallEffectKind", pure)
    ir.register_op_attr(name, "TVectorizable", True)
    ir.register_op_attr(name, "TScriptPrinterName", name)
    tirx.register_intrin_lowering(name, target="default", f=lambda call: formula(call.args[0]))

    @wraps(formula)
    def call(x: PrimExpr) -> PrimExpr:
        dtype = str(x.ty.dtype)
        assert dtype.startswith("float32"), dtype
        return tirx.call_intrin(dtype, name, x)

    INTRINSICS[formula.__name__] = call
    return call


class _Lets:
    """Names for shared subexpressions, so that the expression stays a chain and never grows into a tree."""

    def __init__(self) -> None:
        self._bound: list[tuple[Any, PrimExpr]] = []

    def __call__(self, value: PrimExpr) -> PrimExpr:
        if isinstance(value, tirx.Var | tirx.FloatImm):
            return value
        var = tirx.Var(f"m{len(self._bound)}", value.ty)
        self._bound.append((var, value))
        return var

    def around(self, result: PrimExpr) -> PrimExpr:
        for var, value in reversed(self._bound):
            result = tirx.Let(var, value, result)
        return result


def _like(x: PrimExpr, value: float) -> PrimExpr:
    return tirx.const(value, str(x.ty.dtype))


def _bits_dtype(x: PrimExpr) -> str:
    return str(x.ty.dtype).replace("float", "int")


def _bits(x: PrimExpr) -> PrimExpr:
    return tirx.reinterpret(_bits_dtype(x), x)


def _float(x: PrimExpr) -> PrimExpr:
    return tirx.reinterpret(str(x.ty.dtype).replace("int", "float"), x)


def _int_like(x: PrimExpr, value: int) -> PrimExpr:
    return tirx.const(value, _bits_dtype(x))


def _abs(x: PrimExpr) -> PrimExpr:
    return _float(_bits(x) & _int_like(x, 0x7FFFFFFF))


def _with_sign_of(magnitude: PrimExpr, x: PrimExpr) -> PrimExpr:
    """`magnitude` (not negative) with the sign of `x`, signed zero included."""
    return _float(_bits(magnitude) | (_bits(x) & _int_like(x, -0x80000000)))


def maximum(x: PrimExpr, low: PrimExpr) -> PrimExpr:
    """max(x, low), where a NaN in `x` stays: the compare is false for it."""
    return tirx.Select(x < low, low, x)


def minimum(x: PrimExpr, high: PrimExpr) -> PrimExpr:
    """min(x, high), where a NaN in `x` stays."""
    return tirx.Select(x > high, high, x)


def _polynomial(x: PrimExpr, coefficients: Sequence[float]) -> PrimExpr:
    """Horner's rule, lowest order first; every step one fused multiply-add."""
    result = _like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _like(x, coefficient)
    return result


def _reduce(x: PrimExpr, bias: int, let: _Lets) -> tuple[PrimExpr, PrimExpr]:
    """(r, shifted) with x = n ln2 + r, |r| <= ln2 / 2, and n + bias in the low bits of shifted's pattern."""
    magic = _like(x, _ROUND + bias)
    shifted = let(x * _like(x, _LOG2_E) + magic)
    n = let(shifted - magic)
    return let(x - n * _like(x, _LN2_HIGH) - n * _like(x, _LN2_LOW)), shifted


def _exp_reduced(r: PrimExpr, let: _Lets) -> PrimExpr:
    return let(_polynomial(r, _EXP) * (r * r) + r + _like(r, 1.0))


@_intrinsic
def exp(x: PrimExpr) -> PrimExpr:
    """e^x: 1.1 ulp; overflows to inf above 88.72, underflows gradually to 0 below -103.97."""
    let = _Lets()
    x = let(minimum(let(maximum(let(x), _like(x, -104.0))), _like(x, 89.0)))
    # 2^n leaves the exponent's range at both ends: 2^n = 2^h 2^(n-h). The bias 2*127 makes both fields positive.
    r, shifted = _reduce(x, 254, let)
    pattern = let(_bits(shifted))
    half = let(tirx.shift_right(pattern, _int_like(x, 1)))
    low = _float(tirx.shift_left(half, _int_like(x, 23)))
    high = _float(tirx.shift_left(pattern - half, _int_like(x, 23)))
    return let.around(_exp_reduced(r, let) * low * high)


@_intrinsic
def exp_nonpositive(x: PrimExpr) -> PrimExpr:
    """e^x for x <= 0, as softmax needs it: 1.1 ulp; results below 2^-126 become 0; fewer operations than `exp`."""
    let = _Lets()
    x = let(maximum(let(x), _like(x, -88.0)))  # n >= -127, whose exponent field is 0: a factor of 0
    r, shifted = _reduce(x, 127, let)
    scale = _float(tirx.shift_left(_bits(shifted), _int_like(x, 23)))
    return let.around(_exp_reduced(r, let) * scale)


@_intrinsic
def expm1(x: PrimExpr) -> PrimExpr:
    """e^x - 1: 1.4 ulp."""
    let = _Lets()
    x = let(x)
    clamped = let(minimum(let(maximum(x, _like(x, -18.0))), _like(x, 89.0)))
    r, shifted = _reduce(clamped, 126, let)
    small = let(_polynomial(r, _EXPM1) * (r * r) + r)
    half = let(_float(tirx.shift_left(_bits(shifted), _int_like(x, 23))))  # 2^(n-1): 2^128 has no float
    doubled = let((small * half + (half - _like(x, 0.5))) * _like(x, 2.0))
    return let.around(tirx.Select(x == _like(x, 0.0), x, doubled))  # keeps -0.0


@_intrinsic
def log(x: PrimExpr) -> PrimExpr:
    """Natural logarithm: 0.9 ulp; -inf at 0, NaN below."""
    let = _Lets()
    return let.around(_log_of(let(x), let))


def _log_of(x: PrimExpr, let: _Lets) -> PrimExpr:
    denormal = x < _like(x, _SMALLEST_NORMAL)  # a let of booleans breaks TVM's simplifier
    scaled = tirx.Select(denormal, x * _like(x, 2.0**23), x)
    # Offset by the pattern of sqrt(1/2): the exponent field then counts from sqrt(1/2) to sqrt(2).
    offset = let(_bits(scaled) - _int_like(x, 0x3F3504F3))
    exponent = let(tirx.shift_right(offset, _int_like(x, 23)))
    mantissa = _float((offset & _int_like(x, 0x007FFFFF)) + _int_like(x, 0x3F3504F3))
    f = let(mantissa - _like(x, 1.0))
    n = let(tirx.Cast(str(x.ty.dtype), exponent) - tirx.Select(denormal, _like(x, 23.0), _like(x, 0.0)))
    f2 = let(f * f)
    tail = let(_polynomial(f, _LOG) * (f2 * f) + n * _like(x, _LN2_LOW))
    value = let((tail - f2 * _like(x, 0.5)) + f + n * _like(x, _LN2_HIGH))
    finite = tirx.Select(x < _like(x, _INFINITY), value, x)
    edge = tirx.Select(x == _like(x, 0.0), _like(x, -_INFINITY), _like(x, float("nan")))
    return let(tirx.Select(x > _like(x, 0.0), finite, edge))


@_intrinsic
def log1p(x: PrimExpr) -> PrimExpr:
    """log(1 + x): 1.5 ulp; the part of x that the sum rounds away comes back as a first-order correction."""
    let = _Lets()
    x = let(x)
    u = let(x + _like(x, 1.0))
    lost = x - (u - _like(x, 1.0))
    corrected = let(_log_of(u, let) + lost / u)
    keep = tirx.any(u == _like(x, _INFINITY), u == _like(x, 0.0), x == _like(x, 0.0))
    edge = tirx.Select(u == _like(x, 0.0), _like(x, -_INFINITY), x)
    return let.around(tirx.Select(keep, edge, corrected))


@_intrinsic
def tanh(x: PrimExpr) -> PrimExpr:
    """Hyperbolic tangent: 2.5 ulp; -m / (m + 2) with m = e^(-2|x|) - 1, which is relatively exact at both ends."""
    let = _Lets()
    x = let(x)
    twice = let(minimum(let(_abs(x)), _like(x, 9.5)) * _like(x, -2.0))
    r, shifted = _reduce(twice, 127, let)
    scale = let(_float(tirx.shift_left(_bits(shifted), _int_like(x, 23))))
    small = _polynomial(r, _EXPM1) * (r * r) + r
    m = let(small * scale + (scale - _like(x, 1.0)))
    return let.around(_with_sign_of((_like(x, 0.0) - m) / (m + _like(x, 2.0)), x))


def _one_plus_exp(x: PrimExpr, let: _Lets) -> PrimExpr:
    """1 + e^x, where e^x is inf from 88.4 on and at least e^-87: it vanishes beside the 1 long before."""
    x = let(minimum(let(maximum(x, _like(x, -87.0))), _like(x, 89.0)))
    r, shifted = _reduce(x, 127, let)
    return let(_exp_reduced(r, let) * _float(tirx.shift_left(_bits(shifted), _int_like(x, 23))) + _like(x, 1.0))


@_intrinsic
def sigmoid(x: PrimExpr) -> PrimExpr:
    """1 / (1 + e^-x): 2.4 ulp; results below 2^-127 become 0."""
    let = _Lets()
    return let.around(_like(x, 1.0) / _one_plus_exp(let(_like(x, 0.0) - x), let))


@_intrinsic
def erf(x: PrimExpr) -> PrimExpr:
    """Error function: 1.3 ulp; an odd polynomial up to 0.8, 1 - e^(log erfc) beyond, where erfc no longer cancels."""
    let = _Lets()
    x = let(x)
    magnitude = let(_abs(x))
    t = let(minimum(magnitude, _like(x, 3.93)))
    far = _like(x, 1.0) - exp_nonpositive(_polynomial(t, _LOG_ERFC))
    near = x * _polynomial(let(x * x), _ERF) + x
    return let.around(tirx.Select(magnitude < _like(x, 0.8), near, _with_sign_of(far, x)))


@_intrinsic
def rsqrt(x: PrimExpr) -> PrimExpr:
    """1 / sqrt(x): 1.5 ulp."""
    return _like(x, 1.0) / tirx.sqrt(x)


@_intrinsic
def one_plus_erf(x: PrimExpr) -> PrimExpr:
    """1 + erf(x), twice the normal distribution function of sqrt(2) x: accurate in the negative tail, as `gelu` is."""
    let = _Lets()
    x = let(x)
    tail = let(_normal_tail(x, 2.0**0.5, let) * _like(x, 2.0))
    return let.around(tirx.Select(x < _like(x, 0.0), tail, _like(x, 2.0) - tail))


def _normal_tail(x: PrimExpr, scale: float, let: _Lets) -> PrimExpr:
    """normal_cdf(-scale |x|), or 0 where that is below 2^-126."""
    t = let(minimum(let(_abs(x)), _like(x, _TAIL_END / scale)))
    square = let(t * t)
    factor = _like(x, -0.5 * _LOG2_E * scale**2)
    magic = _like(x, _ROUND + 127)
    shifted = let(square * factor + magic)
    f = let(square * factor - let(shifted - magic))
    density = _polynomial(f, _EXP2) * _float(tirx.shift_left(_bits(shifted), _int_like(x, 23)))
    p = [c * scale**i for i, c in enumerate(_TAIL_P)]
    q = [c * scale**i for i, c in enumerate(_TAIL_Q)]
    return let(density * _polynomial(t, p) / _polynomial(t, q))


@_intrinsic
def gelu(x: PrimExpr) -> PrimExpr:
    """x normal_cdf(x), the exact GELU: 6 ulp for x > -1; below, the relative error grows (1e-6 at -5, 3e-5 at -13).

    The lower tail of normal_cdf is computed as such, not as 1 + erf, so nothing cancels for negative x. Tails below
    2^-126 become 0. gelu(-inf) is NaN as in torch.
    """
    let = _Lets()
    x = let(x)
    tail = _normal_tail(x, 1.0, let)
    return let.around(x * tirx.Select(x < _like(x, 0.0), tail, _like(x, 1.0) - tail))


@_intrinsic
def gelu_tanh(x: PrimExpr) -> PrimExpr:
    """GELU's tanh approximation, as x / (1 + e^(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3): 3.3 ulp for x > -1."""
    let = _Lets()
    x = let(x)
    u = (x * x * _like(x, -0.044715) - _like(x, 1.0)) * x * _like(x, 1.5957691216057308)
    return let.around(x / _one_plus_exp(let(u), let))


@_intrinsic
def silu(x: PrimExpr) -> PrimExpr:
    """x sigmoid(x), as x / (1 + e^-x): 2.4 ulp; results below 2^-121 may become 0."""
    let = _Lets()
    x = let(x)
    return let.around(x / _one_plus_exp(let(_like(x, 0.0) - x), let))
