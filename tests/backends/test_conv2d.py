"""Direct and pointwise convolution: any geometry against float64, epilogues, refusals, registers."""

from __future__ import annotations

import re

import pytest
import torch
from conv_harness import check_conv, compile_kernel, conv_case, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.kernels.conv_plan import Conv, choose_plan, pack_weight
from graphwright.backends.kernels.window import Axis, balanced, runs
from graphwright.backends.lowering.registry import KernelCall, Refusal
from graphwright.hwdb import detect, lookup

RESNET = {
    "batch": 1,
    "size": (14, 14),
    "channels": 64,
    "filters": 64,
    "kernel": (3, 3),
    "padding": (1, 1, 1, 1),
}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Convolutions whose output is not empty: small sizes, every kind of border."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    size = []
    for i in (0, 1):
        reach = dilation[i] * (kernel[i] - 1) + 1
        least = max(1, reach - padding[2 * i] - padding[2 * i + 1])
        size.append(draw(st.sampled_from([least, least + 1, least + 6, 13, 23]).filter(lambda n, m=least: n >= m)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    return {
        "batch": draw(st.sampled_from([1, 1, 2, 3])),
        "size": tuple(size),
        "channels": groups * draw(st.sampled_from([1, 2, 3, 7, 16])),
        "filters": groups * draw(st.sampled_from([1, 3, 8, 13, 24, 40, 67])),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 6), st.integers(1, 4))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "relu", "relu6", "silu"])),
    }


@given(problems())
@settings(max_examples=18, deadline=None, derandomize=True)
def test_any_geometry(problem: dict[str, object]) -> None:
    check_conv(**problem)


@pytest.mark.parametrize(
    "problem",
    [
        RESNET,
        {**RESNET, "size": (7, 7), "channels": 32, "filters": 80},
        {**RESNET, "stride": (2, 2), "filters": 72},
        {**RESNET, "kernel": (1, 1), "padding": (0, 0, 0, 0), "filters": 100},
        {**RESNET, "kernel": (1, 1), "padding": (0, 0, 0, 0), "stride": (2, 2)},
        {
            **RESNET,
            "size": (30, 31),
            "channels": 3,
            "kernel": (7, 7),
            "padding": (3, 3, 3, 3),
            "stride": (2, 2),
        },
        {**RESNET, "groups": 16},  # four channels a group: two groups share a vector
        {**RESNET, "batch": 4, "size": (1, 1), "padding": (1, 1, 1, 1)},
    ],
    ids=lambda p: "x".join(str(v) for v in (*p["size"], p["channels"], p["filters"], *p["kernel"])),
)
def test_layers_of_real_networks(problem: dict[str, object]) -> None:
    check_conv(**problem, bias=True, residual=True, activation="relu")


@pytest.mark.parametrize(
    ("activation", "args"),
    [
        ("gelu", ()),
        ("gelu_tanh", ()),
        ("hardswish", ()),
        ("hardsigmoid", ()),
        ("sigmoid", ()),
        ("tanh", ()),
        ("clamp", (-0.5, 1.5)),
        ("leaky_relu", (0.1,)),
        ("swish", (1.702,)),
    ],
)
def test_activations(activation: str, args: tuple[float, ...]) -> None:
    small = {"batch": 1, "size": (5, 9), "channels": 4, "filters": 11, "kernel": (3, 3)}
    check_conv(**small, padding=(1, 1, 1, 1), bias=True, activation=activation, args=args)


def test_nan_and_infinity_stay_where_torch_puts_them() -> None:
    """Padding is not multiplied: an infinite weight must not meet a zero that is not in the image."""
    case = conv_case(1, (6, 6), 3, 8, (3, 3), padding=(1, 1, 1, 1), activation="relu")
    x, weight = case.tensors[:2]
    assert x is not None
    assert weight is not None
    x[0, 2, 2, 1] = float("nan")
    x[0, 5, 5, 0] = float("inf")
    got, wanted = case.run(detect()), case.reference()
    torch.testing.assert_close(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got.isinf(), wanted.isinf())


@pytest.mark.parametrize(
    ("problem", "because"),
    [
        ({"layout": "NCHW"}, "layout is NCHW"),
        ({"batch": 0}, "no elements"),
    ],
)
def test_refusals(problem: dict[str, object], because: str) -> None:
    refusal = conv_case(**{**RESNET, **problem}).lower(detect())
    assert isinstance(refusal, Refusal)
    assert because in refusal.reason


def test_a_computed_weight_of_few_pixels_is_refused() -> None:
    for width, refused in ((7, True), (8, False)):
        case = conv_case(**{**RESNET, "size": (1, width)})
        case.node.args[1].op = "placeholder"
        answer = case.lower(detect())
        assert isinstance(answer, Refusal) is refused
        if isinstance(answer, Refusal):
            assert "computed" in answer.reason


