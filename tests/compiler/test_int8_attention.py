"""int8={"attention": True}: chosen where it pays, within the tolerance, said in the report; off unless asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.compression.int8_attention import attention_form
from graphwright.compiler.compression.int8_method import int8_method, options_of
from graphwright.errors import InputError
from graphwright.hwdb import detect
from graphwright.passes.dialect import attention

VNNI = detect().vector_dot_product("int8") == "vnni"
needs_vnni = pytest.mark.skipif(not VNNI, reason="this machine has no products of unsigned and signed bytes")
BOTH = {"activation": "dynamic", "attention": True}


class Layer(nn.Module):
    """Attention of `heads` over its input, with a residual."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(3.0 * self.norm(x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


def model(causal: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(128, 2, causal), Layer(128, 2, causal)).eval()


def tokens(length: int = 192) -> torch.Tensor:
    return torch.randn(1, length, 128, generator=torch.Generator().manual_seed(1))


def choices(report: Any) -> list[Any]:
    return [c for c in report.precisions if "attention" in c.operator]


def quantized(x: torch.Tensor, causal: bool = False, **options: Any) -> Any:
    return graphwright.quantize(model(causal), [x, 2 * x], **{**BOTH, **options})


def test_it_is_asked_for() -> None:
    report = quantized(tokens(), attention=False).report()
    assert [c.dtype for c in choices(report)] == ["float32", "float32"]


@needs_vnni
@pytest.mark.parametrize("causal", [False, True])
def test_products_in_bytes(causal: bool, tmp_path: Path) -> None:
    x = tokens()
    result = graphwright.compile(model(causal), x, precision="int8", cache=False, int8=BOTH)
    report = result.report()
    assert [c.form for c in choices(report)] == ["int8 attention"] * 2, report.text()
    assert sum("int8 attention" in kernel.algorithm for kernel in report.kernels) == 2
    assert "q and k by a scale for each row, v for each channel of a head" in report.text()
    assert 1e-4 < report.errors[0].relative_l2 < 4e-2
    # Norms differ in the last bit, and at a tie a value by a step.
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-4, atol=5e-3)
    result.save(tmp_path / "model.gw")
    assert torch.equal(graphwright.load(tmp_path / "model.gw")(x), result(x))


@needs_vnni
def test_what_costs_too_much_goes_back() -> None:
    x = tokens()
    others = ["*qkv*", "*out*"]
    free = quantized(x, keep=others)
    assert {c.form for c in choices(free.report())} == {"int8 attention"}
    with torch.no_grad():
        exact = model().double()(x.double())
    allowed = 0.5 * float((free(x) - exact).norm() / exact.norm())
    some = quantized(x, keep=others, tolerance=allowed)
    assert float((some(x) - exact).norm() / exact.norm()) <= allowed
    reasons = [c.reason for c in choices(some.report()) if c.dtype == "float32"]
    assert reasons
    assert all("costs more accuracy than the tolerance leaves" in reason for reason in reasons)


@needs_vnni
def test_kept_by_name() -> None:
    report = quantized(tokens(), keep=["*attention*"]).report()
    assert {c.reason for c in choices(report)} == {"kept in float32 as keep='*attention*' asks"}


@needs_vnni
def test_few_queries_gain_nothing() -> None:
    form = attention_form(node(queries=1), detect())
    assert form.possible
    assert not form.pays
    assert "gains nothing: rounding and packing" in form.reason
    assert attention_form(node(queries=512), detect()).pays


def test_a_machine_without_such_products_refuses() -> None:
    hw = replace(detect(), features=frozenset({"avx2", "fma"}), isa="x86_64")
    form = attention_form(node(queries=512), hw)
    assert not form.possible
    assert "no products of unsigned and signed bytes" in form.reason


@needs_vnni
def test_what_no_kernel_computes_is_refused() -> None:
    form = attention_form(node(queries=512, dtype=torch.float64), detect())
    assert not form.possible
    assert "no kernel in bytes" in form.reason


def node(queries: int, dtype: torch.dtype = torch.float32) -> torch.fx.Node:
    graph = torch.fx.Graph()
    operands = [graph.placeholder(name) for name in "qkv"]
    for operand, length in zip(operands, (queries, 512, 512), strict=True):
        operand.meta["val"] = torch.empty(1, 4, length, 64, dtype=dtype, device="meta")
    made = graph.call_function(attention, (*operands, None, False, 0.125))
    made.meta["val"] = torch.empty(1, 4, queries, 64, dtype=dtype, device="meta")
    return made


@needs_vnni
def test_quantize_gives_the_same_numbers_and_compiles() -> None:
    made = quantized(tokens())
    assert {c.form for c in choices(made.report())} == {"int8 attention"}
    assert all(c.sqnr_db > 25 for c in choices(made.report()))
    again = graphwright.compile(made, tokens(), cache=False)
    assert sum("int8 attention" in kernel.algorithm for kernel in again.report().kernels) == 2
    # As in test_products_in_bytes: norms differ in the last bit, and at a tie a value by a step.
    torch.testing.assert_close(again(tokens()), made(tokens()), rtol=1e-4, atol=5e-3)


def test_the_option_as_it_is_written() -> None:
    assert int8_method("int8", options_of(["attention=true"])).attention is True
    assert int8_method("int8", options_of(["attention=false"])).attention is False
    with pytest.raises(InputError, match="attention='yes': it has to be True or False"):
        int8_method("int8", options_of(["attention=yes"]))
