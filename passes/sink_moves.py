"""Moves sink through what computes element by element, where then there are fewer of them.

    add(move(a), move(b))             -> move(add(a, b))           a residual join: one move for two
    move'(f(move(a)))                 -> move'(move(f(a)))         one move, or none, by `fuse_reshape_transpose`
    add(move(a), f(layer_norm(move(a)))) -> move(add(a, f(layer_norm(a))))     rows that move as wholes

`move` is a permute or a gather of rows. A node carries a move if all its tensor operands come by that very move (same
shapes, same order of elements), numbers and tensors of one element aside; operators of rows (layer_norm, rms_norm,
softmax over the last dim, values added along it) do where the last dim stays whole. Nodes that carry the same move hang
together by their operands. Of such a group

    before  moves that nobody outside the group reads
    behind  values that somebody outside reads: each needs the move, except by another move, which takes it in

and the group is computed before the move where that is less. Every rewrite therefore leaves fewer moves than there
were, and the pass ends; nodes and edges are looked at once a run. No element is computed otherwise: bit exact.

Refused where as many moves would be needed behind as before.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .fuse_reshape_transpose import compose, map_of
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_PERMUTES = (dialect.permute, aten.permute.default)
_OF_ROWS = (aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int, aten.log_softmax.int)
# Torch does not tag them, but they are; a dropout that draws numbers is not pure, and refused for that.
_POINTWISE = frozenset({aten._to_copy.default, aten.dropout.default})


@dataclass(frozen=True)
class Move:
    """What two equal moves have in common."""

    source: tuple[int, ...]
    result: tuple[int, ...]
    order: object  # digits, or the table's node
    order_of_rows: bool

    @property
    def whole_rows(self) -> bool:
        """Whether the last dim moves as a whole."""
        return self.order_of_rows and self.source[-1:] == self.result[-1:]


@dataclass
class Group:
    """Nodes that carry one move, with those that make it."""

    nodes: list[fx.Node] = field(default_factory=list)
    moves: dict[fx.Node, None] = field(default_factory=dict)


def sink_moves(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let groups of nodes compute in front of the move they carry; returns how many groups."""
    count = 0
    # A move that sank may be one with the next. Every round but the last brings moves further down.
    while changed := _round(graph):
        count += changed
    return rewrite.finish(graph, count)


def _round(graph: fx.GraphModule) -> int:
    made: dict[fx.Node, Move] = {}  # moves themselves
    carried: dict[fx.Node, Move] = {}
    groups = _Groups()
    for node in graph.graph.nodes:
        move = _move(node)
        if move is not None:
            made[node] = move
            continue
        sources = _sources(node, made, carried)
        if sources:
            carried[node] = made.get(sources[0]) or carried[sources[0]]
            groups.add(node, sources, made)
    count = 0
    for group in groups.all():
        if _pays(group):
            _rewrite(graph, group, carried)
            count += 1
    return count


