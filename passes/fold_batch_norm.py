"""Batch normalisation with stored statistics becomes part of the weights in front of it.

    batch_norm(conv(x, W, b), g, h, mean, var, eps) -> conv(x, W * s, (b - mean) * s + h)
    where s = g / sqrt(var + eps)

for conv1d, conv2d, conv3d, their transposed kinds, and linear on a matrix. The new weights are computed in
float64 and rounded once.

Refused when the product is read by anybody else, when statistics are those of the batch (training), when
weights or statistics are not constants, and when the new weights would not be finite.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .refusals import keep
from .split_batch_norm import batch_norm_factors

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CONVS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
_PRODUCTS = _CONVS | _TRANSPOSED | {aten.linear.default}


def fold_batch_norm(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fold every batch norm whose product can take it; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.batch_norm.default):
            continue
        product = node.args[0]
        assert isinstance(product, fx.Node)
        if product.target not in _PRODUCTS:
            keep(log, node, "it does not follow a product")
            continue
        folded = _fold(graph, product, node)
        if isinstance(folded, str):
            keep(log, node, "%s", folded)
            continue
        _rewrite(graph, product, node, *folded)
        count += 1
    return rewrite.finish(graph, count)


def _fold(graph: fx.GraphModule, product: fx.Node, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | str:
    """The new weight and bias, or why there are none."""
    p = rewrite.arguments(product)
    if rewrite.sole_user(product) is not norm:
        return f"{product} is read by {len(product.users)} nodes"
    factors = batch_norm_factors(graph, norm)
    if isinstance(factors, str):
        return factors
    scale, shift = factors
    weight, bias = rewrite.constant(graph, p["weight"]), rewrite.constant(graph, p["bias"])
    if weight is None or (bias is None and p["bias"] is not None):
        return "the weights it follows are not constants"
    if len(rewrite.shape_of(product)) != (2 if product.target is aten.linear.default else weight.dim()):
        # An unbatched image, and a linear over sequences, have their channels elsewhere than in dim 1.
        return f"the channels of {product} are not its dim 1"
    groups = p["groups"] if product.target in _TRANSPOSED else None
    new_weight = _scaled(weight.double(), scale, groups).to(weight.dtype)
    new_bias = (shift if bias is None else shift + bias.double() * scale).to(weight.dtype)
    if not (new_weight.isfinite().all() and new_bias.isfinite().all()):
        return "the folded weights are not finite"
    return new_weight, new_bias


def _scaled(weight: torch.Tensor, scale: torch.Tensor, transposed_groups: int | None) -> torch.Tensor:
    """`weight` with every output channel times its scale."""
    if transposed_groups is None:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # A transposed weight is [in, out / groups, ...]: group g of the inputs feeds group g of the outputs.
    grouped = weight.reshape(transposed_groups, -1, *weight.shape[1:])
    factors = scale.reshape(transposed_groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (grouped * factors).reshape(weight.shape)


def _rewrite(graph: fx.GraphModule, product: fx.Node, norm: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> None:
    arguments: dict[str, Any] = rewrite.arguments(product)
    stem = arguments["weight"].target
    arguments["weight"] = rewrite.add_constant(graph, f"{stem}_normed", weight, norm)
    arguments["bias"] = rewrite.add_constant(graph, f"{stem}_normed_bias", bias, norm)
    assert isinstance(product.target, rewrite.Operator)
    new = rewrite.call(graph, product.target, tuple(arguments.values()), before=norm, value=norm.meta["val"])
    rewrite.replace(norm, new)
    rewrite.erase_unused(product)
