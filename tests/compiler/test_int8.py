"""compile(precision="int8") from end to end: what is quantised and refused, accuracy, sizes, and wrong inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler import compare, pipeline
from graphwright.compiler.capture import capture, export
from graphwright.compiler.compression.int8_method import Method
from graphwright.compiler.compression.int8_plan import plan_int8
from graphwright.errors import InputError
from graphwright.hwdb import detect
from graphwright.passes.default import PASSES

VNNI = detect().vector_dot_product("int8") == "vnni"
needs_vnni = pytest.mark.skipif(not VNNI, reason="this machine has no dot product of bytes: int8 is refused")


class Block(nn.Module):
    """Two convolutions around a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), Block(32)),
        *(nn.Conv2d(32, 64, 1, stride=2), nn.ReLU(), Block(64), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    ).eval()


def images(count: int = 8, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, 64, 64, generator=generator) for _ in range(count)]


def compiled(model: nn.Module, x: torch.Tensor, calibration: Any, **options: Any) -> Any:
    return graphwright.compile(model, x, precision="int8", calibration=calibration, cache=False, **options)


def fused(model: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    captured = capture(export(model, (x,), {}))
    return pipeline.run(captured.graph, detect(), PASSES)[0]


def dtypes(report: Any) -> dict[str, str]:
    return {c.node: c.dtype for c in report.precisions if "conv2d" in c.operator}


@needs_vnni
def test_a_convolutional_network_runs_in_bytes_from_end_to_end() -> None:
    model, calibration = network(), images()
    x = images(1, seed=2)[0]
    result = compiled(model, x, calibration)
    report = result.report()
    assert set(dtypes(report).values()) == {"int8"}, report.text()
    kernels = [k.algorithm for k in report.kernels]
    assert kernels.count("int8 conv") + kernels.count("int8 matmul") == 6
    assert any("gains nothing" in c.reason for c in report.precisions if "linear" in c.operator)  # one row of 64
    # One rounding, of the image: nothing behind it is widened.
    text = str(result.graph.graph)
    assert text.count("graphwright.quantize") == 1
    assert "graphwright.dequantize" not in text
    assert 0.0 < report.errors[0].relative_l2 <= compare.REDUCED["int8"]
    # The graph in PyTorch is the integer reference; a mean in float32 may add in another order.
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-5, atol=1e-6)
    ranked = report.damage()
    assert len(ranked) == 6
    assert ranked[0].sqnr_db is not None
    assert [c.sqnr_db for c in ranked] == sorted(c.sqnr_db for c in ranked if c.sqnr_db is not None)
    assert "most damaged by 8 bits" in report.text()
    # A byte a weight, and a scale, an offset and a bias for each channel: 12 bytes for rows of 27 to 576 weights.
    plain = graphwright.compile(model, x, cache=False).report()
    assert report.weights_bytes < 0.36 * plain.weights_bytes


@needs_vnni
def test_a_tolerance_is_kept_by_going_back() -> None:
    model, calibration = network(), images()
    x = images(1, seed=2)[0]
    free = compiled(model, x, calibration).report()
    tolerance = 0.6 * free.errors[0].relative_l2
    report = compiled(model, x, calibration, tolerance=tolerance).report()
    kinds = list(dtypes(report).values())
    assert 0 < kinds.count("float32") < len(kinds), report.text()
    assert report.errors[0].relative_l2 <= tolerance
    assert any("tolerance" in c.reason for c in report.precisions)


@needs_vnni
def test_keep_and_how_ranges_are_found() -> None:
    model, calibration = network(), images(4)
    for activation in ("minmax", "kl", "percentile"):
        report = compiled(model, images(1)[0], calibration, int8={"activation": activation}).report()
        assert f"ranges by {activation}" in report.text()
        assert report.errors[0].relative_l2 <= compare.REDUCED["int8"]
    options = {"keep": ["*_6_second_weight", "*_0_weight"], "scheme": "symmetric", "weight": "per_tensor"}
    report = compiled(model, images(1)[0], calibration, int8=options).report()
    kinds = list(dtypes(report).values())
    assert kinds[0] == kinds[-1] == "float32"
    assert set(kinds[1:-1]) == {"int8"}
    assert any("keep=" in c.reason for c in report.precisions)
    with pytest.raises(InputError, match="no product is called 'nothing'"):
        compiled(model, images(1)[0], calibration, int8={"keep": ["nothing"]})


