"""Moves of an image's channels are one operator, so that images can lie in NHWC around them.

    reshape(permute(reshape(x, [N, g, C/g, H, W]))), channel_shuffle   -> permute(x, [N, g, C/g, P], dims, [N, C, H, W])

for every chain of reshapes, permutes and copies from an NCHW image to one of the same shape that leaves batch and
pixels where they are, by the index maps of `index_map`.

Kept: chains whose values in between somebody else reads, and those that move pixels.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .fuse_reshape_transpose import compose
from .moves.index_map import Digit, IndexMap, identity
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def recognise_channel_moves(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite every chain that only moves channels; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.reshape.default) and not node._erased:
            count += _rewrite(graph, node)
    return rewrite.finish(graph, count)


def _rewrite(graph: fx.GraphModule, last: fx.Node) -> bool:
    chain = [last]
    while rewrite.calls(source := chain[-1].args[0], aten.reshape.default, aten.permute.default, aten.clone.default):
        if len(source.users) > 1:
            break
        chain.append(source)
    head = chain[-1].args[0]
    if len(chain) < 3 or not isinstance(head, fx.Node) or rewrite.value_of(head) is None:
        return False
    shape = rewrite.shape_of(head)
    if len(shape) != 4 or rewrite.shape_of(last) != shape:
        return False
    moved = compose(identity(shape), chain[::-1])
    if moved is None or moved.keeps_order:
        return False
    if channel_digits(moved) is None:
        keep(log, last, "the chain moves more than channels")
        return False
    arguments = [list(part) for part in moved.moves()]
    value = rewrite.packed(last.meta["val"])
    rewrite.replace_chain(
        chain[-1], last, rewrite.call(graph, dialect.permute, (head, *arguments), before=last, value=value)
    )
    return True


def channel_digits(moved: IndexMap) -> tuple[Digit, ...] | None:
    """The digits of the channel number, strides in channels, where a map of an NCHW image leaves the rest in place."""
    if len(moved.source) != 4 or moved.shape != moved.source or not math.prod(moved.source):
        return None
    batch, channels, height, width = moved.source
    pixels = height * width
    runs = moved.runs((batch, channels, pixels))
    if runs is None:
        return None
    whole, inner, last = runs
    fixed = whole == ([Digit(batch, channels * pixels)] if batch > 1 else [])
    fixed = fixed and last == ([Digit(pixels, 1)] if pixels > 1 else [])
    if not fixed or any(digit.stride % pixels for digit in inner):
        return None
    return tuple(Digit(digit.extent, digit.stride // pixels) for digit in inner)
