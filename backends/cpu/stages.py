"""A PrimFunc read as a list of stages, each one loop nest with one block, and the inlining of cheap producers.

    for i, j, k: C[i, j] += A[i, k] * B[k, j]      ->  Stage(spatial=(i, j), reduce=(k,), writes C)
    for i, j:    D[i, j] = exp(C[i, j])            ->  Stage(spatial=(i, j), writes D)

Axes of extent 1 are gone (their variable is 0). A nest that does not have this form is opaque and stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, Op, TensorLoad

Expr = Any
Stmt = Any
Buffer = Any
Var = Any

# Arithmetic in units of one vector instruction, about: a division, a square root, a polynomial, a libm call per lane.
_DIVISION, _POLYNOMIAL, _LIBM = 4, 20, 60
_CHEAP = {"if_then_else": 1, "reinterpret": 0, "likely": 0, "sqrt": 4, "rsqrt": 8}
_CHEAP |= dict.fromkeys(("fabs", "floor", "ceil", "trunc", "round", "nearbyint", "isnan"), 1)
_CHEAP |= dict.fromkeys(("shift_left", "shift_right", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"), 1)
_POLYNOMIALS = {"exp", "log", "log1p", "tanh", "sigmoid", "erf"}


def intrinsic(node: Any) -> str:
    """The name of the intrinsic that a call calls, without TVM's name space; "" for other nodes."""
    if not isinstance(node, Call) or not isinstance(node.op, Op):
        return ""
    return str(node.op.name).removeprefix("tirx.").removeprefix("prim.")


@dataclass(frozen=True)
class Axis:
    """A loop: its variable, which counts from 0, and its length."""

    var: Var
    extent: int


@dataclass(frozen=True)
class Stage:
    """A loop nest over `spatial` x `reduce` that runs `body`; `init` runs once for every spatial point.

    `body` is a BufferStore in the simple case. For an opaque stage only `opaque` and the two buffer lists are set.
    """

    spatial: tuple[Axis, ...]
    reduce: tuple[Axis, ...]
    body: Stmt
    init: Stmt | None
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    opaque: Stmt | None = None

    @property
    def simple(self) -> bool:
        """Whether the body is a single store."""
        return self.opaque is None and isinstance(self.body, tirx.BufferStore)

    @property
    def injective(self) -> bool:
        """Whether every element is a formula, without a reduction."""
        return self.simple and self.init is None and not self.reduce

    @property
    def points(self) -> int:
        """How often the body runs."""
        return math.prod(axis.extent for axis in (*self.spatial, *self.reduce))


def collect(root: Any, *kinds: Any) -> list[Any]:
    """Every node of the given kinds, children first."""
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kinds, found.append))
    return found


def substitute(root: Any, values: dict[Var, Expr]) -> Any:
    """`root` with variables replaced."""
    if not values:
        return root
    return tvm_ffi.structural_map(root, (tirx.Var, lambda var: values.get(var, var)))


def cost(root: Any) -> int:
    """Vector instructions that one evaluation takes, about; memory accesses count nothing."""
    total = 0

    def count(node: Any) -> None:
        nonlocal total
        if isinstance(node, Call):
            name = intrinsic(node)
            heavy = _POLYNOMIAL if name in _POLYNOMIALS or name.startswith("graphwright.") else _LIBM
            total += _CHEAP.get(name, heavy)
        elif isinstance(node, tirx.Div | tirx.Mod | tirx.FloorDiv | tirx.FloorMod):
            total += _DIVISION
        else:
            total += 1

    arithmetic = (
        *(Call, tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Max),
        *(tirx.Min, tirx.Select, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE),
    )
    loads = (TensorLoad, lambda load: tvm_ffi.structural.WalkResult.SKIP)
    tvm_ffi.structural_walk(root, (loads, (arithmetic, count)), order="pre")
    return total


def read_stages(func: Any) -> tuple[list[Stage], list[Buffer]]:
    """The stages of `func` in order, and the buffers it allocates."""
    root = func.body.block
    body = root.body
    children = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    return [_read_stage(child) for child in children], list(root.alloc_buffers)