class _Groups:
    """Nodes joined by the operands they share (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.order: list[fx.Node] = []
        self.moves: dict[fx.Node, None] = {}

    def add(self, node: fx.Node, sources: list[fx.Node], made: dict[fx.Node, Move]) -> None:
        """A node that carries what its sources do."""
        self.parent[node] = node
        self.order.append(node)
        for source in sources:
            if source in made and source not in self.parent:
                self.parent[source] = source
                self.moves[source] = None
            self.parent[self._root(source)] = self._root(node)

    def all(self) -> list[Group]:
        """The groups, nodes in their order."""
        found: dict[fx.Node, Group] = {}
        for node in self.order:
            found.setdefault(self._root(node), Group()).nodes.append(node)
        for move in self.moves:
            found[self._root(move)].moves[move] = None
        return list(found.values())

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node


def _move(node: fx.Node) -> Move | None:
    """The move a node makes; None where it makes none, or leaves the order of elements."""
    if not node.args or not isinstance(source := node.args[0], fx.Node) or rewrite.value_of(node) is None:
        return None
    if rewrite.calls(node, *_PERMUTES):
        moved = map_of(node)
        if moved is None or moved.keeps_order:
            return None
        return Move(moved.source, moved.shape, moved.digits, _keeps_rows(node))
    if rewrite.calls(node, aten.index_select.default) and node.args[1] == 0:
        table = node.args[2]
        if isinstance(table, fx.Node) and table.op == "get_attr" and rewrite.shape_of(source) == rewrite.shape_of(node):
            return Move(rewrite.shape_of(source), rewrite.shape_of(node), table, len(rewrite.shape_of(node)) == 2)
    return None


def _keeps_rows(node: fx.Node) -> bool:
    moved = map_of(node)
    if moved is None or not moved.shape or not moved.source or not math.prod(moved.shape):
        return False
    width = moved.shape[-1]
    runs = moved.runs((math.prod(moved.shape) // width, width))
    return runs is not None and [(d.extent, d.stride) for d in runs[1]] == ([(width, 1)] if width > 1 else [])


def _sources(node: fx.Node, made: dict[fx.Node, Move], carried: dict[fx.Node, Move]) -> list[fx.Node]:
    """The operands by which a node carries a move; none where it carries none, or nobody reads it."""
    if node.op != "call_function" or not rewrite.is_pure(node) or rewrite.value_of(node) is None or not node.users:
        return []
    target, shape = node.target, rewrite.shape_of(node)
    pointwise = isinstance(target, rewrite.Operator) and (torch.Tag.pointwise in target.tags or target in _POINTWISE)
    by_rows = not pointwise and _is_of_rows(node)
    if not (pointwise or by_rows) or any(isinstance(a, (list, tuple)) and _has_nodes(a) for a in node.args):
        return []
    sources = []
    moves: dict[Move, None] = {}
    whole = by_rows
    for operand in node.all_input_nodes:
        move = made.get(operand) or carried.get(operand)
        value = rewrite.value_of(operand)
        if value is None:
            return []
        if move is not None and move.result == shape and not (by_rows and operand is not node.args[0]):
            sources.append(operand)
            moves[move] = None
        elif value.numel() != 1 or value.dim() > 0:
            along_rows = value.dim() == 1 and value.numel() in (1, shape[-1] if shape else 1)
            if not along_rows:
                return []
            whole = True
    if len(moves) != 1:
        return []
    (move,) = moves
    return sources if move.whole_rows or not whole else []


def _has_nodes(values: object) -> bool:
    return any(isinstance(v, fx.Node) for v in values)  # type: ignore[attr-defined]


def _is_of_rows(node: fx.Node) -> bool:
    if not rewrite.calls(node, *_OF_ROWS):
        return False
    a = rewrite.arguments(node)
    if "normalized_shape" in a:
        return len(a["normalized_shape"]) == 1
    return bool(a["dim"] % max(1, len(rewrite.shape_of(node))) == len(rewrite.shape_of(node)) - 1)


def _pays(group: Group) -> bool:
    inside = set(group.nodes)
    move = next(iter(group.moves))
    before = sum(all(user in inside for user in each.users) for each in group.moves)
    behind = sum(any(user not in inside and not _takes_in(user, move) for user in n.users) for n in group.nodes)
    if behind >= before:
        keep(log, group.nodes[-1], "%d moves behind for %d before", behind, before)
        return False
    return True


def _takes_in(user: fx.Node, move: fx.Node) -> bool:
    """Whether a reader is a move that is one with `move` before it."""
    moved = map_of(move)
    return moved is not None and rewrite.calls(user, *_PERMUTES) and compose(moved, [user]) is not None


def _rewrite(graph: fx.GraphModule, group: Group, carried: dict[fx.Node, Move]) -> None:
    twins: dict[fx.Node, fx.Node] = {move: move.args[0] for move in group.moves}  # type: ignore[misc]
    inside = set(group.nodes)
    some = next(iter(group.moves))
    for node in group.nodes:
        move = carried[node]

        def twin(operand: fx.Node) -> fx.Node:
            return twins.get(operand, operand)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), twin)
        if rewrite.calls(node, *_OF_ROWS) and "dim" in rewrite.arguments(node):
            args, kwargs = (args[0], -1, *args[2:]), {k: v for k, v in kwargs.items() if k != "dim"}  # of another rank
        value = rewrite.packed(node.meta["val"], move.source)
        assert isinstance(node.target, rewrite.Operator), node
        new = rewrite.call(graph, node.target, args, kwargs, before=node, value=value)
        twins[node] = new
        readers = [user for user in node.users if user not in inside]
        if readers:
            moved_value = rewrite.packed(node.meta["val"])
            args = (new, *some.args[1:])
            behind = rewrite.call(graph, some.target, args, some.kwargs, before=node, value=moved_value)  # type: ignore[arg-type]
            for reader in readers:
                reader.replace_input_with(node, behind)
    rewrite.erase_unused(*reversed(group.nodes), *group.moves)
