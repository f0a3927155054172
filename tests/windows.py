"""The windows of an image, as Swin cuts them, for tests of passes that move rows."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def windows(x, size):
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def image(x, size, height, width):
    x = x.view(-1, height // size, width // size, size, size, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def rolled(x, by):
    return x.roll((by, by), (1, 2))


def operators(graph: fx.GraphModule) -> list[object]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function" and n.target is not aten.reshape.default]
