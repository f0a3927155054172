"""Predicted seconds of a fused function before it is scheduled: arithmetic and accesses by vectors, or bytes moved.

cycles = sum over stages of points * (arithmetic / 2 + accesses) / lanes       two vector instructions a cycle
         or points * transpose.CYCLES where tiles are transposed in registers
bytes  = what comes in and goes out, each once; of a buffer no more than its loads reach (embedding, slices)
cold   = weights that other kernels push out of the caches between calls: from memory, and of rows at computed places
         the first line of each is waited for

Beyond the caches of a single core a written line counts twice: it is read before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tvm.ir import TensorLoad

from ...hwdb import Hardware
from ...hwdb.cost import launch_seconds, memory_bandwidth_gbs
from .access import Views, collapse, element_bits, flatten, size_of, split_by_divisors, vectorisable_calls
from .stages import Buffer, Stage, collect, cost, inline_producers, read_stages
from .transpose import CYCLES, find_tile

MISS_SECONDS = 1e-7  # of a line from memory that no prefetcher foresees: an estimate


def predicted_seconds(func: Any, hw: Hardware, cold: Collection[int] = ()) -> float | None:
    """Seconds of `func` on all cores, or None where a stage cannot be read or the machine's rates are unknown.

    `cold` are the parameters that lie in memory when it is called.
    """
    if hw.clock_mhz is None:
        return None
    stages, allocated = read_stages(func)
    stages = inline_producers(stages, allocated)
    if any(stage.opaque is not None for stage in stages):
        return None
    cycles = sum(_cycles(stage, hw) for stage in stages)
    outside = {func.params[i] for i in cold}
    into, out = _moved(stages, set(allocated), outside)
    rate = memory_bandwidth_gbs(hw, into + out)
    own = max((c.size_bytes * hw.cores for c in hw.caches if c.shared_by_cores == 1), default=0)
    moved = into + (out if into + out <= own else 2 * out)
    one_core = max(cycles / (hw.clock_mhz * 1e6), 0.0 if rate is None else moved / (rate * 1e9) * hw.cores)
    one_core += _cold_seconds(stages, outside, hw)
    if hw.cores < 2 or one_core < 2 * launch_seconds(hw):
        return one_core
    return one_core / hw.cores + launch_seconds(hw)


def _cycles(stage: Stage, hw: Hardware) -> float:
    bits = max((element_bits(str(b.dtype)) for b in (*stage.reads, *stage.writes)), default=32)
    lanes = max(1, hw.vector_bits // bits) if vectorisable_calls(stage.body) else 1
    accesses = len(collect(stage.body, TensorLoad)) + 1
    straight = (cost(stage.body) / 2 + accesses) / lanes
    return stage.points * max(straight, CYCLES if _transposes(stage, hw) else 0.0)


def _transposes(stage: Stage, hw: Hardware) -> bool:
    if not stage.simple or 0 in [axis.extent for axis in stage.spatial]:
        return False
    nest = flatten(stage, Views())
    split_by_divisors(nest)
    collapse(nest, 0)
    return find_tile(nest, hw) is not None


def _moved(stages: list[Stage], inner: set[Buffer], cold: set[Buffer]) -> tuple[float, float]:
    """Bytes that come in from caches and that go out."""
    written = {b for stage in stages for b in stage.writes if b not in inner}
    read = {b for stage in stages for b in stage.reads if b not in inner | written | cold}
    return sum(_read(stages, read).values()), sum(_bytes(b) for b in written)


def _read(stages: list[Stage], buffers: set[Buffer]) -> dict[Buffer, float]:
    """Bytes that the loads reach of each buffer."""
    reached = dict.fromkeys(buffers, 0.0)
    for stage in stages:
        for load in collect(stage.body, TensorLoad):
            if load.source in reached:
                reached[load.source] += stage.points * element_bits(str(load.source.dtype)) / 8
    return {b: min(_bytes(b), reach) for b, reach in reached.items()}


def _cold_seconds(stages: list[Stage], cold: set[Buffer], hw: Hardware) -> float:
    """Seconds in which one core has its cold weights from memory."""
    read = _read(stages, {b for stage in stages for b in stage.reads if b in cold})
    rows = sum(read[b] / run for stage in stages for b, run in _runs(stage).items() if b in read)
    streamed = sum(read.values()) / (hw.dram_gbs * 1e9) * hw.cores if hw.dram_gbs else 0.0
    return streamed + rows * MISS_SECONDS


def _runs(stage: Stage) -> dict[Buffer, float]:
    """Bytes of one row of each buffer that is read at places only known at run time."""
    found = {}
    for load in collect(stage.body, TensorLoad):
        computed = [k for k, index in enumerate(load.indices) if collect(index, TensorLoad)]
        if computed:
            extents = [int(n) for n in load.source.shape[computed[-1] + 1 :]]
            found[load.source] = math.prod(extents) * element_bits(str(load.source.dtype)) / 8
    return found


def _bytes(buffer: Buffer) -> float:
    return size_of(buffer) * element_bits(str(buffer.dtype)) / 8
