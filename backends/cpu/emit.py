"""Loops for one nest: vectors along one axis with exact tails, accumulators in registers for reductions.

injective     for v in vectors: out[v..] = f(in[v..])                        the last vector overlaps the one before
reduction 1   for v in vectors: acc = init; for r: acc = g(acc, in[r, v..]); out[v..] = acc       a spatial axis is contiguous
reduction 2   acc[u] = identity; for r in vectors: acc[u] = g(acc[u], in[r..]); out = fold(acc)   a reduce axis is contiguous
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad

from ...hwdb import Hardware
from .access import Nest, Piece, element_bits, merge, pieces, stride, vectorisable_calls
from .stages import Axis, Expr, Stmt, Var, collect, cost, substitute

# Independent accumulators: enough to hide the latency of an addition at two per cycle, few enough for 16 registers.
_ACCUMULATORS = 4


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


def choose_plan(nest: Nest, candidates: Sequence[Axis], hw: Hardware) -> Plan:
    """The axis along which the body is cheapest: contiguous loads, contiguous stores, and long enough."""
    work = cost(nest.body)
    accesses = nest.accesses()
    best = Plan(None, 1, work + 0.5 * len(accesses) + 1)
    if not vectorisable_calls(nest.body):
        return best
    depth = 1
    for axis in nest.reduce:
        depth *= max(axis.extent, 1)
    for axis in candidates:
        is_reduce = axis in nest.reduce
        if axis.extent < 2 or (is_reduce and combiner(nest) is None):
            continue
        steps = [(stride(address, axis.var), dtype, store) for address, dtype, store in accesses]
        lanes = _lanes(nest, steps, hw)
        while lanes > axis.extent:
            lanes //= 2
        if lanes < 2:
            continue
        cycles = work / (2 * lanes)
        for step, _, store in steps:
            if step == 0 and not store:
                continue
            one = 1.0 / lanes if step == 1 else 2.0
            # A reduction keeps its result in registers: it is stored (and loaded) once for all reduce points.
            cycles += one / depth if store and nest.reduce else one
        if is_reduce:
            cycles += 8.0 / axis.extent
        elif nest.reduce:
            cycles += 0.5 / lanes
        if cycles < best.cycles:
            best = Plan(axis, lanes, cycles)
    return best


def _lanes(nest: Nest, steps: Sequence[tuple[int | None, str, bool]], hw: Hardware) -> int:
    bits = [element_bits(dtype) for step, dtype, store in steps if step != 0 or store]
    bits += [element_bits(str(cast.ty.dtype)) for cast in collect(nest.body, tirx.Cast) if not _is_address(cast)]
    return max(hw.vector_bits // max(bits), 1)


def _is_address(cast: Any) -> bool:
    return str(cast.ty.dtype) == "int64"


def combiner(nest: Nest) -> tuple[Callable[[Expr, Expr], Expr], Expr] | None:
    """(g, x) where the body stores g(accumulator, x) and g is known to combine accumulators as well; or None."""
    if not nest.simple or nest.init is None or not isinstance(nest.init, tirx.BufferStore):
        return None
    store = nest.body
    value = store.value

    def is_accumulator(node: Any) -> bool:
        return (
            isinstance(node, TensorLoad)
            and node.source.same_as(store.buffer)
            and tvm_ffi.structural_equal(node.indices[0], store.indices[0])
        )

    found: Expr = None
    if isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min | tirx.And | tirx.Or):
        for one, other in ((value.a, value.b), (value.b, value.a)):
            if is_accumulator(one):
                found = other
    elif isinstance(value, tirx.Select):
        for one, other in ((value.true_value, value.false_value), (value.false_value, value.true_value)):
            if is_accumulator(one):
                found = other
    if found is None:
        return None
    x = tirx.Var("x", found.ty)
    acc = tirx.Var("acc", value.ty)
    kinds = type(found)

    def generalise(node: Any) -> Any:
        if tvm_ffi.structural_equal(node, found):
            return x
        return acc if is_accumulator(node) else node

    pattern = tvm_ffi.structural_map(value, ((kinds, TensorLoad), generalise), order="pre")
    rest = collect(pattern, TensorLoad)
    free = [v for v in collect(pattern, tirx.Var) if not (v.same_as(x) or v.same_as(acc))]
    if rest or free or str(found.ty.dtype) != str(value.ty.dtype):
        return None
    return lambda a, b: substitute(pattern, {acc: a, x: b}), found


def _vector(lanes: int, body: Callable[[Expr], Stmt], like: Var) -> Stmt:
    """`body(v)` for v in 0..lanes, at once."""
    if lanes == 1:
        return body(constant(0, like))
    return loop(lanes, body, like, tirx.ForKind.VECTORIZED)


def emit(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None = None) -> Stmt:
    """Loops over every axis of `nest` that `values` does not fix.

    `block` is (b, n): emit only the b-th of n shares of the vectorised axis (for an injective nest, or one whose
    vectorised axis is spatial).
    """
    outer = [a for a in nest.spatial if a.var not in values and a is not plan.axis]
    if not nest.simple:
        return loops(outer, lambda at: _in_memory(nest, {**values, **at}, plan))
    if nest.init is None and not nest.reduce:
        return loops(outer, lambda at: _injective(nest, {**values, **at}, plan, block))
    if plan.axis is not None and plan.axis in nest.reduce:
        return loops(outer, lambda at: _along_reduce(nest, {**values, **at}, plan))
    return loops(outer, lambda at: _along_spatial(nest, {**values, **at}, plan, block))


def _spread(
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
        rest.append(make(constant(part.high - width, var), width, 1))
    if rest and block is not None:
        index, count = block
        rest = [tirx.IfThenElse(index == constant(count - 1, var), sequence(rest), None)]
    return statements + rest


def _injective(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None) -> Stmt:
    axis = plan.axis
    if axis is None:
        return substitute(nest.body, values)
    statements: list[Stmt] = []
    for part in merge(pieces(nest, axis)):

        def make(start: Expr, lanes: int, count: int, body: Stmt = part.body) -> Stmt:
            return sequence(
                [
                    _vector(
                        lanes,
                        lambda v, u=u: substitute(  # type: ignore[misc]
                            body, {**values, axis.var: start + constant(u * lanes, axis.var) + v}
                        ),
                        axis.var,
                    )
                    for u in range(count)
                ]
            )

        statements += _spread(part, axis, plan.lanes, 1, block, make)
    return sequence(statements)


def _accumulator(nest: Nest, size: int) -> Any:
    return tirx.decl_buffer((size,), str(nest.body.buffer.dtype), "acc", scope="local")


def _accumulate(nest: Nest, body: Stmt, acc: Any, at: Expr) -> Stmt:
    """The body with its result in acc[at] instead of memory."""
    buffer, index = body.buffer, body.indices[0]

    def load(node: Any) -> Any:
        if node.source.same_as(buffer) and tvm_ffi.structural_equal(node.indices[0], index):
            return tirx.BufferLoad(acc, [at])
        return node

    return tirx.BufferStore(acc, tvm_ffi.structural_map(body.value, (TensorLoad, load)), [at])


def _along_spatial(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None) -> Stmt:
    axis = plan.axis
    lanes = plan.lanes
    acc = _accumulator(nest, _ACCUMULATORS * lanes)
    like = nest.axes[0].var if nest.axes else tirx.Var("i", "int32")
    place = nest.body.indices[0]
    init_value = nest.init.value if nest.init is not None else None

    def make(start: Expr | None, width: int, count: int, body: Stmt) -> Stmt:
        def each(what: Callable[[dict[Var, Expr], Expr], Stmt]) -> list[Stmt]:
            result = []
            for u in range(count):

                def one(v: Expr, u: int = u) -> Stmt:
                    offset = constant(u * width, like) + v
                    at = values if axis is None else {**values, axis.var: start + offset}
                    return what(at, offset)

                result.append(_vector(width, one, like))
            return result

        statements = []
        if init_value is not None:
            statements += each(lambda at, o: tirx.BufferStore(acc, substitute(init_value, at), [o]))
        else:
            load = tirx.BufferLoad(nest.body.buffer, [place])
            statements += each(lambda at, o: tirx.BufferStore(acc, substitute(load, at), [o]))
        statements.append(
            loops(
                nest.reduce,
                lambda r: sequence(each(lambda at, o: substitute(_accumulate(nest, body, acc, o), {**at, **r}))),
            )
        )
        statements += each(
            lambda at, o: tirx.BufferStore(nest.body.buffer, tirx.BufferLoad(acc, [o]), [substitute(place, at)])
        )
        return sequence(statements)

    if 0 in [a.extent for a in nest.reduce]:
        nest = Nest(nest.spatial, [], nest.body, nest.init, True)
        assert nest.init is not None
        filled = Nest(nest.spatial, [], nest.init, None, True)
        return _injective(filled, values, plan, block)
    if axis is None:
        return tirx.SeqStmt([tirx.AllocBuffer(acc), make(None, 1, 1, nest.body)])
    statements = []
    for part in merge(pieces(nest, axis)):
        statements += _spread(
            part, axis, lanes, _ACCUMULATORS, block, lambda s, w, c, body=part.body: make(s, w, c, body)
        )
    return tirx.SeqStmt([tirx.AllocBuffer(acc), *statements])


def _along_reduce(nest: Nest, values: dict[Var, Expr], plan: Plan) -> Stmt:
    axis, lanes = plan.axis, plan.lanes
    assert axis is not None
    known = combiner(nest)
    assert known is not None
    combine, _ = known
    dtype = str(nest.body.buffer.dtype)
    count = max(1, min(_ACCUMULATORS, axis.extent // lanes))
    acc = tirx.decl_buffer((count * lanes,), dtype, "acc", scope="local")
    one = tirx.decl_buffer((1,), dtype, "rest", scope="local")
    zero = constant(0, axis.var)
    identity = substitute(nest.init.value, values)  # type: ignore[union-attr]
    place = substitute(nest.body.indices[0], values)

    def vector(start: Expr, u: int, body: Stmt, rest: dict[Var, Expr]) -> Stmt:
        def lane(v: Expr) -> Stmt:
            update = _accumulate(nest, body, acc, constant(u * lanes, axis.var) + v)
            return substitute(update, {**values, **rest, axis.var: start + constant(u * lanes, axis.var) + v})

        return _vector(lanes, lane, axis.var)

    def scalar(start: Expr, body: Stmt, rest: dict[Var, Expr]) -> Stmt:
        return substitute(_accumulate(nest, body, one, zero), {**values, **rest, axis.var: start})

    used_rest = False

    def row(rest: dict[Var, Expr]) -> Stmt:
        nonlocal used_rest
        statements: list[Stmt] = []
        for part in merge(pieces(nest, axis)):
            low, done = constant(part.low, axis.var), part.low
            if part.uniform:
                step = lanes * count
                groups = (part.high - part.low) // step
                if groups:
                    statements.append(
                        loop(
                            groups,
                            lambda i, b=part.body: sequence(  # type: ignore[misc]
                                [vector(low + i * constant(step, axis.var), u, b, rest) for u in range(count)]
                            ),
                            axis.var,
                        )
                    )
                done += groups * step
                left = (part.high - done) // lanes
                statements += [vector(constant(done, axis.var), u, part.body, rest) for u in range(left)]
                done += left * lanes
            if done < part.high:
                used_rest = True
                statements.append(
                    loop(
                        part.high - done,
                        lambda i, b=part.body, d=done: scalar(i + constant(d, axis.var), b, rest),  # type: ignore[misc]
                        axis.var,
                    )
                )
        return sequence(statements)

    body = loops([a for a in nest.reduce if a is not axis], row)
    start = [
        _vector(
            lanes,
            lambda v, u=u: tirx.BufferStore(acc, identity, [constant(u * lanes, axis.var) + v]),
            axis.var,
        )  # type: ignore[misc]
        for u in range(count)
    ]
    if used_rest:
        start.append(tirx.BufferStore(one, identity, [zero]))
    folds = _fold(acc, combine, count, lanes, axis.var)
    total: Expr = tirx.BufferLoad(acc, [zero])
    if used_rest:
        total = combine(total, tirx.BufferLoad(one, [zero]))
    return tirx.SeqStmt(
        [
            tirx.AllocBuffer(acc),
            *([tirx.AllocBuffer(one)] if used_rest else []),
            *start,
            body,
            *folds,
            tirx.BufferStore(nest.body.buffer, total, [place]),
        ]
    )


def _fold(acc: Any, combine: Callable[[Expr, Expr], Expr], count: int, lanes: int, like: Var) -> list[Stmt]:
    """Fold count vectors into one, then its halves into each other until acc[0] holds the whole."""
    statements = []

    def pair(width: int, distance: int) -> Stmt:
        return _vector(
            width,
            lambda v: tirx.BufferStore(
                acc,
                combine(
                    tirx.BufferLoad(acc, [v]),
                    tirx.BufferLoad(acc, [v + constant(distance, like)]),
                ),
                [v],
            ),
            like,
        )

    statements += [pair(lanes, u * lanes) for u in range(1, count)]
    width = lanes // 2
    while width:
        statements.append(pair(width, width))
        width //= 2
    return statements


def _in_memory(nest: Nest, values: dict[Var, Expr], plan: Plan) -> Stmt:
    """A body of several statements: its results stay in memory, the vectorised axis is the innermost loop."""
    axis = plan.axis

    def statement(body: Stmt, rest: dict[Var, Expr], start: Expr | None, width: int) -> Stmt:
        if axis is None:
            return _renamed(substitute(body, {**values, **rest}))
        return _vector(width, lambda v: _renamed(substitute(body, {**values, **rest, axis.var: start + v})), axis.var)

    def make(start: Expr | None, width: int) -> Stmt:
        update = loops(nest.reduce, lambda r: statement(nest.body, r, start, width))
        if nest.init is None:
            return update
        return tirx.SeqStmt([statement(nest.init, {}, start, width), update])

    if axis is None:
        return make(None, 1)
    full, rest = divmod(axis.extent, plan.lanes)
    parts = [loop(full, lambda i: make(i * constant(plan.lanes, axis.var), plan.lanes), axis.var)] if full else []
    if rest:
        first = full * plan.lanes
        parts.append(loop(rest, lambda i: make(i + constant(first, axis.var), 1), axis.var))
    return sequence(parts)


def _renamed(body: Stmt) -> Stmt:
    """`body` with fresh variables for its bindings, since it is emitted more than once."""
    names = {b.var: tirx.Var(b.var.name, b.var.ty) for b in collect(body, tirx.Bind)}
    if not names:
        return body
    return tvm_ffi.structural_map(body, (tirx.Var, lambda var: names.get(var, var)))


__all__ = ["Call", "Plan", "choose_plan", "emit", "loop", "loops", "sequence"]
