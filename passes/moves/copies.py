"""How much of a graph only moves elements: permutes, slices, joins, repetitions and the like.

    permute, transpose, ...   counted where they change the order of the elements, dims of 1 aside
    slice, expand, roll, ...  counted where the result has other elements than the operand
    reshape, clone            never: compiled code keeps every value in order, and they keep the bytes as they are
    moves of constants        never: they are made at compile time

Each is one copy if it runs by itself. Lowering may still take one up into what reads it, so this is the most there can
be, the same measure before and behind the passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .. import dialect, rewrite
from ..canonicalise import PERMUTES, permuted_dims
from ..dialect_joined import joined_rows

aten = torch.ops.aten

# Those whose result has as many elements as their operand only where they do nothing.
_RESIZES = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.expand.default,
        aten.repeat.default,
        aten.constant_pad_nd.default,
    }
)
_MOVES = frozenset(
    {
        aten.cat.default,
        aten.stack.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.roll.default,
        aten.flip.default,
        aten.index_select.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.channel_shuffle.default,
        aten.im2col.default,
        aten.unfold.default,
        joined_rows,
    }
)


@dataclass(frozen=True)
class Copies:
    """Nodes that only move elements, and the bytes they write."""

    count: int
    bytes: int


def count_copies(graph: fx.GraphModule) -> Copies:
    """The copies of a graph before or behind any pass."""
    constants: set[fx.Node] = set()
    sizes = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (rewrite.is_pure(node) and constants.issuperset(node.all_input_nodes)):
            constants.add(node)
        elif is_copy(node):
            sizes.append(_bytes(node.meta["val"]))
    return Copies(len(sizes), sum(sizes))


def is_copy(node: fx.Node) -> bool:
    """Whether the node only moves elements, and cannot leave them where they are."""
    if node.op != "call_function":
        return False
    if node.target in _MOVES:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or rewrite.value_of(source) is None or rewrite.value_of(node) is None:
        return False
    if node.target in _RESIZES:
        return bool(node.meta["val"].numel() != source.meta["val"].numel())
    if node.target is dialect.permute:
        _, shape, dims, _ = node.args
        return _reorders(shape, dims)  # type: ignore[arg-type]
    if node.target in PERMUTES:
        return _reorders(rewrite.shape_of(source), permuted_dims(node))
    return False


def _reorders(shape: tuple[int, ...], dims: list[int]) -> bool:
    """Whether permuting `dims` changes the order of the elements."""
    extents = list(shape)
    moved = [d % len(extents) for d in dims]
    kept = [d for d in moved if extents[d] != 1]
    return kept != sorted(kept)


def _bytes(value: object) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(v) for v in value)
    if not isinstance(value, torch.Tensor) or not all(isinstance(d, int) for d in value.shape):
        return 0
    return value.numel() * value.element_size()
