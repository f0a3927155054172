"""A chain of moves that no permute can say, because it wraps around, becomes one gather of rows.

    permute(roll(reshape(x)))                    -> reshape(index_select(reshape(x), 0, table))
    the same where rows come back to their place -> reshape(x)

by the tables of `row_moves`: Swin's shifted windows are one copy instead of three, opposite rolls with anything between
them that they undo are none.

Kept: single moves, chains that are reshapes and permutes alone (`fuse_reshape_transpose` has a form for them), and rows
so short that a table entry costs as much as the row; a copy that the graph returns of what somebody else holds.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import memory, rewrite
from .moves.row_moves import gathered, is_move, reshaped, rows_moved
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_SHORT_BYTES = 16
_WRAPPED = (aten.index_select.default, aten.roll.default, aten.flip.default)


def gather_rows(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring chains with wrap-around to one gather each; returns how many."""
    count = 0
    for node in reversed(list(graph.graph.nodes)):
        if node._erased or not is_move(graph, node) or _goes_on(graph, node):
            continue
        count += _gather(graph, node)
    return rewrite.finish(graph, count)


def _goes_on(graph: fx.GraphModule, node: fx.Node) -> bool:
    user = rewrite.sole_user(node)
    return user is not None and user.args[0] is node and is_move(graph, user)


def _gather(graph: fx.GraphModule, last: fx.Node) -> bool:
    move = rows_moved(graph, last)
    if move is None:
        return False
    wrapped = [n for n in move.chain if rewrite.calls(n, *_WRAPPED)]
    copies = [n for n in move.chain if not rewrite.calls(n, aten.reshape.default)]
    if not wrapped or (len(copies) == 1 and not move.is_identity):
        return False
    value = last.meta["val"]
    if not value.shape:
        keep(log, last, "it is one number")
        return False
    if value.shape[-1] * value.element_size() < _SHORT_BYTES:
        keep(log, last, "rows of %d elements are shorter than what says where they come from", value.shape[-1])
        return False
    shape = rewrite.shape_of(last)
    if move.is_identity and memory.would_share(last, move.source):
        keep(log, last, "the graph returns what this copies from %s", move.source)
        return False
    if memory.is_copied_apart(last):
        keep(log, last, "the graph returns it, and what a reshape copies from it")
        return False
    if move.is_identity:
        new = reshaped(graph, move.source, shape, last)
    else:
        new = gathered(graph, move.source, move.table, shape, last)
    rewrite.replace_chain(move.chain[0], last, new)
    return True
