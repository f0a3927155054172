"""Where the guards of a nest change: an axis cut into pieces along which every if_then_else is decided."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Range

from .access import Nest, analyzer_of, bind, simplify_integers, stride
from .stages import Axis, Expr, Stmt, Var, collect, intrinsic, substitute


def _guards(body: Stmt) -> list[Expr]:
    return [call.args[0] for call in collect(body, Call) if intrinsic(call) == "if_then_else"]


@dataclass(frozen=True)
class Piece:
    """The part [low, high) of an axis in which `body` holds; `uniform` if no guard there depends on the axis."""

    low: int
    high: int
    body: Stmt
    uniform: bool


def pieces(nest: Nest, axis: Axis, limit: int = 12) -> list[Piece]:
    """Cut an axis where the guards of the body change, so that within a piece they are constant along it.

    `if_then_else(1 <= w and w < 57, x[w - 1], 0)` over w in [0, 58) gives [0, 1), [1, 57) and [57, 58).
    """
    guards = _guards(nest.body)
    atoms = [
        atom for atom in collect(guards, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE) if _uses(atom, axis.var)
    ]
    if not atoms:
        return [Piece(0, axis.extent, nest.body, not any(_uses(g, axis.var) for g in guards))]
    cuts = {0, axis.extent}
    for atom in atoms:
        cuts.update(_cuts(atom, axis, nest.axes))
    ordered = sorted(c for c in cuts if 0 <= c <= axis.extent)
    if len(ordered) - 1 > limit:
        return [Piece(0, axis.extent, nest.body, False)]
    return [_piece(nest, axis, low, high) for low, high in itertools.pairwise(ordered)]


def _uses(root: Any, var: Var) -> bool:
    found = tvm_ffi.structural_walk(
        root, (tirx.Var, lambda v: tvm_ffi.VisitInterrupt(True) if v.same_as(var) else None)
    )
    return found is not None


def _cuts(atom: Expr, axis: Axis, axes: Sequence[Axis]) -> set[int]:
    """Where `atom` may change its value along the axis, for every position of the other axes."""
    difference = atom.a - atom.b
    step = stride(difference, axis.var)
    if not step:
        return set()
    rest = sym.Analyzer()
    for other in axes:
        if not other.var.same_as(axis.var):
            bind(rest, other)
    base = substitute(difference, {axis.var: tirx.const(0, str(axis.var.ty.dtype))})
    bound = rest.const_int_bound(rest.simplify(base))
    low, high = int(bound.min_value), int(bound.max_value)
    if high - low > 64 or abs(low) > 1 << 40 or abs(high) > 1 << 40:
        return set()
    cuts = {cut for c in (low, high) for cut in _roots(atom, step, c)}
    return {cut for cut in cuts if 0 < cut < axis.extent}


def _roots(atom: Expr, step: int, c: int) -> tuple[int, ...]:
    """The first v at which `step * v + c` compares otherwise with 0 than at v - 1."""
    if step < 0:
        step, c = -step, -c
        strict = isinstance(atom, tirx.GT | tirx.LE)
    else:
        strict = isinstance(atom, tirx.LT | tirx.GE)
    up, down = -(c // step), -c // step  # ceil and floor of -c / step
    if isinstance(atom, tirx.EQ | tirx.NE):
        return (down, down + 1)
    return (up,) if strict else (down + 1,)


def _piece(nest: Nest, axis: Axis, low: int, high: int) -> Piece:
    dtype = str(axis.var.ty.dtype)
    analyzer = sym.Analyzer()
    analyzer.bind(axis.var, Range(tirx.const(low, dtype), tirx.const(high, dtype)))
    for other in nest.axes:
        if not other.var.same_as(axis.var):
            bind(analyzer, other)
    body = fold_guards(nest.body, analyzer)
    return Piece(low, high, body, not any(_uses(guard, axis.var) for guard in _guards(body)))


def parts_along(nest: Nest, axis: Axis) -> list[Nest]:
    """The nest cut along a spatial axis where its guards change; just the nest where they do not."""
    if not nest.simple:
        return [nest]
    cut = merge(pieces(nest, axis))
    if len(cut) < 2 or not any(part.uniform for part in cut):
        return [nest]
    parts = []
    for piece in cut:
        dtype = str(axis.var.ty.dtype)
        own = Axis(tirx.Var(axis.var.name, dtype), piece.high - piece.low)
        if own.extent == 1:
            values = {axis.var: tirx.const(piece.low, dtype)}
        else:
            values = {axis.var: own.var + tirx.const(piece.low, dtype)}
        spatial = [own if a is axis else a for a in nest.spatial if a is not axis or own.extent != 1]
        # The other axes get variables of their own too: no variable may be bound by two loops.
        fresh = {a.var: tirx.Var(a.var.name, str(a.var.ty.dtype)) for a in (*spatial, *nest.reduce) if a is not own}
        values.update(fresh)

        def renamed(axes: list[Axis], fresh: dict[Var, Var] = fresh) -> list[Axis]:
            return [Axis(fresh.get(a.var, a.var), a.extent) for a in axes]

        part = Nest(renamed(spatial), renamed(nest.reduce), piece.body, nest.init, nest.simple)
        analyzer = analyzer_of(part.axes)
        part.body = fold_guards(simplify_integers(substitute(part.body, values), analyzer), analyzer)
        if part.init is not None:
            part.init = simplify_integers(substitute(part.init, values), analyzer)
        parts.append(part)
    return parts


def fold_guards(body: Stmt, analyzer: Any) -> Stmt:
    """Drop the branches of if_then_else that the analyzer can decide."""

    def guard(call: Any) -> Any:
        if intrinsic(call) != "if_then_else":
            return call
        condition = analyzer.simplify(call.args[0])
        if isinstance(condition, tirx.IntImm):
            return call.args[1] if int(condition) else call.args[2]
        return tirx.if_then_else(condition, call.args[1], call.args[2])

    return tvm_ffi.structural_map(body, (Call, guard))


def merge(parts: list[Piece]) -> list[Piece]:
    """Join neighbouring pieces with the same body."""
    merged: list[Piece] = []
    for part in parts:
        if merged and merged[-1].uniform == part.uniform and tvm_ffi.structural_equal(merged[-1].body, part.body):
            merged[-1] = replace(merged[-1], high=part.high)
        else:
            merged.append(part)
    return merged
