"""Loops along one vectorised axis, with exact tails: the last vector overlaps the one before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .access import Nest
from .guards import Piece, merge, pieces
from .stages import Axis, Expr, Stmt, Var, substitute


@dataclass(frozen=True)
class Plan:
    """Which axis is vectorised, by how many lanes, and what one run of the body then costs in cycles."""

    axis: Axis | None
    lanes: int
    cycles: float


def constant(value: int, like: Var) -> Expr:
    return tirx.const(value, str(like.ty.dtype))


def loop(extent: Expr | int, body: Callable[[Var], Stmt], like: Var, kind: Any = tirx.ForKind.SERIAL) -> Stmt:
    """for i in range(extent): body(i); no loop at all where the extent is 1."""
    if isinstance(extent, int) and extent == 1:
        return body(constant(0, like))
    var = tirx.Var("i", str(like.ty.dtype))
    bound = constant(extent, like) if isinstance(extent, int) else extent
    return tirx.For(var, constant(0, like), bound, kind, body(var))


def sequence(statements: Sequence[Stmt]) -> Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def loops(axes: Sequence[Axis], body: Callable[[dict[Var, Expr]], Stmt]) -> Stmt:
    """A serial nest over `axes`; `body` receives the value of each axis."""

    def nested(rest: Sequence[Axis], values: dict[Var, Expr]) -> Stmt:
        if not rest:
            return body(values)
        axis = rest[0]
        return loop(axis.extent, lambda i: nested(rest[1:], {**values, axis.var: i}), axis.var)

    return nested(axes, {})


def vector_loop(lanes: int, body: Callable[[Expr], Stmt], like: Var) -> Stmt:
    """`body(v)` for v in 0..lanes, at once."""
    if lanes == 1:
        return body(constant(0, like))
    return loop(lanes, body, like, tirx.ForKind.VECTORIZED)


def spread(
    part: Piece,
    axis: Axis,
    lanes: int,
    group: int,
    block: tuple[Expr, int] | None,
    make: Callable[[Expr, int, int], Stmt],
) -> list[Stmt]:
    """Cover a piece by `make(start, lanes, count)`, count vectors from start; the rest by an overlapping vector.

    Elements may be computed twice, so `make` must be idempotent.
    """
    var = axis.var
    length = part.high - part.low
    if not part.uniform:
        scalar = loop(length, lambda i: make(i + constant(part.low, var), 1, 1), var)
        return [scalar]
    width = lanes
    while width > length:
        width //= 2
    step = width * group
    groups, statements = length // step, []
    low = constant(part.low, var)
    if groups:
        if block is None:
            statements.append(loop(groups, lambda i: make(low + i * constant(step, var), width, group), var))
        else:
            index, count = block
            first = tirx.floordiv(index * constant(groups, var), constant(count, var))
            last = tirx.floordiv((index + constant(1, var)) * constant(groups, var), constant(count, var))
            statements.append(
                loop(last - first, lambda i: make(low + (first + i) * constant(step, var), width, group), var)
            )
    rest: list[Stmt] = []
    done = part.low + groups * step
    vectors = (part.high - done) // width
    if vectors:
        rest.append(make(constant(done, var), width, vectors))
    if (part.high - done) % width:
        # StorageRewrite may let a result take over the memory of an operand that dies here, which the second reading of
        # the overlapped elements would not survive: it never does so for statements marked as foreign.
        again = make(constant(part.high - width, var), width, 1)
        rest.append(tirx.AttrStmt(constant(0, var), "extern_scope", constant(1, var), again))
    if rest and block is not None:
        index, count = block
        rest = [tirx.IfThenElse(index == constant(count - 1, var), sequence(rest), None)]
    return statements + rest


def injective(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None) -> Stmt:
    axis = plan.axis
    if axis is None:
        return substitute(nest.body, values)
    statements: list[Stmt] = []
    for part in merge(pieces(nest, axis)):

        def make(start: Expr, lanes: int, count: int, body: Stmt = part.body) -> Stmt:
            stores = body.seq if isinstance(body, tirx.SeqStmt) else [body]
            return sequence(
                [
                    vector_loop(
                        lanes,
                        lambda v, u=u, store=store: substitute(  # type: ignore[misc]
                            store, {**values, axis.var: start + constant(u * lanes, axis.var) + v}
                        ),
                        axis.var,
                    )
                    for u in range(count)
                    for store in stores
                ]
            )

        statements += spread(part, axis, plan.lanes, 1, block, make)
    return sequence(statements)
