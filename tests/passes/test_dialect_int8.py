"""The operators of 8 bits against the arithmetic they stand for; fake kernels against bodies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from graphwright.passes import dialect_int8
from graphwright.passes.dialect_int8 import dequantize, qconv2d, qlinear, quantize

CHECKS = ("test_schema", "test_faketensor")


def test_quantize_is_torch_s() -> None:
    x = torch.randn(50, 7) * 3
    steps = quantize(x, 0.04, 90, torch.uint8)
    # Both multiply by the inverse of the scale and round ties to the even step.
    assert torch.equal(dequantize(steps, 0.04, 90), torch.fake_quantize_per_tensor_affine(x, 0.04, 90, 0, 255))
    opcheck(quantize, (x, 0.04, 90, torch.uint8), test_utils=CHECKS)
    opcheck(dequantize, (steps, 0.04, 90), test_utils=CHECKS)


def test_values_beyond_the_range_are_clipped_and_nan_is_the_lowest() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30])
    assert quantize(x, 0.1, 3, torch.uint8).tolist() == [255, 0, 0, 255]
    assert quantize(x, 0.1, 3, torch.int8).tolist() == [127, -128, -128, 127]


@pytest.mark.parametrize("K", [5, 700])  # sums in float32, and beyond what float32 holds
def test_qlinear_is_its_integers(K: int) -> None:
    x = torch.randint(0, 256, (4, K), dtype=torch.uint8)
    w = torch.randint(-127, 128, (6, K), dtype=torch.int8)
    scale, bias = torch.rand(6) * 1e-3, torch.randn(6)
    sums = (x.long() - 11) @ w.long().t()
    real = (sums.double() * scale.double() + bias.double()).float().relu()
    args = (x, 11, w, scale, bias, None, 1.0, 0, "relu", [])
    assert torch.equal(qlinear(*args, 1.0, 0, None), real)
    assert torch.equal(qlinear(*args, 0.3, 9, torch.uint8), quantize(real, 0.3, 9, torch.uint8))
    opcheck(qlinear, (*args, 0.3, 9, torch.uint8), test_utils=CHECKS)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_qconv2d_is_a_convolution_of_steps(kernel: int, padding: int) -> None:
    x = torch.randint(0, 256, (2, 6, 5, 8), dtype=torch.uint8)
    w = torch.randint(-127, 128, (12, 8, kernel, kernel), dtype=torch.int8)
    scale = torch.rand(12) * 1e-3
    residual = torch.randint(0, 256, (2, 6, 5, 12), dtype=torch.uint8)
    sums = F.conv2d((x.double() - 7).permute(0, 3, 1, 2), w.double(), padding=padding).permute(0, 2, 3, 1)
    added = ((residual.int() - 5).float() * torch.tensor(0.02)).double()
    real = (sums * scale.double() + added).float()
    sizes = ([1, 1], [padding] * 4, [1, 1], 1)
    args = (x, 7, w, scale, None, residual, 0.02, 5, *sizes, "none", [], 0.05, 100, torch.uint8)
    assert torch.equal(qconv2d(*args), quantize(real, 0.05, 100, torch.uint8))
    opcheck(qconv2d, args, test_utils=CHECKS)


def test_a_sum_of_the_most_terms_fits() -> None:
    assert dialect_int8.MOST_TERMS * 255 * 128 <= 2**31
