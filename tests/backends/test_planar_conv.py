"""Convolutions that read NCHW and write NHWC: numbers against torch in float64, and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from kernel_harness import Constant, refusal, run_kernel
from lowering_harness import check

from graphwright.backends.lowering import kernels_planar  # noqa: F401  (fills KERNELS)
from graphwright.hwdb import detect
from graphwright.passes.dialect_planar import planar_conv2d


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_window(data: st.DataObject) -> None:
    draw = data.draw
    batch, channels, filters = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.sampled_from([3, 8, 24, 40]))
    height, width = draw(st.integers(5, 13)), draw(st.integers(5, 20))
    taps = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 1 + (max(taps) < 3)))
    padding = [draw(st.integers(0, 2)) for _ in range(4)]
    x, weight = torch.randn(batch, channels, height, width), torch.randn(filters, channels, *taps)
    bias = torch.randn(filters) if draw(st.booleans()) else None
    top, bottom, left, right = padding
    wide = F.pad(x.double(), (left, right, top, bottom))
    want = F.conv2d(wide, weight.double(), None if bias is None else bias.double(), stride, 0, dilation)
    want = want.permute(0, 2, 3, 1).relu()
    args = (bias, None, [stride] * 2, padding, [dilation] * 2, "relu", [])
    got = run_kernel(detect(), planar_conv2d, x, Constant(weight), *args)
    # At most 125 products are added up, each rounded once: far below 1e-5 of the size of what is added up.
    scale = F.conv2d(wide.abs(), weight.double().abs(), None, stride, 0, dilation).max() + 1
    assert (got.double() - want).abs().max() <= 1e-5 * scale


def test_refused() -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    rest = (None, None, [1, 1], [0] * 4, [1, 1], "none", [])
    assert "computed" in refusal(detect(), planar_conv2d, x, w, *rest)
    assert "float64" in refusal(detect(), planar_conv2d, x.double(), Constant(w.double()), *rest)


def test_the_definition_in_plain_expressions() -> None:
    x, w = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    check(planar_conv2d, x, w, torch.randn(4), torch.randn(2, 6, 5, 4), [1, 1], [1] * 4, [1, 1], "relu", [])
