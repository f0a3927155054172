"""gate(x) -> linear -> act -> linear ...   becomes   unpack_rows(... packed_linear(pack_rows(gate(x)))), where it pays.

What follows a gate row by row (linear layers with constant weights, activations, sums and products of such values, and
parts of their last dim, as of SwiGLU) gives one and the same row for every row that the gate empties. So rows that are
left are moved to the front, a row of zeros stands for all others, and linear layers stop behind it. A residual that is
gated too is added to the rows that are left, another one behind.

Refused: gates that nothing multiplies row by row, other dtypes than float32, weights that are computed, a residual with
an activation behind it, and what is predicted to take as long with the share of rows that `gate` was told to expect.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection
from math import prod
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from ..hwdb.cost import Work, predict_seconds
from . import dialect, dialect_gating, rewrite
from .precision.forms import Times, streamed_bytes
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

GAIN = 0.9  # of the dense products' time: less is not worth the moves
ENTRY_SECONDS = 0.5e-6  # of a kernel more
_LINEAR = (aten.linear.default, dialect.linear)
_SPLITS = (aten.split_with_sizes.default,)
_BY_ELEMENT = frozenset(
    {
        *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
        *(aten.hardswish.default, aten.hardsigmoid.default, aten.neg.default, aten.abs.default, dialect.swish),
        *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Scalar, aten.add.Scalar, aten.clamp.default),
    }
)


def skip_gated_rows(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite what follows gates where skipping empty rows pays; returns how many gates."""
    gates = [node for node in graph.graph.nodes if rewrite.calls(node, dialect_gating.gate)]
    if not gates or not hw.lanes("float32"):
        return 0
    products = [node for node in graph.graph.nodes if rewrite.calls(node, *_LINEAR)]
    streamed = streamed_bytes(graph, products)
    count = 0
    for gate in gates:
        chain = _followers(graph, gate)
        reason = _refused(gate, chain, hw, streamed)
        if reason is not None:
            keep(log, gate, "%s", reason)
            continue
        _rewrite(graph, gate, chain)
        count += 1
    return rewrite.finish(graph, count)


def _followers(graph: fx.GraphModule, gate: fx.Node) -> list[fx.Node]:
    """What is computed from the gate's rows alone, row by row, in order: up to linear layers and no further."""
    found: dict[fx.Node, None] = {gate: None}
    packed = {gate}  # a residual is added behind the rows are back
    for node in graph.graph.nodes:
        if not packed.isdisjoint(node.all_input_nodes) and _by_row(graph, node, packed):
            found[node] = None
            if _residual(node) is None or _residual(node) in packed:
                packed.add(node)
    while True:  # what follows the last product gains nothing
        last = [n for n in found if n is not gate and n.target not in _LINEAR and not _leads_on(n, found)]
        if not last:
            return list(found)[1:]
        for node in last:
            del found[node]


def _leads_on(node: fx.Node, found: Collection[fx.Node]) -> bool:
    """Whether something behind a node is in the chain; parts of one split stay together."""
    parts = node.args[0].users if node.target is operator.getitem else (node,)  # type: ignore[union-attr]
    return any(user in found for part in parts for user in part.users)


def _part(node: fx.Node) -> tuple[fx.Node, int, tuple[Any, ...]] | None:
    """What a slice, or an element of a split, is a part of, along which dim, and its start, end and step."""
    source: Any
    dim: Any
    bounds: tuple[Any, ...]
    if rewrite.calls(node, aten.slice.Tensor):
        source, dim, *rest = (*node.args, 0)[: max(2, len(node.args))]
        bounds = tuple(rest)
    elif node.target is operator.getitem and rewrite.calls(node.args[0], *_SPLITS):
        sizes: Any
        place: Any = node.args[1]
        source, sizes, dim = (*node.args[0].args, 0)[:3]
        bounds = (sum(sizes[:place]), sum(sizes[: place + 1]))
    else:
        return None
    return source, dim % len(rewrite.shape_of(source)), bounds


def _by_row(graph: fx.GraphModule, node: fx.Node, rows: set[fx.Node]) -> bool:
    if rewrite.calls(node, *_SPLITS):  # its elements are looked at each
        return True
    value = rewrite.value_of(node)
    if value is None or value.dtype != torch.float32:
        return False
    if (part := _part(node)) is not None:
        source, dim, _ = part
        return source in rows and dim == len(rewrite.shape_of(source)) - 1
    if node.target in _BY_ELEMENT:
        shape = rewrite.shape_of(node)
        return all(operand in rows and rewrite.shape_of(operand) == shape for operand in node.all_input_nodes)
    if not rewrite.calls(node, *_LINEAR):
        return False
    a = rewrite.arguments(node)
    weight, bias, residual = a["weight"], a["bias"], a.get("residual")
    if a["input"] not in rows or rewrite.constant(graph, weight) is None or weight in rows:
        return False
    if bias is not None and (bias in rows or rewrite.shape_of(bias) != rewrite.shape_of(weight)[:1]):
        return False
    if residual is None:
        return True
    # What adds the stream of all rows ends the chain: nothing behind it is empty.
    return a.get("activation", "none") == "none" and rewrite.shape_of(residual) == rewrite.shape_of(node)


