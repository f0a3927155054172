"""The dialect's operators of 8 bits: quantize, dequantize, and products whose sums are exact.

    quantize(x)     clamp(round(x / scale) + zero, low, high)         half to even; NaN gives low
    dequantize(q)   (q - zero) * scale
    dequantize_rows(q, scales, zeros, axis)     the same with a scale for each row (slice of `axis`): stored weights
    qlinear(q, w)   sum over k (q - zero) w  exact in int32, then for column n of the result

        addend = fma(residual - zero, residual's scale, bias[n])
        y = fma(float(sum), scale[n], addend)                   scale[n] = input's scale * weight's scale of row n
        y = act(y)                                              in real units
        out = y, or quantize(y) where `dtype` names the result's

Weights are int8 with zero point 0 (symmetric), [N, K] or [N, C, KH, KW]; qconv2d takes and gives NHWC, and its padding
adds nothing to a sum. A residual is float32, or of 8 bits with a scale and zero point of its own. Every operation is
rounded to float32 as kernels round it, so that machine code gives the same bits (activations that are polynomials in
machine code aside). Sums must fit: K * 255 * 127 < 2^31.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dialect

# All of uint8 or int8: the `low` and `high` of a result.
RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
MOST_TERMS = 2**31 // (255 * 128)  # of one sum


def inverse(scale: float) -> float:
    """1 / scale in float32, which values are multiplied by."""
    return float(torch.tensor(1.0, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32))


def _round(y: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    low, high = RANGES[dtype]
    # Clamped first: a float beyond int32 has no integer. The bounds are integers, so the order does not matter.
    steps = (y * torch.tensor(inverse(scale))).clamp(low - zero, high - zero).round()
    return (steps.nan_to_num(low - zero).to(torch.int32) + zero).to(dtype)


def _quantize(input: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    return _round(input.float(), scale, zero, dtype).contiguous()


def _quantize_fake(input: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _dequantize(input: Tensor, scale: float, zero: int) -> Tensor:
    steps = (input.to(torch.int32) - zero).to(torch.float32)
    return (steps * torch.tensor(scale, dtype=torch.float32)).contiguous()


def _dequantize_fake(input: Tensor, scale: float, zero: int) -> Tensor:
    return input.new_empty(input.shape, dtype=torch.float32)


def _along(values: Tensor, input: Tensor, axis: int) -> Tensor:
    """One number a row of `axis`, shaped so that it broadcasts over `input`."""
    return values.reshape([-1 if i == axis else 1 for i in range(input.dim())])


def _dequantize_rows(input: Tensor, scales: Tensor, zeros: Tensor | None, axis: int) -> Tensor:
    steps = input.to(torch.float32)
    if zeros is not None:
        steps = steps - _along(zeros.to(torch.float32), input, axis)
    return (steps * _along(scales.to(torch.float32), input, axis)).contiguous()


def _dequantize_rows_fake(input: Tensor, scales: Tensor, zeros: Tensor | None, axis: int) -> Tensor:
    return input.new_empty(input.shape, dtype=torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * b + c: the product is exact in float64, the sum is rounded twice, which shows at ties alone."""
    product = a.double() * b.double()
    return (product if c is None else product + c.double()).float()


