"""Remove what nobody reads and what does nothing.

    unread nodes and constants                              -> gone
    alias(x), detach(x), clone(x), dropout in eval(x)       -> x
    reshape, expand(x) to the shape it has                  -> x
    permute in order, slice of everything, repeat once, pad by 0 -> x
    _to_copy(x) to the dtype and device it has              -> x
    mul(x, 1), div(x, 1), sub(x, 0)                         -> x   (x + 0 is not x: -0.0 + 0 is 0.0)

Kept: random operators, which move the generator that others draw from; operators with effects; a copy that
the graph returns where x itself may not be returned in its place (an input, a constant, a value somebody else
reads), itself or as a view; a copy whose reader looks at strides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import memory, rewrite
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten


def remove_dead(graph: fx.GraphModule, hw: Hardware) -> int:
    """Erase dead nodes and no-ops; returns the number of nodes and constants that went."""
    count = 0
    # First: a copy stays where somebody else reads its source, who has to be alive.
    for node in reversed(list(graph.graph.nodes)):
        if node.users or not _may_go(node):
            continue
        graph.graph.erase_node(node)
        count += 1
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.users and _does_nothing(node) and not _reason_to_keep(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            rewrite.replace(node, source)
            count += 1
    if count:
        _drop_constants(graph)
    return rewrite.finish(graph, count)


def _may_go(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    # The dtype and shape it asserts are part of the graph already.
    return node.op == "call_function" and (rewrite.is_pure(node) or node.target is aten._assert_tensor_metadata.default)


def _drop_constants(graph: fx.GraphModule) -> None:
    """Forget the buffers that no node reads."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph.named_buffers() if name not in read and "." not in name]:
        delattr(graph, name)


def _does_nothing(node: fx.Node) -> bool:
    test = _NO_OPS.get(node.target) if isinstance(node.target, Operator) else None
    source = node.args[0] if node.args else None
    if test is None or not isinstance(source, fx.Node):
        return False
    old, new = rewrite.value_of(source), rewrite.value_of(node)
    if old is None or new is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    return bool(test(rewrite.arguments(node), tuple(old.shape)))


def _reason_to_keep(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if any(user.target in memory.READS_STRIDES for user in node.users) and node.target in _COPIES:
        keep(log, node, "a reader looks at its strides")
        return True
    if node.target in _COPIES and memory.escapes(node) and (len(source.users) > 1 or not _is_fresh(source)):
        keep(log, node, "it is returned, and %s may not be", source)
        return True
    return False


def _is_fresh(node: fx.Node) -> bool:
    """Whether the node's result shares memory with nothing else."""
    if node.op != "call_function" or not isinstance(node.target, Operator):
        return False
    # reshape's schema says that it may return a view.
    return all(r.alias_info is None for r in node.target._schema.returns)


def _same_slice(a: dict[str, Any], shape: tuple[int, ...]) -> bool:
    return bool(a["step"] == 1)  # the result has the shape of the operand


def _in_order(a: dict[str, Any], shape: tuple[int, ...]) -> bool:
    return [d % len(shape) for d in a["dims"]] == list(range(len(shape)))


def _is_number(value: object, number: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


def _always(a: dict[str, Any], shape: tuple[int, ...]) -> bool:
    return True


_NO_OPS: dict[Operator, Callable[[dict[str, Any], tuple[int, ...]], object]] = {
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.clone.default: _always,
    aten.contiguous.default: _always,
    aten.dropout.default: lambda a, shape: not a["train"] or a["p"] == 0,
    aten.reshape.default: _always,
    aten.view.default: _always,
    aten.expand.default: _always,
    aten.permute.default: _in_order,
    aten.slice.Tensor: _same_slice,
    aten.repeat.default: _always,
    aten.constant_pad_nd.default: lambda a, shape: not any(a["pad"]),
    aten._to_copy.default: lambda a, shape: a["layout"] in (None, torch.strided),
    aten.mul.Tensor: lambda a, shape: _is_number(a["other"], 1),
    aten.div.Tensor: lambda a, shape: _is_number(a["other"], 1),
    aten.sub.Tensor: lambda a, shape: _is_number(a["other"], 0),
}
# Those whose result has memory of its own.
_COPIES = frozenset(_NO_OPS) - {
    aten.alias.default,
    aten.detach.default,
    aten.reshape.default,
    aten.view.default,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
}
