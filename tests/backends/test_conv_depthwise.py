"""A convolution and the depthwise one behind it in one kernel: any geometry against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conv_harness import UNIT
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Constant, inner_loops, kernel_of, refusal, run_kernel

from graphwright.backends.lowering import kernels_pairs  # noqa: F401  (fills KERNELS)
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect, dialect_pairs

pair = dialect_pairs.conv_depthwise
Geometry = tuple[tuple[int, int], tuple[int, ...], tuple[int, int]]  # stride, padding, dilation
PLAIN: Geometry = ((1, 1), (0, 0, 0, 0), (1, 1))


def operands(
    batch: int,
    size: tuple[int, int],
    channels: int,
    hidden: int,
    first_kernel: tuple[int, int] = (1, 1),
    second_kernel: tuple[int, int] = (3, 3),
    first: Geometry = PLAIN,
    second: Geometry = ((1, 1), (1, 1, 1, 1), (1, 1)),
    activations: tuple[str, str] = ("relu6", "relu6"),
    biases: tuple[bool, bool] = (True, True),
    layout: str = "NHWC",
) -> list[object]:
    """The operator's arguments."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    shape = (*size, channels) if layout == "NHWC" else (channels, *size)
    arguments: list[object] = [normal(batch, *shape)]
    for filters, depth, kernel, geometry, activation, bias in (
        (hidden, channels, first_kernel, first, activations[0], biases[0]),
        (hidden, 1, second_kernel, second, activations[1], biases[1]),
    ):
        arguments += [Constant(normal(filters, depth, *kernel)), Constant(normal(filters)) if bias else None]
        arguments += [*map(list, geometry), activation, []]
    return [*arguments, layout]


def check(hw: Hardware, arguments: list[object]) -> None:
    """Assert that the error is within what float32 sums of that length can have, the second on top of the first's."""
    got = run_kernel(hw, pair, *arguments).double()
    wide = [a.tensor if isinstance(a, Constant) else a for a in arguments]
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in wide]
    wanted = pair(*wide)
    sizes = [a.abs() if isinstance(a, torch.Tensor) else a for a in wide]
    sizes[6] = sizes[13] = "none"
    terms = wide[1][0].numel() + wide[8][0].numel() + 4
    # As in conv_harness: n * unit * sum |x||w|, steeper activations than 1 at most 1.13 each.
    allowed = 1.4 * terms * UNIT * pair(*sizes) + 1e-6 * wanted.abs() + 1e-6
    worst = ((got - wanted).abs() / allowed).max().item()
    assert worst <= 1.0, f"error is {worst:.2f} of the bound"


@st.composite
def problems(draw: st.DrawFn) -> list[object]:
    """Pairs whose results are not empty; the first 1x1 or a window."""
    pointwise = draw(st.booleans())
    size, geometry, kernels = [0, 0], [], []

    def axis(least: int, kernel: int) -> tuple[int, int, int, int]:
        dilation, before, after = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
        while least + before + after < dilation * (kernel - 1) + 1:
            after += 1
        return draw(st.integers(1, 4)), before, after, dilation

    size = [draw(st.integers(1, 24)) for _ in range(2)]
    between = list(size)
    for part in range(2):
        if part == 0 and pointwise:
            geometry.append(PLAIN)
            kernels.append((1, 1))
            continue
        kernel = [draw(st.integers(1, 5)) for _ in range(2)]
        rows, columns = (axis(between[i], kernel[i]) for i in (0, 1))
        for i, (stride, before, after, dilation) in enumerate((rows, columns)):
            between[i] = (between[i] + before + after - dilation * (kernel[i] - 1) - 1) // stride + 1
        padding = (rows[1], rows[2], columns[1], columns[2])
        geometry.append(((rows[0], columns[0]), padding, (rows[3], columns[3])))
        kernels.append((kernel[0], kernel[1]))
    return operands(
        draw(st.sampled_from([1, 1, 3])),
        (size[0], size[1]),
        draw(st.sampled_from([1, 3, 5, 17])),
        draw(st.sampled_from([2, 8, 13, 40, 64])),
        kernels[0],
        kernels[1],
        geometry[0],
        geometry[1],
        (draw(st.sampled_from(["none", "relu6", "silu", "sigmoid"])), draw(st.sampled_from(["none", "relu6", "silu"]))),
        (draw(st.booleans()), draw(st.booleans())),
        "NHWC" if pointwise else draw(st.sampled_from(["NHWC", "NCHW"])),
    )


@given(problems())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_geometry(arguments: list[object]) -> None:
    check(detect(), arguments)


@pytest.mark.parametrize(
    ("size", "channels", "hidden", "kernel", "stride"),
    [(28, 24, 144, 3, 1), (29, 16, 96, 3, 2), (14, 40, 240, 5, 2), (7, 160, 960, 3, 1), (14, 24, 48, 7, 1)],
)
def test_layers_of_real_networks(size: int, channels: int, hidden: int, kernel: int, stride: int) -> None:
    """Several blocks of rows, rows kept between them, panels shared out."""
    second = ((stride, stride), (kernel // 2,) * 4, (1, 1))
    check(detect(), operands(1, (size, size), channels, hidden, second_kernel=(kernel, kernel), second=second))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_stem(layout: str) -> None:
    stem = ((2, 2), (1, 1, 1, 1), (1, 1))
    check(detect(), operands(2, (41, 46), 3, 32, first_kernel=(3, 3), first=stem, layout=layout))


def test_one_panel_is_shared_out_by_rows() -> None:
    """The rows under the common border are computed by both."""
    arguments = operands(1, (64, 64), 64, 8)
    call = kernel_of(detect(), pair, *arguments)
    assert isinstance(call, KernelCall)
    assert "2 row" in call.choice or detect().cores == 1
    check(detect(), arguments)


def test_a_scratch_of_many_blocks() -> None:
    """A small L1 and L2: one output row at a time."""
    hw = detect()
    caches = tuple(dataclasses.replace(c, size_bytes=4096) for c in hw.caches)
    check(dataclasses.replace(hw, caches=caches), operands(1, (17, 19), 8, 24))


def test_refuses_what_the_pass_does_not_make() -> None:
    arguments = operands(1, (9, 9), 8, 16)
    arguments[1] = arguments[1].tensor  # type: ignore[attr-defined]
    assert "computed" in refusal(detect(), pair, *arguments)


@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64-v4", "raspberry-pi-4"])
def test_accumulators_stay_in_registers(machine: str) -> None:
    hw = lookup(machine)
    call = kernel_of(hw, pair, *operands(1, (28, 28), 64, 96))
    assert isinstance(call, KernelCall)
    # A whole depthwise window is one stretch of code, in which LLVM may set a value or two aside.
    assert all(16 * loop.stack <= loop.multiply_adds for loop in inner_loops(call.func, hw))


def test_the_operator_means_both() -> None:
    arguments = [a.tensor if isinstance(a, Constant) else a for a in operands(2, (9, 8), 4, 6, biases=(True, False))]
    x, w, b, s, p, d, a, g, w2, b2, s2, p2, d2, a2, g2, _ = arguments
    hidden = dialect.conv2d(x, w, b, None, s, p, d, 1, a, g, "NHWC")
    wanted = dialect.conv2d(hidden, w2, b2, None, s2, p2, d2, 6, a2, g2, "NHWC")
    torch.testing.assert_close(pair(*arguments), wanted, rtol=0, atol=0)