def test_a_machine_without_byte_products_refuses_with_the_reason() -> None:
    report = compiled(network(), images(1)[0], images(2), target="x86-64-v3").report()
    assert set(dtypes(report).values()) == {"float32"}
    assert any("no dot product of bytes" in c.reason for c in report.precisions)
    assert "nothing gains by int8" in report.text()


@needs_vnni
def test_bad_values_keep_their_part_in_float32() -> None:
    model = network()
    model[9].weight.data[:, :] = 0.0  # a layer of zeros: scales stay finite
    model[3].first.weight.data[3, 5] = torch.nan
    x = images(1)[0]
    report = compiled(model, x, images(2), verify=False).report()
    reasons = {c.node: c.reason for c in report.precisions if c.dtype == "float32"}
    assert any("NaN" in reason for reason in reasons.values())
    broken = images(2)
    broken[1][0, 0, 0, 0] = torch.inf
    report = compiled(network(), x, broken, verify=False).report()
    assert any("calibration saw infinities or NaN" in c.reason for c in report.precisions)


@needs_vnni
def test_where_nothing_is_in_8_bits_a_warning_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(64, 64)
    for given, data, tolerance, reason in (
        (model, torch.full_like(x, torch.nan), None, "calibration saw infinities or NaN"),
        (model, x, 1e-5, "costs more accuracy than the tolerance leaves"),
        (copy.deepcopy(model).half(), x.half(), None, "is not float32"),
    ):
        caplog.clear()
        report = graphwright.quantize(given, [data], tolerance=tolerance).report()
        assert "int8" not in dtypes(report).values()
        (said,) = [r.getMessage() for r in caplog.records if "precision='int8'" in r.getMessage()]
        assert reason in said
        assert "stay float32" in said


@needs_vnni
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_constant_activations(fill: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.full((32, 64), fill)
    result = compiled(model, x, [x, x])
    assert result(x).isfinite().all()
    assert result.report().errors[0].relative_l2 <= compare.REDUCED["int8"]


@needs_vnni
def test_an_outlier_of_ten_thousand_is_clipped_by_kl() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(256, 64)
    spoilt = torch.randn(256, 64)
    spoilt[7, 7] = 1e4
    plan = {
        activation: plan_int8(fused(model, x), detect(), Method(activation=activation), [[x], [spoilt]])
        for activation in ("minmax", "kl")
    }
    scales = {activation: max(s.scale for s in found.table.scales.values()) for activation, found in plan.items()}
    assert scales["minmax"] == pytest.approx((1e4 + 4.5) / 255, rel=1e-2)
    assert scales["kl"] < 0.1 * scales["minmax"]
    # With minmax nothing is left of x, and the tolerance sends the layer back to float32.
    report = compiled(model, x, [x, spoilt], int8={"activation": "minmax"}).report()
    assert next(c.dtype for c in report.precisions if c.node == "linear_default") == "float32"
    assert report.errors[0].relative_l2 <= compare.REDUCED["int8"]


def test_wrong_options_say_what_to_do() -> None:
    model, x = network(), images(1)[0]
    with pytest.raises(InputError, match="pass calibration="):
        graphwright.compile(model, x, precision="int8")
    with pytest.raises(InputError, match="calibration is a list"):
        compiled(model, x, [])
    with pytest.raises(InputError, match="calibration set 0"):
        compiled(model, x, [torch.randn(1, 3, 32, 32)])
    with pytest.raises(InputError, match=r"activation='kll'.*'kl'"):
        compiled(model, x, [x], int8={"activation": "kll"})
    with pytest.raises(InputError, match="'activations'"):
        compiled(model, x, [x], int8={"activations": "kl"})
    with pytest.raises(InputError, match="precision='int8'"):
        graphwright.compile(model, x, int8={"activation": "kl"})
    with pytest.raises(InputError, match="keep is a list"):
        compiled(model, x, [x], int8={"keep": "fc"})
    with pytest.raises(InputError, match="tune="):
        compiled(model, x, [x], tune="1s")
    with pytest.raises(InputError, match="less than PyTorch's own"):
        compiled(model, x, [x], tolerance=1e-9)


@needs_vnni
def test_torch_compile_takes_the_same_options() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)).eval()
    x = torch.randn(32, 64)
    options = {"precision": "int8", "calibration": [x], "cache": False}
    fast = torch.compile(model, backend="graphwright", options=options)
    with torch.no_grad():
        result, exact = fast(x), model(x)
    error = float((result - exact).norm() / exact.norm())
    assert 0.0 < error < compare.REDUCED["int8"]


