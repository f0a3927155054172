"""Convolutions whose windows are wide: over a padded copy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conv_harness import check_conv, conv_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright
from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.conv_staged import wants_staging
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import detect


def test_when_the_tiles_differ() -> None:
    wide = Conv(1, 1, 50, 768, 768, (1, 128), padding=(0, 0, 64, 63), groups=16)
    assert wants_staging(wide)
    assert not wants_staging(dataclasses.replace(wide, padding=(0, 0, 0, 0), width=177)), "no border, no difference"
    for size in (3, 7, 11):
        half = size // 2
        assert not wants_staging(Conv(1, 56, 56, 64, 64, (size, size), padding=(half,) * 4))


def test_the_report_says_so() -> None:
    call = conv_case(1, (1, 50), 32, 32, (1, 96), padding=(0, 0, 48, 47), groups=2).lower(detect())
    assert isinstance(call, KernelCall)
    assert call.algorithm == "staged conv"


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_one_wide_window(groups: int, activation: str) -> None:
    check_conv(
        batch=2,
        size=(1, 49),
        channels=24,
        filters=40,
        kernel=(1, 100),
        padding=(0, 0, 50, 50),
        groups=groups,
        bias=True,
        residual=True,
        activation=activation,
    )


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_wide_window(data: st.DataObject) -> None:
    draw = data.draw
    taps, stride, dilation = draw(st.integers(40, 90)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 3]))
    check_conv(
        batch=draw(st.integers(1, 2)),
        size=(draw(st.integers(3, 4)), draw(st.integers(50, 70))),
        channels=groups * draw(st.integers(1, 9)),
        filters=groups * draw(st.integers(1, 12)),
        kernel=(draw(st.integers(1, 3)), taps),
        padding=(draw(st.integers(0, 1)), 2, draw(st.integers(70, 90)), draw(st.integers(70, 90))),
        stride=(1, stride),
        dilation=(1, dilation),
        groups=groups,
        bias=draw(st.booleans()),
    )


def test_a_positional_convolution() -> None:
    """wav2vec2's, through the whole compiler."""
    model = nn.Sequential(nn.Conv1d(32, 32, 128, padding=64, groups=4), nn.GELU()).eval()
    x = torch.randn(1, 32, 49)
    compiled = graphwright.compile(model, (x,), cache=False)
    assert "staged conv" in [kernel.algorithm for kernel in compiled.report().kernels]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-6)  # 1024 terms in another order
