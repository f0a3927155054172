"""What a parallel kernel pays for workers that sleep: the first of a call, and those behind long serial stretches.

    one core's time W, workers there after w:   W < w   the caller alone did all of it
                                                else    w + (W - w) / cores

`w` is a fact of the machine (`Hardware.wake_us`). A worker spins for a while after a loop before it sleeps, so kernels
that follow each other find it awake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import tirx

from ...hwdb import Hardware
from .registry import KernelInfo

SPIN_US = 40.0  # SPIN_NANOSECONDS of aot/pool.c


def is_parallel(func: Any) -> bool:
    """Whether a function has a parallel loop."""
    found = False

    def look(loop: Any) -> None:
        nonlocal found
        found = found or loop.kind == tirx.ForKind.PARALLEL

    tvm_ffi.structural_walk(func.body, ((tirx.For,), look))
    return found


def with_waking(kernels: Sequence[KernelInfo], parallel: Sequence[bool], hw: Hardware) -> list[KernelInfo]:
    """The predictions of a region's kernels, which run one after another, with the time that workers need to wake."""
    found: list[KernelInfo] = []
    serial_us = SPIN_US + 1.0  # before the first there was a caller in Python
    for kernel, shared in zip(kernels, parallel, strict=True):
        known = kernel.predicted_us
        if shared and known is not None and serial_us > SPIN_US and hw.cores > 1:
            kernel = replace(kernel, predicted_us=_woken(known, hw))
        serial_us = 0.0 if shared else serial_us + (known or 0.0)
        found.append(kernel)
    return found


def _woken(predicted_us: float, hw: Hardware) -> float:
    """Microseconds of a kernel predicted for cores that are all there, where all but one sleep."""
    alone = max(0.0, predicted_us - hw.launch_us) * hw.cores
    return hw.launch_us + (alone if alone < hw.wake_us else hw.wake_us + (alone - hw.wake_us) / hw.cores)
