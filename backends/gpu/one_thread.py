"""Loops in an order of their own (sorts, scans, scatters: `te.extern`) as kernels of one thread each.

Slow, and right: the order of the writes is what such a loop means. The rest of the function has a thread an element.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.target import Target


def is_imperative(function: Any) -> bool:
    """Whether a block of the function has loops inside, or is a loop over one element: those write as they like."""
    found = False

    def look(block: Any) -> None:
        nonlocal found
        found = found or (block.name_hint != "root" and (not block.writes or _has_loop(block.body)))

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, look)])
    return found


def in_one_thread(function: Any, target: Target) -> Any | None:
    """The schedule; None where TVM cannot read the function."""
    found = dlight.gpu.Fallback().apply(_rooted(_serial(function)), target, False)
    return None if found is None else found.mod["main"]


def _has_loop(statement: Any) -> bool:
    loops: list[Any] = []
    tvm_ffi.structural_walk(statement, [(tirx.For, loops.append)])
    return bool(loops)


def _serial(function: Any) -> Any:
    """The function with loops that were meant for the threads and vectors of a CPU made plain."""

    def plain(loop: Any) -> Any:
        if loop.kind not in (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, plain)))


def _rooted(function: Any) -> Any:
    """The function with its only block inside a root block, as those of several blocks have it."""
    block = function.body.block
    if block.name_hint == "root":
        return function
    inner = s_tir.SBlock([], block.reads, block.writes, block.name_hint, block.body)
    root = s_tir.SBlock([], [], [], "root", s_tir.SBlockRealize([], True, inner), alloc_buffers=block.alloc_buffers)
    return function.with_body(s_tir.SBlockRealize([], True, root))
