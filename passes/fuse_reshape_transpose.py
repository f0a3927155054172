"""A chain of reshapes, permutes and copies becomes nothing, one reshape, or one graphwright::permute.

    reshape(permute(reshape(...)))  -> x, reshape(x, shape), or permute(x, in_shape, dims, out_shape)
    permute that moves dims of 1    -> reshape(x, shape)

by the normal form of `index_map`. A value that something else reads keeps its place, and what follows
starts from it or from the head of the chain, whichever moves less.

A chain is cut where it is no single reshape-permute-reshape (a reshape may join dims that a permute took
apart), and at a copy that the graph returns. Elements are moved, never rounded: results are bit exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, memory, rewrite
from .moves.index_map import IndexMap, identity
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten

MOVES = frozenset({aten.reshape.default, aten.permute.default, aten.clone.default, dialect.permute})


@dataclass(frozen=True)
class _Chain:
    """A value as a move of the elements of `head`."""

    head: fx.Node
    map: IndexMap

    @property
    def cost(self) -> int:
        """0 for nothing at all, 1 for another shape on the same elements, 2 for moving them."""
        if not self.map.keeps_order:
            return 2
        return 0 if self.map.shape == self.map.source else 1

    def spelling(self) -> tuple[Operator, tuple[Any, ...]]:
        """The one operator that makes the value from the head, and its further arguments."""
        if self.map.keeps_order:
            return aten.reshape.default, (list(self.map.shape),)
        return dialect.permute, tuple(list(part) for part in self.map.moves())


def fuse_reshape_transpose(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring every chain of moves to its normal form; returns the number of values that are made otherwise."""
    count = 0
    # A cut may heal once what is behind it is in normal form. Every round but the last moves less than before.
    while changed := _round(graph):
        count += changed
    return rewrite.finish(graph, count)


def _round(graph: fx.GraphModule) -> int:
    whole: dict[fx.Node, _Chain] = {}  # from as far up as the chain goes
    chains: dict[fx.Node, _Chain] = {}  # from where it is cheapest
    for node in graph.graph.nodes:
        if _is_move(node):
            whole[node], chains[node] = _chain(node, whole, chains)
    read = {n for n in chains if not _only_moved(n, chains)} | {c.head for c in chains.values()}
    copies = {n for n, chain in chains.items() if n in read and memory.is_apart(n, chain.head)}
    current: dict[fx.Node, fx.Node] = {}
    for node, chain in chains.items():
        if node not in read:
            continue
        is_view = node in copies and chain.cost < 2 and _is_returned_packed(node, current.get(chain.head))
        if is_view:
            chain = whole[node]  # a reshape goes together with whatever precedes it
        head = current.get(chain.head, chain.head)
        if is_view and chain.cost < 2:  # cut there: nothing on the way copies any more
            head = rewrite.call(graph, aten.clone.default, (head,), before=node, value=rewrite.packed(head.meta["val"]))
        target, rest = chain.spelling()
        if target is not dialect.permute and memory.would_share(node, head):
            keep(log, node, "the graph returns what this chain copies from %s", head)
            continue
        if chain.cost == 0:
            current[node] = head
        elif node.target is not target or list(node.args) != [head, *rest]:
            value = rewrite.packed(node.meta["val"])
            current[node] = rewrite.call(graph, target, (head, *rest), before=node, value=value)
        if node in current:
            node.replace_all_uses_with(current[node])
    if current:
        rewrite.erase_unused(*reversed(chains))
    return len(current)


def _is_returned_packed(node: fx.Node, head: fx.Node | None) -> bool:
    """Whether a returned copy of what lay apart would be a view now that its source is packed, and returned as well."""
    return head is not None and memory.escapes(node) and memory.escapes(memory.root(head))


def map_of(node: fx.Node) -> IndexMap | None:
    """How a reshape, a permute or a copy moves the elements of its operand; None for any other node."""
    if not _is_move(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _moved(identity(rewrite.shape_of(source)), node)


def compose(map: IndexMap, chain: Sequence[fx.Node]) -> IndexMap | None:
    """`map` followed by the moves of `chain`; None where that is no single reshape-permute-reshape."""
    for node in chain:
        following = _moved(map, node)
        if following is None:
            return None
        map = following
    return map


def _is_move(node: fx.Node) -> bool:
    if node.target not in MOVES or not node.users or rewrite.value_of(node) is None:
        return False
    if node.target is aten.clone.default and rewrite.feeds_output(node):
        keep(log, node, "the graph returns this copy")
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and rewrite.value_of(source) is not None


def _moved(map: IndexMap, node: fx.Node) -> IndexMap | None:
    """`map` followed by the move that `node` is."""
    if node.target is aten.permute.default:
        rank = len(map.shape)
        dims = node.args[1]
        assert isinstance(dims, (list, tuple))
        return map.permute([int(d) % rank for d in dims])  # type: ignore[arg-type]
    if node.target is dialect.permute:
        _, in_shape, dims, out_shape = node.args
        permuted = map.reshape(in_shape).permute(dims)  # type: ignore[arg-type]
        return None if permuted is None else permuted.reshape(out_shape)  # type: ignore[arg-type]
    return map.reshape(rewrite.shape_of(node))


def _chain(node: fx.Node, whole: dict[fx.Node, _Chain], chains: dict[fx.Node, _Chain]) -> tuple[_Chain, _Chain]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    alone = _moved(identity(rewrite.shape_of(source)), node)
    assert alone is not None  # the elements of a source in order can be grouped in every way
    near = _Chain(source, alone)
    if source not in whole:
        return near, near
    found = []
    for start in (whole[source], chains[source]):
        composed = _moved(start.map, node)
        if composed is not None:
            found.append(_Chain(start.head, composed))
    if not found or found[0].head is not whole[source].head:
        log.debug("cut at %s: with what precedes it, it is no single permute", node)
    if not found:
        return near, near
    # Where the source is read anyway, starting from it may be the cheapest.
    choice = found if all(_is_move(user) for user in source.users) else [*found, near]
    return found[0], min(choice, key=lambda chain: chain.cost)


def _only_moved(node: fx.Node, chains: dict[fx.Node, _Chain]) -> bool:
    """Whether nobody but moves that start further up reads the node."""
    return all(user in chains for user in node.users)
