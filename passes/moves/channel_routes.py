"""Values that are lists of other values' channels, and the runs of neighbours that such a list is made of.

Every value made by concats, splits, slices and moves of its last dim is a list of channels (source, number). Sorted by
source they are few runs of neighbours, the pieces.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from .. import dialect, rewrite
from ..fuse_reshape_transpose import map_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Route:
    """The channels of a value: channel i is channel number[i] of sources[which[i]]."""

    sources: tuple[fx.Node, ...]
    which: torch.Tensor
    number: torch.Tensor

    def taken(self, index: torch.Tensor) -> Route:
        """The channels at `index`."""
        return Route(self.sources, self.which[index], self.number[index])


@dataclass(frozen=True)
class Pieces:
    """Runs of neighbouring channels, and the place that each of them has in the value: piece order -> value order."""

    parts: tuple[tuple[fx.Node, int, int], ...]  # source, first channel, channels
    order: torch.Tensor

    @property
    def whole(self) -> fx.Node | None:
        """The one source of which the pieces are all channels, or None."""
        (source, start, width), *others = self.parts
        return source if not others and not start and width == rewrite.shape_of(source)[-1] else None


def routes_of(graph: fx.GraphModule) -> dict[fx.Node, Route]:
    """The routes of all values that are made of other values' channels, in the order of the graph."""
    routes: dict[fx.Node, Route] = {}
    for node in graph.graph.nodes:
        route = _route(node, routes)
        if route is not None:
            routes[node] = route
    return routes


def _own(node: fx.Node, routes: dict[fx.Node, Route]) -> Route:
    width = rewrite.shape_of(node)[-1]
    return routes.get(node) or Route((node,), torch.zeros(width, dtype=torch.int64), torch.arange(width))


def _route(node: fx.Node, routes: dict[fx.Node, Route]) -> Route | None:
    """The channels of a value that is made of other values' channels; None for one that is computed."""
    if node.op != "call_function" or not node.args:
        return None
    if rewrite.calls(node, aten.cat.default):
        return _joined(node, routes)
    if node.target is operator.getitem:
        return _piece(node, routes)
    source = node.args[0]
    if not isinstance(source, fx.Node) or rewrite.value_of(source) is None or rewrite.value_of(node) is None:
        return None
    if not rewrite.shape_of(source) or not rewrite.shape_of(node):
        return None
    if rewrite.calls(node, aten.slice.Tensor):
        a = rewrite.arguments(node)
        if a["dim"] % len(rewrite.shape_of(source)) != len(rewrite.shape_of(source)) - 1:
            return None
        own = _own(source, routes)
        return own.taken(torch.arange(len(own.which))[a["start"] : a["end"] : a["step"]])
    if (
        rewrite.calls(node, dialect.permute, aten.reshape.default)
        and rewrite.shape_of(node)[-1] == rewrite.shape_of(source)[-1]
    ):
        order = _order_of(node)
        return None if order is None else _own(source, routes).taken(order)
    return None


def _joined(node: fx.Node, routes: dict[fx.Node, Route]) -> Route | None:
    a = rewrite.arguments(node)
    rank = len(rewrite.shape_of(node))
    parts = a["tensors"]
    if a["dim"] % rank != rank - 1 or any(
        rewrite.value_of(p) is None or len(rewrite.shape_of(p)) != rank for p in parts
    ):
        return None
    if any(p.meta["val"].dtype != node.meta["val"].dtype for p in parts):
        return None
    sources: dict[fx.Node, int] = {}
    which, number = [], []
    for part in parts:
        own = _own(part, routes)
        places = torch.tensor([sources.setdefault(s, len(sources)) for s in own.sources], dtype=torch.int64)
        which.append(places[own.which])
        number.append(own.number)
    return Route(tuple(sources), torch.cat(which), torch.cat(number))


def _piece(node: fx.Node, routes: dict[fx.Node, Route]) -> Route | None:
    split, index = node.args
    if not rewrite.calls(split, aten.split_with_sizes.default, aten.split.Tensor):
        return None
    a = rewrite.arguments(split)
    whole = a["self"]
    rank = len(rewrite.shape_of(whole))
    if a["dim"] % rank != rank - 1:
        return None
    first = sum(a["split_sizes"][:index]) if "split_sizes" in a else a["split_size"] * index
    return _own(whole, routes).taken(torch.arange(first, first + rewrite.shape_of(node)[-1]))


def _order_of(node: fx.Node) -> torch.Tensor | None:
    """Which channel of the operand each channel is, where a move leaves everything else in place."""
    moved = map_of(node)
    width = rewrite.shape_of(node)[-1]
    count = rewrite.value_of(node).numel()  # type: ignore[union-attr]
    if moved is None or not count:
        return None
    runs = moved.runs((count // width, width))
    if runs is None or any(digit.stride >= width for digit in runs[1]):
        return None
    if [(d.extent, d.stride) for d in runs[0]] != ([(count // width, width)] if count > width else []):
        return None
    order = torch.zeros(1, dtype=torch.int64)
    for digit in runs[1]:
        order = (order[:, None] + torch.arange(digit.extent) * digit.stride).reshape(-1)
    return order


def pieces_of(route: Route) -> Pieces:
    """The route's channels sorted by source and number, neighbours as one piece."""
    order = (route.which * (int(route.number.max()) + 1) + route.number).argsort(stable=True)
    which, number = route.which[order], route.number[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = (which[1:] != which[:-1]) | (number[1:] != number[:-1] + 1)
    starts = [*first.nonzero().flatten().tolist(), len(order)]
    parts = [(route.sources[int(which[a])], int(number[a]), b - a) for a, b in pairwise(starts)]
    return Pieces(tuple(parts), order)


def passes_on(user: fx.Node) -> bool:
    """Whether a reader is a list of channels itself."""
    if rewrite.calls(user, aten.cat.default):
        a = rewrite.arguments(user)
        return bool(a["dim"] % len(rewrite.shape_of(user)) == len(rewrite.shape_of(user)) - 1)
    if rewrite.calls(user, aten.split_with_sizes.default, aten.split.Tensor, aten.slice.Tensor):
        a = rewrite.arguments(user)
        rank = len(rewrite.shape_of(a["self"]))
        return bool(a["dim"] % rank == rank - 1)
    if rewrite.calls(user, dialect.permute, aten.reshape.default):
        source = user.args[0]
        assert isinstance(source, fx.Node)
        return rewrite.shape_of(user)[-1:] == rewrite.shape_of(source)[-1:] and _order_of(user) is not None
    return False