def _read_stage(statement: Stmt) -> Stage:
    loops: dict[Var, int] = {}
    inner = statement
    while isinstance(inner, tirx.For):
        if inner.kind != tirx.ForKind.SERIAL or not isinstance(inner.extent, tirx.IntImm) or int(inner.min) != 0:
            return _opaque(statement)
        loops[inner.loop_var] = int(inner.extent)
        inner = inner.body
    if not isinstance(inner, s_tir.SBlockRealize):
        return _opaque(statement)
    block = inner.block
    if len(block.alloc_buffers) or len(block.match_buffers):
        return _opaque(statement)
    if not (isinstance(inner.predicate, tirx.IntImm) and int(inner.predicate)):
        return _opaque(statement)
    if collect(block.body, s_tir.SBlockRealize, tirx.For, tirx.While, tirx.AllocBuffer, tirx.DeclBuffer):
        return _opaque(statement)
    axes: dict[int, list[Axis]] = {tirx.IterVar.DataPar: [], tirx.IterVar.CommReduce: []}
    values: dict[Var, Expr] = {}
    for iter_var, value in zip(block.iter_vars, inner.iter_values, strict=True):
        if iter_var.iter_type not in axes:
            return _opaque(statement)
        if value in loops and loops[value] != 1:
            axes[iter_var.iter_type].append(Axis(iter_var.var, loops.pop(value)))
        elif value in loops or isinstance(value, tirx.IntImm):
            loops.pop(value, None)
            constant = value if isinstance(value, tirx.IntImm) else 0
            values[iter_var.var] = tirx.const(int(constant), str(iter_var.var.ty.dtype))
        else:
            return _opaque(statement)
    if any(extent != 1 for extent in loops.values()):
        return _opaque(statement)
    spatial, reduce = axes[tirx.IterVar.DataPar], axes[tirx.IterVar.CommReduce]
    body = substitute(block.body, values)
    init = None if block.init is None else substitute(block.init, values)
    stores = collect([body, *([init] if init is not None else [])], tirx.BufferStore)
    if not stores or (not isinstance(block.body, tirx.BufferStore) and not _plain(block.body)):
        return _opaque(statement)
    loads = collect(body, TensorLoad)
    return Stage(
        tuple(spatial),
        tuple(reduce),
        body,
        init,
        _unique([load.source for load in loads]),
        _unique([store.buffer for store in stores]),
    )


def _plain(body: Stmt) -> bool:
    """Whether a body of several statements holds only stores and bindings."""
    parts = body.seq if isinstance(body, tirx.SeqStmt) else [body]
    return all(isinstance(part, tirx.BufferStore | tirx.Bind) for part in parts)


def _opaque(statement: Stmt) -> Stage:
    loads = collect(statement, TensorLoad)
    stores = collect(statement, tirx.BufferStore)
    regions = collect(statement, s_tir.SBlock)
    reads = [load.source for load in loads] + [r.source for block in regions for r in block.reads]
    writes = [store.buffer for store in stores] + [r.source for block in regions for r in block.writes]
    return Stage((), (), statement, None, _unique(reads), _unique(writes), statement)


def _unique(buffers: list[Buffer]) -> tuple[Buffer, ...]:
    return tuple(dict.fromkeys(buffers))


def inline_producers(stages: list[Stage], allocated: list[Buffer]) -> list[Stage]:
    """Put the formula of an injective stage in the place of its reads, where recomputing it costs less than memory.

    Pure movement and light arithmetic go into every reader; a heavy formula only where each element is read once.
    """
    stages = list(stages)
    internal = set(allocated)
    position = 0
    while position < len(stages):
        producer = stages[position]
        readers = [k for k in range(position + 1, len(stages)) if _reads(stages[k], producer.writes)]
        if _inlinable(producer, stages, readers, internal):
            for k in readers:
                stages[k] = _inlined(stages[k], producer)
            del stages[position]
        else:
            position += 1
    return stages


def _reads(stage: Stage, buffers: tuple[Buffer, ...]) -> bool:
    return any(buffer in buffers for buffer in stage.reads)


def _inlinable(producer: Stage, stages: list[Stage], readers: list[int], internal: set[Buffer]) -> bool:
    if not producer.injective or not readers:
        return False
    store = producer.body
    if store.buffer not in internal or store.buffer in producer.reads:
        return False
    axes = [axis.var for axis in producer.spatial]
    varying = [index for index in store.indices if not isinstance(index, tirx.IntImm)]
    if len(varying) != len(axes) or any(not v.same_as(a) for v, a in zip(varying, axes, strict=True)):
        return False
    if any(stages[k].opaque is not None for k in readers):
        return False
    if sum(store.buffer in stage.writes for stage in stages) != 1:
        return False
    work = cost(store.value)
    evaluations = 0
    for k in readers:
        loads = sum(load.source.same_as(store.buffer) for load in collect(stages[k].body, TensorLoad))
        evaluations += loads * stages[k].points
    if work <= 1:  # movement; a guarded one is worth storing where it is read many times
        return work == 0 or evaluations <= 4 * producer.points
    memory = 6  # a store and a load, in vector instructions
    return evaluations * work <= producer.points * (work + memory)


def _inlined(reader: Stage, producer: Stage) -> Stage:
    store = producer.body
    names = [index if isinstance(index, tirx.Var) else None for index in store.indices]

    def value(load: Any) -> Any:
        if not load.source.same_as(store.buffer):
            return load
        values = {n: i for n, i in zip(names, load.indices, strict=True) if n is not None}
        return substitute(store.value, values)

    body = tvm_ffi.structural_map(reader.body, (TensorLoad, value))
    reads = _unique([load.source for load in collect(body, TensorLoad)])
    return replace(reader, body=body, reads=reads)