@needs_vnni
def test_quantize_gives_a_module_that_runs_and_compiles() -> None:
    model, calibration = network(), images()
    x = images(1, seed=2)[0]
    quantised = graphwright.quantize(model, iter(calibration), activation="kl", keep=["*_0_weight"])
    with torch.no_grad():
        exact, integers = model(x), quantised(x)
    error = float((integers - exact).norm() / exact.norm())
    assert 0.0 < error < compare.REDUCED["int8"]
    assert len(quantised.report().damage()) == 5
    result = graphwright.compile(quantised, x, cache=False)
    assert sum(k.algorithm.startswith("int8") for k in result.report().kernels) == 5
    # A mean in float32 may add in another order, and a value at a tie rounds to the next step for it.
    assert float((result(x) - integers).norm() / integers.norm()) < compare.STEPS
    with pytest.raises(InputError, match="quantised for"):
        quantised(torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="calibration is a list"):
        graphwright.quantize(model, [])
    with pytest.raises(InputError, match=r"scheme='symetric'.*symmetric"):
        graphwright.quantize(model, calibration, scheme="symetric")


@pytest.mark.usefixtures("starved")
def test_few_rows_that_wait_for_weights_take_weights_alone_in_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512, bias=False)).eval()
    x = torch.randn(1, 512)
    result = compiled(model, x, [x])
    report = result.report()
    assert [k.algorithm for k in report.kernels].count("int8-weight matmul") == 2, report.text()
    assert {c.form for c in report.precisions if "linear" in c.operator} == {"int8 weights"}
    # Weights rounded to 127 steps of their row's largest, and nothing else.
    assert 1e-3 < report.errors[0].relative_l2 < 1.5e-2
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-4, atol=1e-5)
    plain = graphwright.compile(model, x, cache=False).report()
    assert report.weights_bytes <= 0.27 * plain.weights_bytes


@pytest.mark.usefixtures("starved")
def test_tables_are_stored_in_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 8)).eval()
    ids = torch.randint(0, 2000, (1, 5))
    result = compiled(model, ids, [ids], int8={"keep": ["*1_weight"]})
    report = result.report()
    assert {c.form for c in report.precisions if "embedding" in c.operator} == {"int8 weights"}
    plain = graphwright.compile(model, ids, cache=False).report()
    assert report.weights_bytes < 0.29 * plain.weights_bytes  # a byte an element, and four a row of 64
    # Rows rounded to 127 steps of their largest element: 0.6 % of it at most, 0.3 % in the mean square of a normal row.
    assert 1e-3 < report.errors[0].relative_l2 < 1e-2
    torch.testing.assert_close(result.graph(ids)[0], result(ids), rtol=1e-4, atol=1e-5)
    graph = fused(model, ids)
    for chosen in ({}, {"embedding": "int8 weights"}):  # the graph that is shown is the one that was decided on
        assert plan_int8(graph, detect(), Method(), [[ids]], only=chosen).chosen == chosen.keys()
    whole = compiled(model, ids, [ids], int8={"keep": ["embedding*"]}).report()
    assert {c.dtype for c in whole.precisions if "embedding" in c.operator} == {"float32"}
