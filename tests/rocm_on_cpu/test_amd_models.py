"""Models for AMD's GPUs by the LLVM IR of their kernels, ours and those of TVM's rules, in both orders of lanes."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_on_cpu"))
import amd_models
import models

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# Model, target, precision, and rules it has to reach.
CASES = {
    "block:gfx90a:fp32": {"online attention", "row reductions", "tiled product"},
    "block:gfx1100:fp16": {"float16 online attention", "float16 tiled product", "row reductions"},
    "several:gfx90a:fp32": {"first extreme", "loops in order", "merges by rank"},
    "long:gfx90a:fp16": {"float16 tiled conv", "float16 tiled product", "sums of parts"},
    "cached:gfx90a:fp32": {"attention of few queries", "sums of parts"},
    "edges:gfx1100:fp32": {"a thread an element", "loops in order"},
}
# float32 sums in another order; operands rounded by 2^-11, as some of "cached" are by the model itself.
ALLOWED = {"block:gfx90a:fp32": 1e-6, "several:gfx90a:fp32": 1e-6, "edges:gfx1100:fp32": 0.0}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def distance(result: torch.Tensor, exact: torch.Tensor) -> float:
    if not exact.numel():
        return 0.0
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_models_agree_with_float64_in_both_orders_of_lanes(case):
    name, target, precision = case.split(":")
    model, inputs = models.build(name)
    emulated = amd_models.Emulated(model, inputs, target, precision)
    assert {kernel.algorithm for kernel in emulated.report.kernels} >= CASES[case]
    up, down = emulated(reverse=False), emulated(reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))
    with torch.no_grad():
        exact = tensors(model.double()(*[x.double() if x.dtype == torch.float32 else x for x in inputs]))
    computed = [
        x for x in exact if not any(x.shape == i.shape and torch.equal(x, i.double()) for i in inputs if i.numel())
    ]
    assert len(up) == len(computed)
    # The code has its results in an order of its own.
    for wanted in computed:
        errors = [distance(found, wanted) for found in up if found.shape == wanted.shape]
        assert min(errors) <= ALLOWED.get(case, 1e-3)
