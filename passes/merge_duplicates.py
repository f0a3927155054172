"""Compute the same thing once (common subexpression elimination).

    f(x), f(x)              -> f(x), read by both
    constants of equal bits -> one constant

Refused for random operators, operators with effects, two values that the graph returns both (the caller may
change one of them), and arguments that are equal but not alike: 1 and 1.0 and True, 0.0 and -0.0.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .refusals import keep

log = logging.getLogger(__name__)

# Elements compared before whole tensors are: equal shapes are common among weights, equal samples are not.
_SAMPLE = 64


def merge_duplicates(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let every duplicate's readers read the first one; returns the number of duplicates."""
    count = 0
    first: dict[Hashable, fx.Node] = {}
    constants: dict[Hashable, list[tuple[fx.Node, torch.Tensor]]] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            original = _equal_constant(graph, node, constants)
        elif node.op == "call_function" and rewrite.is_pure(node):
            original = first.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        else:
            continue
        if original is node:
            continue
        if rewrite.feeds_output(node) and rewrite.feeds_output(original):
            keep(log, node, "the graph returns both it and %s", original)
            continue
        rewrite.replace(node, original)
        count += 1
    return rewrite.finish(graph, count)


def _equal_constant(
    graph: fx.GraphModule, node: fx.Node, constants: dict[Hashable, list[tuple[fx.Node, torch.Tensor]]]
) -> fx.Node:
    tensor = rewrite.constant(graph, node)
    if tensor is None or tensor.layout != torch.strided:
        return node
    alike = constants.setdefault((tensor.dtype, tensor.device, tuple(tensor.shape), _sample(tensor)), [])
    for other, value in alike:
        if value is tensor or torch.equal(_bits(value), _bits(tensor)):
            return other
    alike.append((node, tensor))
    return node


def _sample(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    places = torch.linspace(0, tensor.numel() - 1, min(_SAMPLE, tensor.numel()), dtype=torch.float64).long()
    index = torch.unravel_index(places, tensor.shape) if tensor.dim() else ()
    return bytes(_bits(tensor[index]).tolist())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: -0.0 is not 0.0, and a NaN equals itself."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _key(value: Any) -> Hashable:
    """A hashable twin of an argument that is equal only for arguments alike in type and bits."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    return type(value), value
