"""Which stages run together: formulas in one pass over the elements, everything else row by row.

    y = f(x); z = g(y)                     one nest with two stores, where both are over the same elements
    m = max(x[i, :]); e = exp(x[i, :] - m) one group, a row after the other: i is shared
    s = sum(x)                             p[t] = sum(block t of x); s = sum(p): blocks are rows

A stage goes into the last group that it can share rows with, not before the stages it reads: a stage over other rows
in between does not part the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

from ...hwdb import Hardware
from ..region_kernel import row_bytes
from . import access
from .access import Views, combiner, element_bits
from .emit import choose_plan
from .stages import Axis, Buffer, Stage, collect, substitute

_SMALL = 1 << 14  # elements of a stage that hardly pays a parallel loop of its own
_LONG_REDUCTION = 1 << 15  # elements of a reduction that is worth dividing among cores
_BLOCK, _MOST_BLOCKS = 1 << 11, 64


# ---- one pass over the elements ----


def join_formulas(stages: list[Stage]) -> Stage | None:
    """One stage with several stores where all are formulas over the same elements."""
    if len(stages) < 2 or not all(stage.injective and _identical(stage.body.indices, stage) for stage in stages):
        return None
    first = stages[0]
    extents = [axis.extent for axis in first.spatial]
    written = {stage.body.buffer for stage in stages}
    body: list[Any] = []
    for stage in stages:
        if [axis.extent for axis in stage.spatial] != extents:
            return None
        for load in collect(stage.body, TensorLoad):
            if load.source in written and not _identical(load.indices, stage):
                return None
        values = {own.var: common.var for own, common in zip(stage.spatial, first.spatial, strict=True)}
        if any(str(a.ty.dtype) != str(b.ty.dtype) for a, b in values.items()):
            return None
        body.append(substitute(stage.body, values))
    reads = tuple(dict.fromkeys(b for stage in stages for b in stage.reads))
    return replace(first, body=tirx.SeqStmt(body), reads=reads, writes=tuple(stage.body.buffer for stage in stages))


def _identical(indices: Sequence[Any], stage: Stage) -> bool:
    """Whether `indices` are the axes of the stage, in order; constants stand for dims of extent 1."""
    varying = [index for index in indices if not isinstance(index, tirx.IntImm)]
    return len(varying) == len(stage.spatial) and all(
        index.same_as(axis.var) for index, axis in zip(varying, stage.spatial, strict=True)
    )


# ---- long reductions in blocks ----


def split_reductions(stages: list[Stage], hw: Hardware) -> tuple[list[Stage], list[Buffer]]:
    """Long reductions to fewer elements than there are cores, as reductions of blocks and of what those yield.

    Returns the stages, and the buffers of the blocks' results.
    """
    result: list[Stage] = []
    buffers: list[Buffer] = []
    for stage in stages:
        parts = _in_blocks(stage, hw)
        if parts is None:
            result.append(stage)
            continue
        result += parts[:2]
        buffers.append(parts[2])
    return result, buffers


def _in_blocks(stage: Stage, hw: Hardware) -> tuple[Stage, Stage, Buffer] | None:
    elements = math.prod(axis.extent for axis in stage.spatial)
    if hw.cores < 2 or not stage.simple or not stage.reduce or elements >= hw.cores:
        return None
    if stage.points < _LONG_REDUCTION or stage.init is None or not isinstance(stage.init, tirx.BufferStore):
        return None
    known = combiner(access.flatten(stage, Views()))
    head = stage.reduce[0]
    blocks = _blocks(head.extent, stage.points, hw)
    if known is None or blocks is None:
        return None
    combine, _ = known
    dtype = str(head.var.ty.dtype)
    store = stage.body
    block = Axis(tirx.Var("block", dtype), blocks)
    inner = Axis(tirx.Var(f"{head.var.name}_i", dtype), head.extent // blocks)
    partial = tirx.decl_buffer((blocks, *store.buffer.shape), str(store.buffer.dtype), f"{store.buffer.name}_blocks")

    def moved(node: Any, at: Any) -> Any:
        def load(node: Any) -> Any:
            return tirx.BufferLoad(partial, [at, *node.indices]) if node.source.same_as(store.buffer) else node

        value = tvm_ffi.structural_map(node.value, (TensorLoad, load))
        return tirx.BufferStore(partial, value, [at, *node.indices])

    values = {head.var: block.var * tirx.const(inner.extent, dtype) + inner.var}
    reads = (*(b for b in stage.reads if not b.same_as(store.buffer)), partial)
    first = Stage(
        (block, *stage.spatial),
        (inner, *stage.reduce[1:]),
        substitute(moved(store, block.var), values),
        moved(stage.init, block.var),
        reads,
        (partial,),
    )
    # No variable may be bound by two loops.
    own = {axis.var: tirx.Var(axis.var.name, str(axis.var.ty.dtype)) for axis in stage.spatial}
    spatial = tuple(Axis(own[axis.var], axis.extent) for axis in stage.spatial)
    indices = [substitute(index, own) for index in store.indices]
    place = Axis(tirx.Var("block", dtype), blocks)
    value = combine(tirx.BufferLoad(store.buffer, indices), tirx.BufferLoad(partial, [place.var, *indices]))
    second = Stage(
        spatial,
        (place,),
        tirx.BufferStore(store.buffer, value, indices),
        substitute(stage.init, own),
        (store.buffer, partial),
        (store.buffer,),
    )
    return first, second, partial


def _blocks(extent: int, points: int, hw: Hardware) -> int | None:
    """Equal blocks of the outermost reduced axis: as many as keep one in L1, at least one a core."""
    most = min(_MOST_BLOCKS * hw.cores, max(points // _BLOCK, 1), extent)
    return next((count for count in range(most, hw.cores - 1, -1) if extent % count == 0), None)


# ---- rows ----


def groups(stages: list[Stage], hw: Hardware) -> list[tuple[list[Stage], int]]:
    """Stages that run row by row together, and the number of outer axes they share."""
    found: list[tuple[list[Stage], int]] = []
    home: dict[Buffer, int] = {}
    for stage in stages:
        earliest = max((home[b] for b in (*stage.reads, *stage.writes) if b in home), default=0)
        place = len(found)
        for number in range(len(found) - 1, earliest - 1, -1):
            shared = _shared_depth([*found[number][0], stage], hw)
            if shared:
                place = number
                found[number] = ([*found[number][0], stage], shared)
                break
        else:
            found.append(([stage], 0))
        home.update(dict.fromkeys(stage.writes, place))
    return found


def _shared_depth(members: list[Stage], hw: Hardware) -> int:
    """How many outer axes all stages share, element for element; 0 if joining them does not pay."""
    if any(not stage.simple or 0 in [a.extent for a in (*stage.spatial, *stage.reduce)] for stage in members):
        return 0
    written = {stage.writes[0]: stage for stage in members}
    if not _related(members, set(written)):
        return 0
    depth = min(len(stage.spatial) for stage in members)
    for stage in members:
        while depth and not _aligned(stage, depth, set(written)):
            depth -= 1
    first = members[0].spatial
    for k in range(depth):
        if any(stage.spatial[k].extent != first[k].extent for stage in members):
            depth = k
            break
    # The axis along which the heavy stages are vectorised stays inside.
    total = sum(stage.points for stage in members)
    for stage in members:
        if stage.points * 4 >= total:
            depth = min(depth, _outer_axes(stage, hw))
    rows = math.prod(axis.extent for axis in first[:depth])
    if not depth:
        return 0
    scratch = sum(access.size_of(b) * element_bits(str(b.dtype)) // 8 // rows for b in written)
    enough = rows >= hw.cores or total < 1 << 14
    return depth if enough and scratch <= row_bytes(hw) else 0


def _related(members: list[Stage], written: set[Buffer]) -> bool:
    """Whether the last stage reads what another writes, or reads too; small formulas need no relation."""
    *others, last = members
    if all(stage.injective and stage.points <= _SMALL for stage in members):
        return True
    read = {b for stage in others for b in stage.reads}
    return any((b in written or b in read) and not b.same_as(last.writes[0]) for b in last.reads)


def _aligned(stage: Stage, depth: int, written: set[Buffer]) -> bool:
    """Whether every access to a buffer of the group has the first `depth` axes as its first varying indices."""
    accesses = [(n.source, n.indices) for n in collect(stage.body, TensorLoad) if n.source in written]
    accesses += [(stage.body.buffer, stage.body.indices)]
    for buffer, indices in accesses:
        # A constant index into a dim of several elements is an index like any other: of another row.
        varying = [i for i, extent in zip(indices, buffer.shape, strict=True) if int(extent) != 1]
        if len(varying) < depth:
            return False
        if any(not varying[k].same_as(stage.spatial[k].var) for k in range(depth)):
            return False
    return True


def _outer_axes(stage: Stage, hw: Hardware) -> int:
    """How many leading axes lie outside of the axis that this stage would be vectorised along."""
    nest = access.flatten(stage, Views())
    plan = choose_plan(nest, nest.axes, hw)
    if plan.axis is None or plan.axis in nest.reduce:
        return len(stage.spatial)
    place = nest.spatial.index(plan.axis)
    # Short vectorised axes are fused with their neighbours: leave room for that.
    length = plan.axis.extent
    while place and length < 64:
        place -= 1
        length *= nest.spatial[place].extent
    return place
