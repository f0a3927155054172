"""A convolution and the depthwise convolution that alone reads it become one operator.

    conv2d(conv2d(x, W, b, act), D, d, act2, groups=channels) -> conv_depthwise(x, W, b, act, D, d, act2)
    the same of permute(x, NCHW -> NHWC)                      -> conv_depthwise(x, ..., layout=NCHW)

A depthwise sum stays within its channel: a core that computes some channels of the image in between needs no other,
and the image never leaves its caches.

Refused when the image in between has another reader or a residual; for other layouts and dtypes than NHWC in float32;
when a weight is computed; when the first convolution is grouped, or is neither 1 x 1 nor one of few channels (kernels
for such choose their own order); where the image in between and the result stay in the cores' L2 anyway; where the
predicted time does not fall; and for images that are empty, or have more elements than 32 bits count. The permute is
taken up only in front of a window of few channels, which reads single values of its input, in any order.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from ..hwdb.cost import Work, predict_seconds
from . import dialect, rewrite
from .dialect_pairs import conv_depthwise
from .refusals import keep

log = logging.getLogger(__name__)

PANEL_VECTORS = 3  # channels that go through both convolutions together: a register tile's width


def fuse_conv_depthwise(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fuse every pair that pays; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, dialect.conv2d):
            continue
        first = node.args[0]
        if not rewrite.calls(first, dialect.conv2d):
            continue
        a, b = rewrite.arguments(first), rewrite.arguments(node)
        reason = _refuse(first, node, a, b) or _slower(node, a, b, hw)
        if reason:
            keep(log, node, "it is not joined with %s: %s", first, reason)
            continue
        _fuse(graph, first, node, a, b)
        count += 1
    return rewrite.finish(graph, count)


def _refuse(first: fx.Node, second: fx.Node, a: dict[str, Any], b: dict[str, Any]) -> str:
    """Why the pair cannot be fused, or nothing."""
    if a["layout"] != "NHWC" or b["layout"] != "NHWC":
        return "not in NHWC"
    channels = rewrite.shape_of(first)[3]
    if not (b["groups"] == channels == rewrite.shape_of(b["weight"])[0]) or channels == 1:
        return "the second is not depthwise"
    if a["groups"] != 1:
        return "the first is grouped"
    if rewrite.sole_user(first) is not second:
        return f"{first} is read by {len(first.users)} nodes"
    if a["residual"] is not None or b["residual"] is not None:
        return "a residual is added"
    tensors = [t for t in (a["input"], first, second) if t is not None]
    constants = [t for t in (a["weight"], a["bias"], b["weight"], b["bias"]) if t is not None]
    if any(t.op != "get_attr" for t in constants):
        return "a weight is computed"
    if second.meta["val"].dtype != torch.float32:  # and so are the operands: torch convolves no two dtypes
        return "not in float32"
    if any(not 0 < prod(rewrite.shape_of(t)) < 2**31 for t in tensors):
        return "an image is empty, or has more elements than a 32-bit index counts"
    return ""


def _is_pointwise(a: dict[str, Any]) -> bool:
    kernel = rewrite.shape_of(a["weight"])[2:]
    return tuple(kernel) == (1, 1) == tuple(a["stride"]) and not any(a["padding"])


def _slower(second: fx.Node, a: dict[str, Any], b: dict[str, Any], hw: Hardware) -> str:
    """Why the fused operator would not be faster, or nothing."""
    batch, _, _, depth = rewrite.shape_of(a["input"])
    _, *hidden, channels = rewrite.shape_of(b["input"])
    lanes = hw.lanes("float32")
    if not _is_pointwise(a) and depth >= lanes:
        return "the first is a window over many channels"
    out = prod(rewrite.shape_of(second))
    between = batch * prod(hidden) * channels
    if 4 * (between + out) <= sum(c.size_bytes * -(-hw.cores // c.shared_by_cores) for c in hw.caches if c.level == 2):
        return "the image in between stays in L2"
    product = 2.0 * between * prod(rewrite.shape_of(a["weight"])[1:])
    sums = 2.0 * out * prod(rewrite.shape_of(b["weight"])[1:])
    read = 4.0 * (prod(rewrite.shape_of(a["input"])) + prod(rewrite.shape_of(a["weight"])))
    panels = -(-channels // (PANEL_VECTORS * lanes))
    # Cores share out panels; or rows, of which those under a common border are computed twice.
    twice = max(0, rewrite.shape_of(b["weight"])[2] - b["stride"][0]) * (hw.cores - 1) / hidden[0]
    works = (
        Work({"float32": product}, read, 4.0 * between),
        Work({"float32": sums}, 4.0 * between, 4.0 * out),
        Work({"float32": product + sums}, read, 4.0 * out, tasks=batch * panels),
        Work({"float32": product * (1.0 + twice) + sums}, read, 4.0 * out),
    )
    seconds = [s for work in works if (s := predict_seconds(hw, work)) is not None]
    if len(seconds) < len(works):
        return ""  # nothing is known of the machine's rates; less traffic is no loss
    apart, fused = seconds[0] + seconds[1], min(seconds[2:])
    return "" if fused < apart else f"predicted {fused:.1e} s, apart {apart:.1e} s"


def _fuse(graph: fx.GraphModule, first: fx.Node, second: fx.Node, a: dict[str, Any], b: dict[str, Any]) -> None:
    x, layout = a["input"], "NHWC"
    if not _is_pointwise(a) and _from_nchw(x):
        x, layout = x.args[0], "NCHW"
    names = ("weight", "bias", "stride", "padding", "dilation", "activation", "activation_args")
    arguments = (x, *(a[n] for n in names), *(b[n] for n in names), layout)
    permute = a["input"]
    new = rewrite.call(graph, conv_depthwise, arguments, before=second, value=second.meta["val"])
    rewrite.replace(second, new)
    rewrite.erase_unused(first, permute)


def _from_nchw(x: fx.Node) -> bool:
    """Whether x is an image in NCHW, permuted for this reader alone."""
    if not rewrite.calls(x, dialect.permute) or len(x.users) != 1:
        return False
    source, shape, dims, _ = x.args
    assert isinstance(source, fx.Node)
    return list(dims) == [0, 2, 3, 1] and list(shape) == list(rewrite.shape_of(source))  # type: ignore[arg-type]
