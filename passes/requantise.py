"""quantize(qlinear(...)) -> qlinear(..., result in 8 bits), and no byte is widened only to be rounded again.

    quantize(q2d(..., float32), s, z)       -> q2d(..., s, z, uint8)         q2d: qlinear or qconv2d
    others that read q2d(...)               -> dequantize(q2d(..., uint8))   what they read is rounded then
    quantize(dequantize(q, s, z), s, z)     -> q
    quantize(clamp(x, low, high), s, z)     -> quantize(x, s, z)             low and high the codes' ends, or beyond
    q2d(..., residual=dequantize(q, s, z))  -> q2d(..., residual=q with s and z)

Refused: products whose readers round them by different scales, and results that the graph returns in float32.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect_int8, rewrite
from .refusals import keep
from .rewrite import arguments, calls, feeds_output

log = logging.getLogger(__name__)


def requantise(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let products of 8 bits give 8 bits where such products read them."""
    return _requantise(graph, others_too=True)


def requantise_alone(graph: fx.GraphModule, hw: Hardware) -> int:
    """As `requantise`, but for products that anybody else reads: those were trained on what is not rounded."""
    return _requantise(graph, others_too=False)


def _requantise(graph: fx.GraphModule, others_too: bool) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if node._erased:
            continue
        if node.op == "call_function" and node.target in dialect_int8.PRODUCTS:
            count += _residual(node) + _result(graph, node, others_too)
        elif calls(node, dialect_int8.quantize):
            count += _clamp(node) + _pair(node)
    return rewrite.finish(graph, count)


def _clamp(node: fx.Node) -> int:
    """quantize(clamp(x)): rounding clips by itself where the bounds have the first and the last code."""
    source, scale, zero, dtype = node.args
    if not calls(source, torch.ops.aten.clamp.default):
        return 0
    given = arguments(source)
    x, ends = given["self"], (given["min"], given["max"])
    if not all(end is None or isinstance(end, (int, float)) for end in ends) or x.meta["val"].dtype != torch.float32:
        return 0
    low, high = dialect_int8.RANGES[dtype]  # type: ignore[index]
    least, most = (None if end is None else end / scale + zero for end in ends)
    if (least is not None and round(least) > low) or (most is not None and round(most) < high):
        return 0
    node.update_arg(0, x)
    rewrite.erase_unused(source)
    return 1


def _pair(node: fx.Node) -> int:
    """quantize(dequantize(q)) by one and the same scale."""
    (source, scale, zero, dtype) = node.args
    if not calls(source, dialect_int8.dequantize) or tuple(source.args[1:]) != (scale, zero):
        return 0
    stored = source.args[0]
    assert isinstance(stored, fx.Node)
    if stored.meta["val"].dtype != dtype:
        return 0
    rewrite.replace(node, stored)
    rewrite.erase_unused(source)
    return 1


def _residual(node: fx.Node) -> int:
    given = arguments(node)
    residual = given["residual"]
    if not calls(residual, dialect_int8.dequantize):
        return 0
    stored, scale, zero = residual.args
    _set(node, residual=stored, residual_scale=scale, residual_zero=zero)
    rewrite.erase_unused(residual)
    return 1


def _result(graph: fx.GraphModule, node: fx.Node, others_too: bool) -> int:
    if arguments(node)["dtype"] is not None:
        return 0
    rounding = [user for user in node.users if calls(user, dialect_int8.quantize)]
    if not rounding:
        return 0
    how = rounding[0].args[1:]
    if any(user.args[1:] != how for user in rounding):
        keep(log, node, "its readers round it by different scales")
        return 0
    if feeds_output(node):
        keep(log, node, "the graph returns it in float32")
        return 0
    scale, zero, dtype = how
    value = rounding[0].meta["val"]
    wide = [user for user in node.users if user not in rounding]
    if wide and not others_too:
        keep(log, node, "others read it in float32, as in training")
        return 0
    if wide:
        # A residual among them takes the bytes again in its own turn.
        real = rewrite.call(
            graph, dialect_int8.dequantize, (node, scale, zero), before=node.next, value=node.meta["val"], source=node
        )
        for user in wide:
            user.replace_input_with(node, real)
    for user in rounding:
        rewrite.replace(user, node)
    _set(node, out_scale=scale, out_zero=zero, dtype=dtype)
    node.meta["val"] = value
    return 1


def _set(node: fx.Node, **changed: object) -> None:
    """Change arguments by name."""
    given = arguments(node) | changed
    node.args = tuple(given[a.name] for a in node.target._schema.arguments)  # type: ignore[union-attr]
    node.kwargs = {}
