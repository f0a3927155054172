"""`as_strided` reads memory, and compiled values lie in order: it reads an operand that is brought into that order.

    as_strided(x, size, stride)        x dense, dims in another order in memory -> as_strided(permute(x, order), ...)
    as_strided(view(x), size, stride)  -> the same of x, whose memory it reads

Left as it is where the memory of x has gaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..passes.memory import surely_views

aten = torch.ops.aten


def settle_storage_order(graph: fx.Graph) -> None:
    """Rewrite every as_strided of `graph`, whose nodes have the strides that PyTorch gave them."""
    for node in list(graph.nodes):
        if node.target is aten.as_strided.default:
            _settle(graph, node)


def strides_read(graph: fx.Graph) -> dict[str, tuple[int, ...]]:
    """The strides of the inputs whose memory an as_strided reads: with others it would read other elements."""
    waiting = [node.args[0] for node in graph.nodes if node.target is aten.as_strided.default]
    found: dict[str, tuple[int, ...]] = {}
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            found[node.name] = tuple(node.meta["val"].stride())
        elif surely_views(node) or _keeps_strides(node):
            waiting += node.all_input_nodes
    return found


def _keeps_strides(node: fx.Node) -> bool:
    """Whether the result lies as its operands do."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target in (aten.clone.default, aten._to_copy.default) or torch.Tag.pointwise in node.target.tags


def _settle(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    _, size, stride = node.args[:3]
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("storage_offset")
    start = source.meta["val"].storage_offset() if given is None else given
    while surely_views(source):
        source = source.args[0]
    value = source.meta["val"]
    order = sorted(range(value.dim()), key=lambda d: (-value.stride(d), value.shape[d] == 1))
    lying = value.permute(order)
    if not lying.is_contiguous() or value.storage_offset():
        return
    if order != list(range(value.dim())):
        with graph.inserting_before(node):
            permuted = graph.call_function(aten.permute.default, (source, order))
        permuted.meta = {**source.meta, "val": lying}
        source = permuted
    node.args, node.kwargs = (source, size, stride, start), {}
