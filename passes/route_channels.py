"""Channels are read where they were written: concats, splits and shuffles of the last dim become operands of products.

    conv1x1(x)      -> joined_linear([a, b, ...], starts, widths, W')        x = pieces of a, b, ... in some order
    linear(x, W)    -> the same
    depthwise(x)    -> depthwise'(joined_rows(pieces)), of which the result's channels are in another order as well

Channels sorted by source are few runs of neighbours (`channel_routes`); the order goes into weights W' = W[:, order],
which `fold_constants` works out. A channel that a block passes on untouched is then never copied, however many blocks
it passes (ShuffleNetV2's other half). A depthwise convolution has a weight a channel, and may have its channels in any
order where all who read it are products with constant weights.

Results are sums of the same terms in another order. More than MOST_PIECES pieces are put side by side first, in one
copy whatever they came through. Refused: weights that are computed, readers of a list of channels that want it as it
is (windows, sums and products with it among them), depthwise convolutions that add a residual or a computed bias, other
dtypes than float32.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .dialect_joined import joined_linear, joined_rows
from .moves.channel_routes import Pieces, Route, passes_on, pieces_of, routes_of
from .moves.row_moves import reshaped
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

MOST_PIECES = 8  # a piece costs every row tile a loop; with more of them copying is cheaper


def route_channels(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let products read channels where they lie; returns the number of values that they read in one piece before."""
    routes = routes_of(graph)
    current: dict[fx.Node, fx.Node] = {}  # what stands for a product that was rewritten
    count = sum(_read_in_pieces(graph, node, routes[node], current) for node in list(routes))
    if count:
        rewrite.erase_unused(*reversed(routes))
    return rewrite.finish(graph, count)


def _read_in_pieces(graph: fx.GraphModule, node: fx.Node, route: Route, current: dict[fx.Node, fx.Node]) -> bool:
    """Rewrite the products that read `node`, if all who compute with it can take its channels in another order."""
    readers = _computing(node)
    if not readers or not rewrite.is_float(node) or node.meta["val"].dtype != torch.float32 or not len(route.number):
        return False
    pieces = pieces_of(Route(tuple(current.get(s, s) for s in route.sources), route.which, route.number))
    in_order = bool((pieces.order == torch.arange(len(pieces.order))).all())
    if in_order and (pieces.whole is not None or any(_is_depthwise(reader) for reader in readers)):
        return False  # a reshape, or pieces that are side by side for those who need them so
    reason = next((r for reader in readers if (r := _refused(graph, reader, node)) is not None), None)
    if reason is not None:
        keep(log, node, "%s", reason)
        return False
    depthwise = [reader for reader in readers if _is_depthwise(reader)]
    if depthwise or len(pieces.parts) > MOST_PIECES:
        joined = _materialised(graph, pieces, node)
        pieces = Pieces(((joined, 0, len(pieces.order)),), pieces.order)
    for reader in readers:
        if reader in depthwise:
            _reorder_depthwise(graph, reader, pieces, current)
        else:
            current[reader] = _reorder_product(graph, reader, pieces)
    return True


def _computing(node: fx.Node) -> list[fx.Node]:
    """Who reads the value and does not pass channels on."""
    return [user for user in node.users if not passes_on(user)]


def _refused(graph: fx.GraphModule, reader: fx.Node, value: fx.Node) -> str | None:
    """Why the reader cannot take the channels of `value` in another order."""
    if not rewrite.calls(reader, dialect.conv2d, dialect.linear):
        return f"{reader.name} reads it as it is"
    if _reads_elsewhere(reader, value):
        return f"{reader.name} reads it as more than its input"
    if rewrite.constant(graph, reader.args[1]) is None:
        return f"the weight of {reader.name} is computed"
    if rewrite.calls(reader, dialect.linear) or _is_pointwise(reader):
        return None
    if not _is_depthwise(reader):
        return f"{reader.name} is neither 1x1 nor depthwise"
    a = rewrite.arguments(reader)
    if a["residual"] is not None:
        return f"{reader.name} adds a residual"
    if a["bias"] is not None and rewrite.constant(graph, a["bias"]) is None:
        return f"the bias of {reader.name} is computed"
    for user in reader.users:
        if not (rewrite.calls(user, dialect.conv2d) and _is_pointwise(user)):
            return f"what {reader.name} computes is read by {user.name} as it is"
        if _reads_elsewhere(user, reader) or rewrite.constant(graph, user.args[1]) is None:
            return f"{user.name} reads it as more than its input, or its weight is computed"
    return None


