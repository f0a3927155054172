"""Transposed convolution: the phases of an axis, any problem against float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_harness import UNIT, Case, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.kernels.conv_transpose import axis_phases
from graphwright.backends.lowering import kernels_conv_other  # noqa: F401  (fills KERNELS)
from graphwright.backends.lowering.registry import KernelCall, Refusal
from graphwright.hwdb import Hardware, detect
from graphwright.passes import dialect


def case_of(
    size: tuple[int, int],
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    *,
    batch: int = 1,
    stride: tuple[int, int] = (2, 2),
    padding: tuple[int, int] = (0, 0),
    output_padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    layout: str = "NHWC",
) -> Case:
    """A transposed convolution with random operands."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *size, channels, generator=random)
    weight = torch.randn(channels, filters // groups, *kernel, generator=random)
    b = torch.randn(filters, generator=random) if bias else None
    options = (stride, padding, output_padding, dilation, groups, activation, [], layout)
    added = None
    if residual:
        out = dialect.conv_transpose2d(x, weight, None, None, *options[:5], "none", [], layout)
        added = torch.randn(out.shape, generator=random)
    return Case(dialect.conv_transpose2d, (x, weight, b, added), options)


def check(case: Case, hw: Hardware | None = None) -> None:
    got, wanted = case.run(hw or detect()).double(), case.reference()
    # n * unit * sum |x||w|, as in conv_harness.check_conv.
    x, weight, bias, added = (t if t is None else t.double().abs() for t in case.tensors)
    magnitude = dialect.conv_transpose2d(x, weight, bias, added, *case.options[:5], "none", [], "NHWC")
    assert x is not None
    assert weight is not None
    terms = x.shape[3] * weight[0, 0].numel() + 3
    allowed = 1.2 * terms * UNIT * magnitude + 1e-6 * wanted.abs() + 1e-6
    assert ((got - wanted).abs() <= allowed).all()


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Any transposed convolution that torch accepts."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    stride, kernel, dilation = draw(pair), draw(pair), draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 2)]))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    padding, output_padding = [], []
    for i in (0, 1):
        output_padding.append(draw(st.integers(0, max(stride[i], dilation[i]) - 1)))
        reach = (size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + output_padding[i]
        padding.append(draw(st.integers(0, min(3, reach // 2))))
    return {
        "size": size,
        "channels": groups * draw(st.integers(1, 9)),
        "filters": groups * draw(st.integers(1, 19)),
        "kernel": kernel,
        "batch": draw(st.integers(1, 2)),
        "stride": stride,
        "padding": tuple(padding),
        "output_padding": tuple(output_padding),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "relu", "silu"])),
    }


@given(problems())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_problem(problem: dict[str, Any]) -> None:
    check(case_of(**problem))


@pytest.mark.parametrize("bits", [128, 512])
def test_other_vector_widths(bits: int) -> None:
    problem = case_of((5, 7), 12, 40, (4, 4), padding=(1, 1), bias=True, activation="relu")
    check(problem, plain(detect(), vector_bits=bits, vector_registers=32))


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))
def test_phases_meet_every_product_once(
    size: int, kernel: int, stride: int, padding: int, dilation: int, extra: int
) -> None:
    out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + extra
    wanted = {
        (i * stride + k * dilation - padding, i, k)
        for i in range(size)
        for k in range(kernel)
        if 0 <= i * stride + k * dilation - padding < out
    }
    found = []
    for phase in axis_phases(size, out, kernel, stride, padding, dilation):
        for q in range(phase.count):
            for t, k in enumerate(phase.taps):
                i = q - phase.before + t * phase.dilation
                if 0 <= i < size:
                    found.append((phase.start + q * stride, i, k))
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_the_multiplications_are_those_of_the_taps_that_exist() -> None:
    call = case_of((8, 8), 16, 16, (4, 4), padding=(1, 1)).lower(detect())
    assert isinstance(call, KernelCall)
    # Every input meets every tap, except those whose output is cut off.
    assert call.work.flops["float32"] == 2 * 16 * 16 * (8 * 4 - 2) ** 2
    assert call.algorithm == "transposed conv"
    assert call.choice.startswith("4 phases")


def test_refusals() -> None:
    def reason(**changes: Any) -> str:
        answer = case_of(**{"size": (5, 7), "channels": 3, "filters": 4, "kernel": (3, 3), **changes}).lower(detect())
        assert isinstance(answer, Refusal)
        return answer.reason

    assert reason(layout="NCHW") == "the layout is NCHW"
    assert "has 25 phases" in reason(stride=(5, 5))


def test_compiled_from_a_model() -> None:
    import graphwright

    torch.manual_seed(0)
    up = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(6, 10, 4, 2, 1), torch.nn.BatchNorm2d(10), torch.nn.ReLU(), torch.nn.Conv2d(10, 3, 3)
    ).eval()
    x = torch.randn(2, 6, 5, 9)
    compiled = graphwright.compile(up, (x,), cache=False, verify=False)
    assert "transposed conv" in [k.algorithm for k in compiled.report().kernels]
    torch.testing.assert_close(compiled(x), up(x), rtol=1e-5, atol=1e-5)  # two sums of some 100 terms
    sequence = torch.nn.ConvTranspose1d(6, 8, 4, 2, 1).eval()
    x = torch.randn(2, 6, 31)
    compiled = graphwright.compile(sequence, (x,), cache=False, verify=False)
    assert [k.algorithm for k in compiled.report().kernels].count("transposed conv") == 1
    torch.testing.assert_close(compiled(x), F.conv_transpose1d(x, sequence.weight, sequence.bias, 2, 1))


@pytest.mark.parametrize(
    "case",
    [
        case_of((5, 7), 13, 13, (3, 3), groups=13, bias=True, activation="relu"),
        case_of((5, 7), 16, 16, (4, 4), groups=16, residual=True, padding=(1, 1)),
        case_of((5, 3), 9, 9, (2, 2), stride=(3, 3), groups=9, bias=True),  # phases without taps
    ],
)
def test_each_channel_by_itself(case: Case) -> None:
    answer = case.lower(detect())
    assert isinstance(answer, KernelCall)
    assert "strips of" in answer.choice  # the nest of depthwise convolutions
    check(case)
