"""Batch normalisation with stored statistics becomes one multiplication and one addition a channel.

    batch_norm(x, g, h, mean, var, eps) -> x * s + (h - mean * s),   s = g / sqrt(var + eps)

which is the form PyTorch computes in. Pointwise operations fuse with their neighbours and go along into any layout.
The factors are computed in float64 and rounded once.

Refused when statistics are those of the batch (training), when they or the factors are no constants, and when a factor
would not be finite.
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


def split_batch_norm(graph: fx.GraphModule, hw: Hardware) -> int:
    """Split every batch norm with stored statistics; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.batch_norm.default):
            continue
        found = batch_norm_factors(graph, node)
        if isinstance(found, str):
            keep(log, node, "%s", found)
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = node.meta["val"]
        shape = (-1, *[1] * (value.dim() - 2))
        stem = f"{node.name}_split"
        factors = [t.to(value.dtype).reshape(shape) for t in found]
        if not all(f.isfinite().all() for f in factors):
            keep(log, node, "its factors are not finite")
            continue
        s, t = (
            rewrite.add_constant(graph, f"{stem}_{k}", f, node)
            for k, f in zip(("scale", "shift"), factors, strict=True)
        )
        scaled = rewrite.call(graph, aten.mul.Tensor, (source, s), before=node, value=value)
        rewrite.replace(node, rewrite.call(graph, aten.add.Tensor, (scaled, t), before=node, value=value))
        count += 1
    return rewrite.finish(graph, count)


def batch_norm_factors(graph: fx.GraphModule, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | str:
    """The float64 factors s and t such that batch_norm(x) is x * s + t a channel, or why there are none."""
    a = rewrite.arguments(norm)
    if a["training"]:
        return "it is in training mode"
    tensors: dict[str, torch.Tensor] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = rewrite.constant(graph, a[name])
        if tensor is not None:
            tensors[name] = tensor.double()
        elif a[name] is not None:
            return "its statistics are not constants"
    scale = torch.rsqrt(tensors["running_var"] + a["eps"]) * tensors.get("weight", 1.0)
    return scale, tensors.get("bias", 0.0) - tensors["running_mean"] * scale
