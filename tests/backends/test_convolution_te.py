"""Convolutions of every rank, grouping, padding and layout; in float64, so that an error is a wrong term."""

from __future__ import annotations

import functools
from typing import Any

import lowering_harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright.passes.dialect as dialect

aten = torch.ops.aten
check = functools.partial(lowering_harness.check, shipped=True)

torch.manual_seed(0)


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


PLANE = sample(2, 4, 7, 8)

CASES = [
    (aten.conv1d.default, sample(2, 3, 9), sample(4, 3, 3), sample(4), [2], [1], [2]),
    (aten.conv1d.default, sample(3, 9), sample(4, 3, 2)),
    (aten.conv1d.padding, sample(2, 3, 9), sample(4, 3, 4), None, [1], "same", [2]),
    (aten.conv2d.default, PLANE, sample(6, 4, 3, 3), sample(6), [2, 1], [1, 2], [1, 2]),
    (aten.conv2d.default, PLANE, sample(6, 2, 3, 2), sample(6), [1, 1], [0, 1], [1, 1], 2),
    (aten.conv2d.default, PLANE, sample(8, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4),
    (aten.conv2d.default, PLANE[:0], sample(6, 4, 3, 3)),
    (aten.conv2d.default, PLANE.long(), sample(6, 4, 3, 3).mul(9).long()),
    (aten.conv2d.padding, PLANE, sample(6, 4, 3, 2), None, [1, 1], "same"),
    (aten.conv2d.padding, PLANE, sample(6, 4, 3, 2), None, [2, 1], "valid"),
    (aten.conv3d.default, sample(1, 2, 4, 5, 6), sample(3, 2, 2, 3, 1), sample(3), [1, 2, 1], [0, 1, 0]),
    (aten.conv_transpose1d.default, sample(2, 3, 5), sample(3, 2, 4), sample(2), [3], [1], [2]),
    (aten.conv_transpose2d.input, PLANE, sample(4, 3, 3, 4), sample(3), [2, 2], [1, 0], [1, 0]),
    (aten.conv_transpose2d.input, PLANE, sample(4, 3, 2, 2), None, [2, 2]),
    (aten.conv_transpose2d.input, PLANE, sample(4, 3, 3, 3), None, [1, 1], [1, 1], [0, 0], 2),
    (aten.conv_transpose2d.input, PLANE, sample(4, 1, 3, 3), None, [2, 3], [2, 4], [1, 2], 4, [4, 2]),
    # Its rows (channels) are shared by all stages although the weight divides them into groups.
    (aten.conv_transpose1d.default, sample(2, 4), sample(2, 2, 4), sample(4), [3], [1], [2], 2, [4]),
    (aten.conv_transpose3d.input, sample(1, 2, 3, 4, 2), sample(2, 3, 2, 3, 2), None, [2, 1, 3], [0, 1, 1]),
    (
        aten.convolution.default,
        PLANE,
        sample(6, 4, 1, 1),
        sample(6),
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
    ),
    (aten.convolution.default, PLANE, sample(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_convolution(case: tuple[Any, ...]) -> None:
    check(*case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    x, weight = sample(1, 64, 6, 6, dtype=dtype), sample(8, 64, 3, 3, dtype=dtype)
    # One rounding to the dtype at the end, which a sum near zero or a tie may tip: an ulp of values around 100.
    atol = {torch.float16: 0.05, torch.bfloat16: 0.5, torch.float32: 1e-4}[dtype]
    check(aten.conv2d.default, x, weight, None, [1, 1], [1, 1], rtol=0, atol=atol)


ACTIVATIONS = [
    *(("none", []), ("relu", []), ("relu6", []), ("silu", []), ("gelu", []), ("gelu_tanh", [])),
    *(("hardswish", []), ("hardsigmoid", []), ("sigmoid", []), ("tanh", []), ("clamp", [-0.5, 2.0])),
    ("leaky_relu", [0.1]),
]


@pytest.mark.parametrize(("activation", "args"), ACTIVATIONS)
def test_fused_convolution(activation: str, args: list[float]) -> None:
    x = PLANE.permute(0, 2, 3, 1).contiguous()
    weight, bias = sample(6, 2, 3, 3), sample(6)
    form = ([2, 1], [1, 0, 2, 1], [1, 1], 2, activation, args, "NHWC")
    check(dialect.conv2d, x, weight, bias, sample(2, 3, 9, 6), *form)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("extras", [(False, False), (True, False), (False, True)])
def test_fused_convolution_with_and_without_extras(layout: str, extras: tuple[bool, bool]) -> None:
    shape = (2, 6, 7, 8) if layout == "NCHW" else (2, 7, 8, 6)
    x = PLANE if layout == "NCHW" else PLANE.permute(0, 2, 3, 1).contiguous()
    bias, residual = sample(6) if extras[0] else None, sample(*shape) if extras[1] else None
    form = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "relu", [], layout)
    check(dialect.conv2d, x, sample(6, 4, 3, 3), bias, residual, *form)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    extent=st.integers(1, 7),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    groups=st.integers(1, 2),
    data=st.data(),
)
def test_any_transposed_convolution(
    extent: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, data: st.DataObject
) -> None:
    extra = data.draw(st.integers(0, max(stride, dilation) - 1))
    length = (extent - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
    if length < 1:
        padding, length = 0, length + 2 * padding
    x, weight = sample(1, 2, extent), sample(2, 3, kernel)
    check(aten.conv_transpose1d.default, x, weight, None, [stride], [padding], [extra], groups, [dilation])
