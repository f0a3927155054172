"""Values that only products of 16 bits read are 16 bits in memory, on GPUs.

    linear_f16(...)                     -> linear_f16(..., narrow), where all readers round what they read to float16
    attention_f16(...)                  -> attention_f16(..., narrow)
    layer_norm(...), an elementwise one -> the same and a cast, which joins its kernel
    moves in between                    move 16 bits

Who rounds 16 bits to the same 16 bits has the same numbers, and reads half the bytes.

Refused where somebody reads float32 (a residual, a norm, an output, a product of few rows), or where neighbours are no
multiple of the 8 that are copied at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from . import dialect, dialect_mixed
from .rewrite import Operator, arguments, call, shape_of, value_of

aten = torch.ops.aten

PIECE = 8  # elements of 16 bits in 16 bytes
_LINEARS = {torch.float16: dialect_mixed.linear_f16, torch.bfloat16: dialect_mixed.linear_bf16}
_CONVS = {torch.float16: dialect_mixed.conv2d_f16, torch.bfloat16: dialect_mixed.conv2d_bf16}
_ATTENTIONS = {torch.float16: dialect_mixed.attention_f16, torch.bfloat16: dialect_mixed.attention_bf16}
_MOVES = frozenset(
    {
        *(dialect.permute, aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default),
        *(aten.slice.Tensor, aten.select.int, aten.split_with_sizes.default, aten.split.Tensor, operator.getitem),
        *(aten.unsqueeze.default, aten.squeeze.dim),
    }
)
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})


def store_rounded(graph: fx.GraphModule, reduced: Collection[fx.Node]) -> int:
    """Store what only rounding readers read in 16 bits; `reduced` are products on matrix units. Returns how many."""
    count = 0
    own: dict[object, torch.dtype] = {
        target: dtype for table in (_LINEARS, _CONVS, _ATTENTIONS) for dtype, target in table.items()
    }
    for dtype in dict.fromkeys(own[node.target] for node in reduced):
        for node in list(graph.graph.nodes):
            if node in reduced:
                done = node.meta["val"].dtype == dtype
                if done or own[node.target] is not dtype or not _only_rounded(node, dtype):
                    continue
                _narrow(node)
            elif _is_joined(node) and _only_rounded(node, dtype):
                value = node.meta["val"].to(dtype)
                kwargs = {"dtype": dtype}
                cast = call(graph, aten._to_copy.default, (node,), kwargs, before=node.next, value=value, source=node)
                node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
                node = cast
            else:
                continue
            _retype(node, dtype)
            count += 1
    return count


def _is_joined(node: fx.Node) -> bool:
    """Whether a cast behind the node joins its kernel, and what it makes is float32."""
    value = value_of(node)
    if value is None or value.dtype != torch.float32 or not isinstance(node.target, Operator):
        return False
    pointwise = node.target.namespace == "aten" and torch.Tag.pointwise in node.target.tags
    return node.target in _NORMS or pointwise


def _only_rounded(value: fx.Node, dtype: torch.dtype) -> bool:
    """Whether every reader rounds the value to `dtype`, after moves or at once; and there is one."""
    return bool(value.users) and all(
        _takes(user, value, dtype) or (user.target in _MOVES and _only_rounded(user, dtype)) for user in value.users
    )


def _takes(user: fx.Node, value: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the product reads the value in pieces, and rounds all that it reads of it."""
    if user.target is _ATTENTIONS[dtype]:
        return arguments(user)["mask"] is not value and shape_of(value)[-1] % PIECE == 0
    if user.target not in (_LINEARS[dtype], _CONVS[dtype]):
        return False
    given = arguments(user)
    if not given["round_input"] or given["bias"] is value or given["residual"] is value:
        return False
    return given.get("layout", "NHWC") == "NHWC" and shape_of(value)[-1] % PIECE == 0


def _narrow(node: fx.Node) -> None:
    given = arguments(node) | {"narrow": True}
    node.args, node.kwargs = tuple(given.values()), {}


def _retype(node: fx.Node, dtype: torch.dtype) -> None:
    """The node, and the moves behind it, give `dtype`."""
    value: Any = node.meta["val"]
    node.meta["val"] = [part.to(dtype) for part in value] if isinstance(value, list | tuple) else value.to(dtype)
    for user in node.users:
        if user.target in _MOVES:
            _retype(user, dtype)
