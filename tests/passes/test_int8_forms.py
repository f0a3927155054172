"""What 8 bits and 4 bits are predicted to be worth for one product."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx, nn

from graphwright.compiler import pipeline
from graphwright.compiler.capture import capture, export
from graphwright.hwdb import Hardware, lookup
from graphwright.passes.default import PASSES
from graphwright.passes.precision.int8_forms import GAIN, INT4_GAIN, int8_form, is_depthwise, is_product


@pytest.fixture(scope="module")
def hw() -> Hardware:
    return lookup("znver4")


def products(model: nn.Module, x: torch.Tensor, hw: Hardware) -> tuple[fx.GraphModule, list[fx.Node]]:
    passes = [p for p in PASSES if p.__name__ != "fuse_conv_depthwise"]
    graph = pipeline.run(capture(export(model.eval(), (x,), {})).graph, hw, passes)[0]
    return graph, [n for n in graph.graph.nodes if is_product(n)]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_is_worth_it_between_others(hw: Hardware, stride: int) -> None:
    layers = (nn.Conv2d(32, 192, 1), nn.ReLU(), nn.Conv2d(192, 192, 3, stride, 1, groups=192), nn.Conv2d(192, 32, 1))
    graph, nodes = products(nn.Sequential(*layers), torch.randn(1, 32, 28, 28), hw)
    (depthwise,) = [n for n in nodes if is_depthwise(n)]
    source = depthwise.all_input_nodes[0]
    between, alone = int8_form(graph, depthwise, hw, {source}), int8_form(graph, depthwise, hw)
    assert (between.pays, between.worth) == (True, 1.0)
    # Its own rounding costs more than the little that it gains.
    assert (alone.pays, alone.worth) == (False, GAIN)
    assert "gains nothing" in alone.reason or alone.seconds > GAIN * alone.float32_seconds


@pytest.mark.parametrize(
    ("rows", "inputs", "group", "form"),
    [
        (1, 512, 32, "int4 weights"),
        (1, 512, 0, "int8 weights"),  # not asked for
        (1, 500, 32, "int8 weights"),  # no whole groups
        (256, 512, 32, "int8"),  # waits for arithmetic, not for weights
    ],
)
def test_four_bits_where_weights_are_waited_for(hw: Hardware, rows: int, inputs: int, group: int, form: str) -> None:
    small = dataclasses.replace(hw, caches=hw.caches[:1], dram_gbs=10.0)
    graph, (node,) = products(nn.Linear(inputs, 512), torch.randn(rows, inputs), small)
    found = int8_form(graph, node, small, group=group)
    assert (found.name, found.pays) == (form, True)
    if form == "int4 weights":
        assert found.seconds <= INT4_GAIN * int8_form(graph, node, small).seconds


@pytest.mark.parametrize(
    ("target", "rows", "form", "pays"),
    [
        ("znver4", 256, "int8 dynamic", True),
        ("raspberry-pi-5", 256, "int8 dynamic", True),
        ("znver4", 1, "int8 weights", True),  # as fast, and inputs are not rounded
        ("x86-64-v3", 256, "int8", False),  # no dot product of bytes
    ],
)
def test_inputs_rounded_row_by_row(target: str, rows: int, form: str, pays: bool) -> None:
    machine = dataclasses.replace(lookup(target), dram_gbs=10.0)
    graph, (node,) = products(nn.Linear(512, 512), torch.randn(rows, 512), machine)
    found = int8_form(graph, node, machine, streamed=1 << 30, dynamic=True)
    assert (found.name, found.pays) == (form, pays), found.reason
    assert pays or "no dot product of bytes" in found.reason


@pytest.mark.parametrize(("groups", "form"), [(1, "int8 dynamic"), (64, "int8")])
def test_convolutions_round_image_by_image(hw: Hardware, groups: int, form: str) -> None:
    graph, (node,) = products(nn.Conv2d(64, 64, 3, 2, groups=groups), torch.randn(1, 64, 56, 56), hw)
    static, found = int8_form(graph, node, hw), int8_form(graph, node, hw, dynamic=True)
    if form == "int8":
        assert found == static
        return
    assert (found.name, found.pays) == (form, True)
    assert found.seconds > static.seconds  # the image is read once more
    assert found.reason.endswith("inputs by a scale for each image")
