"""Depthwise convolutions of bytes are exact: bit for bit the integer reference, by instructions and without."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import TORCH, integers, one_core, random, requantized, run, run_emulated

from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.dot_depthwise import dot_depthwise
from graphwright.backends.kernels.dot_depthwise_plan import (
    DotDepthwisePlan,
    blocks_of,
    choose_dot_depthwise,
    pack_channels,
    pack_depthwise,
)
from graphwright.backends.kernels.int8_product import RANGES, Requantize, Residual, has_offsets, offsets
from graphwright.hwdb import Hardware, detect, lookup


def depthwise(conv: tuple[int, ...], kernel: tuple[int, int], **rest: tuple[int, ...]) -> Conv:
    batch, height, width, channels = conv
    return Conv(batch, height, width, channels, channels, kernel, groups=channels, **rest)  # type: ignore[arg-type]


def operands(conv: Conv, source: str, zero: int, how: Requantize, plan: DotDepthwisePlan) -> list[torch.Tensor]:
    """The kernel's operands and its result by the reference, last."""
    x = integers(source, *conv.input_shape)
    w = integers("int8", conv.channels, 1, *conv.kernel, seed=1)
    scale = torch.rand(conv.channels, generator=torch.Generator().manual_seed(2)) * 1e-3 + 1e-5
    bias = torch.linspace(-2, 2, conv.channels)
    added = None
    if how.residual is not None:
        kind = how.residual.dtype
        floats = kind == "float32"
        added = random(*conv.output_shape, seed=3) if floats else integers(kind, *conv.output_shape, seed=3)
    top, bottom, left, right = conv.padding
    padded = F.pad(x.double() - zero, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
    sums = F.conv2d(padded, w.double(), None, conv.stride, 0, conv.dilation, conv.groups).round().permute(0, 2, 3, 1)
    rows = None if added is None else added.view(-1, conv.channels)
    expected = requantized(sums.reshape(-1, conv.channels), scale, bias, rows, how).view(conv.output_shape)
    extra = [] if added is None else [added]
    added_to_sums = offsets(w, zero, source, plan.dot)
    assert how.offset or not added_to_sums.any()
    constants = [pack_channels(c, plan) for c in ([added_to_sums] if how.offset else []) + [scale, bias]]
    return [x, pack_depthwise(w), *constants, *extra, expected]


def finish(conv: Conv, result: str, residual: str | None = None, activation: str = "none") -> Requantize:
    added = None if residual is None else Residual(residual, 0.037, 5)
    zero = {"uint8": 110, "int8": -3, "float32": 0}[result]
    args = (-3.0, 5.5) if activation == "clamp" else ()
    count = prod(conv.output_shape[:3])
    return Requantize(count, conv.channels, result, zero, 9.7, True, added, activation, args, conv.output_shape)


def machine(kind: str) -> tuple[Hardware, bool]:
    """This machine; its instructions, or arithmetic in their place, at two widths."""
    hw = detect()
    if kind == "emulated 512":
        return dataclasses.replace(hw, vector_bits=512, vector_registers=32), True
    return (hw, True) if kind == "emulated" else (hw, False)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(["own", "emulated", "emulated 512"]),
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 7, 16, 24, 40, 96])),
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 5, 10])),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.sampled_from(["uint8", "int8"]),
    st.sampled_from(["uint8", "int8", "float32"]),
    st.integers(-128, 255) | st.just(0),
    st.sampled_from([None, "uint8", "int8", "float32"]),
    st.sampled_from(["none", "relu6", "clamp", "leaky"]),
)
def test_bit_for_bit(
    kind: str,
    image: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
    source: str,
    result: str,
    zero: int,
    residual: str | None,
    activation: str,
) -> None:
    low, high = RANGES[source]
    # Windows that fit the image at all.
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    grown = [max(image[1], reach[0]), max(image[2], reach[1])]
    conv = depthwise((image[0], *grown, image[3]), kernel, stride=stride, padding=padding, dilation=dilation)
    hw, emulated = machine(kind)
    plan = choose_dot_depthwise(conv, hw, emulated=emulated)
    how = finish(conv, result, residual, "hardswish" if activation == "leaky" else activation)
    zero = max(low, min(high, zero))
    how = dataclasses.replace(how, offset=has_offsets(zero, source, plan.dot))
    *given_, expected = operands(conv, source, zero, how, plan)
    out = torch.zeros(conv.output_shape, dtype=TORCH[result])
    func = dot_depthwise("int8_depthwise", conv, source, plan, how, zero=zero)
    run(func, detect(), *given_, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("split", [(3, 1), (1, 2)])
def test_tasks_share_rows_or_blocks_of_channels(split: tuple[int, int]) -> None:
    conv = depthwise((1, 5, 4, 136), (3, 3), padding=(1, 1, 1, 1))
    chosen = choose_dot_depthwise(conv, detect())
    plan = dataclasses.replace(chosen, row_blocks=split[0], channel_blocks=split[1])
    how = finish(conv, "uint8", activation="relu")
    *given_, expected = operands(conv, "uint8", 9, how, plan)
    out = torch.zeros(conv.output_shape, dtype=torch.uint8)
    run(dot_depthwise("int8_depthwise", conv, "uint8", plan, how, zero=9), detect(), *given_, out)
    assert torch.equal(out, expected)


def test_a_heavy_activation() -> None:
    conv = depthwise((1, 3, 4, 80), (3, 3), padding=(1, 1, 1, 1))
    plan = choose_dot_depthwise(conv, detect())
    how = finish(conv, "float32", activation="silu")
    *given_, expected = operands(conv, "uint8", 9, how, plan)
    out = torch.zeros(conv.output_shape)
    run(dot_depthwise("int8_depthwise", conv, "uint8", plan, how, zero=9), detect(), *given_, out)
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)  # the polynomial's last bits


