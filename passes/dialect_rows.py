"""The dialect's products of bytes whose inputs are rounded at run time, each row by its own largest value.

    q = round(x * (127 / max |x|))                  of a row, in [-127, 127], half to even; unit = max |x| * (1 / 127)
    sum = sum over k q w8                           exact in int32
    y = fma(float(sum) * scale[n], unit, bias[n] + residual)
    out = act(y)                                    float32

linear_tokens is the same as torchao's models state it (Int8DynamicActivationInt8WeightConfig, version 0.18):

    unit = max(max |x| / 127.5, EPSILON)            of a row
    q = min(round(x * (1 / unit)), 127)             in [-128, 127]

conv2d_images is the same of convolutions, NHWC: each image is rounded by its own largest value, and padding is zeros.

Rows without a value of LEAST are zeros, so that 127 / max |x| is finite. A row that holds an infinity or NaN gives NaN.
Every operation is rounded to float32 as kernels round it (activations that are polynomials in machine code aside).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dialect, dialect_int8, dialect_mixed

LEAST_EXPONENT = -120
LEAST = 2.0**LEAST_EXPONENT
TOKEN_STEPS = 127.5  # half the distance of -128 and 127
EPSILON = 2.0**-23  # torch.finfo(torch.float32).eps


def _linear_rows(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    steps, unit = steps_of(input.float(), (-1,))
    sums = F.linear(steps.double(), weight.double()).float()  # whole numbers: exact in any order
    return _finished(sums, scale, unit, (bias, residual), activation, activation_args)


def steps_of(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x in steps of the unit of what `dims` span, whole numbers in [-127, 127], and the units: NaN of what has none."""
    largest = x.abs().amax(dims, keepdim=True)  # NaN where there is one
    finite = largest.isfinite()
    inverse = 127.0 / torch.where(finite & (largest >= LEAST), largest, 127.0)
    unit = torch.where(finite, largest * torch.tensor(1 / 127, dtype=torch.float32), torch.nan)
    return torch.where(finite, x * inverse, 0.0).round(), unit


def _linear_tokens(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    x = input.float()
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    unit = (torch.where(finite, largest, TOKEN_STEPS) / TOKEN_STEPS).clamp_min(EPSILON)
    steps = torch.where(finite, x * (1.0 / unit), 0.0).round().clamp(-128.0, 127.0)
    sums = F.linear(steps.double(), weight.double()).float()
    unit = torch.where(finite, unit, torch.nan)
    return _finished(sums, scale, unit, (bias, residual), activation, activation_args)


def _finished(
    sums: Tensor,
    scale: Tensor,
    unit: Tensor,
    added: Sequence[Tensor | None],
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    addends = [t.float() for t in added if t is not None]
    y = dialect_int8.fma(sums * scale.float(), unit, sum(addends[1:], addends[0]) if addends else None)
    return dialect.ACTIVATIONS[activation](y, list(activation_args)).contiguous()


def _linear_rows_fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _conv2d_images(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    steps, unit = steps_of(input.float(), (1, 2, 3))
    sums = dialect_int8.convolved(steps, 0, weight, (stride, padding, dilation), 1).float()
    return _finished(sums, scale, unit, (bias, residual), activation, activation_args)


def _conv2d_images_fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    floats = weight.new_empty(weight.shape, dtype=torch.float32)
    sizes = (list(stride), list(padding), list(dilation), 1)
    return input.new_empty(dialect.conv2d(input.float(), floats, None, None, *sizes, "none", [], "NHWC").shape)


linear_rows = dialect.define(
    "linear_rows",
    dialect_mixed.LINEAR_SCALED,
    _linear_rows,
    _linear_rows_fake,
)
linear_tokens = dialect.define("linear_tokens", dialect_mixed.LINEAR_SCALED, _linear_tokens, _linear_rows_fake)
conv2d_images = dialect.define(
    "conv2d_images",
    "(Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, str activation, float[] activation_args) -> Tensor",
    _conv2d_images,
    _conv2d_images_fake,
)

ROUNDING = frozenset({linear_rows, linear_tokens, conv2d_images})
