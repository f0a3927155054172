"""Inputs that 8 bits cannot serve: a message that says what to do, or float32 for that part with the reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.errors import InputError

TARGET = "znver4"  # has dot products of bytes; quantize() runs nothing of it


def report(model: nn.Module, data: Any, **options: Any) -> Any:
    return graphwright.quantize(model.eval(), data, target=TARGET, **options).report()


def products(report: Any) -> list[tuple[str, str]]:
    return [(c.dtype, c.reason) for c in report.precisions if "linear" in c.operator or "conv" in c.operator]


def linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))


def rows(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * scale


def test_no_calibration_data() -> None:
    for nothing in ([], ()):
        with pytest.raises(InputError, match="calibration is a list of inputs"):
            graphwright.quantize(linears(), nothing)
    with pytest.raises(InputError, match="pass calibration="):
        graphwright.compile(linears(), rows(), precision="int8")


def test_calibration_data_of_another_kind() -> None:
    for data, shown in ((None, "nothing"), (3, "int")):
        with pytest.raises(InputError, match=f"calibration is a list of inputs.*got {shown}"):
            graphwright.quantize(linears(), data, target=TARGET)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not run the model on input torch.int32 \(256, 128\): mat1 and mat2"):
        report(linears(), [rows().int()])


def test_samples_stacked_in_a_mapping() -> None:
    x, model = rows(), linears().eval()
    listed = graphwright.quantize(model, [x, 0.5 * x], target=TARGET)
    for name in ("input", "arr_0"):
        made = graphwright.quantize(model, {name: torch.stack([x, 0.5 * x])}, target=TARGET)
        assert torch.equal(made(x), listed(x))
    with pytest.raises(InputError, match="calibration names y, and the model takes input: missing"):
        report(model, {"y": x[None]})
    with pytest.raises(InputError, match="input holds no samples"):
        report(model, {"input": x[:0]})


@pytest.mark.parametrize("tolerance", ["x", float("nan"), 0.0, -1.0, True])
def test_tolerances_that_are_none(tolerance: Any) -> None:
    with pytest.raises(InputError, match="tolerance is a relative error"):
        report(linears(), [rows()], tolerance=tolerance)


@pytest.mark.parametrize("group", ["32", 32.0])
def test_a_group_is_an_int(group: Any) -> None:
    with pytest.raises(InputError, match="it has to be an int, one of 32, 64, 128"):
        report(linears(), [rows()], weights_only="int4", group=group)


def test_a_prepared_model_is_to_be_converted_first() -> None:
    prepared = graphwright.prepare_qat(linears(), [rows()])
    with pytest.raises(InputError, match="convert it first"):
        graphwright.compile(prepared, rows(), cache=False)
    with pytest.raises(InputError, match="convert it first"):
        report(prepared, [rows()])


def test_calibration_data_unlike_the_example(caplog: pytest.LogCaptureFixture) -> None:
    data = [rows(1e-3), rows(1e-3)]
    with caplog.at_level(logging.WARNING, "graphwright"):
        made = graphwright.compile(linears().eval(), rows(), precision="int8", calibration=data, cache=False).report()
    assert {dtype for dtype, _ in products(made)} == {"float32"}
    if "nothing gains" in made.text():
        pytest.skip("this machine has no dot product of bytes: calibration is not looked at")
    assert "its data are not like it" in made.text()
    assert "its data are not like it" in caplog.text
    assert made.errors[0].relative_l2 < 1e-5


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_inputs_keep_float32(value: float, caplog: pytest.LogCaptureFixture) -> None:
    """The second layer reads other values, but of one row only."""
    with caplog.at_level(logging.WARNING, logger="graphwright"):
        made = report(linears(), [torch.full((256, 128), value)] * 2)
    for (dtype, reason), place in zip(products(made), ("in ", "all that "), strict=True):
        assert dtype == "float32"
        assert reason.startswith(f"calibration saw only the value {value:.3g} in ")
        assert place in reason
    assert not made.damage()
    assert f"calibration saw only the value {value:.3g}" in " ".join(made.notes)
    assert "2 products stay float32; calibrate with inputs like those" in caplog.text


def test_a_constant_value_inside_keeps_its_product_in_float32() -> None:
    model = linears()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # of which ReLU leaves nothing
    (first, _), (second, reason) = products(report(model, [rows()]))
    assert (first, second) == ("int8", "float32")
    assert reason.startswith("calibration saw only the value 0 in ")


def test_outliers_send_their_layer_back() -> None:
    spoilt = rows()
    spoilt[7, 7] = 1e4
    made = report(linears(), [rows(), spoilt], activation="minmax")
    assert products(made)[0][0] == "float32"
    assert "more accuracy than the tolerance leaves" in products(made)[0][1]


def test_nan_in_weights() -> None:
    model = linears()
    model[0].weight.data[3, 5] = torch.nan
    made = report(model, [rows()])
    assert products(made)[0] == ("float32", "the weights p_0_weight hold infinities or NaN")


def test_channels_of_zeros() -> None:
    model = linears()
    model[0].weight.data[::2] = 0.0
    model[0].bias.data[::2] = 0.0
    model[2].weight.data[:, 1::4] = 0.0
    quantised = graphwright.quantize(model.eval(), [rows()], target=TARGET)
    assert {dtype for dtype, _ in products(quantised.report())} == {"int8"}
    with torch.no_grad():
        exact, made = model(rows()), quantised(rows())
    assert float((made - exact).norm() / exact.norm()) < 2e-2


def test_operators_without_a_form_in_8_bits() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
            self.made = nn.Linear(64, 64 * 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.grouped(x).mean((2, 3))
            weight = self.made(y)[0].view(64, 64)
            return torch.nn.functional.linear(y, weight).softmax(-1)

    made = report(Mixed(), [torch.randn(1, 64, 28, 28)])
    reasons = [c.reason for c in made.precisions if c.dtype == "float32"]
    assert any("4 groups" in reason for reason in reasons), reasons
    assert any("computed" in reason for reason in reasons), reasons
    assert any("stay float32" in reason for reason in reasons), reasons


def test_a_tolerance_that_cannot_be_met() -> None:
    with pytest.raises(InputError, match="less than PyTorch's own float32 error"):
        report(linears(), [rows()], tolerance=1e-9)
    made = report(linears(), [rows()], tolerance=1e-4)  # float32 keeps it, no product in 8 bits does
    assert {dtype for dtype, _ in products(made)} == {"float32"}
    assert all("more accuracy than the tolerance leaves" in reason for _, reason in products(made))
