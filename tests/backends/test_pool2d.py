"""Pooling in NHWC: torch's results to the last bit for max, to rounding for the mean."""

from __future__ import annotations

import math

import pytest
import torch
from conv_harness import Case, compile_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.lowering.registry import KernelCall, Refusal
from graphwright.hwdb import detect, lookup
from graphwright.passes import dialect


def image(batch: int, height: int, width: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int], list[int], bool]:
    """(x, kernel, stride, padding, ceil_mode) as torch admits them: padding at most half the kernel."""
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    stride = [draw(st.integers(1, 6)) for _ in range(2)]
    across = [draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = draw(st.booleans())
    padding = [across[0], across[0], across[1], across[1]]
    if not ceil_mode and draw(st.booleans()):
        padding = [draw(st.integers(0, k // 2)) for k in kernel for _ in range(2)]
    size = [max(1, kernel[i] - padding[2 * i] - padding[2 * i + 1]) + draw(st.integers(0, 12)) for i in (0, 1)]
    channels = draw(st.sampled_from([1, 3, 8, 13, 32]))
    return image(draw(st.integers(1, 3)), *size, channels), kernel, stride, padding, ceil_mode


@given(geometries(), st.integers(1, 2))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_max_of_any_geometry(
    geometry: tuple[torch.Tensor, list[int], list[int], list[int], bool], dilation: int
) -> None:
    x, kernel, stride, padding, ceil_mode = geometry
    if any(x.shape[1 + i] + sum(padding[2 * i : 2 * i + 2]) <= dilation * (kernel[i] - 1) for i in (0, 1)):
        dilation = 1
    case = Case(dialect.max_pool2d, (x,), (kernel, stride, padding, [dilation, dilation], ceil_mode, "NHWC"))
    torch.testing.assert_close(case.run(detect()).double(), case.reference(), atol=0, rtol=0)


@given(geometries(), st.booleans(), st.sampled_from([None, None, 3]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_mean_of_any_geometry(
    geometry: tuple[torch.Tensor, list[int], list[int], list[int], bool],
    count_include_pad: bool,
    divisor: int | None,
) -> None:
    x, kernel, stride, padding, ceil_mode = geometry
    if not count_include_pad:
        padding = [padding[0], padding[0], padding[2], padding[2]]
        if any(x.shape[1 + i] + 2 * padding[2 * i] < kernel[i] for i in (0, 1)):
            return
    options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor, "NHWC")
    case = Case(dialect.avg_pool2d, (x,), options)
    # 25 terms at most, one rounding each, of a magnitude at most their largest
    torch.testing.assert_close(case.run(detect()).double(), case.reference(), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values_as_torch_has_them(special: float) -> None:
    x = image(1, 9, 9, 16)
    for place in ((0, 0, 0), (4, 4, 3), (8, 8, 15), (4, 5, 3)):
        x[(0, *place)] = special
    case = Case(dialect.max_pool2d, (x,), ([3, 3], [2, 2], [1, 1, 1, 1], [1, 1], False, "NHWC"))
    torch.testing.assert_close(case.run(detect()).double(), case.reference(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_survives_the_taps_after_it(sign: float) -> None:
    """Nine windows, the NaN at another tap in each."""
    x = image(1, 3, 27, 8)
    for tap in range(9):
        x[0, tap // 3, 3 * tap + tap % 3] = math.copysign(math.nan, sign)
    case = Case(dialect.max_pool2d, (x,), ([3, 3], [1, 3], [0] * 4, [1, 1], False, "NHWC"))
    assert case.run(detect()).isnan().all()


@pytest.mark.parametrize("size", [(7, 7), (56, 3)])
def test_global_mean(size: tuple[int, int]) -> None:
    x = image(2, *size, 72)
    case = Case(dialect.avg_pool2d, (x,), (list(size), list(size), [0] * 4, False, True, None, "NHWC"))
    torch.testing.assert_close(case.run(detect()).double(), case.reference(), rtol=1e-5, atol=2e-6)


def test_refuses_nchw() -> None:
    case = Case(dialect.max_pool2d, (image(1, 8, 8, 8),), ([2, 2], [2, 2], [0] * 4, [1, 1], False, "NCHW"))
    refusal = case.lower(detect())
    assert isinstance(refusal, Refusal)
    assert "layout" in refusal.reason


@pytest.mark.parametrize("machine", ["x86-64-v4", "raspberry-pi-4"])
def test_compiles_for_other_machines(machine: str) -> None:
    hw = lookup(machine)
    options = ([3, 3], [2, 2], [1, 1, 1, 1], [1, 1], False, "NHWC")
    call = Case(dialect.max_pool2d, (image(1, 28, 28, 64),), options).lower(hw)
    assert isinstance(call, KernelCall)
    assert compile_kernel(call, hw).mod.inspect_source("asm")
