"""Models for an A100, numerically, without one: TVM's host code, memory plan and every kernel run on the CPU.

Each test is a process of its own, because the driver has to be there before TVM is imported.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run_models.py"
MODELS = ("block", "several", "resnet18", "mobilenetv2")
RULES = {
    *("a thread an element", "matrix times vector", "row reductions", "one thread"),
    *("tiled product", "tiled conv", "tiled pointwise conv", "online attention"),
}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")


def run(*names: str, **environment: str) -> dict[str, dict]:
    """What run_models.py says of each model."""
    done = subprocess.run(
        [sys.executable, str(RUN), *names],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["upwards", "downwards"])
def test_models_keep_their_numbers_in_both_orders_of_lanes(order):
    results = run(*MODELS, **({"EMULATED_REVERSE": "1"} if order == "downwards" else {}))
    assert set(results) == set(MODELS)
    for name, result in results.items():
        assert "failure" not in result, f"{name}: {result['failure']}"
        assert result["repeats"], name
        for ours, eager in result["errors"]:
            # float32 sums in another order: a few times eager's own rounding; 1e-6 where eager happens to be exact.
            assert ours <= max(8 * eager, 1e-6), (name, ours, eager)
    assert {rule for result in results.values() for rule in result["rules"]} >= RULES


@pytest.mark.slow
@pytest.mark.parametrize("order", ["upwards", "downwards"])
def test_products_on_tensor_cores_err_by_the_rounding_of_their_operands(order):
    results = run("block:fp16", "block:bf16", **({"EMULATED_REVERSE": "1"} if order == "downwards" else {}))
    # A rounded operand errs by u / sqrt(3) in the mean, u = 2^-11 and 2^-8; four layers of such products.
    for (name, result), bound in zip(results.items(), (1e-3, 8e-3), strict=True):
        assert "failure" not in result, f"{name}: {result['failure']}"
        assert result["repeats"], name
        (ours, _), *_ = result["errors"]
        assert bound / 100 < ours < bound, (name, ours)
        assert f"{'bfloat16' if name.endswith('bf16') else 'float16'} tiled product" in result["rules"]


@pytest.mark.slow
def test_without_barriers_the_numbers_are_wrong():
    """The emulator would show a missing barrier: tiles are read before the other warps have filled them."""
    result = run("block", EMULATED_WITHOUT_BARRIERS="1")["block"]
    assert "failure" not in result, result["failure"]
    assert max(ours for ours, _ in result["errors"]) > 1e-2
