"""Seconds to compile 10 to 1000 layers: `python benchmarks/compile_time.py [DEPTH ...]`.

Equal layers share one kernel; distinct ones, each with a width of its own, are compiled one by one. Prints JSON, with
the processor seconds of this process beside those of the clock.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

import graphwright

DEPTHS = {"equal": (10, 100, 1000), "distinct": (10, 100, 300)}


def equal(depth: int) -> tuple[nn.Module, torch.Tensor]:
    """Linear and ReLU, `depth` times over, all of one width."""
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(64, 64), nn.ReLU())]), torch.randn(8, 64)


def distinct(depth: int) -> tuple[nn.Module, torch.Tensor]:
    """The same, every layer one wider than the one before, and from the middle on one narrower."""
    widths = [64 + min(i, depth - i) for i in range(depth + 1)]
    layers = [m for i in range(depth) for m in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(8, widths[0])


def measure(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    """Compile without the cache."""
    started, used = time.perf_counter(), time.process_time()
    compiled = graphwright.compile(model.eval(), example, cache=False, verify=False)
    found = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}
    found |= {stage: seconds for stage, seconds in compiled.report().stages.items() if stage != "verify"}
    return {label: round(value, 2) for label, value in found.items()}


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    torch.set_grad_enabled(False)
    measure(*equal(2))  # what is done once a process
    found = {
        kind.__name__: {depth: measure(*kind(depth)) for depth in given or DEPTHS[kind.__name__]}
        for kind in (equal, distinct)
    }
    print(json.dumps(found, indent=1))
