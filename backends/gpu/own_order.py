"""Loops in an order of their own (sorts, scans, scatters: `te.extern`) as kernels, a thread for each independent part.

    for row (independent): for k: y[row, k] = y[row, k - 1] + x[row, k]      a thread a row
    for row (independent), column (independent): ...                         a thread an element
    for k: y[i[k]] += x[k]                                                   one thread

Each loop nest of such a function is a kernel: the next one begins when all its threads are done. Loops that are not
independent stay inside, in their order: the writes of a thread are those of the nest, in their order. The rest of the
function has a thread an element.
"""

from __future__ import annotations

from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.target import Target

from ..lowering.imperative import INDEPENDENT

_MOST_THREADS = 256  # of a block


def is_imperative(function: Any) -> bool:
    """Whether a block of the function has loops inside, or is a loop over one element: those write as they like."""
    found = False

    def look(block: Any) -> None:
        nonlocal found
        found = found or _is_loop_nest(block)

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, look)])
    return found


def in_own_order(function: Any, target: Target, units: int) -> Any:
    """The function scheduled for a device of `units`. Raises ValueError where TVM cannot read it."""
    warp = int(target.attrs["thread_warp_size"])

    def bind(block: Any) -> Any:
        if not _is_loop_nest(block):
            return block
        body = _bound(block.body, units, warp)
        return s_tir.SBlock([], block.reads, block.writes, block.name_hint, body, alloc_buffers=block.alloc_buffers)

    bound = function.with_body(tvm_ffi.structural_map(function.body, (s_tir.SBlock, bind)))
    found = dlight.gpu.Fallback().apply(_rooted(bound), target, False)
    if found is None:
        raise ValueError("its blocks are not a sequence of loops that TVM can schedule")
    return found.mod["main"]


def _is_loop_nest(block: Any) -> bool:
    return block.name_hint != "root" and (not block.writes or _has_loop(block.body))


def _has_loop(statement: Any) -> bool:
    loops: list[Any] = []
    tvm_ffi.structural_walk(statement, [(tirx.For, loops.append)])
    return bool(loops)


def _bound(body: Any, units: int, warp: int) -> Any:
    """The statements of a block with the threads that run them: a kernel for each loop nest."""
    while isinstance(body, tirx.AttrStmt):  # the parent that an IR builder wants has no meaning
        body = body.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    if not all(isinstance(statement, tirx.For) for statement in statements):  # variables that all of them use
        return _threads(_serial(body), 1, tirx.Var("thread", "int32"), warp, units)
    kernels = [_spread(statement, units, warp) for statement in statements]
    return kernels[0] if len(kernels) == 1 else tirx.SeqStmt(kernels)


def _spread(nest: Any, units: int, warp: int) -> Any:
    """A nest of loops with a thread for each step of the independent ones."""
    apart: list[Any] = []
    inside: list[Any] = []
    body = nest
    while isinstance(body, tirx.For):
        (apart if INDEPENDENT in body.annotations else inside).append(body)
        body = body.body
    body = _serial(body)
    for loop in reversed(inside):
        body = tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, body)
    number, count = tirx.Var("number", "int32"), prod([int(loop.extent) for loop in apart])
    step, places = count, {}
    for loop in apart:
        step //= int(loop.extent)
        place = tirx.floormod(tirx.floordiv(number, step), loop.extent)
        places[loop.loop_var] = loop.min + tirx.Cast(loop.loop_var.ty.dtype, place)
    return _threads(_substituted(body, places), count, number, warp, units)


def _threads(body: Any, count: int, number: Any, warp: int, units: int) -> Any:
    """`body` for every `number` below `count`, by as many threads."""
    threads = _MOST_THREADS
    while threads > warp and count < threads * units:
        threads //= 2
    threads = min(threads, count)
    blocks = -(-count // threads)
    axes = [tirx.Var(name, "int32") for name in ("block", "thread")]
    value = axes[0] * threads + axes[1]
    if blocks * threads > count:
        body = tirx.IfThenElse(number < count, body, None)
    body = _substituted(body, {number: value})
    for axis, extent, tag in zip(reversed(axes), (threads, blocks), ("threadIdx.x", "blockIdx.x"), strict=True):
        thread = tirx.IterVar(ir.Range(0, extent), tirx.Var(tag, "int32"), tirx.IterVar.ThreadIndex, tag)
        body = tirx.For(axis, 0, extent, tirx.ForKind.THREAD_BINDING, body, thread)
    return body


def _substituted(statement: Any, values: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(statement, (tirx.Var, lambda var: values.get(var, var)))


def _serial(statement: Any) -> Any:
    """Loops that were meant for the threads and vectors of a CPU made plain."""

    def plain(loop: Any) -> Any:
        if loop.kind not in (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(statement, (tirx.For, plain))


def _rooted(function: Any) -> Any:
    """The function with its only block inside a root block, as those of several blocks have it."""
    block = function.body.block
    if block.name_hint == "root":
        return function
    inner = s_tir.SBlock([], block.reads, block.writes, block.name_hint, block.body)
    root = s_tir.SBlock([], [], [], "root", s_tir.SBlockRealize([], True, inner), alloc_buffers=block.alloc_buffers)
    return function.with_body(s_tir.SBlockRealize([], True, root))
