"""A convolution over volumes becomes one over images: depth joins the batch, its taps join the channels.

    conv3d(x, W)  ->  y = stack of x[:, :, k * dilation :: stride] for the taps k in depth
                      conv2d(y as [N * depth, C * taps, H, W], W as [K, C * taps, KH, KW]) back to [N, K, depth, H, W]

All kernels, layouts and fusions of images then serve volumes as well. What it costs is a copy of x for every tap in
depth, none for a depth of one. Channels lie (channel, tap), so that groups and the weight's order stay as they are.

Refused for unbatched input, dtypes that are not floating point, results without elements, and convolutions of each
channel by itself: their taps would become channels that no other filter reads.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def flatten_conv3d(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite every conv3d that can be; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.conv3d.default):
            continue
        a = rewrite.arguments(node)
        reason = _refusal(graph, node, a)
        if reason:
            keep(log, node, "%s", reason)
            continue
        _rewrite(graph, node, a)
        count += 1
    return rewrite.finish(graph, count)


def _refusal(graph: fx.GraphModule, conv: fx.Node, a: dict[str, Any]) -> str:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not rewrite.is_float(conv, *[n for n in (x, weight, bias) if n is not None]):
        return "not in floating point"
    if len(rewrite.shape_of(x)) != 5:
        return "not a batch"
    if rewrite.shape_of(weight)[1] == 1 and a["groups"] > 1:
        return "each channel is convolved by itself"
    if 0 in rewrite.shape_of(conv):
        return "its result is empty"
    return ""


def _rewrite(graph: fx.GraphModule, conv: fx.Node, a: dict[str, Any]) -> None:
    def call(target: rewrite.Operator, *args: Any) -> fx.Node:
        return rewrite.call(graph, target, args, before=conv)

    x, weight = a["input"], a["weight"]
    stride, padding, dilation = (rewrite.repeated(a[k], 3) for k in ("stride", "padding", "dilation"))
    filters, channels, taps, *kernel = rewrite.shape_of(weight)
    batch, _, depth, *out = rewrite.shape_of(conv)
    if padding[0]:
        x = call(aten.constant_pad_nd.default, x, [0, 0, 0, 0, padding[0], padding[0]], 0.0)
    _, of_input, _, *size = rewrite.shape_of(x)
    slices = [_slice(graph, conv, x, k * dilation[0], depth, stride[0]) for k in range(taps)]
    columns = [call(aten.reshape.default, s, [batch, of_input, 1, depth, *size]) for s in slices]
    stacked = columns[0] if taps == 1 else call(aten.cat.default, columns, 2)
    images = call(aten.permute.default, stacked, [0, 3, 1, 2, 4, 5])
    images = call(aten.reshape.default, images, [batch * depth, of_input * taps, *size])
    flat = call(aten.reshape.default, weight, [filters, channels * taps, *kernel])
    y = call(aten.conv2d.default, images, flat, a["bias"], stride[1:], padding[1:], dilation[1:], a["groups"])
    y = call(aten.reshape.default, y, [batch, depth, filters, *out])
    new = rewrite.call(graph, aten.permute.default, (y, [0, 2, 1, 3, 4]), before=conv)
    rewrite.replace(conv, new)


def _slice(graph: fx.GraphModule, before: fx.Node, x: fx.Node, start: int, count: int, step: int) -> fx.Node:
    """Planes start, start + step, ... of a volume, `count` of them."""
    depth = rewrite.shape_of(x)[2]
    end = start + (count - 1) * step + 1
    if (start, end, step) == (0, depth, 1):
        return x
    return rewrite.call(graph, aten.slice.Tensor, (x, 2, start, end, step), before=before)
