"""A two-dimensional convolution and what follows it become one graphwright::conv2d.

    conv2d(x, W, b)                                -> graphwright::conv2d(x, W, b)
    conv2d(pad(x, p, 0), W, b, padding=q)          -> the same with padding p + q
    activation(add(add(conv2d(x, W), bias), y))    -> the same with bias, residual y and activation

A convolution that is fused already, without an activation, takes up what follows it now.

Refused for unbatched images and dtypes that are not floating point; padding is not taken up where it is
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
from .epilogue import Epilogue, extend

log = logging.getLogger(__name__)
aten = torch.ops.aten


def fuse_conv_activation(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fuse convolutions with pads before and epilogues behind them; returns the number of convolutions changed."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.conv2d.default, dialect.conv2d) and _fuse(graph, node):
            count += 1
    return rewrite.finish(graph, count)


def _fuse(graph: fx.GraphModule, conv: fx.Node) -> bool:
    a = rewrite.arguments(conv)
    if conv.target is dialect.conv2d:
        if a["activation"] != "none":
            return False
    else:
        operands = [n for n in (a["input"], a["weight"], a["bias"]) if n is not None]
        if not rewrite.is_float(conv, *operands) or len(rewrite.shape_of(a["input"])) != 4:
            log.debug("keep %s: not a batch of images in floating point", conv)
            return False
        vertical, horizontal = rewrite.repeated(a["padding"], 2)
        a |= {
            "stride": rewrite.repeated(a["stride"], 2),
            "padding": [vertical, vertical, horizontal, horizontal],
            "dilation": rewrite.repeated(a["dilation"], 2),
            "residual": None,
            "layout": "NCHW",
        }
    pad = a["input"]
    absorbed = _padding(pad, a["padding"]) if a["layout"] == "NCHW" else None
    if absorbed is not None:
        a |= {"input": pad.args[0], "padding": absorbed}
    start = Epilogue(conv, a["bias"], a["residual"])
    channels = rewrite.shape_of(a["weight"])[0]
    axis = 1 if a["layout"] == "NCHW" else 3
    found = extend(start, lambda other: _is_bias(other, channels, axis))
    if conv.target is dialect.conv2d and found == start and absorbed is None:
        return False
    _rewrite(graph, conv, a, found, channels)
    if absorbed is not None:
        rewrite.erase_unused(pad)
    return True


def _padding(pad: Any, padding: Sequence[int]) -> list[int] | None:
    """The convolution's padding with that of `pad` added; None where `pad` is nothing to take up."""
    if not rewrite.calls(pad, aten.constant_pad_nd.default):
        return None
    p = rewrite.arguments(pad)
    amounts = [*p["pad"], 0, 0, 0, 0]
    left, right, top, bottom = amounts[:4]
    if p["value"] != 0 or any(n < 0 for n in amounts) or any(amounts[4:]):
        log.debug("keep %s: a convolution pads the image, and with zeros", pad)
        return None
    return [old + new for old, new in zip(padding, (top, bottom, left, right), strict=True)]


def _is_bias(other: fx.Node, channels: int, axis: int) -> bool:
    """Whether a constant holds one number a channel."""
    shape = rewrite.shape_of(other)
    spread = (1,) * (4 - len(shape)) + shape
    return other.op == "get_attr" and spread == tuple(channels if i == axis else 1 for i in range(4))


def _rewrite(graph: fx.GraphModule, conv: fx.Node, a: dict[str, Any], found: Epilogue, channels: int) -> None:
    bias = found.bias
    if bias is not None and rewrite.shape_of(bias) != (channels,):
        bias = rewrite.call(graph, aten.reshape.default, (bias, [channels]), before=found.last)
    new = rewrite.call(
        graph,
        dialect.conv2d,
        (
            a["input"],
            a["weight"],
            bias,
            found.residual,
            a["stride"],
            a["padding"],
            a["dilation"],
            a["groups"],
            found.activation,
            list(found.args),
            a["layout"],
        ),
        before=found.last,
        value=rewrite.packed(found.last.meta["val"]),
        source=conv,
    )
    rewrite.replace_chain(conv, found.last, new)
