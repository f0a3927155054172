"""Workloads counted by hand, the directions predictions move in, and what needs neither TVM nor a device."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from graphwright import hwdb
from graphwright.compiler.capture import capture, export
from graphwright.compiler.cli import app
from graphwright.compiler.prediction import page as predict_page
from graphwright.compiler.prediction import predict
from graphwright.compiler.prediction.accelerator import Accelerated
from graphwright.compiler.prediction.workload import Operation, Product, Workload, workload
from graphwright.errors import CaptureError, InputError


def counted(model, *inputs, target="x86-64-v3"):
    return predict.Predictor(model.eval(), inputs).workload(hwdb.lookup(target))


def test_a_convolution_is_a_product():
    """1x64x56x56 by 64x64x3x3 is 2 x 64 x 56 x 56 x 64 x 9 operations; the ReLU joins it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.nn.ReLU())
    work = counted(model, torch.randn(1, 64, 56, 56))
    conv = next(o for o in work.operations if o.products)
    assert conv.products == (Product(56 * 56, 64, 64 * 9),)
    assert conv.winograd
    assert work.flops == 2 * 64 * 56 * 56 * 64 * 9
    assert (conv.read, conv.written, conv.weights) == (64 * 56 * 56, 64 * 56 * 56, 64 * 64 * 9)
    assert work.weight_elements == 64 * 64 * 9


def test_depthwise_and_grouped_convolutions_divide_the_channels():
    grouped = counted(torch.nn.Conv2d(32, 64, 3, groups=4), torch.randn(1, 32, 10, 10))
    assert grouped.flops == 2 * 64 * 8 * 8 * 8 * 9
    (product,) = next(
        o for o in counted(torch.nn.Conv2d(16, 16, 3, groups=16), torch.randn(1, 16, 6, 6)).operations if o.products
    ).products
    assert (product.columns, product.depth, product.batch, product.flops) == (1, 9, 16, 2 * 16 * 4 * 4 * 9)


def test_attention_is_two_products():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    work = counted(Attention(), torch.randn(2, 4, 10, 16), torch.randn(2, 4, 30, 16), torch.randn(2, 4, 30, 16))
    assert work.flops == 2 * 2 * 4 * 10 * 30 * (16 + 16)


def test_equal_layers_are_one_entry_and_embeddings_read_their_rows():
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), *[torch.nn.Linear(64, 64) for _ in range(5)])
    work = counted(model, torch.randint(0, 1000, (1, 7)))
    linear = next(o for o in work.operations if o.products)
    assert (linear.count, linear.products) == (5, (Product(7, 64, 64),))
    gather = next(o for o in work.operations if not o.products)
    assert gather.read == 2 * 7 * 64  # not the table
    assert work.weight_elements == 1000 * 64 + 5 * (64 * 64 + 64)


def test_the_most_that_is_alive_counts_views_once():
    class Wide(torch.nn.Module):
        def forward(self, x):
            y = torch.cat([x, x], 1)
            return torch.softmax(y.reshape(-1, 10), 1).sum(0)

    work = workload(capture(export(Wide(), (torch.randn(100, 10),))).graph)
    assert work.activation_elements == 2000 + 2000  # y and its softmax; x is gone


DEVICES = ["raspberry-pi-4", "graviton3", "rtx-4090", "t4", "mi300x", "tpu-v5e"]


@pytest.fixture(scope="module")
def predictor():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 7, 2, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 1000),
    )
    return predict.Predictor(model.eval(), (torch.randn(1, 3, 112, 112),))


@pytest.mark.parametrize("name", DEVICES)
def test_better_hardware_is_never_slower(predictor, name):
    hw = hwdb.lookup(name)
    base = predictor.predict(hw)
    better = dataclasses.replace(hw, dram_gbs=hw.dram_gbs * 2)
    if hw.kind != "npu":
        better = dataclasses.replace(better, clock_mhz=hw.clock_mhz * 2)
    assert 0 < predictor.predict(better).milliseconds <= base.milliseconds * 1.001


@pytest.mark.parametrize("name", DEVICES)
def test_a_prediction_is_above_the_roofline_of_the_whole(predictor, name):
    """No more than Winograd's fourfold saving below FLOPs over peak."""
    hw = hwdb.lookup(name)
    row = predictor.predict(hw)
    assert row.milliseconds > predictor.workload(hw).flops / hw.peak_flops(row.precision) * 1e3 / 4
    assert row.least_ms < row.milliseconds < row.most_ms


def test_narrower_types_are_faster_where_the_hardware_has_them(predictor):
    for name in ("raspberry-pi-5", "t4", "graviton3"):
        hw = hwdb.lookup(name)
        wide, narrow = predictor.predict(hw, "float32"), predictor.predict(hw, "float16")
        assert narrow.precision == "float16"
        assert narrow.milliseconds < wide.milliseconds
        assert narrow.memory_bytes == wide.memory_bytes // 2
    old = hwdb.lookup("raspberry-pi-4")  # no float16 arithmetic: nothing gained, and the row says so
    assert predictor.predict(old, "float16").precision == "float32"
    assert predictor.predict(old, "float16").milliseconds == predictor.predict(old).milliseconds


def test_an_accelerator_without_float32_is_predicted_in_what_it_has(predictor):
    assert predictor.predict(hwdb.lookup("tpu-v5e")).precision == "bfloat16"
    assert predictor.predict(hwdb.lookup("hailo-8")).precision == "int8"


