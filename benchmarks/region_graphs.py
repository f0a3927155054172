"""Graphs of elementwise operators and reductions as models write them, with inputs: what fusion has to be good at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Graph(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Call the function."""
        return self.function(*inputs)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def _rotated(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.where(mask, scores * 0.125, float("-inf")), -1)


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = x + y
    n = F.layer_norm(h, (h.shape[-1],), weight, bias)
    return h, n, n * torch.sigmoid(n)


def shared_gelu(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    g = F.gelu(x)
    return g * scale, g + shift


def mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1)
    return mean, ((x - mean.unsqueeze(-1)) ** 2).mean(-1)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def several_outputs(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product = x * y
    total = product + z
    return product, total, torch.tanh(total)


def bias_chain(x: Tensor, one: Tensor, two: Tensor, rows: Tensor) -> Tensor:
    return F.relu((x + one) * two + rows) * 0.5 + one


def attention_bias(positions: Tensor, slopes: Tensor) -> Tensor:
    distance = (positions[None, :] - positions[:, None]).float()
    bias = slopes[:, None, None] * distance.abs()
    return torch.where(distance > 0, float("-inf"), -bias)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    shifted = logits - logits.amax(-1, keepdim=True)
    chances = shifted - shifted.exp().sum(-1, keepdim=True).log()
    loss = -chances.gather(-1, target[:, None]).mean()
    return loss, -(chances.exp() * chances).sum(-1)


def normalise_image(image: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    x = (image.float() / 255 - mean) / std
    return x, ((x * 40 + 128).clamp(0, 255) + 0.5).to(torch.uint8)


def lstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    state = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(state), state


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + 0.5 * size
    at = centre + deltas[..., :2] * size
    half = 0.5 * size * torch.exp(deltas[..., 2:].clamp(max=4.135))
    return torch.cat((at - half, at + half), -1).clamp(0, 640)


def sinusoids(steps: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) / 160 * torch.arange(160))
    angles = steps[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), -1)


def whole_statistics(x: Tensor) -> tuple[Tensor, ...]:
    return x.mean(), x.amax(), x.amin(), (x * x).sum().sqrt()


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x * x).mean((0, 2, 3)) - mean * mean


def small_and_many(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.tanh(t * 0.5 + 1) for t in tensors)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)


def graphs() -> dict[str, tuple[Graph, tuple[Tensor, ...]]]:
    """Every graph by its name, with inputs from a fixed seed."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    boxes = torch.rand(8400, 4, generator=make).cumsum(-1) * 160
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    image = torch.randint(0, 256, (4, 3, 224, 224), generator=make, dtype=torch.uint8)
    found: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "rms_norm": (rms_norm, (normal(512, 2048), normal(2048))),
        "rope": (rope, (normal(1, 16, 256, 64), normal(1, 4, 256, 64), normal(256, 64), normal(256, 64))),
        "swiglu": (swiglu, (normal(256, 2 * 2816),)),
        "masked_softmax": (masked_softmax, (normal(1, 12, 256, 256), causal)),
        "residual_norm": (residual_norm, (normal(512, 768), normal(512, 768), normal(768), normal(768))),
        "shared_gelu": (shared_gelu, (normal(256, 3072), normal(3072), normal(256, 3072))),
        "mean_variance": (mean_variance, (normal(1024, 1024),)),
        "group_norm_silu": (group_norm_silu, (normal(1, 128, 56, 56), normal(128), normal(128))),
        "several_outputs": (several_outputs, (normal(768, 1024), normal(768, 1024), normal(768, 1024))),
        "bias_chain": (bias_chain, (normal(512, 1024), normal(1024), normal(1024), normal(512, 1))),
        "attention_bias": (attention_bias, (torch.arange(256), normal(12).abs())),
        "cross_entropy": (cross_entropy, (normal(128, 8192), torch.arange(128) * 7)),
        "normalise_image": (normalise_image, (image, normal(3, 1, 1), normal(3, 1, 1).abs() + 1)),
        "lstm_gates": (lstm_gates, (normal(64, 4 * 512), normal(64, 512))),
        "decode_boxes": (decode_boxes, (normal(1, 8400, 4), boxes)),
        "sinusoids": (sinusoids, (torch.arange(64).float() * 15,)),
        "whole_statistics": (whole_statistics, (normal(1024, 1024),)),
        "channel_statistics": (channel_statistics, (normal(8, 64, 56, 56),)),
        "small_and_many": (small_and_many, tuple(normal(64, 64) for _ in range(12))),
        "similarity": (similarity, (normal(1024, 512), normal(1024, 512))),
    }
    return {name: (Graph(function).eval(), inputs) for name, (function, inputs) in found.items()}
