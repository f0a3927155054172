"""compile(precision="bf16"): what is assigned and refused, the tolerance kept, the cache told apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler import api, compare
from graphwright.errors import GraphwrightError
from graphwright.hwdb import detect


@pytest.fixture
def starved(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with its smallest cache only, so that small weights count as streamed; no bfloat16 arithmetic."""
    hw = detect()
    narrow = {f for f in hw.features if "bf16" in f}
    small = dataclasses.replace(hw, caches=hw.caches[:1], dram_gbs=10.0, features=hw.features - narrow)
    monkeypatch.setattr(api, "lookup", lambda target: small)


class Net(nn.Module):
    """Three products, of which the first feeds a sharp softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(96, 128), nn.Linear(128, 128), nn.Linear(128, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.softmax(20 * self.first(x), -1)).relu())


def compiled(**options: Any) -> tuple[Any, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 96)
    return graphwright.compile(model, x, precision="bf16", **options), model, x


@pytest.mark.usefixtures("starved")
def test_weights_become_bfloat16_and_outputs_stay_float32() -> None:
    result, model, x = compiled(cache=False)
    report = result.report()
    assert [c.dtype for c in report.precisions] == ["bfloat16"] * 3
    assert "weights only" in report.text()
    assert report.passes[-1].name == "assign_precision"
    assert sum(k.algorithm == "bf16-weight matmul" for k in report.kernels) == 3
    assert result(x).dtype == torch.float32
    assert 0.0 < report.errors[0].relative_l2 <= compare.REDUCED["bf16"]
    assert "linear_bf16" in str(result.graph.graph)
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-4, atol=1e-5)
    plain = graphwright.compile(model, x, cache=False).report()
    assert report.weights_bytes < 0.6 * plain.weights_bytes


@pytest.mark.usefixtures("starved")
def test_a_tolerance_is_kept_by_going_back() -> None:
    free = compiled(cache=False)[0].report()
    tolerance = free.errors[0].relative_l2 * 0.7
    report = compiled(cache=False, tolerance=tolerance)[0].report()
    kinds = [c.dtype for c in report.precisions]
    assert 0 < kinds.count("float32") < 3, report.text()
    assert report.errors[0].relative_l2 <= tolerance
    assert any("tolerance" in c.reason for c in report.precisions)
    strict = compiled(cache=False, tolerance=1e-6)[0].report()
    assert {c.dtype for c in strict.precisions} == {"float32"}
    assert strict.errors[0].relative_l2 <= 1e-6


@pytest.mark.usefixtures("starved")
def test_the_cache_and_artifacts_know_the_precision(tmp_path: Path) -> None:
    first, model, x = compiled()
    assert not graphwright.compile(model, x).report().precisions
    second = compiled()[0]
    assert second.report().cached
    assert second.report().precisions == first.report().precisions
    loaded = graphwright.load(first.save(tmp_path / "net.gw"))
    assert loaded.report().precision == "bf16"
    assert torch.equal(loaded(x), first(x))


def test_where_the_machine_gains_nothing_it_is_refused_with_the_reason() -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(200, 64)
    hw = detect()
    report = graphwright.compile(model, x, precision="bf16", cache=False).report()
    if hw.vector_dot_product("bfloat16") is None:
        assert report.precisions[0].dtype == "float32"
        assert "no bfloat16 arithmetic on this machine" in report.text()
        assert report.errors[0].relative_l2 < 1e-6


def test_code_for_a_machine_with_dot_products_is_built() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 9))
    result = graphwright.compile(
        model.eval(), torch.randn(1, 3, 8, 8), precision="bf16", target="sapphirerapids", cache=False
    )
    names = [k.algorithm for k in result.report().kernels]
    assert names.count("bf16 matmul") == 2
    assert names.count("bf16 conv") == 1


def test_through_dynamo() -> None:
    model, x = nn.Linear(32, 16).eval(), torch.randn(1, 32)
    with torch.no_grad():
        result = torch.compile(model, backend="graphwright", options={"precision": "bf16", "cache": False})(x)
    torch.testing.assert_close(result, model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["fp16", "int8", "auto"])
def test_what_is_not_built_is_refused(name: str) -> None:
    with pytest.raises(GraphwrightError, match="not built yet; there are 'fp32' and 'bf16'"):
        graphwright.compile(nn.Linear(2, 2), torch.randn(1, 2), precision=name)


def test_a_typo_is_named() -> None:
    with pytest.raises(GraphwrightError, match="did you mean 'bf16'"):
        graphwright.compile(nn.Linear(2, 2), torch.randn(1, 2), precision="bf61")
