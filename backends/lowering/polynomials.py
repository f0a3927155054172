"""Orthogonal polynomials of degree n[i] at x[i], by their three-term recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .imperative import grid, local
from .registry import Out, lowers
from .special import WORKING, elementwise_loop

aten = torch.ops.aten


def _number(value: float) -> Any:
    return tirx.const(float(value), WORKING)


@dataclass(frozen=True)
class Family:
    """P_0 = 1, P_1 = first(x), P_{k+1} = following(x, k, P_k, P_{k-1})."""

    first: Callable[[Any], Any]
    following: Callable[[Any, Any, Any, Any], Any]


def _chebyshev(first: Callable[[Any], Any], argument: Callable[[Any], Any]) -> Family:
    return Family(first, lambda x, k, p, q: _number(2) * argument(x) * p - q)


def _same(x: Any) -> Any:
    return x


def _shifted(x: Any) -> Any:
    return _number(2) * x - _number(1)


FAMILIES: dict[torch._ops.OpOverload, Family] = {
    aten.special_chebyshev_polynomial_t.default: _chebyshev(_same, _same),
    aten.special_chebyshev_polynomial_u.default: _chebyshev(lambda x: _number(2) * x, _same),
    aten.special_chebyshev_polynomial_v.default: _chebyshev(lambda x: _number(2) * x - _number(1), _same),
    aten.special_chebyshev_polynomial_w.default: _chebyshev(lambda x: _number(2) * x + _number(1), _same),
    aten.special_shifted_chebyshev_polynomial_t.default: _chebyshev(_shifted, _shifted),
    aten.special_shifted_chebyshev_polynomial_u.default: _chebyshev(lambda x: _number(2) * _shifted(x), _shifted),
    aten.special_shifted_chebyshev_polynomial_v.default: _chebyshev(
        lambda x: _number(2) * _shifted(x) - _number(1), _shifted
    ),
    aten.special_shifted_chebyshev_polynomial_w.default: _chebyshev(
        lambda x: _number(2) * _shifted(x) + _number(1), _shifted
    ),
    aten.special_hermite_polynomial_h.default: Family(
        lambda x: _number(2) * x, lambda x, k, p, q: _number(2) * (x * p - k * q)
    ),
    aten.special_hermite_polynomial_he.default: Family(_same, lambda x, k, p, q: x * p - k * q),
    aten.special_laguerre_polynomial_l.default: Family(
        lambda x: _number(1) - x,
        lambda x, k, p, q: ((k + k + _number(1) - x) * p - k * q) / (k + _number(1)),
    ),
    aten.special_legendre_polynomial_p.default: Family(
        _same, lambda x, k, p, q: ((k + k + _number(1)) * x * p - k * q) / (k + _number(1))
    ),
}


def _evaluate(family: Family, x: Any, n: Any) -> Any:
    """0 for a negative degree; the degree is truncated to an integer, as torch does."""
    degree = tirx.Select(ex.is_nan(n), _number(-1), tirx.max(tirx.min(n, _number(1e6)), _number(-1))).astype("int64")
    current, previous, following = local(WORKING), local(WORKING), local(WORKING)
    previous[0], current[0] = _number(1), family.first(x)
    with grid([tirx.max(degree - 1, tirx.const(0, "int64"))]) as (step,):
        k = (step + 1).astype(WORKING)
        following[0] = family.following(x, k, current[0], previous[0])
        previous[0] = current[0]
        current[0] = following[0]
    zero = tirx.const(0, "int64")
    low = tirx.Select(degree < zero, _number(0), _number(1))
    return tirx.Select(degree > zero, current[0], low)


def _polynomial(family: Family, out: Out, x: te.Tensor, n: te.Tensor) -> te.Tensor:
    return elementwise_loop(out, functools.partial(_evaluate, family), x, n)


for _operator, _family in FAMILIES.items():
    lowers(_operator)(functools.partial(_polynomial, _family))
