"""quantize(move(x)) -> move(quantize(x)): what only moves or compares bytes does so in a quarter of the memory.

move       reshape, view, permute, transpose, slice, expand, cat, max pooling: rounding is monotonic and element by
           element, so both orders give the same bits
           cat([x, y]) rounds x and y by the scale of the whole

Refused: moves that somebody else reads in float32 or by another scale (they would be computed twice), operands that are
not float32.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, dialect_int8, rewrite
from .refusals import keep
from .rewrite import calls

log = logging.getLogger(__name__)
aten = torch.ops.aten

MOVES = frozenset(
    {
        dialect.permute,
        dialect.max_pool2d,
        aten.cat.default,
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.expand.default,
        aten.clone.default,
    }
)


def moved(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements a move passes on; none where the node is no move."""
    if node.op != "call_function" or node.target not in MOVES:
        return []
    operands = list(node.args[0]) if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    return [n for n in operands if isinstance(n, fx.Node)]


def hoist_quantise(graph: fx.GraphModule, hw: Hardware) -> int:
    """Round in front of moves instead of behind them."""
    count = 0
    waiting = [n for n in graph.graph.nodes if calls(n, dialect_int8.quantize)]
    while waiting:
        node = waiting.pop()
        if not node._erased and (made := _hoist(graph, node)):
            count += 1
            waiting += made  # which may stand behind another move
    return rewrite.finish(graph, count)


def _hoist(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Hoist the roundings of one move, of which `node` is one: those in front of it now."""
    move = node.args[0]
    assert isinstance(move, fx.Node)
    operands = moved(move)
    how = node.args[1:]
    if not operands:
        return []
    if any((user.target, user.args[1:]) != (dialect_int8.quantize, how) for user in move.users):
        keep(log, move, "others read it in float32, or rounded by another scale")
        return []
    if any(n.meta["val"].dtype != torch.float32 for n in operands):
        keep(log, move, "it moves something else than float32")
        return []
    rounded = {n: rewrite.call(graph, dialect_int8.quantize, (n, *how), before=move, source=node) for n in operands}
    given = [rounded[n] for n in operands] if isinstance(move.args[0], (list, tuple)) else rounded[operands[0]]
    target = move.target
    assert isinstance(target, rewrite.Operator)
    made = rewrite.call(graph, target, (given, *move.args[1:]), dict(move.kwargs), before=move, source=move)
    for user in list(move.users):
        rewrite.replace(user, made)
    rewrite.erase_unused(move)
    return list(rounded.values())