@pytest.mark.parametrize(("result", "lowest"), [("uint8", 0), ("int8", -128)])
def test_nan_and_infinities_are_clipped(result: str, lowest: int) -> None:
    conv = depthwise((1, 4, 4, 64), (3, 3), padding=(1, 1, 1, 1))
    plan = choose_dot_depthwise(conv, detect())
    how = finish(conv, result, "float32")
    *given_, expected = operands(conv, "uint8", 9, how, plan)
    for channel, (value, code) in enumerate([(torch.nan, lowest), (-torch.inf, lowest), (torch.inf, lowest + 255)]):
        given_[-1][..., channel] = value
        expected[..., channel] = code
    out = torch.zeros(conv.output_shape, dtype=TORCH[result])
    run(dot_depthwise("int8_depthwise", conv, "uint8", plan, how, zero=9), detect(), *given_, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["znver4", "alderlake"])
def test_instructions_of_other_machines(name: str, tmp_path: Path) -> None:
    hw = one_core(lookup(name))
    conv = depthwise((1, 5, 6, 72), (3, 3), padding=(1, 1, 1, 1), stride=(1, 2))
    plan = choose_dot_depthwise(conv, hw)
    assert plan.dot.name == "vpdpbusd"
    how = finish(conv, "uint8", activation="relu6")
    *given_, expected = operands(conv, "int8", -9, how, plan)
    out = torch.zeros(conv.output_shape, dtype=torch.uint8)
    run_emulated(dot_depthwise("int8_depthwise", conv, "int8", plan, how, zero=-9), hw, tmp_path, *given_, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33, 64, 95, 200])
@pytest.mark.parametrize("widest", [16, 32, 64])
def test_blocks_store_every_channel_once(channels: int, widest: int) -> None:
    stored: list[int] = []
    for block in blocks_of(channels, widest):
        for i in range(block.count):
            start = block.start + i * block.width
            stored += range(start + block.first, start + block.last)
    assert stored == list(range(channels))
