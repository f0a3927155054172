"""Whose memory a node's result lies in, and who gets hold of it.

A result of the graph belongs to the caller, who may write to it: it may not lie in an input, in a constant, or in
another result. A rewrite that puts an older value in a node's place must ask.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .rewrite import Operator

aten = torch.ops.aten

READS_STRIDES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.as_strided.default,
        aten.view.dtype,
        aten.view_as_complex.default,
    }
)
# Composite operators give them operands in order, and they take no look at strides: attention reads other elements.
# `as_strided` reads memory; capture gives it an operand that lies in order.
_READS_IN_ORDER = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten.native_group_norm.default,
        aten.as_strided.default,
    }
)
# Their schemas are silent on the views that they may return.
_MAY_VIEW = frozenset({aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints})


def views(node: fx.Node) -> bool:
    """Whether the result may lie in the memory of the first operand."""
    if node.target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(node.target, Operator) or not node.args:
        return False
    if not isinstance(node.args[0], fx.Node):
        return False
    aliases = any(r.alias_info is not None for r in node.target._schema.returns)
    return aliases or node.target in _MAY_VIEW


def in_order(target: object, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a call as its operator needs them: a rewrite may have changed how they lie."""
    if target not in _READS_IN_ORDER:
        return args
    return tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)


def surely_views(node: fx.Node) -> bool:
    """Whether the result lies in the memory of the first operand, whatever the strides."""
    return views(node) and node.target not in _MAY_VIEW


def root(node: fx.Node) -> fx.Node:
    """The node whose memory the result may lie in."""
    while views(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _surely_root(node: fx.Node) -> fx.Node:
    """The node whose memory the result lies in, where a reshape of what lies apart counts as the copy it may be."""
    while views(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target in _MAY_VIEW and not source.meta["val"].is_contiguous():
            return node
        node = source
    return node


def is_apart(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value made of moves of `source` surely has other memory: a reshape on the way copied what lay apart."""
    return _surely_root(node) is not _surely_root(source)


def is_copied_apart(node: fx.Node) -> bool:
    """Whether the graph returns the result and a reshape that copies it: of a result in order that would be a view."""
    if node.meta["val"].is_contiguous() or not escapes(node):
        return False
    return any(user.target in _MAY_VIEW and escapes(user) for user in node.users)


def escapes(node: fx.Node) -> bool:
    """Whether the graph returns the memory of the result: the result itself, or a view of it."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user not in seen and views(user) and user.args[0] in seen:
                seen.add(user)
                waiting.append(user)
    return False


def would_share(node: fx.Node, new: fx.Node) -> bool:
    """Whether with `new` in the place of `node`, the graph would return memory that somebody else holds."""
    owner = root(new)
    if owner is _surely_root(node) or not escapes(node):
        return False
    if owner.op != "call_function" or escapes(new):
        return True
    # `new` may be made of calls that nobody reads yet; what only leads to `node` goes with it.
    return any(not _leads_only_to(user, node, new) for user in owner.users)


def _leads_only_to(user: fx.Node, node: fx.Node, new: fx.Node) -> bool:
    for _ in range(4):
        if user is node or user is new:
            return True
        if len(user.users) != 1:
            return False
        (user,) = user.users
    return False
