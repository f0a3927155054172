"""Convolution in bfloat16, direct: any geometry against float64, and on the emulated processor."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import loops_with, one_core, random, run, run_emulated

from graphwright.backends.kernels.bf16_matmul import FloatFinish
from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.dot_conv import choose_dot_conv, dot_conv, pack_conv
from graphwright.backends.kernels.dot_product import bf16_dot, narrow_text
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect

DTYPES = {"float32": torch.float32, "uint16": torch.bfloat16}


@st.composite
def problems(draw: st.DrawFn) -> Conv:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    least = [dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1] for i in (0, 1)]
    height, width = (max(1, n) + draw(st.integers(0, 9)) for n in least)
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    channels, filters = draw(st.sampled_from([1, 3, 4, 9, 16])), draw(st.sampled_from([1, 5, 8, 24, 33]))
    return Conv(draw(st.integers(1, 2)), height, width, channels, filters, kernel, stride, padding, dilation)


def operands(conv: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        random(*conv.input_shape),
        random(conv.filters, conv.channels, *conv.kernel, seed=1),
        random(conv.filters, seed=2),
        random(*conv.output_shape, seed=3),
    )


def expected(conv: Conv, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation), 1)
    rounded = [t.bfloat16().double() for t in (x, w)]
    return dialect.conv2d(*rounded, bias.double(), residual.double(), *sizes, "relu", [], "NHWC")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)), st.booleans(), st.integers(1, 3))
def test_any_geometry(conv: Conv, source: str, result: str, avx512: bool, cores: int) -> None:
    hw = dataclasses.replace(detect(), cores=cores, launch_us=0.0)
    if avx512:
        hw = dataclasses.replace(hw, vector_bits=512, vector_registers=32)
    dot = bf16_dot(hw, emulated=True)
    assert dot is not None
    x, w, bias, residual = operands(conv)
    plan = choose_dot_conv(conv, dot, hw)
    finish = FloatFinish(prod(conv.output_shape[:3]), conv.filters, True, source, "relu", (), result)
    finish = dataclasses.replace(finish, output_shape=conv.output_shape)
    func = dot_conv("bf16_conv", conv, source, dot, plan, finish, narrow_text(hw))
    out = torch.full(conv.output_shape, float("nan"), dtype=DTYPES[result])
    x, residual = x.to(DTYPES[source]), residual.to(DTYPES[source])
    run(func, detect(), x, pack_conv(w.bfloat16(), dot, plan), bias, residual, out)
    exact = expected(conv, x, w, bias, residual)
    # At most 256 float32 products of order one to sixteen, then perhaps a rounding to bfloat16.
    rounding = 2.0**-8 * 1.01 if result == "uint16" else 1e-6
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("name", ["znver4", "sapphirerapids"])
def test_the_instruction_is_there_and_nothing_spills(name: str) -> None:
    hw = lookup(name)
    dot = bf16_dot(hw)
    assert dot is not None
    conv = Conv(1, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1, 1, 1))
    plan = choose_dot_conv(conv, dot, hw)
    assert plan.pixels * plan.vectors + plan.vectors + 1 <= 32
    func = dot_conv("bf16_conv", conv, "uint16", dot, plan, FloatFinish(784, 128, True), narrow_text(hw))
    loops = loops_with(func, hw, "vdpbf16ps")
    assert loops
    assert all(loop.spills == 0 and "zmm" in loop.text for loop in loops)


def test_on_the_emulated_processor(tmp_path: Path) -> None:
    hw: Hardware = one_core(lookup("sapphirerapids"))
    conv = Conv(1, 7, 6, 5, 18, (3, 2), (2, 1), (1, 1, 1, 0))
    dot = bf16_dot(hw)
    assert dot is not None
    x, w, bias, residual = operands(conv)
    plan = choose_dot_conv(conv, dot, hw)
    finish = FloatFinish(prod(conv.output_shape[:3]), 18, True, "float32", "relu", output_shape=conv.output_shape)
    func = dot_conv("bf16_conv", conv, "float32", dot, plan, finish, narrow_text(hw))
    out = torch.full(conv.output_shape, float("nan"))
    run_emulated(func, hw, tmp_path, x, pack_conv(w.bfloat16(), dot, plan), bias, residual, out)
    torch.testing.assert_close(out.double(), expected(conv, x, w, bias, residual), rtol=1e-5, atol=1e-5)
