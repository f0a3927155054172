"""Predicted seconds of a piece of work on a machine: the one figure passes, tiling and reports share.

    seconds    = max(arithmetic, memory) + launches          (roofline: Williams, Waterman, Patterson, 2009)
                 their sum on cores that work in order
    arithmetic = sum over dtypes of FLOPs / (peak * efficiency), times the imbalance of a static split;
                 a type the hardware lacks is widened (`Hardware.computed_in`)
    memory     = bytes / bandwidth of the smallest level that holds them all

`tasks` equal pieces on `cores` cores take ceil(tasks / cores) rounds, so the cores are busy for
tasks / (rounds * cores) of the time: five pieces on four cores take as long as eight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .records import Hardware


@dataclass(frozen=True)
class Work:
    """A piece of work in plain numbers."""

    flops: Mapping[str, float] = field(default_factory=dict)  # by dtype; a multiply-add counts two
    bytes_read: float = 0.0  # distinct bytes that must come in (activations and weights)
    bytes_written: float = 0.0
    launches: int = 1  # parallel regions started
    tasks: int | None = None  # equal pieces the work divides into; None = as many as wanted
    efficiency: float = 0.8  # share of peak FLOP/s the inner loop reaches


def predict_seconds(hw: Hardware, work: Work) -> float | None:
    """Seconds `work` takes on `hw` by the roofline model, or None where the machine's rates are unknown."""
    busy = _busy_share(hw.cores, work.tasks)
    arithmetic = 0.0
    for dtype, flops in work.flops.items():
        computed = hw.computed_in(dtype)
        peak = None if computed is None else hw.peak_flops(computed)
        if peak is None:
            return None
        arithmetic += flops / (peak * work.efficiency * busy)

    moved = work.bytes_read + work.bytes_written
    memory = 0.0
    if moved > 0:
        bandwidth = memory_bandwidth_gbs(hw, moved)
        if bandwidth is None:
            return None
        memory = moved / (bandwidth * 1e9 * busy)
    return overlapped(hw, arithmetic, memory) + work.launches * launch_seconds(hw)


def overlapped(hw: Hardware, one: float, other: float, exposed: float = 0.0) -> float:
    """What two things take that go on at once: the longer, and of the shorter the share that is `exposed`.

    A core that works in order hides nothing: what waits for memory keeps the next instruction from starting.
    """
    return max(one, other) + (1.0 if hw.in_order else exposed) * min(one, other)


def memory_bandwidth_gbs(hw: Hardware, footprint_bytes: float) -> float | None:
    """GB/s of all cores over a footprint that stays in the smallest cache level holding it, else in DRAM.

    Every level counts with all its copies that the cores of `hw` reach: the work is spread over the cores. A cache
    whose rate nobody published counts as what lies behind it.
    """
    for cache in hw.caches:
        copies = math.ceil(hw.cores / cache.shared_by_cores)
        if footprint_bytes <= cache.size_bytes * copies and (rate := hw.bandwidth_gbs(cache.level)) is not None:
            return rate
    rates = [rate for level in (0, *(cache.level for cache in hw.caches)) if (rate := hw.bandwidth_gbs(level))]
    # DRAM is not faster than the caches in front of it, whatever its record says.
    return min(rates) if hw.dram_gbs is not None else None


def launch_seconds(hw: Hardware) -> float:
    """Seconds to start and join one parallel region; one core runs it as a plain call."""
    return hw.launch_us * 1e-6 if hw.cores > 1 else 0.05e-6


def _busy_share(cores: int, tasks: int | None) -> float:
    if tasks is None:
        return 1.0
    tasks = max(tasks, 1)
    return tasks / (math.ceil(tasks / cores) * cores)