def test_energy_and_memory_are_bounds_and_unknown_stays_unknown(predictor):
    hw = hwdb.lookup("t4")
    row = predictor.predict(hw)
    assert row.joules == pytest.approx(hw.tdp_watts * row.milliseconds / 1e3)
    assert row.fits is True
    assert predictor.predict(dataclasses.replace(hw, dram_bytes=1000)).fits is False
    assert predictor.predict(dataclasses.replace(hw, dram_bytes=None, tdp_watts=None)).fits is None
    unknown = predictor.predict(dataclasses.replace(hw, clock_mhz=None))
    assert (unknown.milliseconds, unknown.joules, unknown.most_ms) == (None, None, None)
    assert "unknown" in unknown.line()


class Chosen(torch.nn.Module):
    def forward(self, x):
        return x[x > 0] * 2


def test_shapes_that_depend_on_values_are_refused():
    with pytest.raises(CaptureError, match=r"aten\.index\.Tensor\) has the shape .* depends on the values"):
        counted(Chosen(), torch.randn(4))


def test_a_model_that_computes_nothing_takes_no_time():
    nothing = predict.Predictor(torch.nn.Identity(), (torch.zeros(4),))
    assert {nothing.predict(hwdb.lookup(id)).milliseconds for id in ("raspberry-pi-5", "t4")} == {0.0}


def test_units_without_work_and_small_tiles_cost():
    hw = hwdb.lookup("a100-sxm-80gb")
    work = Workload((), 10**9, 10**9)  # nothing stays in the cache

    def share(rows, columns, depth=64):
        flops = 2.0 * rows * columns * depth
        device = Accelerated(work, hw, "float16")
        operation = Operation("linear", (Product(rows, columns, depth),), 0.0, 0.0, 0.0, 0.0, 0)
        return flops / device.cost(operation).arithmetic / hw.peak_flops("float16")

    assert share(256 * 108, 256) == pytest.approx(0.8)  # every unit has a tile: EFFICIENCY
    assert share(256 * 109, 256) < 0.65  # one tile more is one round more, or smaller tiles
    assert share(32, 32) < 0.02


def test_weights_stream_unless_all_stay_in_the_cache():
    hw = hwdb.lookup("a100-sxm-80gb")  # 40 MB
    operation = Operation("linear", (Product(1, 1000, 1000),), 0.0, 1000.0, 1000.0, 1e6, 0)
    small = Accelerated(Workload((operation,), 10**6, 2000), hw, "float32").cost(operation)
    large = Accelerated(Workload((operation,), 10**9, 2000), hw, "float32").cost(operation)
    assert large.memory == pytest.approx(4e6 / (hw.dram_gbs * 1e9 * 0.85), rel=0.01)
    assert small.memory < large.memory / 3


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match=r"fp23.*fp32"):
        predict.precision_dtype("fp23")


def test_gpus_are_predicted_without_tvm():
    code = """
import sys, torch
from graphwright import hwdb
from graphwright.compiler.prediction.predict import Predictor
found = Predictor(torch.nn.Linear(64, 64), (torch.randn(4, 64),))
rows = [found.predict(hwdb.lookup(name)) for name in ("rtx-4090", "mi300x", "tpu-v5e")]
assert all(row.milliseconds for row in rows)
assert "tvm" not in sys.modules, "tvm"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_shows_every_device_and_escapes_names(tmp_path, predictor):
    targets = [hwdb.lookup(name) for name in (*DEVICES, "native")]
    rows = predict.ranked(predictor, targets)
    html = predict_page.page("<b>model</b>", predictor, targets, rows, "float32", chosen=False)
    assert "<b>model</b>" not in html
    assert html.count('class="roof"') == 5  # native, the fastest GPU, NPU and CPU, and the board
    assert html.count('class="band"') == len(rows)
    assert "nan" not in html.lower().replace("nano", "")
    assert all(float(x) <= 860 for x in re.findall(r'[ c]x="([\d.]+)"', html))
    for hw in targets:
        assert hw.name in html


def test_the_command_writes_table_and_page(tmp_path, monkeypatch):
    (tmp_path / "some_models.py").write_text(
        "import torch\ndef mlp():\n    return torch.nn.Linear(8, 8), (torch.randn(1, 8),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    page = tmp_path / "page.html"
    arguments = ["hw", "predict", "some_models:mlp", "--devices", "t4,pi5", "--precision", "fp16", "--html", str(page)]
    output = CliRunner().invoke(app, arguments).stdout.splitlines()
    assert output[0].startswith("predicted, not measured")
    assert {line.split()[0] for line in output[1:3]} == {"t4", "raspberry-pi-5"}
    assert page.read_text().startswith("<!doctype html>")
    listed = json.loads(
        CliRunner().invoke(app, ["hw", "predict", "some_models:mlp", "--devices", "t4", "--json"]).stdout
    )
    assert listed[0]["memory_bytes"] == 4 * (72 + 16)


def test_a_page_of_devices_without_a_figure_is_drawn(predictor):
    targets = [hwdb.lookup("hailo-8")]
    html = predict_page.page("m", predictor, targets, predict.ranked(predictor, targets), "float32", chosen=True)
    assert "Hailo-8" in html
    assert "unknown" in html


def test_a_page_is_a_file(tmp_path):
    result = CliRunner().invoke(app, ["hw", "predict", "resnet18", "--devices", "t4", "--html", str(tmp_path)])
    assert result.exit_code == 1
    assert "is a directory: name a file in it" in result.output
