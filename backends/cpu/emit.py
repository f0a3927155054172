"""Which axis of a nest is vectorised, and the loops that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

from ...hwdb import Hardware
from ..tiling import ALIAS_BYTES
from .access import Nest, combiner, element_bits, stride, vectorisable_calls
from .guards import Piece, merge, pieces
from .loops import Plan, constant, injective, loop, loops, sequence, vector_loop
from .reduce import along_reduce, along_spatial
from .stages import Axis, Expr, Stmt, Var, collect, cost, substitute


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
        for step, dtype, store in steps:
            if step == 0 and not store:
                continue
            one = 1.0 / lanes if step == 1 else 2.0
            if step not in (None, 0, 1) and step * element_bits(dtype) // 8 % ALIAS_BYTES == 0:
                one = 4.0  # all lanes fall on one set of L1
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


def emit(nest: Nest, values: dict[Var, Expr], plan: Plan, block: tuple[Expr, int] | None = None) -> Stmt:
    """Loops over every axis of `nest` that `values` does not fix.

    `block` is (b, n): emit only the b-th of n shares of the vectorised axis (for an injective nest, or one whose
    vectorised axis is spatial).
    """
    outer = [a for a in nest.spatial if a.var not in values and a is not plan.axis]
    formulas = nest.init is None and not nest.reduce
    if not nest.simple and not (formulas and _stores(nest.body)):
        return loops(outer, lambda at: _in_memory(nest, {**values, **at}, plan))
    if formulas:
        return loops(outer, lambda at: injective(nest, {**values, **at}, plan, block))
    if plan.axis is not None and plan.axis in nest.reduce:
        return loops(outer, lambda at: along_reduce(nest, {**values, **at}, plan))
    return loops(outer, lambda at: along_spatial(nest, {**values, **at}, plan, block))


def _stores(body: Stmt) -> bool:
    """Whether the body is a sequence of stores that may be repeated: none reads what it or a later one writes."""
    if not isinstance(body, tirx.SeqStmt) or not all(isinstance(part, tirx.BufferStore) for part in body.seq):
        return False
    pending: list[Any] = []
    for store in reversed(list(body.seq)):
        pending.append(store.buffer)
        if any(load.source.same_as(buffer) for load in collect(store.value, TensorLoad) for buffer in pending):
            return False
    return True


def _in_memory(nest: Nest, values: dict[Var, Expr], plan: Plan) -> Stmt:
    """A body of several statements: its results stay in memory, the vectorised axis is the innermost loop."""
    axis = plan.axis

    def statement(body: Stmt, rest: dict[Var, Expr], start: Expr | None, width: int) -> Stmt:
        if axis is None:
            return _renamed(substitute(body, {**values, **rest}))

        def lane(v: Expr) -> Stmt:
            return _renamed(substitute(body, {**values, **rest, axis.var: start + v}))

        return vector_loop(width, lane, axis.var)

    def make(body: Stmt, start: Expr | None, width: int) -> Stmt:
        update = loops(nest.reduce, lambda r: statement(body, r, start, width))
        if nest.init is None:
            return update
        return tirx.SeqStmt([statement(nest.init, {}, start, width), update])

    if axis is None:
        return make(nest.body, None, 1)

    def cover(part: Piece) -> list[Stmt]:
        # TVM 0.27 makes a vector loop whose guard varies into one scalar loop a statement, and loses the bindings.
        full = (part.high - part.low) // plan.lanes if part.uniform else 0
        done = part.low + full * plan.lanes
        low, rest = constant(part.low, axis.var), constant(done, axis.var)
        parts = []
        if full:
            lanes = constant(plan.lanes, axis.var)
            parts.append(loop(full, lambda i: make(part.body, low + i * lanes, plan.lanes), axis.var))
        if done < part.high:
            parts.append(loop(part.high - done, lambda i: make(part.body, rest + i, 1), axis.var))
        return parts

    return sequence([statement for part in merge(pieces(nest, axis)) for statement in cover(part)])


def _renamed(body: Stmt) -> Stmt:
    """`body` with fresh variables for its bindings, since it is emitted more than once."""
    names = {b.var: tirx.Var(b.var.name, b.var.ty) for b in collect(body, tirx.Bind)}
    if not names:
        return body
    return tvm_ffi.structural_map(body, (tirx.Var, lambda var: names.get(var, var)))
