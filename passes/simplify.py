"""Algebraic identities that are exact: the same bits for every input, also for NaN, infinities, denormals and -0.0.

    neg(neg(x)) -> x,  x / 8 -> x * 0.125,  slice(cat(a, b)) -> slice(a),  where(True, a, b) -> a, ...

The tables say what, and why it is exact: identities/.

Refused where the dtype or shape would change; where a reader looks at strides; and where the graph would return memory
that somebody else holds (an input, a constant, another result) in the place of memory of its own.
"""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import fx

from ..hwdb import Hardware
from . import memory, rewrite
from .identities import arithmetic, cast, choice, move, reduce, shape
from .identities.identity import Identity, Site
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten

IDENTITIES: tuple[Identity, ...] = (
    *arithmetic.IDENTITIES,
    *choice.IDENTITIES,
    *cast.IDENTITIES,
    *move.IDENTITIES,
    *reduce.IDENTITIES,
    *shape.IDENTITIES,
)


def _by_operator() -> dict[Operator, list[Identity]]:
    table: dict[Operator, list[Identity]] = {}
    for identity in IDENTITIES:
        for target in identity.operators:
            table.setdefault(target, []).append(identity)
    return table


_TABLE = _by_operator()


def simplify(graph: fx.GraphModule, hw: Hardware) -> int:
    """Apply every identity until none applies; returns how many did."""
    count = 0
    waiting = deque(graph.graph.nodes)
    while waiting:
        node = waiting.popleft()
        if node._erased or not node.users or node.op != "call_function" or rewrite.value_of(node) is None:
            continue
        new = _simplified(graph, node)
        if new is None:
            continue
        operands = node.all_input_nodes
        node.replace_all_uses_with(new)
        rewrite.erase_cone(node)
        # The new value meets its readers, and operands that lost a reader meet those they have left.
        waiting.extendleft(dict.fromkeys((new, *new.users, *(u for o in operands if not o._erased for u in o.users))))
        count += 1
    return rewrite.finish(graph, count)


def _simplified(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    for identity in _TABLE.get(node.target, ()):  # type: ignore[call-overload]
        before = node.prev
        new = identity.apply(Site(graph, node))
        reason = "" if new is None else _refusal(node, new)
        if reason:
            keep(log, node, "%s: %s", identity.text, reason)
        kept: fx.Node | None = None if reason else new
        made = node.prev
        while made is not before:  # what was made on the way to it
            made, last = made.prev, made
            if last is not kept and not last.users:
                graph.graph.erase_node(last)
        if kept is not None:
            return kept
    return None


def _refusal(node: fx.Node, new: fx.Node) -> str:
    """Why the readers of `node` may not read `new`; empty where they may."""
    old_value, value = rewrite.value_of(node), rewrite.value_of(new)
    assert old_value is not None
    assert value is not None
    if (old_value.shape, old_value.dtype) != (value.shape, value.dtype):
        return "the dtype or shape would change"
    if any(user.target in memory.READS_STRIDES for user in node.users) and old_value.stride() != value.stride():
        return "a reader looks at its strides"
    if memory.would_share(node, new):
        return "it is returned, and what would be returned instead is held by others"
    return ""
