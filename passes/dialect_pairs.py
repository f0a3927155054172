"""The dialect's operators that are two convolutions in one: the image in between has no name in the graph.

Bodies and layouts as in `dialect`: every operation rounded as torch rounds it, results contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dialect


def _conv_depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_args: Sequence[float],
    depth_weight: Tensor,
    depth_bias: Tensor | None,
    depth_stride: Sequence[int],
    depth_padding: Sequence[int],
    depth_dilation: Sequence[int],
    depth_activation: str,
    depth_args: Sequence[float],
    layout: str,
) -> Tensor:
    """The result is NHWC; `layout` is the input's."""
    x = input.permute(0, 2, 3, 1).contiguous() if layout == "NCHW" else input
    first = (stride, padding, dilation, 1, activation, activation_args, "NHWC")
    hidden = dialect.conv2d(x, weight, bias, None, *first)
    groups = depth_weight.shape[0]
    second = (depth_stride, depth_padding, depth_dilation, groups, depth_activation, depth_args, "NHWC")
    result: Tensor = dialect.conv2d(hidden, depth_weight, depth_bias, None, *second)
    return result


_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation, "
    "float[] activation_args, Tensor depth_weight, Tensor? depth_bias, int[] depth_stride, int[] depth_padding, "
    "int[] depth_dilation, str depth_activation, float[] depth_args, str layout) -> Tensor"
)

conv_depthwise = dialect.define("conv_depthwise", _SCHEMA, _conv_depthwise, _conv_depthwise)
