"""Which pass made each node of a rewritten graph, and which captured nodes it stands for.

What replaced a node that is gone after a pass stands for it. Where nothing did:

    as many calls of its operator, from the same place of the source, are new as are gone     each for one, in order
    its readers are gone too, or read another node in its place                               what stands for those; it
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

Operands = dict[fx.Node, list[fx.Node]]


class Trail:
    """Filled by `begin` on the graph before the first pass, and `after` behind every pass that rewrote."""

    def __init__(self) -> None:
        self.made: dict[fx.Node, str] = {}
        self.origins: dict[fx.Node, set[str]] = {}  # names of captured nodes
        self._operands: Operands = {}
        self._replaced: dict[str, str] = {}  # since the last pass

    def begin(self, graph: fx.GraphModule) -> None:
        """Every node stands for itself."""
        self._operands = _operands(graph)
        self.origins = {node: {node.name} for node in self._operands}
        graph._register_replace_node_hook(self._replace)

    def _replace(self, old: fx.Node, new: str, user: fx.Node) -> None:
        self._replaced[old.name] = new

    def after(self, name: str, graph: fx.GraphModule) -> None:
        """Follow what pass `name` did."""
        old, new = self._operands, _operands(graph)
        for node in new:
            if node not in old:
                self.made[node] = name
                self.origins[node] = set()
        for node, heirs in self._heirs(old, new).items():
            for heir in heirs:
                self.origins[heir] |= self.origins[node]
        for node in reversed(new):  # a new node that stands for nothing is part of what its new reader stands for
            for operand in new[node] if node not in old else ():
                if operand not in old and not self.origins[operand]:
                    self.origins[operand] |= self.origins[node]
        self._operands, self._replaced = new, {}

    def _heirs(self, old: Operands, new: Operands) -> dict[fx.Node, set[fx.Node]]:
        """What stands for the nodes that are gone."""
        names = {node.name: node for node in new}
        twins = _twins(old, new)
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node, operands in old.items():
            for operand in operands:
                readers.setdefault(operand, []).append(node)
        heirs: dict[fx.Node, set[fx.Node]] = {}
        for node in reversed(old):  # readers first
            if node in new:
                continue
            if node in twins:
                heirs[node] = {twins[node]}
            elif (replacement := names.get(self._last(node.name))) is not None:
                heirs[node] = {replacement}
            else:
                found = [(old[r], new.get(twins.get(r, r)), heirs.get(r)) for r in readers.get(node, ())]
                heirs[node] = set().union(*(_instead(node, *one) for one in found))
        return heirs

    def _last(self, name: str) -> str:
        """What a name was replaced with in the end."""
        seen = {name}
        while (following := self._replaced.get(name)) is not None and following not in seen:
            name = following
            seen.add(name)
        return name

    def by_name(self) -> dict[str, tuple[str, list[str]]]:
        """For the nodes there are now: the pass that made it ("" for none), and the captured nodes it stands for."""
        return {n.name: (self.made.get(n, ""), sorted(self.origins[n])) for n in self._operands}


def _operands(graph: fx.GraphModule) -> Operands:
    """The nodes in order, each with those it reads, one entry a place."""
    return {n: [a for a in tree_leaves((n.args, n.kwargs)) if isinstance(a, fx.Node)] for n in graph.graph.nodes}


def _twins(old: Operands, new: Operands) -> dict[fx.Node, fx.Node]:
    """Nodes that are gone with the new ones of their kind."""
    gone: dict[Any, list[fx.Node]] = {}
    come: dict[Any, list[fx.Node]] = {}
    for nodes, others, groups in ((old, new, gone), (new, old, come)):
        for node in nodes:
            if node not in others and node.op == "call_function":
                groups.setdefault((node.target, node.meta.get("stack_trace")), []).append(node)
    pairs = [(group, come[key]) for key, group in gone.items() if len(group) == len(come.get(key, ()))]
    return {a: b for group, others in pairs for a, b in zip(group, others, strict=True)}


def _instead(
    node: fx.Node, read: list[fx.Node], reads: list[fx.Node] | None, heirs: set[fx.Node] | None
) -> set[fx.Node]:
    """What a reader that read `read` has in the place of `node`, now that it `reads`, or is gone and has `heirs`."""
    if reads is None:
        return heirs or set()
    if len(read) != len(reads):
        return set()
    return {b for a, b in zip(read, reads, strict=True) if a is node and b is not node}
