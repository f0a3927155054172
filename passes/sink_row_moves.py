"""Rows move where moving them is free: products of rows let them through to the attention behind or before them.

    linear(rows(x))            -> rows(linear(x))        where attention alone reads the product, which reads by a table
    rows(linear(attention))    -> linear(rows(attention))       and where attention wrote the rows, it writes them there

`rows` is any permutation of rows (`row_moves`): the windows of Swin, rolled or not. A product computes each row from
that row, so results are bit exact. `fuse_head_moves` then takes the move up.

Refused where somebody else reads what is moved, for products that add a residual, and for rows that are dropped or
repeated.
"""

from __future__ import annotations

import logging
import operator

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .refusals import keep
from .row_moves import RowMove, gathered, is_move, rows_moved

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.select.int, aten.unbind.int)


def sink_row_moves(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring moves of rows to the attentions that can do them; returns the number of products they passed."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, dialect.linear) and not node._erased:
            count += _sink(graph, node) or _rise(graph, node)
    return rewrite.finish(graph, count)


def _sink(graph: fx.GraphModule, product: fx.Node) -> bool:
    """linear(rows(x)) -> rows(linear(x))."""
    moved = product.args[0]
    assert isinstance(moved, fx.Node)
    if not is_move(graph, moved) or not _only_attended(graph, product):
        return False
    siblings = _readers(graph, moved)
    move = _row_move(graph, moved)
    if move is None:
        return False
    reason = _refused(product)
    if reason is None and any(not rewrite.calls(s, dialect.linear) or not _only_attended(graph, s) for s in siblings):
        reason = "somebody besides attention reads the rows that are moved"
    if reason is not None:
        keep(log, product, "%s", reason)
        return False
    shape = rewrite.shape_of(product)
    before = rewrite.shape_of(move.source)
    args = (move.source, *product.args[1:])
    new = rewrite.call(graph, dialect.linear, args, before=product)
    assert rewrite.shape_of(new) == (*before[:-1], shape[-1])
    rewrite.replace_chain(product, product, gathered(graph, new, move.table, shape, product))
    return True


def _rise(graph: fx.GraphModule, product: fx.Node) -> bool:
    """rows(linear(x)) -> linear(rows(x)), where x is attention's."""
    source = product.args[0]
    user = rewrite.sole_user(product)
    if user is None or not is_move(graph, user) or user.args[0] is not product or not _is_attention(graph, source):
        return False
    last = user
    while (following := rewrite.sole_user(last)) is not None and is_move(graph, following):
        last = following
    move = rows_moved(graph, last)
    if move is None or move.source is not product or move.is_identity:
        return False
    assert isinstance(source, fx.Node)
    reason = _refused(product)
    if reason is None and len(source.users) > 1:
        reason = "somebody else reads what attention wrote"
    if reason is not None:
        keep(log, product, "%s", reason)
        return False
    shape = rewrite.shape_of(last)
    turned = gathered(graph, source, move.table, [*shape[:-1], rewrite.shape_of(source)[-1]], last)
    value = rewrite.packed(last.meta["val"])
    new = rewrite.call(graph, dialect.linear, (turned, *product.args[1:]), before=last, value=value, source=product)
    rewrite.replace_chain(product, last, new)
    return True


def _refused(product: fx.Node) -> str | None:
    return "it adds a residual, which would have to move as well" if product.args[3] is not None else None


def _row_move(graph: fx.GraphModule, moved: fx.Node) -> RowMove | None:
    """The move of rows that ends in `moved`, where it is one."""
    move = rows_moved(graph, moved)
    return None if move is None or move.is_identity else move


def _readers(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Who reads a value, in whatever shape."""
    readers: list[fx.Node] = []
    for user in node.users:
        readers += _readers(graph, user) if rewrite.calls(user, aten.reshape.default) else [user]
    return readers


def _only_attended(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether everybody who reads the node, moved or cut, is an attention that takes it for q, k or v."""
    waiting, found = [node], False
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if rewrite.calls(user, dialect.attention) and current in user.args[:3] and current not in user.args[3:]:
                found = True
            elif is_move(graph, user) or rewrite.calls(user, *_CUTS) or user.target is operator.getitem:
                waiting.append(user)
            else:
                return False
    return found


def _is_attention(graph: fx.GraphModule, node: object) -> bool:
    """Whether the node is attention's result, moved perhaps."""
    while isinstance(node, fx.Node) and is_move(graph, node):
        node = node.args[0]
    return rewrite.calls(node, dialect.attention)
