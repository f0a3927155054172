"""Split a graph into regions that are compiled and stretches that stay in PyTorch.

Every node gets a level: the number of times a path to it changes between the two kinds. Nodes of one kind and level
form one part; a part only needs parts of lower level, so parts are convex and run in level order. What draws random
numbers or has effects runs in the order of the model: each counts as needing the one before.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..passes import rewrite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Nodes that run together; `compiled` tells where. Inputs and outputs are nodes of the whole graph."""

    compiled: bool
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Partition:
    """The parts in running order, and why nodes were left to PyTorch."""

    parts: tuple[Part, ...]
    reasons: dict[fx.Node, str]


def partition(graph: fx.GraphModule, why_not: Callable[[fx.Node], str | None]) -> Partition:
    """Group the graph's operators; `why_not(node)` is None for a node that can be compiled, else the reason."""
    reasons: dict[fx.Node, str] = {}
    compiled: dict[fx.Node, bool] = {}
    level: dict[fx.Node, int] = {}
    behind = 0  # the level of the last node that has its place in an order
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    for node in calls:
        if node.target is operator.getitem:
            # A result of a multi-output operator lives where its producer does.
            source = node.args[0]
            assert isinstance(source, fx.Node)
            compiled[node], level[node] = compiled[source], level[source]
            continue
        reason = why_not(node)
        compiled[node] = reason is None
        if reason is not None:
            reasons[node] = reason
        # Parts of even level are compiled, of odd level in PyTorch.
        kind = 0 if compiled[node] else 1
        needed = kind
        for source in node.all_input_nodes:
            if source in level:
                same = level[source] % 2 == kind
                needed = max(needed, level[source] + (0 if same else 1))
        if not rewrite.is_pure(node):
            needed = behind = max(needed, behind)
        level[node] = needed
    groups: dict[int, list[fx.Node]] = {}
    for node in calls:
        groups.setdefault(level[node], []).append(node)
    return Partition(tuple(_part(groups[k], k % 2 == 0) for k in sorted(groups)), reasons)


def _part(nodes: list[fx.Node], compiled: bool) -> Part:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    outputs: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                inputs[source] = None
        if any(user not in inside for user in node.users):
            outputs[node] = None
    return Part(compiled, tuple(nodes), tuple(inputs), tuple(outputs))
