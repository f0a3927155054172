"""Operators whose products and sums are float16: linear and conv2d on a machine with arithmetic of halves.

    block sum    acc <- fl16(acc + x_k w_k) over BLOCK neighbouring k, x and w rounded to float16
    result       the block sums added in float32, then bias, residual and activation in float32

A sum of n halves errs by about 0.4 u sqrt(n / 2) of its size (u = 2^-11; each addition rounds a partial sum that has
grown like a random walk), whatever the depth of the product: 8e-4 for blocks of 32, twice that for 128; rounding the
operands adds 4e-4. Dot products of bfloat16 err by 3e-3. fmlal (halves multiplied, sums in float32) would err by the
4e-4 alone, but multiplies as many pairs an instruction as float32 does, and so gains no time.

The bodies round every eighth partial sum, by as much as eight roundings add up to: exact products, the right size of
error, a partial sum beyond 65504 is infinite as on the machine, and no loop over single k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dialect, dialect_mixed

BLOCK = 32
_STEP = 8


def half_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x[M, K] . weight[N, K]^T in the dtype of x, with the errors of sums in float16."""
    x, weight = x.half().to(x.dtype), weight.to(x.dtype)
    total = x.new_zeros((x.shape[0], weight.shape[0]))
    for start in range(0, x.shape[1], BLOCK):
        acc = torch.zeros_like(total)
        for first in range(start, min(start + BLOCK, x.shape[1]), _STEP):
            last = min(first + _STEP, start + BLOCK, x.shape[1])
            acc = acc + x[:, first:last] @ weight[:, first:last].t()
            rounded = acc.half().to(acc.dtype)
            acc = torch.where(rounded.isfinite(), acc + (rounded - acc) * (last - first) ** 0.5, rounded)
        total = total + acc
    return total


def _finished(
    sums: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, args: Sequence[float]
) -> Tensor:
    sums = sums if bias is None else sums + bias
    sums = sums if residual is None else sums + residual
    return dialect.ACTIVATIONS[activation](sums, list(args)).contiguous()


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
    round_input: bool,
    narrow: bool,
) -> Tensor:
    sums = half_sums(input.reshape(-1, input.shape[-1]), weight)
    return _finished(sums.view(*input.shape[:-1], -1), bias, residual, activation, activation_args)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
    round_input: bool,
    narrow: bool,
) -> Tensor:
    assert groups == 1
    assert layout == "NHWC"
    top, bottom, left, right = padding
    x = F.pad(input.permute(0, 3, 1, 2), (left, right, top, bottom))
    taps = F.unfold(x, tuple(weight.shape[2:]), tuple(dilation), 0, tuple(stride)).transpose(1, 2)
    sums = half_sums(taps.reshape(-1, taps.shape[-1]), weight.flatten(1))
    reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    height, width = ((x.shape[2 + i] - reach[i]) // stride[i] + 1 for i in (0, 1))
    return _finished(sums.view(x.shape[0], height, width, -1), bias, residual, activation, activation_args)


linear_half: Any = dialect.define(
    "linear_half", dialect_mixed.LINEAR, _linear, dialect_mixed.linear_fake(torch.float16)
)
conv2d_half: Any = dialect.define(
    "conv2d_half", dialect_mixed.CONV2D, _conv2d, dialect_mixed.conv2d_fake(torch.float16)
)
