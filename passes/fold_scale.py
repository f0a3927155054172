"""A constant factor for each channel becomes part of the weights in front of it.

    linear(x, W, b) * s -> linear(x, W * s, b * s)     s: one number an output, as in ConvNeXt's layer scale
    conv(x, W, b) * s   -> conv(x, W * s, b * s)       conv1d, conv2d, conv3d

What is added behind the factor can then be fused into the product. The new weights are computed in float64 and
rounded once.

Refused when the product is read by anybody else, when weights are no constants, for dtypes that are not floating point
or change, and when the new weights would not be finite.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CONVS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})


def fold_scale(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fold every factor whose product can take it; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.mul.Tensor):
            continue
        for product, factor in (node.args, node.args[::-1]):
            if not rewrite.calls(product, aten.linear.default, *_CONVS):
                continue
            reason = _fold(graph, node, product, factor)
            if reason:
                keep(log, node, "%s", reason)
                continue
            count += 1
            break
    return rewrite.finish(graph, count)


def _fold(graph: fx.GraphModule, scaled: fx.Node, product: fx.Node, factor: object) -> str:
    """Fold one factor, or say why not."""
    if rewrite.sole_user(product) is not scaled:
        return f"{product} is read by {len(product.users)} nodes"
    arguments = rewrite.arguments(product)
    constants = [rewrite.constant(graph, node) for node in (factor, arguments["weight"], arguments["bias"])]
    scale, weight, bias = constants
    if scale is None or weight is None or (bias is None and arguments["bias"] is not None):
        return "the factor or the weights are not constants"
    operands = [n for n in (scaled, product, factor, arguments["weight"], arguments["bias"]) if n is not None]
    if not rewrite.is_float(*operands):
        return "the dtype is not floating point, or changes"
    shape = rewrite.shape_of(product)
    places = [1] * len(shape)
    channel = len(shape) - 1 if product.target is aten.linear.default else len(shape) - weight.dim() + 1
    places[channel] = weight.shape[0]
    if [1] * (len(shape) - scale.dim()) + list(scale.shape) != places:
        return f"the factor has shape {tuple(scale.shape)}, not one number a channel"
    factors = scale.double().flatten()
    new_weight = (weight.double() * factors.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    new_bias = None if bias is None else (bias.double() * factors).to(bias.dtype)
    if not all(t.isfinite().all() for t in (new_weight, new_bias) if t is not None):
        return "the scaled weights are not finite"
    stem = arguments["weight"].target
    arguments["weight"] = rewrite.add_constant(graph, f"{stem}_scaled", new_weight, scaled)
    if new_bias is not None:
        arguments["bias"] = rewrite.add_constant(graph, f"{stem}_scaled_bias", new_bias, scaled)
    assert isinstance(product.target, rewrite.Operator)
    new = rewrite.call(graph, product.target, tuple(arguments.values()), before=scaled, value=scaled.meta["val"])
    rewrite.replace(scaled, new)
    rewrite.erase_unused(product)
    return ""
