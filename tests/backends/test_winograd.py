"""Winograd convolution: the algebra, any size against float64, the error beside eager's, where it is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import tvm
from conv_harness import compile_kernel, conv_case, plain, target
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.winograd import winograd
from graphwright.backends.kernels.winograd_error import refusal, relative_error
from graphwright.backends.kernels.winograd_plan import (
    PAIRS,
    WinogradPlan,
    choose_winograd,
    filter_matrix,
    pack_weight,
    plans,
)
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import Hardware, detect, lookup


def run(
    conv: Conv, plan: WinogradPlan, seed: int = 0, hw: Hardware | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's result, float64's, and eager's in float32."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(conv.input_shape, generator=random)
    weight = torch.randn(conv.filters, conv.channels, 3, 3, generator=random)
    bias = torch.randn(conv.filters, generator=random)
    residual = torch.randn(conv.output_shape, generator=random)
    out = torch.full(conv.output_shape, 12345.0)
    func = winograd(conv, plan).with_attr("global_symbol", "main")
    main = tvm.compile(tvm.IRModule({"main": func}), target=target(hw or detect()))["main"]
    extra = [bias] * conv.bias + [residual] * conv.residual
    given_out = tvm.runtime.from_dlpack(out)
    main(*(tvm.runtime.from_dlpack(t) for t in (x, pack_weight(weight, plan), *extra)), given_out)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        top, bottom, left, right = conv.padding
        image = F.pad(x.to(dtype).permute(0, 3, 1, 2), (left, right, top, bottom))
        y = F.conv2d(image, weight.to(dtype), bias.to(dtype) if conv.bias else None).permute(0, 2, 3, 1)
        y = y + residual.to(dtype) if conv.residual else y
        return {"none": lambda t: t, "relu": F.relu, "silu": F.silu}[conv.activation](y)

    return torch.from_numpy(given_out.numpy()), reference(torch.float64), reference(torch.float32)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@st.composite
def problems(draw: st.DrawFn) -> Conv:
    """3 x 3 convolutions in whole vectors of channels."""
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    size = [draw(st.integers(max(1, 3 - padding[2 * i] - padding[2 * i + 1]), 13)) for i in (0, 1)]
    return Conv(
        draw(st.integers(1, 3)),
        size[0],
        size[1],
        16 * draw(st.integers(1, 3)),
        16 * draw(st.integers(1, 5)),
        (3, 3),
        padding=padding,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(["none", "relu", "silu"])),
    )


@given(problems(), st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_size_and_every_plan(conv: Conv, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(plans(conv, detect())))
    got, wanted, _ = run(conv, plan)
    # 4 times eager's bound on a sum of 9 C terms would pass; sums of this length err by some 4e-7.
    assert relative(got, wanted) < 2e-6, (conv, plan)


@pytest.mark.parametrize("m", sorted(PAIRS))
@pytest.mark.parametrize("channels", [32, 64, 256, 512])
def test_error_is_as_predicted_and_within_four_times_eagers(m: int, channels: int) -> None:
    conv = Conv(1, 14, 14, channels, 32, (3, 3), padding=(1, 1, 1, 1))
    plan = next(p for p in plans(conv, detect()) if p.m == m)
    got, wanted, eager = run(conv, plan)
    error = relative(got, wanted)
    assert error < 4 * relative(eager, wanted)
    assert 0.75 < error / relative_error(PAIRS[m], channels) < 1.25  # the fit, and one sample of 6272 outputs


def test_refused_where_it_would_round_too_much() -> None:
    def tiles(channels: int) -> set[int]:
        conv = Conv(1, 56, 56, channels, 64, (3, 3), padding=(1, 1, 1, 1))
        return {plan.m for plan in plans(conv, plain(detect(), vector_bits=256))}

    assert tiles(64) == {2, 4}
    assert tiles(16) == {2}  # the roundings of the transforms are not lost among those of few channels
    assert tiles(80_000) == {2}
    assert refusal(PAIRS[4], 64) is None
    assert refusal((0.5, 1.0, 2.0), 64) == "it rounds 7.4 times as much as the direct sum"  # F(6x6)
    assert refusal((1.0, 2.0), 64) == "it rounds 3.9 times as much as the direct sum"  # the usual points of F(4x4)
    assert "its error over 80000 channels is 3e-05" in str(refusal(PAIRS[4], 80_000))


@pytest.mark.parametrize("m", sorted(PAIRS))
def test_the_algebra_is_exact_in_rational_numbers(m: int) -> None:
    """Sums over points reproduce the correlation of n inputs with 3 taps, in float64 to rounding."""
    random = torch.Generator().manual_seed(m)
    d = torch.randn(m + 2, dtype=torch.float64, generator=random)
    w = torch.randn(3, dtype=torch.float64, generator=random)
    points = [0.0, *(s * p for p in PAIRS[m] for s in (1.0, -1.0))]
    # B^T d by its definition: coefficients of the product of (x - q) over the other points.
    values = []
    for i in range(len(points) + 1):
        polynomial = torch.ones(1, dtype=torch.float64)
        for q in points[:i] + points[i + 1 :]:
            padded = torch.zeros(len(polynomial) + 1, dtype=torch.float64)
            padded[1:] += polynomial
            padded[:-1] -= q * polynomial
            polynomial = padded
        values.append(float((polynomial * d[: len(polynomial)]).sum()))
    products = torch.tensor(values, dtype=torch.float64) * (filter_matrix(m) @ w)
    outputs = [
        sum(p**k * v for p, v in zip(points, products.tolist(), strict=False))
        + (products[-1].item() if k == m - 1 else 0.0)
        for k in range(m)
    ]
    wanted = [float((d[k : k + 3] * w).sum()) for k in range(m)]
    torch.testing.assert_close(torch.tensor(outputs), torch.tensor(wanted))


def test_chosen_where_it_pays() -> None:
    hw = plain(detect(), cores=2)

    def algorithm(**changes: object) -> str:
        problem = {"batch": 1, "size": (56, 56), "channels": 64, "filters": 64, "kernel": (3, 3)}
        call = conv_case(**{**problem, "padding": (1, 1, 1, 1), **changes}).lower(hw)
        assert isinstance(call, KernelCall)
        return call.algorithm

    assert algorithm() == "winograd conv"
    assert algorithm(size=(28, 28), channels=128, filters=128) == "winograd conv"
    assert algorithm(stride=(2, 2)) == "direct conv"
    assert algorithm(dilation=(2, 2)) == "direct conv"
    assert algorithm(groups=2) == "direct conv"
    assert algorithm(filters=60) == "direct conv"
    assert algorithm(kernel=(5, 5)) == "direct conv"
    # One tile of 4 x 4: its weights, four times as large, would not be reused.
    assert algorithm(size=(4, 4), channels=512, filters=512) == "direct conv"


@pytest.mark.parametrize("machine", ["x86-64-v4", "raspberry-pi-4"])
def test_compiles_for_other_machines(machine: str) -> None:
    hw = lookup(machine)
    conv = Conv(1, 28, 28, 64, 64, (3, 3), padding=(1, 1, 1, 1), bias=True)
    plan = choose_winograd(conv, hw)
    assert plan is not None
    assert plan.rows * plan.vectors + plan.vectors + 1 <= hw.vector_registers
    call = KernelCall(winograd(conv, plan), (), "winograd conv", plan.reason, None)
    assert compile_kernel(call, hw).mod.inspect_source("asm")
