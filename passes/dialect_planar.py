"""The dialect's convolution of an image in NCHW that gives one in NHWC: nobody writes the permuted image down.

planar_conv2d(x, W, b, ...) = conv2d(permute(x, NCHW -> NHWC), W, b, ..., NHWC)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dialect


def _planar_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    x = input.permute(0, 2, 3, 1).contiguous()
    rest = (stride, padding, dilation, 1, activation, activation_args, "NHWC")
    result: Tensor = dialect.conv2d(x, weight, bias, residual, *rest)
    return result


_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
    "str activation, float[] activation_args) -> Tensor"
)

planar_conv2d = dialect.define("planar_conv2d", _SCHEMA, _planar_conv2d, _planar_conv2d)
