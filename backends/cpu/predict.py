"""Predicted seconds of a fused function before it is scheduled: arithmetic and accesses by vectors, or bytes moved.

cycles = sum over stages of points * (arithmetic / 2 + accesses) / lanes       two vector instructions a cycle
bytes  = the buffers that come in and go out, each once
"""

from __future__ import annotations

from typing import Any

from tvm.ir import TensorLoad

from ...hwdb import Hardware
from ...hwdb.cost import launch_seconds, memory_bandwidth_gbs
from .access import element_bits, size_of, vectorisable_calls
from .stages import collect, cost, inline_producers, read_stages


def predicted_seconds(func: Any, hw: Hardware) -> float | None:
    """Seconds of `func` on all cores, or None where a stage cannot be read or the machine's rates are unknown."""
    if hw.clock_mhz is None:
        return None
    stages, allocated = read_stages(func)
    stages = inline_producers(stages, allocated)
    if any(stage.opaque is not None for stage in stages):
        return None
    cycles = 0.0
    for stage in stages:
        bits = max((element_bits(str(b.dtype)) for b in (*stage.reads, *stage.writes)), default=32)
        lanes = max(1, hw.vector_bits // bits) if vectorisable_calls(stage.body) else 1
        accesses = len(collect(stage.body, TensorLoad)) + 1
        cycles += stage.points * (cost(stage.body) / 2 + accesses) / lanes
    inner = set(allocated)
    outer = {b for stage in stages for b in (*stage.reads, *stage.writes) if b not in inner}
    moved = sum(size_of(b) * element_bits(str(b.dtype)) / 8 for b in outer)
    rate = memory_bandwidth_gbs(hw, moved)
    one_core = max(cycles / (hw.clock_mhz * 1e6), 0.0 if rate is None else moved / (rate * 1e9) * hw.cores)
    if hw.cores < 2 or one_core < 2 * launch_seconds(hw):
        return one_core
    return one_core / hw.cores + launch_seconds(hw)
