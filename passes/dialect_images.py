"""What the bodies of operators on images share. The layout is "NCHW", or "NHWC" for logical shapes [N, H, W, C]."""

from __future__ import annotations

import torch
from torch import Tensor


def owned(result: Tensor, *sources: Tensor | None) -> Tensor:
    """`result` contiguous, in memory of its own: an operator's result may not share any with its inputs."""
    shared = any(s is not None and s.untyped_storage()._cdata == result.untyped_storage()._cdata for s in sources)
    return result.clone(memory_format=torch.contiguous_format) if shared else result.contiguous()


def spatial_shape(input: Tensor, layout: str) -> tuple[int, int, int]:
    """Batch, height, width."""
    if layout == "NHWC":
        return input.shape[0], input.shape[1], input.shape[2]
    return input.shape[0], input.shape[2], input.shape[3]


def image_shape(batch: int, channels: int, height: int, width: int, layout: str) -> tuple[int, int, int, int]:
    """The shape of an image of these sizes."""
    if layout == "NHWC":
        return batch, height, width, channels
    return batch, channels, height, width
