"""Identities of comparisons, selections, bounds and logic; exact with NaN and both zeros.

Not here: not(a < b) = (a >= b) in floating point (NaN), argmax(softmax(x)) = argmax(x) (two sums round to a tie),
max(a, b) = max(b, a) (which zero).
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .. import rewrite
from ..rewrite import calls
from .identity import Identity, Site, dtype_of

aten = torch.ops.aten

_NOTS = (aten.logical_not.default, aten.bitwise_not.default)
_ANDS = (aten.logical_and.default, aten.bitwise_and.Tensor)
_ORS = (aten.logical_or.default, aten.bitwise_or.Tensor)
_OPPOSITE = {
    aten.eq.Tensor: aten.ne.Tensor,
    aten.eq.Scalar: aten.ne.Scalar,
    aten.lt.Tensor: aten.ge.Tensor,
    aten.lt.Scalar: aten.ge.Scalar,
    aten.gt.Tensor: aten.le.Tensor,
    aten.gt.Scalar: aten.le.Scalar,
}
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()}
_EQUALITIES = (aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar)
_BOUNDS = (aten.relu.default, aten.clamp.default)


def _not_of_not(site: Site) -> fx.Node | None:
    (x,) = site.args
    if not calls(x, *_NOTS) or dtype_of(x.args[0]) != site.dtype:
        return None
    # Of integers, only bitwise_not undoes itself.
    return x.args[0] if site.dtype == torch.bool or x.target is site.node.target is aten.bitwise_not.default else None  # type: ignore[return-value]


def _not_of_comparison(site: Site) -> fx.Node | None:
    (x,) = site.args
    if not calls(x, *_OPPOSITE):
        return None
    ordered = x.target not in _EQUALITIES
    if ordered and (dtype_of(x.args[0]) in rewrite.FLOATS or not _exact(x.args[1])):
        return None
    return site.call(_OPPOSITE[x.target], *x.args)  # type: ignore[index]


def _exact(other: object) -> bool:
    """Whether an operand of a comparison cannot be NaN."""
    return isinstance(other, int) or (isinstance(other, fx.Node) and dtype_of(other) not in rewrite.FLOATS)


def _both(site: Site) -> fx.Node | None:
    """f(x, x) -> x."""
    a, b = site.args
    return a if a is b and site.same_dtype(a) else None


def _absorbed(site: Site) -> fx.Node | None:
    """max(max(a, b), b) -> max(a, b)"""
    for outer, inner in (site.args, site.args[::-1]):
        if calls(inner, site.node.target) and any(x is outer for x in inner.args):  # type: ignore[arg-type]
            return inner
    return None


def _known_bool(site: Site) -> fx.Node | None:
    """x and True, x or False -> x; x and False, x or True -> the constant."""
    if site.dtype != torch.bool:
        return None
    deciding = site.node.target in _ORS
    for x, other in (site.args, site.args[::-1]):
        value = site.uniform(other)
        if not isinstance(x, fx.Node) or not isinstance(value, bool) or not site.same_dtype(x):
            continue
        if value == deciding:
            device = rewrite.value_of(x).device  # type: ignore[union-attr]
            return site.call(aten.full.default, list(site.shape), value, dtype=torch.bool, device=device)
        same = rewrite.shape_of(x) == site.shape
        return x if same else site.call(aten.expand.default, x, list(site.shape))
    return None


def _compared_bool(site: Site) -> fx.Node | None:
    """b == True, b != False, b.to(int) != 0 -> b; b == False, ... -> not b"""
    x, other = site.args
    value = site.uniform(other)
    if calls(x, aten._to_copy.default) and dtype_of(x.args[0]) == torch.bool:
        x = x.args[0]
    if dtype_of(x) != torch.bool or value is None or value not in (0, 1):
        return None
    wanted = site.node.target in (aten.eq.Tensor, aten.eq.Scalar)
    return x if bool(value) == wanted else site.call(aten.logical_not.default, x)


def _where_same(site: Site) -> fx.Node | None:
    _, a, b = site.args
    return _as_result(site, a) if a is b else None


def _where_known(site: Site) -> fx.Node | None:
    condition, a, b = site.args
    value = site.uniform(condition)
    return None if value is None else _as_result(site, a if value else b)


def _as_result(site: Site, x: object) -> fx.Node | None:
    """A branch, in the shape of the whole."""
    if not isinstance(x, fx.Node) or not site.same_dtype(x):
        return None
    return x if rewrite.shape_of(x) == site.shape else site.call(aten.expand.default, x, list(site.shape))


def _where_not(site: Site) -> fx.Node | None:
    condition, a, b = site.args
    if not calls(condition, *_NOTS) or dtype_of(condition.args[0]) != torch.bool:
        return None
    return site.call(aten.where.self, condition.args[0], b, a)


def _where_of_where(site: Site) -> fx.Node | None:
    condition, a, b = site.args
    for place, branch in enumerate((a, b)):
        if calls(branch, aten.where.self) and branch.args[0] is condition:
            kept = branch.args[1 + place]
            return site.call(aten.where.self, condition, *((kept, b) if place == 0 else (a, kept)))
    return None


def _bounds(node: object) -> tuple[float, float] | None:
    """The bounds of a clamp or relu; None where they are no numbers in order."""
    if not calls(node, *_BOUNDS):
        return None
    if node.target is aten.relu.default:
        return 0, math.inf
    a = rewrite.arguments(node)
    if not all(v is None or isinstance(v, (int, float)) for v in (a["min"], a["max"])):
        return None
    low = -math.inf if a["min"] is None else a["min"]
    high = math.inf if a["max"] is None else a["max"]
    return (low, high) if low <= high else None  # also where one is NaN


def _clamp_of_clamp(site: Site) -> fx.Node | None:
    (x, *_) = site.args
    inner, outer = _bounds(x), _bounds(site.node)
    if inner is None or outer is None or not site.same_dtype(x, x.args[0]):
        return None
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    if (low, high) == inner:
        return x  # type: ignore[no-any-return]
    if len(x.users) > 1:  # nothing is saved
        return None
    ends = (None if low == -math.inf else low, None if high == math.inf else high)
    return site.call(aten.clamp.default, x.args[0], *ends)


def _clamp_of_nothing(site: Site) -> fx.Node | None:
    (x, *_) = site.args
    unbounded = site.is_float and site.same_dtype(x) and _bounds(site.node) == (-math.inf, math.inf)
    return x if unbounded else None


IDENTITIES = (
    Identity("not(not(x)) -> x", _NOTS, _not_of_not, "of bool, or all bits flipped twice"),
    Identity("not(a == b) -> a != b; not(a < b) -> a >= b of integers", _NOTS, _not_of_comparison,
             "equality and its negation are opposites for NaN too; order is not"),
    Identity("max(x, x), min(x, x), x and x, x or x -> x", (
        aten.maximum.default, aten.minimum.default, *_ANDS, *_ORS), _both, "also for NaN"),
    Identity("max(max(a, b), b) -> max(a, b), likewise min", (aten.maximum.default, aten.minimum.default), _absorbed,
             "NaN stays NaN"),
    Identity("x and True -> x, x and False -> False, likewise or", (*_ANDS, *_ORS), _known_bool, "of bool"),
    Identity("b == True, b.to(int) != 0 -> b; b == False -> not b", _EQUALITIES, _compared_bool, "of bool"),
    Identity("where(c, x, x) -> x", (aten.where.self,), _where_same, "either way"),
    Identity("where(True, a, b) -> a, where(False, a, b) -> b", (aten.where.self,), _where_known, "by definition"),
    Identity("where(not(c), a, b) -> where(c, b, a)", (aten.where.self,), _where_not, "by definition"),
    Identity("where(c, where(c, a, b), d) -> where(c, a, d), likewise the other branch", (aten.where.self,),
             _where_of_where, "the inner choice is made"),
    Identity("clamp(clamp(x, a, b), c, d) -> clamp(x, clamp(a, c, d), clamp(b, c, d)), relu likewise", _BOUNDS,
             _clamp_of_clamp, "a <= b and c <= d; NaN stays NaN"),
    Identity("clamp(x, -inf, inf) -> x", (aten.clamp.default,), _clamp_of_nothing, "NaN stays NaN"),
)  # fmt: skip
