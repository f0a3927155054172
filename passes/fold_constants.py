"""Evaluate once, at compile time, what depends on constants only.

    f(constant, ...) -> constant            clone(constant) where the graph returns it

Refused where the result would make the weights grow by more than what it frees and `_GROWTH` bytes in
total; for random operators and operators with effects; and for `expand`, `full` and dequantize, which say in a few
bytes what the constant would spell out (they are evaluated when something that depends on them is).
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import memory, rewrite
from .dialect_int8 import STORED
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_GROWTH = 64 << 20
_COMPACT = frozenset(
    {
        aten.expand.default,
        aten.full.default,
        aten.full_like.default,
        aten.zeros.default,
        aten.zeros_like.default,
        aten.ones.default,
        aten.ones_like.default,
        aten.scalar_tensor.default,
        *STORED,
    }
)
# Memory as it is found: not a value.
_UNDEFINED = frozenset({aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default})
_NAMESPACES = frozenset({"aten", "prims", "graphwright"})


def fold_constants(graph: fx.GraphModule, hw: Hardware) -> int:
    """Replace constant subgraphs by their values; returns the number of values stored."""
    constants = _constant_nodes(graph)
    reads = Counter(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    values: dict[fx.Node, torch.Tensor] = {}
    names: dict[fx.Node, str] = {}
    unread: dict[fx.Node, None] = {}
    grown = 0
    for node in _roots(constants):
        cone = _cone(node, constants, values)
        alone = [n for n in _read_here_only(node, cone) if n.op == "get_attr" and reads[str(n.target)] == 1]
        growth = int(node.meta["val"].nbytes) - sum(int(n.meta["val"].nbytes) for n in alone)
        if grown + growth > _GROWTH:
            keep(log, node, "stored, it would take %d more bytes", growth)
            continue
        grown += growth
        values[node] = _evaluate(graph, node, cone, values)
        leaves = [n for n in cone if n.op == "get_attr"]
        names[node] = str(leaves[0].target) if len(leaves) == 1 else node.name
        unread.update(dict.fromkeys(cone))
    for node, value in reversed(values.items()):  # what is returned as a view of another value is its own by then
        stored = rewrite.add_constant(graph, f"{names[node]}_folded", value, node)
        given = memory.escapes(node)  # to the caller, who may write to it
        node.replace_all_uses_with(rewrite.call(graph, aten.clone.default, (stored,), before=node) if given else stored)
    rewrite.erase_unused(*[n for n in reversed(constants) if n in unread or n in values])
    return rewrite.finish(graph, len(values))


def _constant_nodes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """The nodes that depend on no input, and their order."""
    constants: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known = rewrite.constant(graph, node) is not None
        else:
            known = _may_fold(node) and all(n in constants for n in node.all_input_nodes)
        if known:
            constants[node] = len(constants)
    return constants


def _may_fold(node: fx.Node) -> bool:
    if not rewrite.is_pure(node) or node.target in _UNDEFINED:
        return False
    if node.target is operator.getitem:
        return rewrite.value_of(node) is not None
    # An operator of somebody else's may do what its schema does not say.
    if node.target.namespace not in _NAMESPACES:  # type: ignore[union-attr]
        return False
    values = node.meta.get("val")
    many = values if isinstance(values, (tuple, list)) else (values,)
    return all(isinstance(v, torch.Tensor) and all(isinstance(d, int) for d in v.shape) for v in many)


def _roots(constants: dict[fx.Node, int]) -> list[fx.Node]:
    """The constant nodes whose value something else needs, in order."""
    roots: list[fx.Node] = []
    stay: set[fx.Node] = set()
    for node in reversed(constants):
        if _given_away(node):
            stay.add(node)
            continue
        if node.op == "get_attr" or all(user in constants and user not in stay for user in node.users):
            continue
        if node.target in _COMPACT or rewrite.value_of(node) is None:
            stay.add(node)
        else:
            roots.append(node)
    return roots[::-1]


def _given_away(node: fx.Node) -> bool:
    """Whether the node is the copy of a stored constant that the graph returns."""
    if not rewrite.calls(node, aten.clone.default):
        return False
    return node.all_input_nodes[0].op == "get_attr" and memory.escapes(node)


def _cone(root: fx.Node, constants: dict[fx.Node, int], values: dict[fx.Node, torch.Tensor]) -> list[fx.Node]:
    """What `root` is computed from, in order, back to stored constants and values already known."""
    seen: set[fx.Node] = set()
    stack = list(root.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in values:
            stack.extend(node.all_input_nodes)
    return sorted(seen, key=lambda n: constants[n])


def _read_here_only(root: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
    """The nodes of the cone that nothing reads but what leads to `root`."""
    alone = {root}
    for node in reversed(cone):
        if all(user in alone for user in node.users):
            alone.add(node)
    return [n for n in cone if n in alone]


def _evaluate(
    graph: fx.GraphModule, root: fx.Node, cone: list[fx.Node], values: dict[fx.Node, torch.Tensor]
) -> torch.Tensor:
    known: dict[fx.Node, Any] = dict(values)
    with torch.no_grad():
        for node in [*cone, root]:
            if node in known:
                continue
            if node.op == "get_attr":
                known[node] = rewrite.constant(graph, node)
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            assert callable(node.target)
            known[node] = node.target(*args, **kwargs)
        result: torch.Tensor = known[root].resolve_conj().resolve_neg()
    expected = root.meta["val"]
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype), root
    # A view would hold on to, or share, the memory of what it was taken from.
    return result.clone(memory_format=torch.contiguous_format)
