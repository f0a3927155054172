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
# In groups of a process each, of about the same time.
GROUPS = (
    ("block", "several", "resnet18", "mobilenetv2", "gpt2", "llama-decode"),
    ("bert", "minilm", "convnext", "shufflenetv2", "wav2vec2"),
    ("bert-eager", "efficientnet", "gpt2-decode", "resnet50", "swin", "vit"),
)
RULES = {
    *("a thread an element", "row reductions", "loops in order", "few rows"),
    *("tiled product", "tiled conv", "tiled pointwise conv", "online attention", "attention of few queries"),
}
# Products of fewer than 16 rows, whose weights stay in the cache once shrunk: 16 bits gain nothing.
FEW_ROWS = ("gpt2-decode", "llama-decode", "minilm", "wav2vec2")
# Relative L2 error of a result. A rounded operand errs by u / sqrt(3) in the mean, u = 2^-11 and 2^-8; up to 20 layers.
ROUNDED = {"fp16": 5e-3, "bf16": 8e-3}

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
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_models_keep_their_numbers_in_both_orders_of_lanes(names):
    results = run(*names)
    assert set(results) == set(names)
    for name, result in results.items():
        assert "failure" not in result, f"{name}: {result['failure']}"
        assert result["same"], name
        for ours, eager in result["errors"]:
            # float32 sums in another order: a few times eager's own rounding; 1e-6 where eager happens to be exact.
            assert ours <= max(8 * eager, 1e-6), (name, ours, eager)
        if name != "several":  # whose kernels all read an input or write a result
            # From the second call on, the rest is in CUDA graphs: half of them at least, in models so small.
            assert result["replays"], name
            assert result["launches"] <= result["kernels"] / 2, (name, result)
    if names == GROUPS[0]:
        assert {rule for result in results.values() for rule in result["rules"]} >= RULES


@pytest.mark.slow
@pytest.mark.parametrize("names", [*GROUPS, ("block:bf16",)], ids=lambda names: names[0])
def test_products_on_matrix_units_err_by_the_rounding_of_their_operands(names):
    asked = {name if ":" in name else f"{name}:fp16" for name in names} - {"several:fp16"}
    results = run(*sorted(asked))
    assert set(results) == asked
    for name, result in results.items():
        assert "failure" not in result, f"{name}: {result['failure']}"
        assert result["same"], name
        if name.partition(":")[0] not in FEW_ROWS:
            assert any("float16" in rule for rule in result["rules"]), (name, result["rules"])
        for ours, _ in result["errors"]:
            assert ours < ROUNDED[name.partition(":")[2]], (name, ours)


@pytest.mark.slow
def test_16_bit_constants_and_results_without_elements_are_right():
    result = run("edges")["edges"]
    assert "failure" not in result, result["failure"]
    assert result["same"]
    assert [ours for ours, _ in result["errors"]] == [0.0] * 10
    assert "nothing to compute" in result["rules"]


@pytest.mark.slow
def test_sums_in_parts_err_by_the_rounding_of_their_operands():
    results = run("long:fp16", "long:bf16")
    for name, result in results.items():
        assert "failure" not in result, result["failure"]
        assert result["same"]
        assert "sums of parts" in result["rules"]
        for ours, _ in result["errors"]:
            assert ours < ROUNDED[name.partition(":")[2]], (name, ours)


@pytest.mark.slow
def test_products_with_2_of_4_weights_err_by_the_rounding_of_their_operands():
    for name, result in run("sparse:fp16", "sparse:bf16").items():
        assert "failure" not in result, result["failure"]
        assert result["same"]
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[name.partition(":")[2]]
        assert {f"{dtype} sparse tiled product", f"{dtype} sparse tiled conv"} <= set(result["rules"])
        assert {f"{dtype} sparse tiled pointwise conv", "sums of parts"} <= set(result["rules"])
        for ours, _ in result["errors"]:
            assert ours < ROUNDED[name.partition(":")[2]], (name, ours)


@pytest.mark.slow
def test_few_queries_over_parts_of_the_keys_keep_their_numbers():
    result = run("cached")["cached"]
    assert "failure" not in result, result["failure"]
    assert result["same"]
    assert {"attention of few queries", "sums of parts"} <= set(result["rules"])
    assert not any("row reductions" in rule for rule in result["rules"])  # no softmax apart
    # Sums in float32; the last result is rounded to 16 bits once more than the exact one, which is too.
    for (ours, _), allowed in zip(result["errors"], (1e-6, 1e-6, 2.0**-11), strict=True):
        assert ours < allowed


@pytest.mark.slow
def test_transposed_convolutions_keep_their_numbers_for_all_strides_and_dilations():
    result = run("transposed")["transposed"]
    assert "failure" not in result, result["failure"]
    assert result["same"]
    for number, (ours, eager) in enumerate(result["errors"]):
        assert ours <= max(8 * eager, 1e-6), (number, ours, eager)


@pytest.mark.slow
def test_reductions_over_one_element_and_results_that_no_kernel_makes_are_right():
    for name, result in run("single", "single:fp16", "returned").items():
        assert "failure" not in result, (name, result["failure"])
        assert result["same"], name
        for number, (ours, eager) in enumerate(result["errors"]):
            assert ours <= max(8 * eager, 1e-6), (name, number, ours, eager)


@pytest.mark.slow
def test_without_barriers_the_numbers_are_wrong():
    """The emulator would show a missing barrier: tiles are read before the other warps have filled them."""
    result = run("block", EMULATED_WITHOUT_BARRIERS="1")["block"]
    assert "failure" not in result, result["failure"]
    assert max(ours for ours, _ in result["errors"]) > 1e-2
