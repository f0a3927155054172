"""The operands of a written-out attention: heads in their places, without factors and without repeats.

reshape(x * number)                      -> reshape(x), number
reshape(expand(reshape(x)))              -> the heads of x, each of which serves a group
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from . import dialect, rewrite
from .moves.index_map import Digit, IndexMap, identity

aten = torch.ops.aten

MOVES = frozenset({aten.reshape.default, aten.permute.default, aten.clone.default})
MOST_MOVES = 32  # looked through: what a pass looks at for one attention has a limit
# A matrix of heads: the node, the shape [batch, heads, rows, depth] it has as heads, whether its last dims are swapped.
Heads = tuple[fx.Node, tuple[int, ...], bool]


def one_number(value: object) -> float | None:
    """The number that an argument stands for: one, or a constant of one element that broadcasts to nothing more."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or rewrite.value_of(value) is None or math.prod(rewrite.shape_of(value)) != 1:
        return None
    if value.op == "get_attr":
        root = value.graph.owning_module
        stored = None if root is None else rewrite.constant(root, value)
        return None if stored is None or stored.dtype == torch.bool else float(stored)
    if rewrite.calls(value, aten.scalar_tensor.default):
        return one_number(value.args[0])
    return one_number(value.args[1]) if rewrite.calls(value, aten.full.default) else None


def moves_above(node: fx.Node, alone: bool = False) -> tuple[fx.Node, list[fx.Node]]:
    """(source, path): the moves between a source and `node`, last one first; `alone`: those with a single reader."""
    path: list[fx.Node] = []
    while rewrite.calls(node, *MOVES) and len(path) < MOST_MOVES:
        if alone and len(node.users) != 1:
            break
        path.append(node)
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node, path


def composed(source: fx.Node, path: Sequence[fx.Node]) -> IndexMap | None:
    """The moves of `path`, the last one first, as one of the elements of `source`; None where that is none."""
    moved: IndexMap | None = identity(rewrite.shape_of(source))
    for move in reversed(path):
        if moved is None:
            return None
        if move.target is aten.permute.default:
            dims: list[int] = rewrite.arguments(move)["dims"]
            moved = moved.permute([d % len(moved.shape) for d in dims])
        else:
            moved = moved.reshape(rewrite.shape_of(move))
    return moved


def unscaled(graph: fx.GraphModule, node: fx.Node, before: fx.Node) -> tuple[fx.Node, float]:
    """The node without the numbers that it or what it moves is multiplied by, and their product."""
    path: list[fx.Node] = []
    source, bare, kept, factor = node, node, 0, 1.0
    while source.op == "call_function" and len(path) < MOST_MOVES:
        number = one_number(source.args[1]) if source.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if number is not None and number and math.isfinite(number):
            if not isinstance(source.args[0], fx.Node) or rewrite.shape_of(source.args[0]) != rewrite.shape_of(source):
                break
            if not rewrite.is_float(source, source.args[0]):
                break
            factor *= 1 / number if source.target is aten.div.Tensor else number
            kept = len(path)
            source = bare = source.args[0]
            continue
        if not rewrite.calls(source, *MOVES, aten.expand.default):
            break
        path.append(source)
        assert isinstance(source.args[0], fx.Node)
        source = source.args[0]
    if factor == 1.0:
        return node, 1.0
    for move in reversed(path[:kept]):
        bare = rewrite.call(graph, move.target, (bare, *move.args[1:]), move.kwargs, before=before)  # type: ignore[arg-type]
    return bare, factor


def heads(graph: fx.GraphModule, node: fx.Node, shape: tuple[int, ...], swapped: bool, before: fx.Node) -> fx.Node:
    """`node`, matrices in any number of batches, as heads of `shape`."""
    held = (*shape[:-2], shape[-1], shape[-2]) if swapped else shape
    if rewrite.shape_of(node) != held:
        node = rewrite.call(graph, aten.reshape.default, (node, list(held)), before=before)
    if swapped:
        node = rewrite.call(graph, aten.permute.default, (node, [0, 1, 3, 2]), before=before)
    return node


def without_repeats(graph: fx.GraphModule, key: Heads, value: Heads, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values as heads, before they were repeated for groups where both were, and as often."""
    keys, values = _repeated(*key), _repeated(*value)
    if keys is None or values is None or keys[2] != values[2]:
        return heads(graph, *key, before), heads(graph, *value, before)
    found = []
    for (node, (in_shape, dims), times), (_, shape, _) in ((keys, key), (values, value)):
        few = [shape[0], shape[1] // times, *shape[2:]]
        found.append(rewrite.call(graph, dialect.permute, (node, in_shape, dims, few), before=before))
    return found[0], found[1]


def _repeated(
    node: fx.Node, shape: tuple[int, ...], swapped: bool
) -> tuple[fx.Node, tuple[list[int], list[int]], int] | None:
    """(x, the moves that make heads of x, how many heads each serves) where x was expanded on the way to `node`."""
    node, path = moves_above(node)
    if not rewrite.calls(node, aten.expand.default) or not isinstance(node.args[0], fx.Node):
        return None
    source, wide = node.args[0], rewrite.shape_of(node)
    own = [1] * (len(wide) - len(rewrite.shape_of(source))) + list(rewrite.shape_of(source))
    grown = [i for i, (old, new) in enumerate(zip(own, wide, strict=True)) if old != new]
    if len(grown) != 1 or not math.prod(wide):
        return None
    moved = composed(node, path)
    if moved is None:
        return None
    moved = moved.reshape((*shape[:-2], shape[-1], shape[-2]) if swapped else shape)
    moved = moved.permute([0, 1, 3, 2]) if swapped else moved
    times, inner = wide[grown[0]], math.prod(wide[grown[0] + 1 :])
    if moved is None or shape[1] % times:
        return None
    return _ungrouped(source, moved, shape, times, inner)


def _ungrouped(
    source: fx.Node, moved: IndexMap, shape: tuple[int, ...], times: int, inner: int
) -> tuple[fx.Node, tuple[list[int], list[int]], int] | None:
    """`moved` without the digit of `times` copies, which has to be the innermost of the heads."""
    apart = moved.reshape((shape[0], shape[1] // times, times, *shape[2:])).permute([2, 0, 1, 3, 4])
    if apart is None:
        return None
    first, *rest = apart.digits
    left = first.extent // times
    if first.extent % times or first.stride * left != inner:
        return None
    digits = [Digit(left, first.stride)] if left > 1 else []
    # In the source, strides beyond the copies are as much shorter.
    digits += [Digit(d.extent, d.stride // times if d.stride > inner else d.stride) for d in rest]
    order = sorted(range(len(digits)), key=lambda i: -digits[i].stride)
    in_shape = [digits[i].extent for i in order]
    return source, (in_shape or [1], [order.index(i) for i in range(len(digits))] or [0]), times
