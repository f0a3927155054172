"""Pruned models through the whole compiler: what runs, what explain says, and 8 bits on top."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.explaining.explain import explain
from graphwright.hwdb import detect, lookup


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()


X = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def test_a_pruned_model_skips_its_blocks() -> None:
    pruned = graphwright.prune(model(), "16x16", 0.75)
    compiled = graphwright.compile(pruned, X)
    report = compiled.report()
    kernels = [k for k in report.kernels if k.algorithm == "block-sparse matmul"]
    assert len(kernels) == 2
    assert all("16x16 blocks, 25% kept" in k.choice for k in kernels)
    dense = graphwright.compile(pruned, X, kernel_fusion=["matmul+bias", "matmul+relu"])
    assert not [k for k in dense.report().kernels if k.algorithm == "block-sparse matmul"]
    assert report.weights_bytes < 0.35 * dense.report().weights_bytes
    torch.testing.assert_close(compiled(X), dense(X), rtol=1e-4, atol=1e-5)


def test_pixels_of_a_pointwise_convolution_are_rows() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 1))
    pruned = graphwright.prune(nn.Sequential(*layers).eval(), "4x16", 0.75)
    compiled = graphwright.compile(pruned, torch.randn(1, 64, 14, 14))
    assert [k.algorithm for k in compiled.report().kernels].count("block-sparse matmul") == 2


def test_explain_says_why_and_why_not() -> None:
    blocks = explain(graphwright.prune(model(), "16x16", 0.75), X)
    assert "block-sparse matmul" in blocks
    neighbours = explain(graphwright.prune(model(), "2:4"), X)
    assert "block-sparse matmul" not in neighbours
    assert "skip_zero_blocks:   2 x graphwright.linear.default" in neighbours
    assert "in a 2:4 pattern: no vector instruction of a CPU leaves out single weights" in neighbours
    assert "of its weights are zero" not in explain(model(), X)


@pytest.mark.skipif(detect().vector_dot_product("int8") is None, reason="no dot product of bytes on this machine")
def test_8_bits_of_a_pruned_model() -> None:
    """Zeros stay zeros; the product that stays float32 skips its blocks."""
    pruned = graphwright.prune(model(), "16x16", 0.5)
    data = [torch.randn(64, 128) for _ in range(4)]
    options = {"precision": "int8", "calibration": data, "int8": {"keep": ["*2_weight"]}}
    compiled = graphwright.compile(pruned, X, **options)
    algorithms = [k.algorithm for k in compiled.report().kernels]
    assert "int8 matmul" in algorithms
    assert "block-sparse matmul" in algorithms
    with torch.no_grad():
        want = pruned(X)
    assert float((compiled(X) - want).norm() / want.norm()) < 0.05


def test_where_skipping_is_as_fast_as_8_bits_nothing_is_rounded() -> None:
    pruned = graphwright.prune(model(), "16x16", 0.75)
    quantised = graphwright.quantize(pruned, [X], target=lookup("znver4"))
    reasons = [c.reason for c in quantised.report().precisions if "linear" in c.operator]
    assert len(reasons) == 2
    assert all("of float32, which skips blocks of zeros" in reason for reason in reasons), reasons
