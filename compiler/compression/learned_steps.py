"""Rounding to 8 bits whose step is a parameter: Esser et al., Learned step size quantization, ICLR 2020 (LSQ).

    forward     v = clamp(round(x / s), low, high) * s
    by x        1 inside [low, high], 0 outside                               the straight-through estimator
    by s        round(x / s) - x / s inside, low or high outside, times 1 / sqrt(count * high)
    at first    s = max |x| / high
    always      s in [max |x| / high / FINEST, max |x| / high], max |x| over all that was seen: coarser steps leave
                codes unused, and an optimizer with momentum that overshoots to where all is rounded to 0 never returns

The paper begins with 2 mean |x| / sqrt(high), which is for few bits: of 127 codes, normal numbers would use some 28.
Values have one step, and codes from 0 to 255: 0 stands for code 0 where no negative value was seen, for 128 otherwise.
Weights have a step for each output and codes from -127 to 127. Both are what kernels compute with
(passes/dialect_int8.py), bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...passes.precision.int8_scales import WEIGHT_LIMIT

HIGHEST = 255  # code of a value
MIDDLE = 128  # the code of 0 where values have both signs
FINEST = 256.0  # times finer than the largest value needs: all but a 256th of the range is clipped
LEAST = 2.0**-126  # of a step: the smallest normal number, so that its inverse is finite


def rounded(x: Tensor) -> Tensor:
    """x rounded half to even, with the derivative of x."""
    return x + (x.round() - x).detach()


def bounded(step: nn.Parameter, largest: Tensor, high: int) -> None:
    """Bring a step that an optimizer made back to where its codes are used."""
    with torch.no_grad():
        highest = initial_step(largest, high)
        # A step that is not finite is none: it begins again.
        wanted = torch.where(step.isfinite(), step.abs(), highest).clamp(highest / FINEST, highest)
        if not torch.equal(wanted, step):
            step.copy_(wanted)


def slowed(step: Tensor, factor: float) -> Tensor:
    """The step, its derivative times `factor`; never below LEAST, whatever an optimizer made of it.

    Of a copy: a layer that is called again before the derivatives are taken may move its step.
    """
    positive = step.clone().abs().clamp_min(LEAST)
    return positive.detach() + (positive - positive.detach()) * factor


def initial_step(largest: Tensor, high: int) -> Tensor:
    """The first step for values up to `largest`; 1 where all are 0."""
    return torch.where(largest > 0.0, largest / high, 1.0)


class ValueStep(nn.Module):
    """Rounds what a layer reads. The first values it sees set the step, and whether there are negative ones."""

    zero: Tensor
    seen: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x, rounded."""
        if not bool(self.seen) or self.training:
            self._look(x.detach())
        zero = int(self.zero)
        if bool(self.seen):
            bounded(self.step, self.largest, HIGHEST - zero)
        step = slowed(self.step, 1.0 / math.sqrt(max(1, x[0].numel() if x.dim() else 1) * (HIGHEST - zero)))
        # By the inverse, as the operator `quantize` has it.
        return rounded((x * step.reciprocal()).clamp(-zero, HIGHEST - zero)) * step

    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that have a code."""
        zero = int(self.zero)
        bounded(self.step, self.largest, HIGHEST - zero)
        step = float(self.step.detach().abs().clamp_min(LEAST))
        return -zero * step, (HIGHEST - zero) * step

    def _look(self, x: Tensor) -> None:
        """Take note of finite values: the sign of a batch, and how far it reaches."""
        with torch.no_grad():
            x = x if bool(x.isfinite().all()) else x[x.isfinite()]
            if not x.numel():
                return
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
            if not bool(self.seen):
                self.zero.fill_(MIDDLE if float(x.min()) < 0.0 else 0)
                self.step.copy_(initial_step(self.largest, HIGHEST - int(self.zero)))
                self.seen.fill_(True)
            elif not int(self.zero) and float(x.min()) < 0.0:  # the first values were of one sign by chance
                self.zero.fill_(MIDDLE)
                self.step.mul_(2.0)


class WeightSteps(nn.Module):
    """Rounds the weights of a layer, [outputs, ...], with a step for each output."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = weight.detach().float().abs().flatten(1).amax(1)
        self.step = nn.Parameter(initial_step(largest, WEIGHT_LIMIT).reshape(-1, *[1] * (weight.dim() - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weights, rounded."""
        largest = weight.detach().float().abs().flatten(1).amax(1).reshape(self.step.shape)
        bounded(self.step, largest, WEIGHT_LIMIT)
        step = slowed(self.step, 1.0 / math.sqrt(max(1, weight[0].numel()) * WEIGHT_LIMIT))
        return rounded((weight / step).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)) * step
