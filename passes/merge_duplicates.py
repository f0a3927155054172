"""Compute the same thing once (common subexpression elimination).

    f(x), f(x)              -> f(x), read by both; likewise where defaults are spelt out in one of them
    a + b, b + a            -> a + b, read by both; likewise products, equality, and, or, xor
    constants of equal bits -> one constant

Refused for random operators, operators with effects, two values that the graph returns both, or views of them (the
caller may change one of them), and arguments that are equal but not alike: 1 and 1.0 and True, 0.0 and -0.0. The
greater of two numbers is taken in either order for integers only: of 0.0 and -0.0, the order decides.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import memory, rewrite
from .refusals import keep

log = logging.getLogger(__name__)

aten = torch.ops.aten

_COMMUTATIVE = frozenset(
    {
        *(aten.add.Tensor, aten.mul.Tensor, aten.eq.Tensor, aten.ne.Tensor),
        *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor),
        *(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default),
    }
)
_COMMUTATIVE_FOR_INTEGERS = frozenset({aten.maximum.default, aten.minimum.default})

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
            original = first.setdefault(_call_key(node), node)
        else:
            continue
        if original is node:
            continue
        if rewrite.feeds_output(node) and rewrite.feeds_output(original):
            keep(log, node, "the graph returns both it and %s", original)
            continue
        if not memory.views(node) and memory.escapes(node) and memory.escapes(original):
            keep(log, node, "the graph returns views of both it and %s", original)
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


def _call_key(node: fx.Node) -> Hashable:
    """Equal for calls that compute the same."""
    if not isinstance(node.target, rewrite.Operator):
        return node.target, _key(node.args), _key(node.kwargs)
    arguments = rewrite.arguments(node)
    key = tuple(_key(value) for value in arguments.values())
    if _commutes(node, arguments):
        return node.target, frozenset(key[:2]), key[2:]
    return node.target, key


def _commutes(node: fx.Node, arguments: dict[str, Any]) -> bool:
    a, b, *rest = (*arguments.values(), None)
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    if node.target in _COMMUTATIVE_FOR_INTEGERS:
        value = rewrite.value_of(node)
        return value is not None and not value.is_floating_point()
    # The second operand of an addition may have a factor.
    return node.target in _COMMUTATIVE and rest[0] in (None, 1)


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
