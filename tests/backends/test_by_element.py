"""Products that read the left operand by vectors of k: any rest of k, against float64; and the code for 64-bit Arm.

The way of 64-bit Arm is taken here with this machine's vectors: the loop nest is the same.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from conv_harness import check_conv
from kernel_harness import UNIT, Constant, compile_kernel, inner_loops, run_kernel
from narrow_harness import run

from graphwright.backends.kernels.bf16_matmul import FloatFinish, bf16_matmul, pack_weight
from graphwright.backends.kernels.conv2d import conv2d
from graphwright.backends.kernels.conv_plan import Conv, choose_plan
from graphwright.backends.kernels.dot_product import bf16_weights, choose_dot_tiling, int8_dot
from graphwright.backends.kernels.int8_product import Requantize, int8_matmul
from graphwright.backends.kernels.matmul import matmul
from graphwright.backends.lowering import kernels_pairs  # noqa: F401  (fills KERNELS)
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect, dialect_pairs

sdpa, pair = torch.ops.aten.scaled_dot_product_attention.default, dialect_pairs.conv_depthwise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Assert that `got` is a . b up to n u sum |a||b| (Higham, Accuracy and Stability, section 4.2)."""
    a, b = a.double(), b.double()
    assert torch.all((got.double() - a @ b).abs() <= (a.shape[-1] + 2) * UNIT * (a.abs() @ b.abs()))


class ByElement(Hardware):
    """A machine one lane of whose registers may be a factor."""

    multiplies_by_element = True


def here() -> Hardware:
    """This machine, taken for one that multiplies by element."""
    machine = detect()
    return ByElement(**{field.name: getattr(machine, field.name) for field in dataclasses.fields(machine)})


@pytest.mark.parametrize(("M", "K", "N"), [(1, 9, 40), (7, 8, 17), (13, 31, 64), (40, 800, 30), (5, 3, 9), (4, 16, 1)])
def test_linear(M: int, K: int, N: int) -> None:
    x, w = random(M, K), random(N, K, seed=1)
    check(run_kernel(here(), dialect.linear, x, Constant(w), None, None, "none", []), x, w.t())


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("K", [5, 8, 33])
def test_batched(K: int, transpose_a: bool) -> None:
    a, b = random(3, 10, K), random(3, K, 26, seed=1)
    left = a.mT.contiguous() if transpose_a else a
    got = run_kernel(here(), dialect.matmul, left, b, None, None, transpose_a, False, "none", [])
    check(got, a, b)


@pytest.mark.parametrize(
    "problem",
    [
        {"batch": 1, "size": (9, 11), "channels": 3, "filters": 24, "kernel": (7, 7), "stride": (2, 2)},
        {"batch": 2, "size": (6, 7), "channels": 20, "filters": 10, "kernel": (3, 3), "dilation": (1, 2)},
        {"batch": 1, "size": (5, 5), "channels": 8, "filters": 40, "kernel": (1, 1), "stride": (2, 2)},
        {"batch": 1, "size": (6, 6), "channels": 18, "filters": 12, "kernel": (3, 1), "groups": 2},
        {"batch": 1, "size": (12, 13), "channels": 16, "filters": 32, "kernel": (3, 3), "bias": True},  # Winograd
    ],
)
def test_convolutions(problem: dict[str, object]) -> None:
    check_conv(here(), padding=(1, 0, 2, 1), **problem)


@pytest.mark.parametrize(("channels", "kernel", "layout"), [(21, 1, "NHWC"), (8, 3, "NHWC"), (10, 3, "NCHW")])
def test_convolution_with_the_depthwise_one_behind_it(channels: int, kernel: int, layout: str) -> None:
    shape = (9, 8, channels) if layout == "NHWC" else (channels, 9, 8)
    x, first, second = random(1, *shape), random(40, channels, kernel, kernel, seed=1), random(40, 1, 3, 3, seed=2)
    plain = ([1, 1], [0, 0, 0, 0], [1, 1], "none", [])
    rest = (None, [1, 1], [1, 1, 1, 1], [1, 1], "none", [], layout)
    got = run_kernel(here(), pair, x, Constant(first), None, *plain, Constant(second), *rest)
    wanted = pair(x.double(), first.double(), None, *plain, second.double(), *rest)
    sizes = pair(x.double().abs(), first.double().abs(), None, *plain, second.double().abs(), *rest)
    assert torch.all((got.double() - wanted).abs() <= (first[0].numel() + 12) * UNIT * sizes)


def test_attention() -> None:
    q, k, v = random(1, 2, 9, 20), random(1, 2, 21, 20, seed=1), random(1, 2, 21, 12, seed=2)
    wanted = sdpa(q.double(), k.double(), v.double())
    torch.testing.assert_close(run_kernel(here(), sdpa, q, k, v).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", [31, 64])
def test_weights_of_half_the_bytes(K: int) -> None:
    hw, M, N = here(), 6, 40
    x, w = random(M, K), random(N, K, seed=1).bfloat16().float()
    dot = bf16_weights(hw)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    out = torch.zeros(M, N)
    func = bf16_matmul(M, K, N, hw, FloatFinish(M, N), dot=dot, tiling=tiling)
    run(func, hw, x, pack_weight(w, dot, tiling.columns), out)
    check(out, x, w.t())


@pytest.mark.parametrize("name", ["raspberry-pi-4b", "raspberry-pi-5"])
def test_arm_reads_four_steps_at_once(name: str) -> None:
    """One load of a row serves four steps: no more than 4 instructions for 3 multiply-adds."""
    hw = lookup(name)
    conv = Conv(1, 14, 14, 128, 128, (3, 3), padding=(1, 1, 1, 1))
    for func in (matmul(196, 256, 128, hw), conv2d(conv, choose_plan(conv, hw))):
        densest = min(
            (loop for loop in inner_loops(func, hw) if loop.multiply_adds >= 16),
            key=lambda loop: len(instructions(loop.text)) / loop.multiply_adds,
        )
        assert densest.stack == 0
        assert len(instructions(densest.text)) <= 1.33 * densest.multiply_adds, densest.text
        assert len(re.findall(r"fmla\tv\d+\.4s, v\d+\.4s, v\d+\.s\[[0-3]\]", densest.text)) == densest.multiply_adds


def instructions(text: str) -> list[str]:
    """The lines of assembly that are instructions."""
    return [line for line in text.splitlines() if re.match(r"\t[a-z]", line)]


@pytest.mark.parametrize(
    ("name", "source", "instruction"), [("raspberry-pi-5", "int8", "sdot"), ("neoverse-v1", "uint8", "sudot")]
)
def test_bytes_of_four_words_are_read_at_once(name: str, source: str, instruction: str) -> None:
    """One load of a row serves four instructions of the form that takes its word from a lane."""
    hw = lookup(name)
    dot = int8_dot(hw)
    tiling = choose_dot_tiling(hw, dot, 64, 256, 256)
    func = int8_matmul(64, 256, 256, hw, source, Requantize(64, 256, "int8"), dot=dot, tiling=tiling)
    text = compile_kernel(func, hw).mod.inspect_source("asm")
    assert len(re.findall(rf"\t{instruction}\t.*\.4b\[[0-3]\]", text)) == len(re.findall(r"\t(?:s|u|su|us)dot\t", text))
    assert len(re.findall(rf"\t{instruction}\t", text)) >= 4 * tiling.rows
