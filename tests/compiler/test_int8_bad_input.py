"""Inputs that 8 bits cannot serve: a message that says what to do, or float32 for that part with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
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
    others = ((None, "nothing"), (3, "int"), (rows(), r"Tensor: for one set of inputs pass \[it\]"))
    for data, shown in (*others, ("a.npz", r"str, no file: pass dict\(numpy.load")):
        with pytest.raises(InputError, match=f"calibration is a list of inputs.*got {shown}"):
            graphwright.quantize(linears(), data, target=TARGET)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not run the model on input torch.int32 \(256, 128\): mat1 and mat2"):
        report(linears(), [rows().int()])


def test_data_are_read_once_from_any_iterable() -> None:
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=128)
    x, listed = rows()[:128], list(batches)
    expected = graphwright.compile(linears().eval(), x, precision="int8", calibration=listed, cache=False)(x)
    for data in (batches, iter(batches), (batch for batch in batches)):
        made = graphwright.compile(linears().eval(), x, precision="int8", calibration=data, cache=False)
        assert torch.equal(made(x), expected)
    with pytest.raises(InputError, match="got nothing"):
        graphwright.compile(linears().eval(), x, precision="int8", calibration=iter([]))


def test_an_iterator_among_the_options_of_torch_compile() -> None:
    """Each graph of a model would find it used up by the one before."""
    options = {"precision": "int8", "calibration": (x for x in [rows()])}
    with pytest.raises(Exception, match=r"generator, which can be read once only: pass list\(it\)"):
        torch.compile(linears().eval(), backend="graphwright", options=options)(rows())


def test_float64_as_numpy_makes_it() -> None:
    array = rows().double().numpy()
    for data in ({"input": array[None]}, {"arr_0": array[None]}, [torch.from_numpy(array)]):
        with pytest.raises(InputError, match=r"in float64, which NumPy makes.*array.astype\('float32'\).*does not run"):
            graphwright.quantize(linears().eval(), data, target=TARGET)
        with pytest.raises(InputError, match=r"set 0: input is torch.float64.*array.astype\('float32'\)"):
            graphwright.compile(linears().eval(), rows(), precision="int8", calibration=data)
    with pytest.raises(InputError, match=r"calibration set 0 is a ndarray.*torch.from_numpy"):
        report(linears(), [rows().numpy()])
    with pytest.raises(InputError, match="input is a str, of which PyTorch makes no tensor"):
        report(linears(), {"input": "x"})


def test_a_quantised_model_is_called_like_the_model() -> None:
    made = graphwright.quantize(linears().eval(), [rows()], target=TARGET)
    assert torch.equal(made(input=rows()), made(rows()))
    for args, shown in (((), r"\(\)"), ((rows(), rows()), r"\(\*, \*\)"), (([rows()],), r"\(\[\*\]\)")):
        with pytest.raises(InputError, match=rf"the model was quantised for: expected \(\*\), got {shown}"):
            made(*args)
    with pytest.raises(InputError, match="input: expected a tensor, got ndarray"):
        made(rows().numpy())


def test_numbers_of_numpy_are_numbers() -> None:
    made = graphwright.quantize(linears().eval(), [rows()], tolerance=np.float32(0.1), target=TARGET)
    assert products(made.report())[0][0] == "int8"
    x = torch.tensor([[0.25, -0.25], [0.25, 0.75]])
    assert torch.equal(graphwright.gate(x, np.float32(0.5), share=np.float64(0.5)), x * torch.tensor([[0.0], [1.0]]))
    assert float((graphwright.prune(linears(), "16x16", np.float32(0.5))[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("size", [1e-38, 1e37])
def test_values_at_the_ends_of_float32(size: float, scheme: str) -> None:
    found = report(linears(), [rows(size) for _ in range(2)], scheme=scheme)
    assert [dtype for dtype, _ in products(found)] == ["int8", "int8"], products(found)


PREPARED = r"prepared already: train it, then graphwright.convert"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: graphwright.prepare_qat(graphwright.prepare_qat(linears(), [rows()])), PREPARED),
        (lambda: graphwright.prepare_qat(len), "prepare_qat works on the layers of an nn.Module, and got a builtin"),
        (lambda: graphwright.prepare_qat(linears(), rows()), r"got Tensor: for one set of inputs pass \[it\]"),
        (lambda: graphwright.prepare_qat(linears(), None), "calibration=None: pass a list"),
        (lambda: graphwright.prepare_qat(linears(), {"input": rows()}), "not a mapping: pass"),
        (lambda: graphwright.prepare_qat(linears(), keep=3), "keep is a list of names.* got 3"),
        (lambda: graphwright.convert(len, rows()), "convert works on the layers"),
        (lambda: graphwright.prune(lambda x: x), "prune works on the layers of an nn.Module, and got a function"),
        (lambda: graphwright.prune(nn.Linear), "got the class Linear"),
        (lambda: graphwright.prune(torch.export.export(linears(), (rows(),))), "pass the nn.Module it was exported"),
        (lambda: graphwright.prune(linears(), ["2:4"]), "there are '2:4'"),
        (lambda: graphwright.prune(linears(), keep=None), "keep is a list of names.* got None"),
        (lambda: graphwright.prune(linears(), importance="wanda", calibration=3), "calibration is a list.* got int"),
        (lambda: graphwright.keep_zeros(graphwright.prune(linears()), 3), "an optimizer of torch.optim, and got a int"),
        (
            lambda: graphwright.keep_zeros(torch.optim.SGD(linears().parameters(), 0.1), linears()),
            r"takes the model first: keep_zeros\(model, optimizer\)",
        ),
        (lambda: report(linears(), [rows()], activation=np.array(["kl", "mse"])), "there are 'kl'"),
        (lambda: report(linears(), [rows()], group=True), "group=True: it has to be an int"),
    ],
)
def test_other_wrong_uses_say_what_is_wrong(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


def test_what_is_quantised_is_not_pruned_or_prepared() -> None:
    made = graphwright.quantize(linears().eval(), [rows()], target=TARGET)
    for function in (graphwright.prune, graphwright.prepare_qat):
        with pytest.raises(InputError, match=r"is quantised already.*the model in float32"):
            function(made)


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