def _finish(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    activation: str,
    activation_args: Sequence[float],
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """The epilogue of exact sums [..., N] (in any dtype that holds them)."""
    addend = None if bias is None else bias.float()
    if residual is not None and residual.is_floating_point():
        addend = residual.float() if addend is None else addend + residual.float()
    elif residual is not None:
        steps = (residual.to(torch.int32) - residual_zero).float()
        addend = fma(steps, torch.tensor(residual_scale, dtype=torch.float32), addend)
    y = fma(sums.float(), scale.float(), addend)
    y = dialect.ACTIVATIONS[activation](y, list(activation_args))
    return (y if dtype is None else _round(y, out_scale, out_zero, dtype)).contiguous()


def _exact(weight: Tensor) -> torch.dtype:
    """A type of floats that holds every sum of bytes times these weights: float32 while all are below 2^24."""
    largest = float(weight.float().abs().flatten(1).sum(1).max()) if weight.numel() else 0.0
    return torch.float32 if 255.0 * largest < 2.0**24 else torch.float64


def _product(x: Tensor, zero: int, weight: Tensor) -> Tensor:
    """Exact sums of (x - zero) . weight[N, K]^T."""
    wide = _exact(weight)
    return F.linear(x.to(wide) - zero, weight.to(wide))


def convolved(input: Tensor, zero: int, weight: Tensor, sizes: Sequence[Sequence[int]], groups: int) -> Tensor:
    """Exact sums over the windows of images [N, H, W, C] of whole numbers; `sizes`: stride, padding, dilation."""
    stride, (top, bottom, left, right), dilation = sizes
    if weight.shape[1] == 1 and groups == len(weight):  # tap by tap: PyTorch takes milliseconds for doubles in groups
        wide = _exact(weight)
        x, w = F.pad(input.to(wide) - zero, (0, 0, left, right, top, bottom)), weight.to(wide)
        extents = [
            (x.shape[1 + d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] * stride[d] for d in (0, 1)
        ]
        sums = x.new_zeros(())
        for i, j in product(range(weight.shape[2]), range(weight.shape[3])):
            y, z = i * dilation[0], j * dilation[1]
            read = x[:, y : y + extents[0] + 1 : stride[0], z : z + extents[1] + 1 : stride[1]]
            sums = sums + read * w[:, 0, i, j]
        return sums
    x = F.pad(input.double() - zero, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
    sums = F.conv2d(x, weight.double(), None, list(stride), 0, list(dilation), groups)
    # Convolutions may be computed by transforms, which leave a trace of rounding on whole numbers.
    return sums.round().permute(0, 2, 3, 1)


def _qlinear(
    input: Tensor,
    input_zero: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    activation: str,
    activation_args: Sequence[float],
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype | None,
) -> Tensor:
    sums = _product(input, input_zero, weight)
    added = (bias, residual, residual_scale, residual_zero)
    return _finish(sums, scale, *added, activation, activation_args, out_scale, out_zero, dtype)


def _qlinear_fake(
    input: Tensor,
    input_zero: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    activation: str,
    activation_args: Sequence[float],
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype | None,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype or torch.float32)


def _qconv2d(
    input: Tensor,
    input_zero: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype | None,
) -> Tensor:
    if weight.shape[2:] == (1, 1) and groups == 1 and list(stride) == [1, 1] and not any(padding):
        sums = _product(input, input_zero, weight.flatten(1))
    else:
        sums = convolved(input, input_zero, weight, (stride, padding, dilation), groups)
    added = (bias, residual, residual_scale, residual_zero)
    return _finish(sums, scale, *added, activation, activation_args, out_scale, out_zero, dtype)


def _qconv2d_fake(
    input: Tensor,
    input_zero: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    out_scale: float,
    out_zero: int,
    dtype: torch.dtype | None,
) -> Tensor:
    sizes = (list(stride), list(padding), list(dilation), groups)
    images = [t.new_empty(t.shape, dtype=torch.float32) for t in (input, weight)]
    shape = dialect.conv2d(*images, None, None, *sizes, "none", [], "NHWC").shape
    return input.new_empty(shape, dtype=dtype or torch.float32)


_SUMS = (
    "Tensor input, int input_zero, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, "
    "float residual_scale, int residual_zero"
)
_RESULT = "str activation, float[] activation_args, float out_scale, int out_zero, ScalarType? dtype"

quantize = dialect.define(
    "quantize", "(Tensor input, float scale, int zero, ScalarType dtype) -> Tensor", _quantize, _quantize_fake
)
dequantize = dialect.define(
    "dequantize", "(Tensor input, float scale, int zero) -> Tensor", _dequantize, _dequantize_fake
)
dequantize_rows = dialect.define(
    "dequantize_rows",
    "(Tensor input, Tensor scales, Tensor? zeros, int axis) -> Tensor",
    _dequantize_rows,
    _dequantize_rows_fake,
)
qlinear = dialect.define("qlinear", f"({_SUMS}, {_RESULT}) -> Tensor", _qlinear, _qlinear_fake)
qconv2d = dialect.define(
    "qconv2d",
    f"({_SUMS}, int[] stride, int[] padding, int[] dilation, int groups, {_RESULT}) -> Tensor",
    _qconv2d,
    _qconv2d_fake,
)

PRODUCTS = frozenset({qlinear, qconv2d})
# Weights in 8 bits are one of these on a constant: spelt out, they would be four times as large.
STORED = frozenset({dequantize, dequantize_rows})