def _reads_elsewhere(product: fx.Node, value: fx.Node) -> bool:
    """Whether the product adds the value, or multiplies by it."""
    return any(operand is value for name, operand in rewrite.arguments(product).items() if name != "input")


def _is_pointwise(node: fx.Node) -> bool:
    a = rewrite.arguments(node)
    taps = rewrite.shape_of(a["weight"])[2:]
    return bool(
        a["layout"] == "NHWC"
        and tuple(taps) == (1, 1)
        and a["groups"] == 1
        and list(a["stride"]) == [1, 1]
        and not any(a["padding"])
    )


def _is_depthwise(node: fx.Node) -> bool:
    if not rewrite.calls(node, dialect.conv2d):
        return False
    a = rewrite.arguments(node)
    return bool(
        a["layout"] == "NHWC" and a["groups"] == rewrite.shape_of(node)[-1] == rewrite.shape_of(a["input"])[-1] > 1
    )


def _materialised(graph: fx.GraphModule, pieces: Pieces, node: fx.Node) -> fx.Node:
    """The pieces side by side, behind `node`; the source itself where it is all of them."""
    before = node.next
    if pieces.whole is not None:
        return reshaped(graph, pieces.whole, rewrite.shape_of(node), before)
    parts = _parts(graph, pieces, rewrite.shape_of(node)[:-1], before)
    return rewrite.call(graph, joined_rows, parts, before=before)


def _parts(
    graph: fx.GraphModule, pieces: Pieces, lead: tuple[int, ...], before: fx.Node
) -> tuple[list[fx.Node], list[int], list[int]]:
    """Sources (with those leading dims), first channels and widths."""
    sources, starts, widths = (list(part) for part in zip(*pieces.parts, strict=True))
    return [reshaped(graph, s, [*lead, rewrite.shape_of(s)[-1]], before) for s in sources], starts, widths


def _reordered(graph: fx.GraphModule, weight: Any, dim: int, order: torch.Tensor, before: fx.Node) -> Any:
    """A constant with its dim in another order."""
    if weight is None or bool((order == torch.arange(len(order))).all()):
        return weight
    index = rewrite.add_constant(graph, "order", order, before)
    return rewrite.call(graph, aten.index_select.default, (weight, dim, index), before=before)


def _reorder_product(graph: fx.GraphModule, reader: fx.Node, pieces: Pieces) -> fx.Node:
    a = rewrite.arguments(reader)
    weight = _reordered(graph, a["weight"], 1, pieces.order, reader)
    rest = (a["bias"], a["residual"], a["activation"], a["activation_args"])
    value = rewrite.packed(reader.meta["val"])
    if pieces.whole is not None:
        middle = (a["stride"], a["padding"], a["dilation"], a["groups"]) if "stride" in a else ()
        last = (a["layout"],) if "layout" in a else ()
        whole = reshaped(graph, pieces.whole, rewrite.shape_of(a["input"]), reader)
        args: tuple[Any, ...] = (whole, weight, *rest[:2], *middle, *rest[2:], *last)
        assert isinstance(reader.target, rewrite.Operator)
        new = rewrite.call(graph, reader.target, args, before=reader, value=value)
    else:
        matrix = weight
        if len(rewrite.shape_of(weight)) > 2:
            matrix = reshaped(graph, weight, rewrite.shape_of(weight)[:2], reader)
        parts = _parts(graph, pieces, rewrite.shape_of(reader)[:-1], reader)
        new = rewrite.call(graph, joined_linear, (*parts, matrix, *rest), before=reader, value=value)
    rewrite.replace(reader, new)
    return new


def _reorder_depthwise(graph: fx.GraphModule, reader: fx.Node, pieces: Pieces, current: dict[fx.Node, fx.Node]) -> None:
    a = rewrite.arguments(reader)
    a["input"] = pieces.parts[0][0]
    for name in ("weight", "bias"):
        a[name] = _reordered(graph, a[name], 0, pieces.order, reader)
    new = rewrite.call(graph, dialect.conv2d, tuple(a.values()), before=reader, value=reader.meta["val"])
    for user in list(reader.users):
        b = rewrite.arguments(user)
        b["input"], b["weight"] = new, _reordered(graph, b["weight"], 1, pieces.order, user)
        product = rewrite.call(graph, dialect.conv2d, tuple(b.values()), before=user, value=user.meta["val"])
        rewrite.replace(user, product)
        current[user] = product
    rewrite.replace(reader, new)
