"""Convolutions whose images are rounded to bytes at run time: bit for bit the integer reference."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import run_kernel_on
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import byte_machine, fma, integers, random, run

from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.dot_conv import DotConvPlan, choose_dot_conv, pack_conv
from graphwright.backends.kernels.dot_product import Dot, int8_dot
from graphwright.backends.kernels.int8_product import has_offsets, int8_images_conv, offsets
from graphwright.backends.kernels.int8_rows import RowFinish
from graphwright.hwdb import detect, lookup
from graphwright.passes import dialect, dialect_rows


@st.composite
def problems(draw: st.DrawFn) -> Conv:
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    height, width = kernel[0] + draw(st.integers(0, 8)), kernel[1] + draw(st.integers(0, 8))
    stride, dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2))), (1, 1)
    channels, filters = draw(st.sampled_from([1, 3, 8, 17, 64])), draw(st.sampled_from([1, 8, 20, 33]))
    return Conv(draw(st.integers(1, 4)), height, width, channels, filters, kernel, stride, padding, dilation)


def finish_of(conv: Conv, dot: Dot, *rest: Any) -> RowFinish:
    pixels, signed = prod(conv.output_shape[1:3]), has_offsets(0, "int8", dot)
    shapes = {"output_shape": conv.output_shape, "rows_of_unit": pixels}
    return RowFinish(conv.batch * pixels, conv.filters, *rest, offset=signed, **shapes)


def stored(w: torch.Tensor, dot: Dot, plan: DotConvPlan) -> list[torch.Tensor]:
    """The weights as the kernel reads them, and their offsets where there are any."""
    return [pack_conv(w, dot, plan), *[offsets(w, 0, "int8", dot)] * has_offsets(0, "int8", dot)]


def operands(conv: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = random(*conv.input_shape) * torch.logspace(-25, 25, conv.batch)[:, None, None, None]
    x[-1, ..., ::3] = 2.5  # ties and the extremes
    w = integers("int8", conv.filters, conv.channels, *conv.kernel, seed=1)
    return x, w, torch.linspace(1e-4, 1e-3, conv.filters)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    problems(),
    st.sampled_from(["own", "emulated", "512", "pairs"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([("none", ()), ("relu", ()), ("leaky_relu", (0.1,))]),
)
def test_bit_for_bit(
    conv: Conv, kind: str, bias: bool, residual: bool, activation: tuple[str, tuple[float, ...]]
) -> None:
    hw, dot = byte_machine(kind)
    x, w, scale = operands(conv)
    if conv.batch > 2:
        x[1] = 0.0
    added = [random(conv.filters, seed=2)] * bias + [random(*conv.output_shape, seed=3)] * residual
    plan = choose_dot_conv(conv, dot, hw)
    func = int8_images_conv(conv, hw, finish_of(conv, dot, bias, residual, *activation), dot=dot, plan=plan)
    out = torch.full(conv.output_shape, 7.0)
    run(func, detect(), x, *stored(w, dot, plan), scale, *added, out)
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation))
    expected = []
    for i, image in enumerate(x):  # by integers, an image at a time
        largest = image.abs().max()
        q = (image * (127.0 / (largest if largest > 0 else torch.tensor(1.0)))).round()
        assert int(q.abs().max()) <= 127
        sums = dialect.conv2d(q[None].double(), w.double(), None, None, *sizes, 1, "none", [], "NHWC")[0].round()
        addend = [t if t.dim() == 1 else t[i] for t in added]
        unit = largest * torch.tensor(1 / 127)
        y = fma(sums.float() * scale, unit, sum(addend[1:], addend[0]) if addend else None)
        expected.append(dialect.ACTIVATIONS[activation[0]](y, list(activation[1])))
    assert torch.equal(out, torch.stack(expected))
    given = (added[0] if bias else None, added[-1] if residual else None)
    assert torch.equal(out, dialect_rows.conv2d_images(x, w, scale, *given, *sizes, activation[0], list(activation[1])))


def test_images_without_a_scale() -> None:
    conv = Conv(4, 5, 6, 7, 20, (3, 3), padding=(1, 1, 1, 1))
    hw, dot = byte_machine("own")
    x, w, scale = operands(conv)
    x[0, 4, 5, 6], x[1, 0, 0, 0], x[2] = torch.nan, -torch.inf, x[2] * 1e-44
    plan = choose_dot_conv(conv, dot, hw)
    out = torch.full(conv.output_shape, 7.0)
    func = int8_images_conv(conv, hw, finish_of(conv, dot, True), dot=dot, plan=plan)
    bias = random(20, seed=2)
    run(func, detect(), x, *stored(w, dot, plan), scale, bias, out)
    assert out[:2].isnan().all()
    sizes = ([1, 1], [1, 1, 1, 1], [1, 1])
    expected = dialect_rows.conv2d_images(x, w, scale, bias, None, *sizes, "none", [])
    assert expected[:2].isnan().all()
    assert torch.equal(out[2:], expected[2:])


@pytest.mark.parametrize(
    ("board", "cpu", "instruction"),
    [
        ("raspberry-pi-5", "cortex-a76", "sdot"),
        ("neoverse-v1", "max", "usdot"),
        ("raspberry-pi-4b", "cortex-a72", "smull and sadalp"),
    ],
)
def test_on_arm(board: str, cpu: str, instruction: str, tmp_path: Path) -> None:
    """The same bits under QEMU; channels of no whole words, images without a scale."""
    hw = lookup(board)
    dot = int8_dot(hw)
    assert dot.name == instruction
    conv = Conv(3, 6, 7, 5, 20, (3, 2), (2, 1), (1, 0, 2, 1))
    x, w, scale = operands(conv)
    x[1] = 0.0
    plan, bias, residual = choose_dot_conv(conv, dot, hw), random(20, seed=2), random(*conv.output_shape, seed=3)
    func = int8_images_conv(conv, hw, finish_of(conv, dot, True, True, "leaky_relu", (0.1,)), dot=dot, plan=plan)
    out = torch.full(conv.output_shape, 7.0)
    run_kernel_on(func, hw, cpu, tmp_path, x, *stored(w, dot, plan), scale, bias, residual, out)
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation))
    assert torch.equal(out, dialect_rows.conv2d_images(x, w, scale, bias, residual, *sizes, "leaky_relu", [0.1]))
