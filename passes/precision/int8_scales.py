"""How values and weights are stored in 8 bits: what calibration finds, and `quantise` rewrites by.

values     one scale and zero point a tensor, uint8: VNNI multiplies unsigned bytes by signed ones
weights    int8 in [-127, 127] with zero point 0, a scale for each row (output channel) or one for all

A bias is corrected for what rounding the weights adds in the mean (Nagel et al., Data-free quantization through weight
equalization and bias correction, 2019, section 4.2, with means measured instead of derived from batch norms):

    b' = b - sum over inputs (w8 * scale - w) * mean(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .weight_grid import grid_steps

WEIGHT_LIMIT = 127


@dataclass(frozen=True)
class Scale:
    """A value q stands for (q - zero) * scale."""

    scale: float
    zero: int
    dtype: torch.dtype = torch.uint8


@dataclass(frozen=True)
class Table:
    """What a graph is quantised by; names are those of nodes.

    `means` holds the mean of each channel (last dim) of values that products read: none, and biases stay as they are.
    """

    scales: Mapping[str, Scale]
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)
    per_channel: bool = True


def scale_between(low: float, high: float, symmetric: bool = False) -> Scale:
    """The scale that covers [low, high] and holds 0 exactly; `symmetric` puts 0 in the middle of values of both signs.

    A range of nothing but 0 gets the scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        return Scale(1.0, 0)
    two_sided = symmetric and low < 0.0
    # No less than the smallest normal number of float32, which operators have it in: its inverse is finite.
    step = max(max(-low, high) / 127.0 if two_sided else (high - low) / 255.0, 2.0**-126)
    return Scale(step, 128 if two_sided else int(max(0, min(255, round(-low / step)))))


def weight_scales(weight: torch.Tensor, per_channel: bool = True) -> torch.Tensor:
    """A float32 scale for each row of weight[N, ...]; rows of zeros get 1, rows on a grid keep it (weight_grid.py)."""
    rows = weight.detach().float().flatten(1).abs()
    largest = rows.amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    if not per_channel:
        largest = largest.max().expand_as(largest)
    scales = largest / WEIGHT_LIMIT
    if per_channel and (steps := grid_steps(weight)) is not None:
        scales = torch.where(steps > 0.0, steps, scales)
    # Below the normal numbers a division by the scale would lose the weight, or overflow.
    return torch.where(scales < 2.0**-126, torch.ones_like(scales), scales).contiguous()


def quantised_weight(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """weight[N, ...] rounded to int8 steps of its row's scale."""
    steps = weight.detach().float() / scales.view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(torch.int8)


def corrected_bias(
    bias: torch.Tensor | None, weight: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """The bias that takes off what rounding the weights adds in the mean; `mean` holds one number an input channel.

    Taps of a convolution that lie on padding count as if they did not: right inside the image, close at its border.
    """
    rows = scales.view(-1, *[1] * (weight.dim() - 1))
    error = stored.double() * rows.double() - weight.detach().double()  # [N, channels of a group, taps...]
    by_channel = error.flatten(2).sum(2) if error.dim() > 2 else error
    groups = mean.numel() // by_channel.shape[1]
    means = mean.double().view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    added = (by_channel * means).sum(1)
    base = torch.zeros_like(added) if bias is None else bias.detach().double()
    return (base - added).float()
