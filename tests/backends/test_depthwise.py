"""Depthwise convolution: any geometry against float64, epilogues, and the shape of the nest."""

from __future__ import annotations

import pytest
from conv_harness import check_conv, compile_kernel, conv_case
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.kernels.sweep import Windows, choose_sweep
from graphwright.backends.kernels.window import Axis
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import detect, lookup


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Depthwise convolutions whose output is not empty."""
    channels = draw(st.sampled_from([2, 3, 5, 8, 11, 16, 37, 64]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    size = []
    for i in (0, 1):
        reach = dilation[i] * (kernel[i] - 1) + 1
        least = max(1, reach - padding[2 * i] - padding[2 * i + 1])
        size.append(least + draw(st.sampled_from([0, 1, 6, 17])))
    return {
        "batch": draw(st.sampled_from([1, 1, 3])),
        "size": tuple(size),
        "channels": channels,
        "filters": channels,
        "groups": channels,
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 6), st.integers(1, 4))),
        "padding": padding,
        "dilation": dilation,
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "relu6", "silu"])),
    }


@given(problems())
@settings(max_examples=14, deadline=None, derandomize=True)
def test_any_geometry(problem: dict[str, object]) -> None:
    check_conv(**problem)


@pytest.mark.parametrize(
    ("channels", "size", "stride", "kernel"),
    [(144, 28, 1, 3), (96, 29, 2, 3), (960, 7, 1, 3), (40, 30, 1, 7), (16, 40, 1, 23)],
)
def test_layers_of_real_networks(channels: int, size: int, stride: int, kernel: int) -> None:
    """Large enough to be divided among cores; the last has more taps than are unrolled."""
    check_conv(
        batch=1,
        size=(size, size),
        channels=channels,
        filters=channels,
        groups=channels,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        bias=True,
        activation="relu6",
    )


@pytest.mark.parametrize("multiplier", [2, 3])
def test_multipliers_go_to_the_grouped_kernel(multiplier: int) -> None:
    problem = {
        "batch": 1,
        "size": (6, 6),
        "channels": 8,
        "filters": 8 * multiplier,
        "groups": 8,
        "kernel": (3, 3),
    }
    call = conv_case(**problem).lower(detect())
    assert isinstance(call, KernelCall)
    assert call.algorithm == "direct conv"
    check_conv(**problem)


def test_every_core_has_work_where_there_is_enough() -> None:
    def tasks(height: int, channels: int, cores_of: str) -> int:
        axis = Axis(height, height, 3, 1, 1)
        return choose_sweep(Windows(1, axis, axis, channels), lookup(cores_of)).tasks

    cores = lookup("raspberry-pi-4").cores
    assert tasks(112, 32, "raspberry-pi-4") % cores == 0
    assert tasks(7, 960, "raspberry-pi-4") % cores == 0  # by channels: 7 rows do not divide
    assert tasks(2, 4, "raspberry-pi-4") == 1  # not worth a second thread


@pytest.mark.parametrize("machine", ["x86-64-v4", "raspberry-pi-4"])
def test_compiles_for_other_machines(machine: str) -> None:
    hw = lookup(machine)
    problem = {"batch": 1, "size": (28, 28), "channels": 96, "filters": 96, "groups": 96, "kernel": (3, 3)}
    call = conv_case(**problem, padding=(1, 1, 1, 1), bias=True, activation="relu6").lower(hw)
    assert isinstance(call, KernelCall)
    assembly = compile_kernel(call, hw).mod.inspect_source("asm")
    assert ("zmm" if machine == "x86-64-v4" else "fmla") in assembly
