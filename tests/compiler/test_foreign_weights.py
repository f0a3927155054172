"""Weights as torchao stores them, without torchao: which layer each form gets, and its numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rewriting import check_values, trace
from torch import nn

import graphwright
from graphwright.compiler.foreign_weights import RoundingLinear, StoredLinear, form_of
from graphwright.hwdb import detect, lookup
from graphwright.passes.recognise_quantised import recognise_quantised

X = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)[:, None]


def weight(**other: Any) -> Any:
    """The attributes of an Int8Tensor of Int8DynamicActivationInt8WeightConfig, [512, 256]."""
    w = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    scale = w.abs().amax(1, keepdim=True) / 127.5
    how = SimpleNamespace(
        granularity=type("PerRow", (), {})(), mapping_type=SimpleNamespace(name="SYMMETRIC"), reduce_range=False
    )
    given = {"qdata": (w / scale).round().clamp(-128, 127).to(torch.int8), "scale": scale, "dtype": torch.float32}
    given |= {"zero_point": torch.zeros(512, 1, dtype=torch.int8), "act_quant_kwargs": how}
    return SimpleNamespace(**given | other)


def expected(w: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """torchao's arithmetic (Int8Tensor's linear, quantize_affine, 0.18)."""
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    q = (x * (1.0 / scale)).round().clamp(-128, 127).to(torch.int32)
    return (q @ w.qdata.t().to(torch.int32)).float() * scale * w.scale.flatten() + bias


def test_inputs_that_are_rounded_row_by_row_are_multiplied_as_bytes() -> None:
    w, bias = weight(), torch.randn(512)
    layer = RoundingLinear(w, nn.Parameter(bias)).eval()
    x = X.reshape(2, 8, 256)
    # The scales are applied in another order: one rounding of each.
    torch.testing.assert_close(layer(x), expected(w, x, bias), rtol=3e-7, atol=1e-5)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    compiled = graphwright.compile(model, x, cache=False)
    torch.testing.assert_close(compiled(x), expected(w, x, bias).relu(), rtol=1e-5, atol=1e-4)
    if detect().vector_dot_product("int8") is None:
        return
    assert any("rows rounded at run time" in k.algorithm for k in compiled.report().kernels)
    assert compiled.report().weights_bytes < 1.2 * 512 * 256


@pytest.mark.parametrize("target", ["x86-64-v3", "a100"])
def test_machines_without_products_of_bytes_compute_the_same(target: str) -> None:
    w, bias = weight(), torch.randn(512)
    layer = RoundingLinear(w, nn.Parameter(bias)).eval()
    graph, hw = trace(layer, (X,)), lookup(target)
    assert recognise_quantised(graph, hw) == 1
    assert recognise_quantised(graph, hw) == 0
    assert not any("linear_tokens" in str(node.target) for node in graph.graph.nodes)
    check_values(graph, (X,))
    (made,) = graph(X)
    # Products of steps, up to 127 * 128, are added in float32 here.
    torch.testing.assert_close(made, expected(w, X, bias), rtol=1e-5, atol=1e-3)


def test_which_layer_a_weight_gets() -> None:
    assert form_of(weight()) is RoundingLinear
    assert form_of(weight(act_quant_kwargs=None)) is StoredLinear
    how = vars(weight().act_quant_kwargs)
    others = [
        {"act_quant_kwargs": SimpleNamespace(**how | {"reduce_range": True})},
        {"act_quant_kwargs": SimpleNamespace(**how | {"mapping_type": SimpleNamespace(name="ASYMMETRIC")})},
        {"act_quant_kwargs": SimpleNamespace(**how | {"granularity": type("PerTensor", (), {})()})},
        {"act_quant_scale": torch.ones(1)},
        {"act_pre_scale": torch.ones(256)},
        {"dtype": torch.bfloat16},
        {"scale": torch.ones(512, 8)},
        {"zero_point": torch.ones(512, 1)},
        {"qdata": weight().qdata.float()},
    ]
    for other in others:
        assert form_of(weight(**other)) is None, other
