"""Weights of four bits: symmetric integers in [-7, 7], a float32 scale for each group of inputs of an output.

    stored    eight inputs are four bytes: byte b holds input b plus 8 in its low half, input 4 + b plus 8 in its high
              one, so that two masks of a word give four unsigned bytes each
    scale     of the clips tried, the one whose rounding errs least in the mean square; groups of zeros get 1

To nearest, without the updates of Frantar et al., GPTQ, 2023, whose groups these are (section 4).
"""

from __future__ import annotations

import torch

GROUPS = (32, 64, 128)
LIMIT = 7
OFFSET = 8  # that makes integers unsigned
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the group's largest magnitude


def rounded(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K] (int8) and scales [N, K / group] of weight[N, K]; K is a multiple of `group`."""
    n, k = weight.shape
    values = weight.detach().float().reshape(n, k // group, group)
    largest = values.abs().amax(2, keepdim=True)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = largest * (clip / LIMIT)
        # Below the normal numbers a division by the scale would lose the weight, or overflow.
        scale = torch.where(scale < 2.0**-126, torch.ones_like(scale), scale)
        steps = (values / scale).round().clamp(-LIMIT, LIMIT)
        error = (steps * scale - values).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    steps = (values / best).round().clamp(-LIMIT, LIMIT).to(torch.int8)
    return steps.reshape(n, k), best.squeeze(2).contiguous()


def halves(steps: torch.Tensor) -> torch.Tensor:
    """Integers [N, K] in [-8, 7] as bytes [N, K / 2] (uint8)."""
    unsigned = (steps.to(torch.int32) + OFFSET).reshape(steps.shape[0], -1, 2, 4)
    return (unsigned[:, :, 0] | unsigned[:, :, 1] << 4).to(torch.uint8).flatten(1).contiguous()


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K / 2] as integers [N, K] (int8)."""
    words = stored.reshape(stored.shape[0], -1, 4)
    return torch.stack([words & 15, words >> 4], 2).to(torch.int8).flatten(1) - OFFSET
