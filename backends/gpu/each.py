"""A thread for every element of a result: the schedule of elementwise work and of short reductions.

    sum -> epilogue     for every element: the sum in a register, then the epilogue, one kernel

Blocks have 256 threads, and fewer where that leaves units without a block.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import s_tir
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline

_MOST_THREADS = 256


def one_thread_each(function: Any, units: int, warp_threads: int) -> Any | None:
    """The schedule, or None for functions of other forms: several reductions, or an epilogue of another extent."""
    sch = s_tir.Schedule(function)
    infos = normalize_prim_func(sch)
    if infos is None:
        return None
    infos = try_inline(sch, infos)
    *before, last = infos
    elements = _elements(last)
    if len(before) > 1 or any(not info.is_reduction() or _elements(info) != elements for info in before):
        return None
    threads = _MOST_THREADS
    while threads > warp_threads and elements < threads * units:
        threads //= 2
    kinds = last.dom_kind()
    loops = sch.get_loops(last.block_rv)
    if len(loops) != len(kinds) or set(kinds) - set("SR") or (before and "R" in kinds):
        return None
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
    if not spatial:
        spatial = [sch.add_unit_loop(loops[0] if loops else last.block_rv)]
    sch.reorder(*spatial, *reduced)
    block, thread = sch.split(sch.fuse(*spatial), factors=[None, threads])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    if before:
        total = before[0].block_rv
        sch.compute_at(total, thread, preserve_unit_loops=True)
        sch.set_scope(total, 0, "local")
        # Loops of the reduction come behind those of the element, which have extent 1.
        inner = sch.get_loops(total)[2:]
        reduced = inner[len(inner) - before[0].dom_kind().count("R") :]
        sch.decompose_reduction(total, reduced[0])
    elif reduced:
        sch.decompose_reduction(last.block_rv, reduced[0])
    return sch.mod["main"]


def _elements(info: Any) -> int:
    return prod(int(i.dom) for i in info.iters if i.kind == "S")
