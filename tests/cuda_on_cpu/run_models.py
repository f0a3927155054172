"""Compile models for an A100 and run them on the emulator; prints a line of JSON for each: errors, or what went wrong.

    python tests/cuda_on_cpu/run_models.py NAME[:PRECISION]...

EMULATED_WITHOUT_BARRIERS takes every __syncthreads() out of the kernels, and leaves the verification of `compile` out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import emulator

emulator.start()

import models  # noqa: E402  (torch and tvm come behind the driver)
import torch  # noqa: E402

import graphwright  # noqa: E402

BROKEN = "EMULATED_WITHOUT_BARRIERS" in os.environ
emulator.take_over()


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result."""
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 distance; 0 where there is nothing to compare."""
    if result.shape == exact.shape and not exact.numel():
        return 0.0
    return float((result.double() - exact).norm() / exact.norm())


def measured(name: str) -> dict[str, Any]:
    """Compile (which verifies on the device), save, load, run in both orders of lanes; errors of ours and of eager
    against float64; and what a second call launches.

    "block:fp16" is the block in that precision.
    """
    name, _, precision = name.partition(":")
    model, inputs = models.build(name)
    compiled = graphwright.compile(
        model, inputs, target="a100", precision=precision or "fp32", cache=False, verify=not BROKEN
    )
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        loaded = graphwright.load(compiled.save(Path(scratch, "model.gw")))
        first, eager = tensors(loaded(*inputs)), tensors(model(*inputs))
        counts = emulator.counts()
        launches, replays = counts.launches, counts.replays
        os.environ["EMULATED_REVERSE"] = "1"
        try:
            second = tensors(loaded(*inputs))
        finally:
            del os.environ["EMULATED_REVERSE"]
        double = [x.double() if x.is_floating_point() else x for x in inputs]
        exact = [x.double() for x in tensors(model.double()(*double))]
    return {
        "errors": [(error(a, c), error(b, c)) for a, b, c in zip(first, eager, exact, strict=True)],
        "same": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
        "launches": counts.launches - launches,
        "replays": counts.replays - replays,
        "kernels": len(compiled.report().kernels),
        "rules": sorted({kernel.algorithm for kernel in compiled.report().kernels}),
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        try:
            found = measured(wanted)
        except Exception:
            found = {"failure": traceback.format_exc()[-4000:]}
        print(json.dumps({"name": wanted, **found}), flush=True)
