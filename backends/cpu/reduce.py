"""Loops for one reduction: accumulators in registers, sums of many elements in blocks.

along a spatial axis   for v in vectors: acc = init; for r: acc = g(acc, in[r, v..]); out[v..] = acc
along a reduce axis    acc[u] = identity; for r in vectors: acc[u] = g(acc[u], in[r..]); out = fold(acc)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

from .access import Nest, combiner
from .guards import Piece, merge, pieces
from .loops import Plan, constant, injective, loop, loops, sequence, spread, vector_loop
from .stages import Axis, Expr, Stmt, Var, substitute

# Sums longer than this are summed in blocks of about _BLOCK, whose sums are then added: the error grows with the block.
_LONG, _BLOCK = 256, 64
# Independent accumulators: enough to hide the latency of an addition at two per cycle, few enough for 16 registers.
ACCUMULATORS = 4


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


def along_spatial(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None) -> Stmt:
    axis = plan.axis
    lanes = plan.lanes
    like = nest.axes[0].var if nest.axes else tirx.Var("i", "int32")
    place = nest.body.indices[0]
    if 0 in [a.extent for a in nest.reduce]:
        assert nest.init is not None
        return injective(Nest(nest.spatial, [], nest.init, None, True), values, plan, block)
    acc = _accumulator(nest, ACCUMULATORS * lanes)
    long = _is_long_sum(nest, math.prod(a.extent for a in nest.reduce))
    total = _accumulator(nest, ACCUMULATORS * lanes) if long else acc
    init = nest.init.value if nest.init is not None else tirx.BufferLoad(nest.body.buffer, [place])

    def make(start: Expr | None, width: int, count: int, body: Stmt) -> Stmt:
        def each(what: Callable[[dict[Var, Expr], Expr], Stmt]) -> list[Stmt]:
            result = []
            for u in range(count):

                def one(v: Expr, u: int = u) -> Stmt:
                    offset = constant(u * width, like) + v
                    at = values if axis is None else {**values, axis.var: start + offset}
                    return what(at, offset)

                result.append(vector_loop(width, one, like))
            return result

        def update(r: dict[Var, Expr]) -> Stmt:
            return sequence(each(lambda at, o: substitute(_accumulate(nest, body, acc, o), {**at, **r})))

        def clear() -> list[Stmt]:
            return each(lambda at, o: tirx.BufferStore(acc, tirx.const(0, str(acc.dtype)), [o]))

        def flush() -> list[Stmt]:
            add = each(
                lambda at, o: tirx.BufferStore(total, tirx.BufferLoad(total, [o]) + tirx.BufferLoad(acc, [o]), [o])
            )
            return [*add, *clear()]

        first = each(lambda at, o: tirx.BufferStore(total, substitute(init, at), [o]))
        plain = loops(nest.reduce, update)
        middle = [*clear(), _in_blocks(nest.reduce, update, flush)] if long else [plain]
        last = each(
            lambda at, o: tirx.BufferStore(nest.body.buffer, tirx.BufferLoad(total, [o]), [substitute(place, at)])
        )
        return sequence([*first, *middle, *last])

    allocations = [tirx.AllocBuffer(buffer) for buffer in ((acc, total) if long else (acc,))]
    if axis is None:
        return tirx.SeqStmt([*allocations, make(None, 1, 1, nest.body)])
    statements = []
    for part in merge(pieces(nest, axis)):

        def covered(start: Expr, width: int, count: int, body: Stmt = part.body) -> Stmt:
            return make(start, width, count, body)

        statements += spread(part, axis, lanes, ACCUMULATORS, block, covered)
    return tirx.SeqStmt([*allocations, *statements])


def _is_long_sum(nest: Nest, additions: int) -> bool:
    value = nest.body.value
    return (
        isinstance(value, tirx.Add) and "float" in str(value.ty.dtype) and additions > _LONG and nest.init is not None
    )


def _in_blocks(axes: Sequence[Axis], body: Callable[[dict[Var, Expr]], Stmt], flush: Callable[[], list[Stmt]]) -> Stmt:
    """The nest over `axes` with `flush` after about every _BLOCK runs of the body, and at the end."""
    rest, runs = list(axes), 1
    inner: list[Axis] = []
    while rest and runs < _BLOCK:
        inner.insert(0, rest.pop())
        runs *= inner[0].extent
    head, tail = inner[0], inner[1:]
    size = max(1, _BLOCK // (runs // head.extent))

    def block(values: dict[Var, Expr], start: Expr, length: int) -> Stmt:
        def run(i: Expr) -> Stmt:
            return loops(tail, lambda at: body({**values, head.var: start + i, **at}))

        return sequence([loop(length, run, head.var), *flush()])

    def whole(values: dict[Var, Expr]) -> Stmt:
        count, left = divmod(head.extent, size)
        parts = []
        if count:
            parts.append(loop(count, lambda i: block(values, i * constant(size, head.var), size), head.var))
        if left:
            parts.append(block(values, constant(count * size, head.var), left))
        return sequence(parts)

    return loops(rest, whole)


def along_reduce(nest: Nest, values: dict[Var, Expr], plan: Plan) -> Stmt:
    axis, lanes = plan.axis, plan.lanes
    assert axis is not None
    known = combiner(nest)
    assert known is not None
    combine, _ = known
    dtype = str(nest.body.buffer.dtype)
    count = max(1, min(ACCUMULATORS, axis.extent // lanes))
    step = lanes * count
    acc = tirx.decl_buffer((step,), dtype, "acc", scope="local")
    one = tirx.decl_buffer((1,), dtype, "rest", scope="local")
    long = _is_long_sum(nest, math.prod(a.extent for a in nest.reduce) // step)
    total = tirx.decl_buffer((step,), dtype, "total", scope="local") if long else acc
    zero = constant(0, axis.var)
    assert nest.init is not None
    identity = substitute(nest.init.value, values)
    place = substitute(nest.body.indices[0], values)

    def each(what: Callable[[Expr], Stmt]) -> list[Stmt]:
        def one(u: int) -> Stmt:
            return vector_loop(lanes, lambda v: what(constant(u * lanes, axis.var) + v), axis.var)

        return [one(u) for u in range(count)]

    def vector(start: Expr, u: int, body: Stmt, rest: dict[Var, Expr]) -> Stmt:
        def lane(v: Expr) -> Stmt:
            update = _accumulate(nest, body, acc, constant(u * lanes, axis.var) + v)
            return substitute(update, {**values, **rest, axis.var: start + constant(u * lanes, axis.var) + v})

        return vector_loop(lanes, lane, axis.var)

    def vectors(start: Expr, body: Stmt, rest: dict[Var, Expr]) -> Stmt:
        return sequence([vector(start, u, body, rest) for u in range(count)])

    def scalar(start: Expr, body: Stmt, rest: dict[Var, Expr]) -> Stmt:
        return substitute(_accumulate(nest, body, one, zero), {**values, **rest, axis.var: start})

    def flush() -> list[Stmt]:
        if not long:
            return []
        add = each(lambda o: tirx.BufferStore(total, tirx.BufferLoad(total, [o]) + tirx.BufferLoad(acc, [o]), [o]))
        return [*add, *each(lambda o: tirx.BufferStore(acc, identity, [o]))]

    parts = merge(pieces(nest, axis))
    used_rest = any(not part.uniform or (part.high - part.low) % lanes for part in parts)

    def row(rest: dict[Var, Expr]) -> Stmt:
        return sequence([statement for part in parts for statement in piece(part, rest)])

    def piece(part: Piece, rest: dict[Var, Expr]) -> list[Stmt]:
        statements: list[Stmt] = []
        done = part.low
        if part.uniform:
            groups = Axis(tirx.Var("group", str(axis.var.ty.dtype)), (part.high - part.low) // step)
            low = constant(part.low, axis.var)
            if groups.extent:

                def group(at: dict[Var, Expr]) -> Stmt:
                    return vectors(low + at[groups.var] * constant(step, axis.var), part.body, rest)

                statements.append(_in_blocks([groups], group, flush) if long else loops([groups], group))
            done += groups.extent * step
            left = (part.high - done) // lanes
            statements += [vector(constant(done, axis.var), u, part.body, rest) for u in range(left)]
            done += left * lanes
        if done < part.high:
            statements.append(
                loop(part.high - done, lambda i: scalar(i + constant(done, axis.var), part.body, rest), axis.var)
            )
        return statements

    body = loops([a for a in nest.reduce if a is not axis], row)
    start = each(lambda o: tirx.BufferStore(acc, identity, [o]))
    if long:
        start += each(lambda o: tirx.BufferStore(total, identity, [o]))
    if used_rest:
        start.append(tirx.BufferStore(one, identity, [zero]))
    result: Expr = tirx.BufferLoad(total, [zero])
    if used_rest:
        result = combine(result, tirx.BufferLoad(one, [zero]))
    buffers = [acc, *([total] if long else []), *([one] if used_rest else [])]
    return tirx.SeqStmt(
        [
            *[tirx.AllocBuffer(buffer) for buffer in buffers],
            *start,
            body,
            *flush(),
            *_fold(total, combine, count, lanes, axis.var),
            tirx.BufferStore(nest.body.buffer, result, [place]),
        ]
    )


def _fold(acc: Any, combine: Callable[[Expr, Expr], Expr], count: int, lanes: int, like: Var) -> list[Stmt]:
    """Fold count vectors into one, then its halves into each other until acc[0] holds the whole."""
    statements = []

    def pair(width: int, distance: int) -> Stmt:
        return vector_loop(
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
