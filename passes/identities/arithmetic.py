"""Identities of arithmetic, exact in IEEE 754 and in wrapping integers. NaN payloads are no part of a value.

Not here, each with the value that refutes it (tests/passes/test_identities.py computes them):
    x + 0 = x (-0.0), x * 0 = 0 and x - x = 0 (NaN, inf), x / x = 1 (0), x / 3 = x * (1/3) (rounding),
    -(a - b) = b - a (a = b), abs(relu(x)) = relu(x) (-0.0), pow(x, 0.5) = sqrt(x) (-0.0, -inf),
    sqrt(x) ** 2 = x, exp(log(x)) = x, (x * a) * b = x * (a * b), (x + a) + b = x + (a + b) (rounding)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from .. import rewrite
from ..rewrite import calls
from .identity import Identity, Site, is_number, is_power_of_two

aten = torch.ops.aten

_ROUNDS = (aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default)
# Their results have no sign bit (or are NaN).
_UNSIGNED = (aten.abs.default, aten.exp.default, aten.sigmoid.default, aten.softmax.int)
# f(-0.0) = f(0.0).
_BLIND_TO_THE_SIGN_OF_ZERO = (
    *(aten.abs.default, aten.exp.default, aten.exp2.default, aten.cos.default, aten.cosh.default),
    *(aten.sigmoid.default, aten.softmax.int, aten.isnan.default, aten.isinf.default, aten.logical_not.default),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar),
)


def _inner(*operators: rewrite.Operator) -> Callable[[Site], fx.Node | None]:
    """f(g(x)) -> x for every g of `operators`."""

    def apply(site: Site) -> fx.Node | None:
        (x, *_) = site.args
        return x.args[0] if calls(x, *operators) else None  # type: ignore[return-value]

    return apply


def _drop_outer(*inner: rewrite.Operator) -> Callable[[Site], fx.Node | None]:
    """f(g(x)) -> g(x) for every g of `inner`."""

    def apply(site: Site) -> fx.Node | None:
        return site.args[0] if calls(site.args[0], *inner) else None

    return apply


def _abs_of_neg(site: Site) -> fx.Node | None:
    (x,) = site.args
    # Of unsigned integers, abs is nothing and neg is not.
    return site.call(aten.abs.default, x.args[0]) if calls(x, aten.neg.default) and site.dtype != torch.uint8 else None


def _relu_of_unsigned(site: Site) -> fx.Node | None:
    # The least integer has no absolute value.
    return site.args[0] if site.is_float and calls(site.args[0], *_UNSIGNED) else None


def _times_minus_one(site: Site) -> fx.Node | None:
    for x, factor in (site.args, site.args[::-1]):
        if isinstance(x, fx.Node) and is_number(site.uniform(factor), -1) and site.same_dtype(x):
            return site.call(aten.neg.default, x)
    return None


def _doubled(site: Site) -> fx.Node | None:
    a, b = site.args[:2]
    if a is not b or site.dtype == torch.bool or site.arguments["alpha"] != 1:
        return None
    return site.call(aten.mul.Tensor, a, 2)


def _div_by_power(site: Site) -> fx.Node | None:
    x, divisor = site.args
    number = site.uniform(divisor)
    if not site.is_float or not site.same_dtype(x) or not is_power_of_two(number, site.dtype):
        return None
    return site.call(aten.mul.Tensor, x, 1 / number)  # type: ignore[operator]


def _mul_of_mul(site: Site) -> fx.Node | None:
    x, outer = site.args
    if not site.is_float or not calls(x, aten.mul.Tensor) or not site.same_dtype(x, x.args[0]):
        return None
    inner, outer = site.uniform(x.args[1]), site.uniform(outer)
    if not all(is_power_of_two(n, site.dtype) and abs(n) >= 1 for n in (inner, outer)):  # type: ignore[arg-type]
        return None
    product = inner * outer  # type: ignore[operator]
    return site.call(aten.mul.Tensor, x.args[0], product) if is_power_of_two(product, site.dtype) else None


def _add_of_neg(site: Site) -> fx.Node | None:
    if site.arguments["alpha"] != 1:
        return None
    for a, b in (site.args[:2], site.args[1::-1]):
        # In a narrower dtype, the negation of the least integer wraps before it is widened. Bools cannot be subtracted.
        negated = calls(b, aten.neg.default) and isinstance(a, fx.Node) and site.same_dtype(b)
        if negated and a.meta["val"].dtype != torch.bool:
            return site.call(aten.sub.Tensor, a, b.args[0])
    return None


def _sub_of_neg(site: Site) -> fx.Node | None:
    a, b = site.args[:2]
    if site.arguments["alpha"] != 1 or not calls(b, aten.neg.default) or not site.same_dtype(b):
        return None
    return site.call(aten.add.Tensor, a, b.args[0]) if isinstance(a, fx.Node) else None


def _two_negs(site: Site) -> fx.Node | None:
    a, b = site.args
    if not calls(a, aten.neg.default) or not site.is_float or not site.same_dtype(a):
        return None
    if calls(b, aten.neg.default) and site.same_dtype(b):
        return site.call(site.node.target, a.args[0], b.args[0])  # type: ignore[arg-type]
    if isinstance(b, (int, float)) and not isinstance(b, bool):
        return site.call(site.node.target, a.args[0], -float(b))  # type: ignore[arg-type]
    return None


def _power(site: Site) -> fx.Node | None:
    x, exponent = site.args
    return x if site.same_dtype(x) and is_number(exponent, 1) else None


def _neutral(site: Site) -> fx.Node | None:
    """x + n, x * n, x - n, x / n for the n that changes nothing."""
    target, (x, other) = site.node.target, site.args[:2]
    zero = -0.0 if site.is_float and target is aten.add.Tensor else 0
    neutral = zero if target in (aten.add.Tensor, aten.sub.Tensor) else 1
    if site.same_dtype(x) and is_number(site.uniform(other), neutral):
        return x  # type: ignore[no-any-return]
    symmetric = target in (aten.add.Tensor, aten.mul.Tensor) and site.arguments.get("alpha", 1) == 1
    if symmetric and site.same_dtype(other) and is_number(site.uniform(x), neutral):
        return other  # type: ignore[no-any-return]
    return None


def _zero_nobody_sees(site: Site) -> fx.Node | None:
    if not site.is_float or not all(calls(user, *_BLIND_TO_THE_SIGN_OF_ZERO) for user in site.node.users):
        return None
    for x, zero in (site.args[:2], site.args[1::-1]):
        if isinstance(x, fx.Node) and site.same_dtype(x) and is_number(site.uniform(zero), 0.0):
            alpha = site.arguments["alpha"]
            return x if isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0 else None
    return None


IDENTITIES = (
    Identity("neg(neg(x)) -> x", (aten.neg.default,), _inner(aten.neg.default), "a sign flipped twice"),
    Identity("abs(abs(x)) -> abs(x)", (aten.abs.default,), _drop_outer(aten.abs.default), "no sign is left"),
    Identity("abs(neg(x)) -> abs(x)", (aten.abs.default,), _abs_of_neg, "only the sign differs"),
    Identity("relu(relu(x)) -> relu(x)", (aten.relu.default,), _drop_outer(aten.relu.default), "nothing is below 0"),
    Identity("relu(abs, exp, sigmoid, softmax) -> the same", (aten.relu.default,), _relu_of_unsigned, "no sign is set"),
    Identity("sign(sign(x)) -> sign(x)", (aten.sign.default,), _drop_outer(aten.sign.default), "-1, 0 and 1 stay"),
    Identity("floor(ceil(x)) -> ceil(x), and so on", _ROUNDS, _drop_outer(*_ROUNDS), "integers round to themselves"),
    Identity("x + (-0.0), x - 0, x * 1, x / 1 -> x", (
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _neutral, "also for -0.0; x + 0 is not"),
    Identity("f(x + 0) -> f(x)", (aten.add.Tensor,), _zero_nobody_sees, "only -0.0 changes, and f(-0.0) = f(0.0)"),
    Identity("x * -1 -> neg(x)", (aten.mul.Tensor,), _times_minus_one, "a product with 1 is not rounded"),
    Identity("x + x -> x * 2", (aten.add.Tensor,), _doubled, "both are 2x, rounded once (never, but for overflow)"),
    Identity("x / 2**k -> x * 2**-k", (aten.div.Tensor,), _div_by_power, "one real number, rounded once"),
    Identity("(x * 2**i) * 2**j -> x * 2**(i+j), i, j >= 0", (aten.mul.Tensor,), _mul_of_mul,
             "growing by powers of two rounds nothing; shrinking rounds denormals twice"),
    Identity("a + neg(b) -> a - b", (aten.add.Tensor,), _add_of_neg, "IEEE 754 defines a - b so"),
    Identity("a - neg(b) -> a + b", (aten.sub.Tensor,), _sub_of_neg, "likewise"),
    Identity("neg(a) * neg(b) -> a * b, neg(a) * 3 -> a * -3, also /", (aten.mul.Tensor, aten.div.Tensor), _two_negs,
             "the sign of a product is apart from its size"),
    Identity("x ** 1 -> x", (aten.pow.Tensor_Scalar,), _power, "also for NaN"),
)  # fmt: skip
