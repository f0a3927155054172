"""compile(precision=...): what is assigned and refused, the tolerance kept, the cache told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler import compare
from graphwright.errors import InputError
from graphwright.hwdb import detect


class Net(nn.Module):
    """Three products, of which the first feeds a sharp softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(96, 128), nn.Linear(128, 128), nn.Linear(128, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.softmax(20 * self.first(x), -1)).relu())


def compiled(precision: str = "bf16", **options: Any) -> tuple[Any, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 96)
    return graphwright.compile(model, x, precision=precision, **options), model, x


def linears(report: Any) -> list[str]:
    return [c.dtype for c in report.precisions if "linear" in c.operator]


@pytest.mark.usefixtures("starved")
def test_weights_become_bfloat16_and_outputs_stay_float32() -> None:
    result, model, x = compiled(cache=False)
    report = result.report()
    assert linears(report) == ["bfloat16"] * 3
    assert {c.dtype for c in report.precisions if "linear" not in c.operator} == {"float32"}
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
    kinds = linears(report)
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
    model = nn.Sequential(
        nn.Conv2d(24, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 9)
    )
    result = graphwright.compile(
        model.eval(), torch.randn(1, 24, 8, 8), precision="bf16", target="sapphirerapids", cache=False
    )
    names = [k.algorithm for k in result.report().kernels]
    assert names.count("bf16 matmul") == 2
    assert names.count("bf16 conv") == 1


@pytest.mark.usefixtures("starved")
def test_float16_weights_err_by_an_eighth() -> None:
    wide, narrow = (compiled(name, cache=False)[0].report() for name in ("bf16", "fp16"))
    assert linears(narrow) == ["float16"] * 3
    assert sum(k.algorithm == "f16-weight matmul" for k in narrow.kernels) == 3
    assert narrow.weights_bytes == wide.weights_bytes
    assert 0 < narrow.errors[0].relative_l2 < wide.errors[0].relative_l2 / 4


@pytest.mark.usefixtures("starved")
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 2e-5])
def test_auto_keeps_any_tolerance_and_says_what_was_measured(tolerance: float) -> None:
    report = compiled("auto", cache=False, tolerance=tolerance)[0].report()
    assert report.errors[0].relative_l2 <= tolerance
    text = report.text()
    if any(dtype != "float32" for dtype in linears(report)):
        assert "error against float64" in text
        assert f"{tolerance:.1e} allowed" in text
    else:
        assert "everything stays float32" in text
    assert ("float32" in linears(report)) == (tolerance < 1e-2)
    if tolerance < 1e-2:
        assert "first-order propagation, 8 probes" in text


def test_auto_stays_float32_where_nothing_gains() -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(200, 64)
    if detect().vector_dot_product("bfloat16") is None:
        report = graphwright.compile(model, x, precision="auto", cache=False).report()
        assert linears(report) == ["float32"]
        assert "nothing gains by auto" in report.text()


def test_auto_decides_for_other_machines_by_pytorch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval(), torch.randn(64, 256)
    report = graphwright.compile(model, x, precision="auto", target="sapphirerapids", cache=False).report()
    assert linears(report) == ["bfloat16"] * 2
    strict = graphwright.compile(model, x, precision="auto", target="sapphirerapids", cache=False, tolerance=2.5e-3)
    assert linears(strict.report()).count("float32") >= 1
    assert "costs more accuracy" in strict.report().text()


def test_a_tolerance_that_float32_does_not_keep() -> None:
    with pytest.raises(InputError, match="less than PyTorch's own float32 error"):
        graphwright.compile(nn.Linear(300, 64), torch.randn(9, 300), tolerance=1e-9, cache=False)


@pytest.mark.usefixtures("starved")
def test_a_tolerance_that_nothing_reduced_could_keep() -> None:
    with pytest.raises(InputError, match="less than PyTorch's own float32 error"):
        compiled("auto", cache=False, tolerance=1e-9)


@pytest.mark.usefixtures("starved")
def test_machine_code_that_errs_more_than_pytorch_is_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer of the machine code is ten times off: nothing is reduced any more, and the numbers hold."""
    compare_all, spoilt = compare.compare, []

    def spoil(results: Any, expected: Any, tolerance: Any) -> Any:
        if not spoilt:
            spoilt.append(1)
            return compare.Difference(0, 10 * tolerance, tolerance)
        return compare_all(results, expected, tolerance)

    monkeypatch.setattr(compare, "compare", spoil)
    report = compiled("auto", cache=False)[0].report()
    assert linears(report) == ["float32"] * 3
    assert "machine code erred by too much" in report.text()


def test_through_dynamo() -> None:
    model, x = nn.Linear(32, 16).eval(), torch.randn(1, 32)
    with torch.no_grad():
        result = torch.compile(model, backend="graphwright", options={"precision": "bf16", "cache": False})(x)
    torch.testing.assert_close(result, model(x), rtol=2e-2, atol=2e-2)


def test_a_typo_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        graphwright.compile(nn.Linear(2, 2), torch.randn(1, 2), precision="bf61")
