"""The generic CPU schedule: any PrimFunc that TE produces becomes parallel, vectorised loops.

    read stages -> inline cheap producers -> join (join.py) -> loops, one group after another

A group of stages that share outer axes runs row by row (softmax: maximum, exponential, sum, quotient of one row), its
intermediate results in a scratch row. Outer loops are parallel where there is enough work. Two rules hold: elements
that are only moved stay bit-exact, and a schedule never fails: what a rule cannot do falls to the next simpler one, at
last to the function as it came.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from ...hwdb import Hardware
from . import access
from .access import Nest, Views
from .emit import choose_plan, emit
from .guards import merge, parts_along, pieces
from .join import groups, join_formulas, split_reductions
from .loops import Plan, constant, sequence
from .stages import Axis, Expr, Stage, Stmt, Var, inline_producers, read_stages, substitute
from .transpose import CYCLES, emit_tiles, find_tile

log = logging.getLogger(__name__)

_PARTS = 8  # nests that one stage may be cut into


def schedule(func: Any, hw: Hardware) -> Any:
    """Return `func` with its loops arranged for `hw`; its results are the same up to the order of sums.

    `func` is a tirx.PrimFunc with static shapes, before `expand_math`. What no rule covers is returned as it is, with
    a warning.
    """
    for rule in (_joined, _separate):
        try:
            return rule(func, hw)
        except Exception as error:  # any schedule is better than none: the function itself is always correct
            log.debug("%s of %s: %s", rule.__name__, _name(func), error, exc_info=True)
    log.warning("no schedule applies to %s, which runs in one thread; the report says so", _name(func))
    return func


def _name(func: Any) -> str:
    return str(func.attrs.get("global_symbol", "?")) if func.attrs is not None else "?"


def _joined(func: Any, hw: Hardware) -> Any:
    return _scheduled(func, hw, join=True)


def _separate(func: Any, hw: Hardware) -> Any:
    return _scheduled(func, hw, join=False)


def _scheduled(func: Any, hw: Hardware, join: bool) -> Any:
    stages, allocated = read_stages(func)
    stages = inline_producers(stages, allocated)
    if join:
        stages, blocks = split_reductions(stages, hw)
        allocated = [*allocated, *blocks]
    live = {buffer for stage in stages for buffer in (*stage.reads, *stage.writes)}
    runs = [([stage], 0) for stage in stages]
    if join:
        runs = groups(stages, hw)
        if len(runs) > 1 and (together := join_formulas(stages)) is not None:
            runs = [([together], 0)]
    named = {b for stage in stages if stage.opaque is not None for b in (*stage.reads, *stage.writes)}
    views = Views(own=[b for b in allocated if b not in named])
    statements: list[Stmt] = []
    inner: set[Any] = set()
    for index, (members, depth) in enumerate(runs):
        later = {b for ms, _ in runs[index + 1 :] for stage in ms for b in stage.reads}
        private = [
            b
            for stage in members
            for b in stage.writes
            if b in set(allocated) and b not in later and depth and len(members) > 1
        ]
        inner.update(private)
        statements.append(_group(members, depth, private, views, hw))
    outer = [b for b in allocated if b in live and b not in inner]
    allocations = [tirx.AllocBuffer(views.flat(b)[0] if b in views.own else b) for b in outer]
    body = sequence([*allocations, *views.declarations, *statements])
    root = func.body.block
    block = type(root)(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        body,
        root.init,
        [],
        root.match_buffers,
        root.annotations,
    )
    return func.with_body(type(func.body)(func.body.iter_values, func.body.predicate, block))


# ---- one group ----


def _group(members: list[Stage], depth: int, private: Sequence[Any], views: Views, hw: Hardware) -> Stmt:
    if len(members) > 1:
        return _rows(members, depth, private, views, hw)
    stage = members[0]
    if stage.opaque is not None:
        return stage.opaque
    if 0 in [axis.extent for axis in stage.spatial]:
        return tirx.Evaluate(tirx.const(0, "int32"))
    nest = access.flatten(stage, views)
    access.split_by_divisors(nest)
    return sequence([_alone(part, hw) for part in _split_by_guards(nest, hw)])


def _split_by_guards(nest: Nest, hw: Hardware) -> list[Nest]:
    """Cut the axes outside of the vectorised one where guards change: a concatenation's parts, a border's rows."""
    inner = choose_plan(nest, nest.axes, hw).axis
    parts = [nest]
    for axis in nest.spatial:
        if axis is inner:
            continue
        cut = [part for part in parts for part in parts_along(part, axis)]
        if len(cut) > _PARTS:
            break
        parts = cut
    return parts


def _alone(nest: Nest, hw: Hardware) -> Stmt:
    access.collapse(nest, 0)
    if not nest.axes:
        return emit(nest, {}, Plan(None, 1, 1.0))
    like = nest.axes[0].var
    tile = find_tile(nest, hw)
    if tile is not None:
        axes = [tile.columns if a is tile.across else a for a in nest.spatial if a is not tile.along]
        return _parallel(axes, _tasks(nest.axes, CYCLES, hw), like, lambda at: emit_tiles(nest, at, tile), [])
    plan = choose_plan(nest, nest.axes, hw)
    outer = [axis for axis in nest.spatial if axis is not plan.axis]
    tasks = _tasks(nest.axes, plan.cycles, hw)
    rows = math.prod(axis.extent for axis in outer)
    shares = 1
    if plan.axis is not None and plan.axis in nest.spatial and tasks > rows:
        group = plan.lanes * (4 if nest.reduce else 1)
        shares = max(1, min(-(-tasks // rows), plan.axis.extent // group))
    if shares > 1 and not _guarded(nest, plan):
        share = Axis(tirx.Var("share", str(like.ty.dtype)), shares)
        return _parallel([*outer, share], tasks, like, lambda at: emit(nest, at, plan, (at[share.var], shares)), [])
    return _parallel(outer, tasks, like, lambda at: emit(nest, at, plan), [])


def _guarded(nest: Nest, plan: Plan) -> bool:
    return plan.axis is not None and len(merge(pieces(nest, plan.axis))) > 1


def _rows(members: list[Stage], depth: int, private: Sequence[Any], views: Views, hw: Hardware) -> Stmt:
    allocations: list[Stmt] = []
    for buffer in private:
        kept = [int(e) for e in buffer.shape]
        dims, seen = 0, 0
        while seen < depth:  # dims of extent 1 are no axes
            seen += kept[dims] != 1
            dims += 1
        size = math.prod(kept[dims:])
        scratch = tirx.decl_buffer((size,), str(buffer.dtype), f"{buffer.name}_row")
        views.scratch[buffer] = (scratch, dims)
        allocations.append(tirx.AllocBuffer(scratch))
    shared = [Axis(tirx.Var(a.var.name, str(a.var.ty.dtype)), a.extent) for a in members[0].spatial[:depth]]
    nests: list[tuple[Nest, Plan]] = []
    cycles = 0.0
    for stage in members:
        nest = access.flatten(stage, views)
        values = {own.var: _as(common.var, own.var) for own, common in zip(stage.spatial, shared, strict=False)}
        body = substitute(nest.body, values)
        init = None if nest.init is None else substitute(nest.init, values)
        nest = Nest([*shared, *nest.spatial[depth:]], nest.reduce, body, init, nest.simple)
        access.split_by_divisors(nest, depth)
        access.collapse(nest, depth)
        plan = choose_plan(nest, [*nest.spatial[depth:], *nest.reduce], hw)
        nests.append((nest, plan))
        cycles += plan.cycles * math.prod(a.extent for a in (*nest.spatial[depth:], *nest.reduce))

    def row(at: dict[Var, Expr]) -> Stmt:
        return sequence([emit(nest, at, plan) for nest, plan in nests])

    tasks = _tasks(shared, cycles, hw)
    return _parallel(shared, tasks, shared[0].var, row, allocations)


def _as(value: Expr, like: Var) -> Expr:
    dtype = str(like.ty.dtype)
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def _tasks(axes: Sequence[Axis], cycles: float, hw: Hardware) -> int:
    """Into how many parallel pieces the work is worth dividing: one, if starting a region costs more than it saves."""
    points = math.prod(axis.extent for axis in axes)
    microseconds = points * cycles / hw.cycles_per_us
    if hw.cores < 2 or microseconds < 2 * hw.launch_us:
        return 1
    each = max(1, min(4, int(microseconds / (4 * hw.launch_us * hw.cores))))
    return each * hw.cores


def _parallel(axes: Sequence[Axis], tasks: int, like: Var, body: Any, allocations: Sequence[Stmt]) -> Stmt:
    """Run `body` for every position of `axes`, in `tasks` equal shares; each share has its own allocations."""
    rows = math.prod(axis.extent for axis in axes)
    dtype = str(like.ty.dtype)

    def span(first: Expr, count: Expr | int) -> Stmt:
        if isinstance(count, int) and count == 1:
            return sequence([*allocations, _at(axes, first, like, body)])
        var = tirx.Var("row", dtype)
        extent = constant(count, like) if isinstance(count, int) else count
        inner = tirx.For(var, constant(0, like), extent, tirx.ForKind.SERIAL, _at(axes, first + var, like, body))
        return sequence([*allocations, inner])

    tasks = min(tasks, rows)
    if tasks <= 1:
        return span(constant(0, like), rows)
    task = tirx.Var("task", dtype)
    if rows % tasks == 0:
        share = span(task * constant(rows // tasks, like), rows // tasks)
    else:
        first = tirx.floordiv(task * constant(rows, like), constant(tasks, like))
        last = tirx.floordiv((task + constant(1, like)) * constant(rows, like), constant(tasks, like))
        share = span(first, last - first)
    return tirx.For(task, constant(0, like), constant(tasks, like), tirx.ForKind.PARALLEL, share)


def _at(axes: Sequence[Axis], position: Expr, like: Var, body: Any) -> Stmt:
    """`body` with the axes bound to where `position` lies in row-major order."""
    if not axes:
        return body({})
    if len(axes) == 1:
        return body({axes[0].var: _as(position, axes[0].var)})
    flat = tirx.Var("position", str(like.ty.dtype))
    bindings: list[Stmt] = [tirx.Bind(flat, position)]
    values: dict[Var, Expr] = {}
    rest: Expr = flat
    inner = math.prod(axis.extent for axis in axes)
    for axis in axes:
        inner //= axis.extent
        bound = tirx.Var(axis.var.name, str(axis.var.ty.dtype))
        value = rest if inner == 1 else tirx.floordiv(rest, constant(inner, like))
        if not axis.var.same_as(axes[0].var):
            value = tirx.floormod(value, constant(axis.extent, like))
        bindings.append(tirx.Bind(bound, _as(value, axis.var)))
        values[axis.var] = bound
    return sequence([*bindings, body(values)])
