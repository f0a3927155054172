"""Slices of one value side by side are that value permuted, where they are all of it.

    cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        -> permute(x, [B H/2, 2, W, C], [0, 2, 1, 3], [B, H/2, W/2, 4 C])      Swin's patch merging

What a chain of slices, reshapes and permutes reads is found by applying it to numbered elements; the order of the whole
is factored into digits (`index_map.factored`). The permute copies runs, where the concat asks for every element which
slice it is of; and it is a move like others, which `fuse_reshape_transpose` merges.

Kept: concats of several values, or of parts that leave out or repeat elements, and orders that have no digits.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .moves.index_map import IndexMap, factored
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

MOST = 1 << 22  # elements that are numbered at compile time
_CUTS = (aten.slice.Tensor, aten.select.int, aten.reshape.default, aten.permute.default)


def join_slices(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite concats that only permute a value; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.cat.default):
            count += _rewrite(graph, node)
    return rewrite.finish(graph, count)


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> bool:
    a = rewrite.arguments(node)
    parts = a["tensors"]
    chains = [_chain(part) for part in parts]
    sources = {chain[-1].args[0] if chain else part for part, chain in zip(parts, chains, strict=True)}
    if len(sources) != 1 or not all(chains):
        return False
    (source,) = sources
    assert isinstance(source, fx.Node)
    count = math.prod(rewrite.shape_of(source))
    if count != math.prod(rewrite.shape_of(node)) or not 0 < count <= MOST:
        keep(log, node, "its parts are not all of %s", source)
        return False
    digits = factored(_order(node, source, chains, a["dim"]))
    if digits is None:
        keep(log, node, "the parts of %s lie in no order that a permute gives", source)
        return False
    moved = IndexMap(rewrite.shape_of(source), digits, rewrite.shape_of(node))
    arguments = [list(part) for part in moved.moves()]
    value = rewrite.packed(node.meta["val"])
    new = rewrite.call(graph, dialect.permute, (source, *arguments), before=node, value=value)
    rewrite.replace_chain(node, node, new)
    return True


def _chain(node: object) -> list[fx.Node]:
    """The cuts and moves that lead to a part, last one first."""
    chain: list[fx.Node] = []
    while (
        rewrite.calls(node, *_CUTS) and isinstance(node.args[0], fx.Node) and rewrite.value_of(node.args[0]) is not None
    ):
        chain.append(node)
        node = node.args[0]
    return chain


def _order(node: fx.Node, source: fx.Node, chains: list[list[fx.Node]], dim: int) -> torch.Tensor:
    """Which element of the source each element of the concat is."""
    numbers = torch.arange(math.prod(rewrite.shape_of(source))).reshape(rewrite.shape_of(source))
    parts = []
    for chain in chains:
        part = numbers
        for cut in reversed(chain):
            assert callable(cut.target)
            part = cut.target(part, *cut.args[1:], **cut.kwargs)
        parts.append(part)
    return torch.cat(parts, dim).reshape(-1)
