"""The bodies of the dialect's pooling operators, and of their fake kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dialect_images import image_shape, owned, spatial_shape


def max_pool2d_body(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    layout: str,
) -> Tensor:
    # torch pools bytes of small images only, since it counts positions in them; float32 holds every byte.
    source = input.float() if input.dtype in (torch.uint8, torch.int8) else input
    x = source.permute(0, 3, 1, 2) if layout == "NHWC" else source
    x, pad = _pool_padding(x, padding, ceil_mode, -math.inf)
    y = F.max_pool2d(x, list(kernel), list(stride), pad, list(dilation), ceil_mode).to(input.dtype)
    return owned(y.permute(0, 2, 3, 1) if layout == "NHWC" else y, input)


def avg_pool2d_body(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    layout: str,
) -> Tensor:
    if not count_include_pad and (padding[0], padding[2]) != (padding[1], padding[3]):
        raise ValueError(f"avg_pool2d: padding {list(padding)} is uneven and not counted; pad the input first")
    x = input.permute(0, 3, 1, 2) if layout == "NHWC" else input
    x, pad = _pool_padding(x, padding, ceil_mode, 0.0)
    y = F.avg_pool2d(x, list(kernel), list(stride), pad, ceil_mode, count_include_pad, divisor)
    return owned(y.permute(0, 2, 3, 1) if layout == "NHWC" else y, input)


def _pool_padding(x: Tensor, padding: Sequence[int], ceil_mode: bool, fill: float) -> tuple[Tensor, list[int]]:
    # torch pools with even padding only; uneven padding is written out, which floor mode cannot tell apart.
    top, bottom, left, right = padding
    if (top, left) == (bottom, right):
        return x, [top, left]
    if ceil_mode:
        raise ValueError(f"pooling: padding {list(padding)} is uneven under ceil_mode; pad the input first")
    return F.pad(x, (left, right, top, bottom), value=fill), [0, 0]


def max_pool2d_fake(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    layout: str,
) -> Tensor:
    return _pooled(input, kernel, stride, padding, dilation, ceil_mode, layout)


def avg_pool2d_fake(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    layout: str,
) -> Tensor:
    return _pooled(input, kernel, stride, padding, (1, 1), ceil_mode, layout)


def _pooled(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    layout: str,
) -> Tensor:
    batch, *spatial = spatial_shape(input, layout)
    sizes = []
    for i in (0, 1):
        before, after = padding[2 * i], padding[2 * i + 1]
        room = spatial[i] + before + after - dilation[i] * (kernel[i] - 1) - 1
        size = (room + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        # torch drops a last window that would start in the padding behind the image.
        sizes.append(size - 1 if ceil_mode and (size - 1) * stride[i] >= spatial[i] + before else size)
    channels = input.shape[3] if layout == "NHWC" else input.shape[1]
    return input.new_empty(image_shape(batch, channels, sizes[0], sizes[1], layout))
