"""Rows move where moving them is free: products of rows let them through to the attention behind or before them.

    linear(rows(x))            -> rows(linear(x))        where attention alone reads the product, which reads by a table
    rows(linear(attention))    -> linear(rows(attention))       and where attention wrote the rows, it writes them there

`rows` is any permutation of rows (`row_moves`): the windows of Swin, rolled or not. A product computes each row from
that row, so results are bit exact. `fuse_head_moves` then takes the move up.

Refused where somebody else reads what is moved, where q, k and v are of rows in different orders, for products that add
a residual, and for rows that are dropped or repeated.
"""

from __future__ import annotations

import logging
import operator

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .moves.row_moves import gathered, is_move, rows_moved
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.select.int, aten.unbind.int)


def sink_row_moves(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring moves of rows to the attentions that can do them; returns the number of products they passed."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, dialect.attention):
            count += _sink(graph, node)
        elif rewrite.calls(node, dialect.linear):
            count += _rise(graph, node)
    return rewrite.finish(graph, count)


def _sink(graph: fx.GraphModule, attention: fx.Node) -> int:
    """linear(rows(x)) -> rows(linear(x)) for the products that are q, k and v."""
    products = list(dict.fromkeys(_computed(graph, operand) for operand in attention.args[:3]))  # type: ignore[arg-type]
    if not all(rewrite.calls(product, dialect.linear) for product in products):
        return 0
    inputs = [product.args[0] for product in products]
    found = [rows_moved(graph, x) for x in inputs if isinstance(x, fx.Node) and is_move(graph, x)]
    moves = [move for move in found if move is not None and not move.is_identity]
    if not moves:
        return 0
    reason = next((r for product in products if (r := _refused(product)) is not None), None)
    if len(moves) < len(products) or any(not torch.equal(move.table, moves[0].table) for move in moves):
        reason = "q, k and v are of rows in different orders"
    elif not all(_only_attended(graph, reader) for move in moves for reader in _readers(move.result)):
        reason = "somebody besides attention reads the rows that are moved"
    if reason is not None:
        keep(log, attention, "%s", reason)
        return 0
    for product, move in zip(products, moves, strict=True):
        shape = rewrite.shape_of(product)
        new = rewrite.call(graph, dialect.linear, (move.source, *product.args[1:]), before=product)
        rewrite.replace_chain(product, product, gathered(graph, new, move.table, shape, product))
    return len(products)


def _rise(graph: fx.GraphModule, product: fx.Node) -> bool:
    """rows(linear(x)) -> linear(rows(x)), where x is attention's."""
    source, user = product.args[0], rewrite.sole_user(product)
    written = _attended(graph, source)
    if user is None or not is_move(graph, user) or user.args[0] is not product or not written:
        return False
    last = user
    while (following := rewrite.sole_user(last)) is not None and is_move(graph, following):
        last = following
    move = rows_moved(graph, last)
    if move is None or move.source is not product or move.is_identity:
        return False
    assert isinstance(source, fx.Node)
    reason = _refused(product)
    if reason is None and any(len(node.users) > 1 for node in written):
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


def _computed(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What a value is a move or a part of."""
    while is_move(graph, node) or rewrite.calls(node, *_CUTS) or node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a value, in whatever shape."""
    readers: list[fx.Node] = []
    for user in node.users:
        readers += _readers(user) if rewrite.calls(user, aten.reshape.default) else [user]
    return readers


def _only_attended(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether everybody who reads the product, moved or cut, is an attention that takes it for q, k or v."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if rewrite.calls(user, dialect.attention) and current not in user.args[3:]:
                continue
            if not (is_move(graph, user) or rewrite.calls(user, *_CUTS) or user.target is operator.getitem):
                return False
            waiting.append(user)
    return rewrite.calls(node, dialect.linear)


def _attended(graph: fx.GraphModule, node: object) -> list[fx.Node]:
    """The chain of moves from `node` up to attention's result; nothing where it is something else's."""
    chain = []
    while isinstance(node, fx.Node) and is_move(graph, node):
        chain.append(node)
        node = node.args[0]
    return [*chain, node] if rewrite.calls(node, dialect.attention) else []