def _refused(gate: fx.Node, chain: list[fx.Node], hw: Hardware, streamed: int) -> str | None:
    shape = rewrite.shape_of(gate)
    if rewrite.value_of(gate).dtype != torch.float32:  # type: ignore[union-attr]
        return f"it is {rewrite.value_of(gate).dtype}, and the kernels are float32"  # type: ignore[union-attr]
    rows, products = prod(shape[:-1]), [node for node in chain if rewrite.calls(node, *_LINEAR)]
    if not products or len(shape) < 2 or not prod(shape):
        return "no linear layer with constant weights reads its rows"
    share = float(gate.args[3])  # type: ignore[arg-type]
    left = min(1.0, 1.0 - share + 1.0 / rows)
    times = [Times(node, hw, streamed) for node in products]
    dense = sum(t.seconds() for t in times)
    exits = _exits(gate, chain)
    moved = 4.0 * (2 * prod(shape) * left + sum(2 * prod(rewrite.shape_of(n)) for n in exits) + prod(shape))
    moves = predict_seconds(hw, Work({}, moved / 2, moved / 2, launches=0)) or 0.0
    packed = sum(t.seconds(rate=1.0 / left) for t in times) + moves + (2 + len(exits)) * ENTRY_SECONDS
    if packed > GAIN * dense:
        taken = packed / dense if dense else 1.0
        return f"with {share:.0%} of the rows empty, moving the others is predicted to take {taken:.2f} of all products"
    return None


def _exits(gate: fx.Node, chain: list[fx.Node]) -> list[fx.Node]:
    """Whose rows are put back: somebody else reads them, or adds another residual."""
    inside = {gate, *chain}
    return [node for node in chain if not inside.issuperset([*node.users, _residual(node) or gate])]


def _residual(node: fx.Node) -> fx.Node | None:
    if not rewrite.calls(node, *_LINEAR):
        return None
    residual = rewrite.arguments(node).get("residual")
    return residual if isinstance(residual, fx.Node) else None


def _rewrite(graph: fx.GraphModule, gate: fx.Node, chain: list[fx.Node]) -> None:
    source, threshold, by_row, share = gate.args
    assert isinstance(source, fx.Node)
    at, shape = gate.next, (prod(rewrite.shape_of(gate)[:-1]), rewrite.shape_of(gate)[-1])
    flat = _seen_as(graph, source if by_row else gate, shape, at)  # a row that is left is left whole
    size = rewrite.call(graph, aten.abs.default, (_seen_as(graph, source, shape, at),), before=at)
    strength = rewrite.call(graph, aten.amax.default, (size, [-1], False), before=at)
    places = rewrite.call(graph, dialect_gating.row_places, (strength, threshold), before=at)
    packed = {gate: rewrite.call(graph, dialect_gating.pack_rows, (flat, places), before=at)}
    for node in chain:
        packed[node] = _packed(graph, node, packed, places, share)
    for node in reversed(_exits(gate, chain)):
        unpacked = rewrite.call(graph, dialect_gating.unpack_rows, (packed[node], places), before=node)
        shaped = _seen_as(graph, unpacked, rewrite.shape_of(node), node)
        if (residual := _residual(node)) is not None and residual not in packed:
            shaped = rewrite.call(graph, aten.add.Tensor, (shaped, residual), before=node)
        node.replace_all_uses_with(shaped)
    rewrite.erase_unused(*reversed(chain), gate)


def _packed(
    graph: fx.GraphModule, node: fx.Node, packed: dict[fx.Node, fx.Node], places: fx.Node, share: object
) -> fx.Node:
    """The node for the rows that are left; without a residual that has all rows, which `_rewrite` adds behind."""
    if rewrite.calls(node, *_LINEAR):
        a = rewrite.arguments(node)
        epilogue = (a.get("activation", "none"), a.get("activation_args", []))
        operands = (packed[a["input"]], a["weight"], a["bias"], *epilogue, places, share)
        made = rewrite.call(graph, dialect_gating.packed_linear, operands, before=node)
        if (residual := _residual(node)) not in packed:
            return made
        return rewrite.call(graph, aten.add.Tensor, (made, packed[residual]), before=node)
    if rewrite.calls(node, *_SPLITS):
        return packed[node.args[0]]  # type: ignore[index]
    if (part := _part(node)) is not None:
        source, _, bounds = part
        return rewrite.call(graph, aten.slice.Tensor, (packed[source], 1, *bounds), before=node)
    args = fx.map_arg(node.args, lambda operand: packed[operand])
    return rewrite.call(graph, node.target, args, before=node, kwargs=node.kwargs)  # type: ignore[arg-type]


def _seen_as(graph: fx.GraphModule, node: fx.Node, shape: object, before: fx.Node) -> fx.Node:
    if rewrite.shape_of(node) == tuple(shape):  # type: ignore[arg-type]
        return node
    return rewrite.call(graph, aten.reshape.default, (node, list(shape)), before=before)  # type: ignore[call-overload]
