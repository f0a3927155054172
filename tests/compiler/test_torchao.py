"""Models that torchao's `quantize_` changed: its codes and its numbers. Skipped where torchao is not installed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphwright
from graphwright.hwdb import detect

quantization = pytest.importorskip("torchao.quantization")

X = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128, bias=False)).eval()


def quantised(config: object, given: nn.Module | None = None) -> nn.Module:
    made = copy.deepcopy(given or model())
    quantization.quantize_(made, config)
    return made


def test_int8_weights_keep_their_codes() -> None:
    theirs = quantised(quantization.Int8WeightOnlyConfig())
    before = theirs[0].weight
    compiled = graphwright.compile(theirs, (X,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), theirs(X), rtol=1e-5, atol=1e-5)
    codes = sum(layer.weight.numel() for layer in (theirs[0], theirs[2]))
    assert compiled.report().weights_bytes < 1.3 * codes, compiled.report().text()
    assert theirs[0].weight is before


def test_a_layer_alone_and_one_that_is_used_twice() -> None:
    layer = quantised(quantization.Int8WeightOnlyConfig(), nn.Sequential(nn.Linear(256, 256)))[0].eval()
    for made in (layer, nn.Sequential(layer, nn.ReLU(), layer).eval()):
        compiled = graphwright.compile(made, (X,))
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), made(X), rtol=1e-5, atol=1e-5)
        assert compiled.report().weights_bytes < 2.2 * 256 * 256


def test_inputs_rounded_at_run_time_are_multiplied_as_bytes() -> None:
    theirs = quantised(quantization.Int8DynamicActivationInt8WeightConfig())
    compiled = graphwright.compile(theirs, (X,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), theirs(X), rtol=1e-4, atol=1e-4)
    codes = sum(layer.weight.numel() for layer in (theirs[0], theirs[2]))
    if detect().vector_dot_product("int8") is not None:
        assert sum("rows rounded at run time" in k.algorithm for k in compiled.report().kernels) == 2
        assert compiled.report().weights_bytes < 1.3 * codes


@pytest.mark.parametrize(
    "config",
    [
        quantization.Int8DynamicActivationInt8WeightConfig(granularity=quantization.PerTensor()),
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    ],
    ids=["dynamic", "int4"],
)
def test_others_compute_what_torchao_says(config: object) -> None:
    theirs = quantised(config)
    compiled = graphwright.compile(theirs, (X,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), theirs(X), rtol=1e-4, atol=1e-4)
