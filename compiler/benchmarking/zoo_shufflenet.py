"""ShuffleNetV2, as in Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _convolution(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Module:
    layers = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        *([nn.ReLU()] if relu else []),
    ]
    return nn.Sequential(*layers)


def _branch(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        _convolution(channels, out, 1),
        _convolution(out, out, 3, stride, groups=out, relu=False),
        _convolution(out, out, 1),
    )


class _Unit(nn.Module):
    """Half of the channels pass through a branch, or at stride 2 all of them through two; then the halves are dealt."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut = None
        if stride > 1:
            depthwise = _convolution(channels, channels, 3, stride, groups=channels, relu=False)
            self.shortcut = nn.Sequential(depthwise, _convolution(channels, out // 2, 1))
        self.branch = _branch(channels if stride > 1 else channels // 2, out // 2, stride)

    def forward(self, x: Tensor) -> Tensor:
        kept, taken = (self.shortcut(x), x) if self.shortcut is not None else x.chunk(2, dim=1)
        joined = torch.cat([kept, self.branch(taken)], dim=1)
        batch, channels, height, width = joined.shape
        dealt = joined.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return dealt.reshape(batch, channels, height, width)


class ShuffleNetV2(nn.Module):
    """A classifier; `widths` are the channels of the first convolution and of every stage, `depths` units a stage."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int] = (24, 116, 232, 464),
        depths: Sequence[int] = (4, 8, 4),
        last: int = 1024,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, widths[0], 3, 2), nn.MaxPool2d(3, 2, 1))
        units = [
            _Unit(before if i == 0 else out, out, 2 if i == 0 else 1)
            for before, out, depth in zip(widths, widths[1:], depths, strict=False)
            for i in range(depth)
        ]
        self.stages = nn.Sequential(*units)
        self.last = _convolution(widths[-1], last, 1)
        self.classify = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.last(self.stages(self.stem(x))).mean([2, 3]))
        return logits
