"""A convolution over images or sequences and what follows it become one graphwright::conv2d.

    conv2d(x, W, b)                                -> graphwright::conv2d(x, W, b)
    conv2d(pad(x, p, 0), W, b, padding=q)          -> the same with padding p + q
    activation(add(add(conv2d(x, W), bias), y))    -> the same with bias, residual y and activation
    conv1d(x, W)                                   -> the same on an image of one row, reshaped back

A convolution that is fused already, without an activation, takes up what follows it now.

Refused for unbatched input and dtypes that are not floating point; padding is not taken up where it is
not zero, negative, or beyond the image; an addition is not where it has a factor, broadcasts, or changes
the dtype; nothing is where the value in between is read by anybody else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .epilogue import Epilogue, allowed, extend
from .families import fuses
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def fuse_conv_activation(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fuse convolutions with pads before and epilogues behind them; returns the number of convolutions changed."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.conv1d.default, aten.conv2d.default, dialect.conv2d) and _fuse(graph, node):
            count += 1
    return rewrite.finish(graph, count)


def _fuse(graph: fx.GraphModule, conv: fx.Node) -> bool:
    a = rewrite.arguments(conv)
    if conv.target is not dialect.conv2d:
        operands = [n for n in (a["input"], a["weight"], a["bias"]) if n is not None]
        if not rewrite.is_float(conv, *operands) or len(rewrite.shape_of(conv)) != len(rewrite.shape_of(a["weight"])):
            keep(log, conv, "not a batch in floating point")
            return False
        a |= _as_image(a, len(rewrite.shape_of(conv)) - 2)
    elif a["activation"] != "none":
        return False
    pads = []
    if a["layout"] == "NCHW" and fuses(graph, "conv+pad"):
        while (padding := _padding(a["input"], a["padding"])) is not None:
            pads.append(a["input"])
            a |= {"input": a["input"].args[0], "padding": padding}
    start = Epilogue(conv, a["bias"], a["residual"])
    rank, channels = len(rewrite.shape_of(conv)), rewrite.shape_of(a["weight"])[0]
    bias_shape = [1] * rank
    bias_shape[1 if a["layout"] == "NCHW" else 3] = channels
    found = extend(start, lambda other: _is_bias(other, bias_shape), allowed(graph, "conv"))
    if conv.target is dialect.conv2d and found == start and not pads:
        return False
    _rewrite(graph, conv, a, found)
    rewrite.erase_unused(*pads)
    return True


def _as_image(a: dict[str, Any], spatial: int) -> dict[str, Any]:
    """The arguments of graphwright::conv2d that differ from those of conv1d or conv2d."""
    row = [1] * (2 - spatial)
    edge = [0] * (2 - spatial)
    vertical, horizontal = edge + rewrite.repeated(a["padding"], spatial)
    return {
        "stride": row + rewrite.repeated(a["stride"], spatial),
        "padding": [vertical, vertical, horizontal, horizontal],
        "dilation": row + rewrite.repeated(a["dilation"], spatial),
        "residual": None,
        "layout": "NCHW",
    }


def _padding(pad: Any, padding: Sequence[int]) -> list[int] | None:
    """The convolution's padding with that of `pad` added; None where `pad` is nothing to take up."""
    if not rewrite.calls(pad, aten.constant_pad_nd.default):
        return None
    p = rewrite.arguments(pad)
    amounts = [*p["pad"], 0, 0, 0, 0]
    left, right, top, bottom = amounts[:4]
    spatial = 2 * (len(rewrite.shape_of(pad)) - 2)
    if 0 in rewrite.shape_of(p["self"]):
        keep(log, pad, "PyTorch convolves no image without elements")
        return None
    if p["value"] != 0 or any(n < 0 for n in amounts) or any(amounts[spatial:]):
        keep(log, pad, "a convolution pads the image, and with zeros")
        return None
    return [old + new for old, new in zip(padding, (top, bottom, left, right), strict=True)]


def _is_bias(other: fx.Node, wanted: Sequence[int]) -> bool:
    """Whether a constant holds one number a channel."""
    shape = rewrite.shape_of(other)
    return other.op == "get_attr" and [1] * (len(wanted) - len(shape)) + list(shape) == list(wanted)


def _rewrite(graph: fx.GraphModule, conv: fx.Node, a: dict[str, Any], found: Epilogue) -> None:
    def image(node: fx.Node | None) -> fx.Node | None:
        """A sequence as an image of one row."""
        if node is None or len(shape := rewrite.shape_of(node)) == 4:
            return node
        return rewrite.call(graph, aten.reshape.default, (node, [*shape[:2], 1, *shape[2:]]), before=found.last)

    bias, channels = found.bias, rewrite.shape_of(a["weight"])[0]
    if bias is not None and rewrite.shape_of(bias) != (channels,):
        bias = rewrite.call(graph, aten.reshape.default, (bias, [channels]), before=found.last)
    shape = rewrite.shape_of(conv)
    value = rewrite.packed(found.last.meta["val"], None if len(shape) == 4 else [*shape[:2], 1, *shape[2:]])
    new = rewrite.call(
        graph,
        dialect.conv2d,
        (
            image(a["input"]),
            image(a["weight"]),
            bias,
            image(found.residual),
            a["stride"],
            a["padding"],
            a["dilation"],
            a["groups"],
            found.activation,
            list(found.args),
            a["layout"],
        ),
        before=found.last,
        value=value,
        source=conv,
    )
    if len(shape) == 3:
        new = rewrite.call(graph, aten.reshape.default, (new, list(shape)), before=found.last)
    rewrite.replace_chain(conv, found.last, new)
