"""Constant padding moves to the operator that can pad, and what is computed only to be cut off is not computed.

    pad(pad(x, p, v), q, v)            -> pad(x, p + q, v)
    conv(f(pad(x, p, 0)))              -> conv(pad(f(x), p, 0))            f(0) = 0; fuse_conv_activation takes it up
    avg_pool2d(pad(x, p, 0))           -> avg_pool2d(x, padding=p, count_include_pad=True)
    max_pool2d(pad(x, p, -inf))        -> max_pool2d(x, padding=p)
    slice(conv(x, padding=p), from a)  -> conv(pad(x, the rest of p), padding=0)

Refused where the padding or the convolution is read by anybody else; where f(0) is not 0.0; where padding is negative,
uneven (pools), more than half the window, or of another value; under ceil_mode; where a pool does not count padding;
where a slice skips elements or cuts off more than the padding made.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .identities.move import cut
from .refusals import keep
from .rewrite import calls

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_POOLS = {aten.avg_pool2d.default: 0.0, aten.max_pool2d.default: -math.inf}
# f(0.0) is 0.0 and not -0.0.
_KEEPS_ZERO = (
    *(aten.relu.default, aten.abs.default, aten.tanh.default, aten.silu.default, aten.gelu.default),
    *(aten.hardswish.default, aten.leaky_relu.default, aten.sin.default, aten.sqrt.default),
)
_pad = aten.constant_pad_nd.default


def merge_pads(graph: fx.GraphModule, hw: Hardware) -> int:
    """Move padding to where it costs nothing; returns how many pads, pools and convolutions changed."""
    count = 0
    for node in list(graph.graph.nodes):
        if node._erased or rewrite.value_of(node) is None:
            continue
        for rule in _RULES.get(node.target, ()):
            new = rule(graph, node)
            if new is not None:
                node.replace_all_uses_with(new)
                rewrite.erase_cone(node)
                count += 1
                break
    return rewrite.finish(graph, count)


def _amounts(pad: fx.Node) -> list[int]:
    """Elements in front and behind, for every dim from the last to the first."""
    given = [int(n) for n in rewrite.arguments(pad)["pad"]]
    return given + [0] * (2 * len(rewrite.shape_of(pad)) - len(given))


def _value(pad: fx.Node) -> float:
    return float(rewrite.arguments(pad)["value"])


def _alike(a: float, b: float) -> bool:
    return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


def _pad_of_pad(graph: fx.GraphModule, outer: fx.Node) -> fx.Node | None:
    inner = outer.args[0]
    if not calls(inner, _pad):
        return None
    if not _alike(_value(inner), _value(outer)):
        keep(log, outer, "the two paddings have different values")
        return None
    if min(_amounts(inner) + _amounts(outer)) < 0:
        keep(log, outer, "a padding cuts off")
        return None
    total = [a + b for a, b in zip(_amounts(inner), _amounts(outer), strict=True)]
    return _padded(graph, outer, inner.args[0], total, _value(outer))


def _padded(graph: fx.GraphModule, before: fx.Node, x: Any, amounts: list[int], value: float) -> fx.Node:
    last = max((i for i, n in enumerate(amounts) if n), default=1) // 2 * 2 + 2
    return rewrite.call(graph, _pad, (x, amounts[:last], value), before=before)


def _pad_before_elementwise(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    pad = node.args[0]
    reader = rewrite.sole_user(node)
    if not calls(pad, _pad) or not calls(reader, *_CONVS) or reader.args[0] is not node:
        return None
    if len(pad.users) > 1:
        keep(log, node, "its padded operand is read by %d nodes", len(pad.users))
        return None
    if not _alike(_value(pad), 0.0):
        keep(log, node, "it is padded with %s", _value(pad))
        return None
    assert isinstance(node.target, rewrite.Operator)
    inner = rewrite.call(graph, node.target, (pad.args[0], *node.args[1:]), node.kwargs, before=node)
    return _padded(graph, node, inner, _amounts(pad), 0.0)


def _pool(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    pad = node.args[0]
    if not calls(pad, _pad):
        return None
    reason = _pool_refusal(node, pad)
    if reason:
        keep(log, node, "%s", reason)
        return None
    a = rewrite.arguments(node)
    right, bottom = _amounts(pad)[0], _amounts(pad)[2]
    height, width = rewrite.repeated(a["padding"], 2)
    a |= {"self": pad.args[0], "padding": [height + bottom, width + right]}
    if not a["stride"]:
        a["stride"] = a["kernel_size"]
    assert isinstance(node.target, rewrite.Operator)
    return rewrite.call(graph, node.target, tuple(a.values()), before=node)


def _pool_refusal(node: fx.Node, pad: fx.Node) -> str:
    a, amounts = rewrite.arguments(node), _amounts(pad)
    kernel, padding = rewrite.repeated(a["kernel_size"], 2), rewrite.repeated(a["padding"], 2)
    if not _alike(_value(pad), _POOLS[node.target]):  # type: ignore[index]
        return f"it is padded with {_value(pad)}"
    if min(amounts) < 0 or any(amounts[4:]) or amounts[0] != amounts[1] or amounts[2] != amounts[3]:
        return "the padding is uneven, negative, or not of the image"
    if amounts[2] + padding[0] > kernel[0] // 2 or amounts[0] + padding[1] > kernel[1] // 2:
        return "the padding is more than half the window"
    if a["ceil_mode"]:
        return "the last window may begin in the padding"
    if not a.get("count_include_pad", True):
        return "its padding does not count"
    return ""


def _cut_convolution(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    found = cut(node)
    if found is None or not calls(found[0], *_CONVS):
        return None
    conv, dim, first, step, count = found
    a, rank = rewrite.arguments(conv), len(rewrite.shape_of(conv))
    if dim < 2 or rank != len(rewrite.shape_of(a["weight"])):
        return None
    if len(conv.users) > 1:
        keep(log, node, "%s is read by %d nodes", conv, len(conv.users))
        return None
    if step != 1 or not count:
        keep(log, node, "it skips elements")
        return None
    axis, spatial = dim - 2, rank - 2
    stride, padding, dilation = (rewrite.repeated(a[k], spatial) for k in ("stride", "padding", "dilation"))
    length = rewrite.shape_of(a["input"])[dim]
    reach = dilation[axis] * (rewrite.shape_of(a["weight"])[dim] - 1) + 1
    front = padding[axis] - first * stride[axis]
    back = (count - 1) * stride[axis] + reach - length - front
    if front < 0 or back < 0:
        keep(log, node, "it cuts off more than the padding made")
        return None
    amounts = [n for p in padding[::-1] for n in (p, p)]
    place = 2 * (spatial - 1 - axis)
    amounts[place : place + 2] = [front, back]
    a |= {"input": _padded(graph, node, a["input"], amounts, 0.0), "padding": [0] * spatial}
    assert isinstance(conv.target, rewrite.Operator)
    return rewrite.call(graph, conv.target, tuple(a.values()), before=node, source=conv)


Rule = Callable[[fx.GraphModule, fx.Node], "fx.Node | None"]
_RULES: dict[Any, tuple[Rule, ...]] = {
    _pad: (_pad_of_pad,),
    aten.slice.Tensor: (_cut_convolution,),
    **dict.fromkeys(_KEEPS_ZERO, (_pad_before_elementwise,)),
    **dict.fromkeys(_POOLS, (_pool,)),
}