def test_algorithms_are_named() -> None:
    def algorithm(**changes: object) -> str:
        call = conv_case(**{**RESNET, **changes}).lower(detect())
        assert isinstance(call, KernelCall)
        return call.algorithm

    assert algorithm(stride=(2, 2)) == "direct conv"
    assert algorithm(channels=3) == "stem conv"
    assert algorithm(kernel=(1, 1), padding=(0, 0, 0, 0)) == "pointwise conv"
    assert algorithm(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2)) == "direct conv"
    assert algorithm(groups=64) == "depthwise conv"


@pytest.mark.parametrize("registers", [16, 32])
def test_packed_weight_holds_every_filter_once(registers: int) -> None:
    hw = plain(detect(), vector_registers=registers)
    for filters, groups in ((64, 1), (67, 1), (24, 8), (13, 1), (200, 2)):
        conv = Conv(1, 14, 14, 4 * groups, filters, (3, 3), padding=(1, 1, 1, 1), groups=groups)
        plan = choose_plan(conv, hw)
        weight = torch.arange(1, 1 + filters * 4 * 9, dtype=torch.float32).reshape(filters, 4, 3, 3)
        packed = pack_weight(weight, conv, plan)
        assert packed.ndim == 1
        values = packed[packed != 0]
        assert sorted(values.tolist()) == sorted(weight.flatten().tolist())
        accumulators = plan.pixels * plan.vectors
        assert accumulators + plan.vectors + 1 <= registers


def hot_loops(assembly: str, fma: str, vector: str, stack: str) -> list[tuple[int, int]]:
    """The innermost loops that multiply-add: (multiply-adds, vector moves to or from the stack)."""
    lines = assembly.split("\n")
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"^(\.L\w+):", line))}
    found = []
    for i, line in enumerate(lines):
        jump = re.match(r"^\t(?:j\w+|b\.\w+|cbn?z\t\w+,|tbn?z.*,)\s*(\.L\w+)", line)
        if not jump or labels.get(jump.group(1), i) >= i:
            continue
        body = lines[labels[jump.group(1)] + 1 : i]
        if any(re.match(r"^\.L\w+:", b) for b in body):
            continue
        multiplies = sum(fma in b for b in body)
        if multiplies:
            found.append((multiplies, sum(bool(re.search(vector, b)) and stack in b for b in body)))
    return found


@pytest.mark.parametrize(
    ("machine", "registers", "fma", "vector", "stack"),
    [
        ("x86-64-v3", 16, "vfmadd", r"%ymm", "(%rsp)"),
        ("x86-64-v4", 32, "vfmadd", r"%zmm", "(%rsp)"),
        ("raspberry-pi-4", 32, "fmla", r"\bq\d+", "[sp"),
    ],
)
def test_accumulators_stay_in_registers(machine: str, registers: int, fma: str, vector: str, stack: str) -> None:
    hw = lookup(machine)
    assert hw.vector_registers == registers
    strided = {"stride": (2, 2), "padding": (1, 1, 1, 1), "bias": True, "activation": "relu"}
    call = conv_case(1, (56, 56), 64, 64, (3, 3), **strided).lower(hw)
    assert isinstance(call, KernelCall)
    loops = hot_loops(compile_kernel(call, hw).mod.inspect_source("asm"), fma, vector, stack)
    assert loops
    # A loop that kept its accumulators in memory would load and store each of them for every multiply-add.
    assert all(spills * 8 <= multiplies for multiplies, spills in loops), loops
    assert max(multiplies for multiplies, _ in loops) >= registers // 2


def test_taps_agree_with_a_scan_of_every_window() -> None:
    for axis in (
        Axis(7, 7, 3, 1, 1),
        Axis(9, 4, 5, 2, 2, 2),
        Axis(3, 6, 4, 1, 4, 1),
        Axis(1, 1, 3, 1, 1),
        Axis(20, 3, 3, 8, 0),
        Axis(2, 9, 2, 1, 5, 2),
    ):
        for position in range(axis.out):
            reads = [t for t in range(axis.kernel) if 0 <= axis.first(position) + t * axis.dilation < axis.size]
            low, high = axis.taps(position)
            assert list(range(low, high)) == reads, (axis, position)
        for pixels in (1, 2, 3, 6):
            covered = []
            for run in runs(axis, pixels):
                for i in range(run.count):
                    start = run.start + i * run.pixels
                    covered += range(start, start + run.pixels)
                    for p in range(run.pixels):
                        low, high = axis.taps(start + p)
                        valid = [t for t, (a, b) in enumerate(run.valid) if a <= p < b]
                        assert valid == list(range(low, high))
                joined = [t for s in run.spans for t in range(s.tap, s.tap + s.taps)]
                assert joined == [t for t, (a, b) in enumerate(run.valid) if b > a]
            assert covered == list(range(axis.out))


@given(st.integers(1, 500), st.integers(1, 40))
def test_balanced_pieces(total: int, most: int) -> None:
    pieces = balanced(total, most)
    assert sum(pieces) == total
    assert max(pieces) <= most
    assert max(pieces) - min(pieces) <= 1
    assert len(pieces) == -(-total // most)
