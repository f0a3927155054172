"""Which pass made each node of a rewritten graph, and which captured nodes it stands for.

Passes are only watched from outside: where a node is gone after a pass, what its readers read in its place stands for
it; where they are gone too, what stands for them does.
"""

from __future__ import annotations

from torch import fx
from torch.utils._pytree import tree_leaves


class Trail:
    """Filled by `begin` on the graph before the first pass, and `after` behind every pass that rewrote."""

    def __init__(self) -> None:
        self.made: dict[fx.Node, str] = {}
        self.origins: dict[fx.Node, set[str]] = {}  # names of captured nodes
        self._operands: dict[fx.Node, list[fx.Node]] = {}

    def begin(self, graph: fx.GraphModule) -> None:
        """Every node stands for itself."""
        self._operands = _operands(graph)
        self.origins = {node: {node.name} for node in self._operands}

    def after(self, name: str, graph: fx.GraphModule) -> None:
        """Follow what pass `name` did."""
        old, new = self._operands, _operands(graph)
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node, operands in old.items():
            for operand in operands:
                readers.setdefault(operand, []).append(node)
        heirs: dict[fx.Node, set[fx.Node]] = {}
        for node in reversed(old):  # readers first
            if node not in new:
                heirs[node] = set().union(*(_taken(node, r, old, new, heirs) for r in readers.get(node, ())))
        for node in new:
            if node not in old:
                self.made[node] = name
                self.origins[node] = set()
        for node, found in heirs.items():
            for heir in found:
                self.origins[heir] |= self.origins[node]
        self._pass_on(old, new)
        self._operands = new

    def _pass_on(self, old: dict[fx.Node, list[fx.Node]], new: dict[fx.Node, list[fx.Node]]) -> None:
        """A new node that stands for nothing is part of what its new reader stands for."""
        for node in reversed(new):
            if node in old:
                continue
            for operand in new[node]:
                if operand not in old and not self.origins[operand]:
                    self.origins[operand] |= self.origins[node]

    def by_name(self) -> dict[str, tuple[str, list[str]]]:
        """For the nodes there are now: the pass that made it ("" for none), and the captured nodes it stands for."""
        return {n.name: (self.made.get(n, ""), sorted(self.origins[n])) for n in self._operands}


def _operands(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """The nodes in order, each with those it reads, one entry a place."""
    return {n: [a for a in tree_leaves((n.args, n.kwargs)) if isinstance(a, fx.Node)] for n in graph.graph.nodes}


def _taken(
    node: fx.Node,
    reader: fx.Node,
    old: dict[fx.Node, list[fx.Node]],
    new: dict[fx.Node, list[fx.Node]],
    heirs: dict[fx.Node, set[fx.Node]],
) -> set[fx.Node]:
    """What stands for `node` by the account of one of its former readers."""
    if reader not in new:
        return heirs[reader]
    if len(old[reader]) != len(new[reader]):
        return set()
    return {b for a, b in zip(old[reader], new[reader], strict=True) if a is node and b in new}
