"""Moves of whole rows: which row of a source every row of a result is.

A row is the last dim. A chain of reshapes, permutes, copies, rolls, flips and selections by constant indices that
leaves rows whole is a permutation of row numbers, whatever it is made of:

    table[i] = j      row i of the result is row j of the source

    chain of chains   table_1[table_2]       inverse   the places of 0, 1, 2, ... in the table
    nothing           0, 1, 2, ...           wrapped   a roll needs no other form than the rest

The table is found by applying the chain to numbered elements, so there is no second definition of any operator to keep
in step with the first. What mixed-radix digits cannot say (wrap-around, and joins that cut a digit) it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .. import dialect, rewrite

aten = torch.ops.aten

MOST = 1 << 24  # elements a chain is applied to at compile time: 128 MiB for a moment

_MOVES = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.clone.default,
        dialect.permute,
        aten.roll.default,
        aten.flip.default,
    }
)


@dataclass(frozen=True)
class RowMove:
    """Row i of `result` is row table[i] of `source`."""

    source: fx.Node
    result: fx.Node
    chain: tuple[fx.Node, ...]  # from the source's reader to the result
    table: torch.Tensor  # int64

    @property
    def is_identity(self) -> bool:
        """Whether no row moves."""
        return bool((self.table == torch.arange(len(self.table))).all())


def inverse(table: torch.Tensor) -> torch.Tensor:
    """Where each row goes, for a table that says where each comes from."""
    result = torch.empty_like(table)
    result[table] = torch.arange(len(table))
    return result


def is_move(graph: fx.GraphModule, node: object) -> bool:
    """Whether the node only puts the elements of its first operand in another order or shape."""
    if not rewrite.calls(node, *_MOVES, aten.index_select.default) or not isinstance(node.args[0], fx.Node):
        return False
    source = rewrite.value_of(node.args[0])
    if source is None or rewrite.value_of(node) is None:
        return False
    if node.target in _MOVES:
        return True
    if not rewrite.calls(node, aten.index_select.default):
        return False
    index = rewrite.constant(graph, node.args[2])
    extent = source.shape[int(node.args[1])] if source.dim() else 0  # type: ignore[arg-type]
    return index is not None and len(index) == extent and bool((index.sort().values == torch.arange(extent)).all())


def rows_moved(graph: fx.GraphModule, result: fx.Node, most: int | None = None) -> RowMove | None:
    """The row move that ends in `result`, from as far up as one reader follows another; None where rows are cut.

    `most` bounds the number of nodes of the chain.
    """
    chain: list[fx.Node] = []
    node = result
    while is_move(graph, node) and (not chain or len(node.users) == 1) and (most is None or len(chain) < most):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    while chain:
        table = _table(graph, chain[::-1])
        if table is not None:
            return RowMove(chain[-1].args[0], result, tuple(chain[::-1]), table)  # type: ignore[arg-type]
        chain.pop()
    return None


def gathered(
    graph: fx.GraphModule, source: fx.Node, table: torch.Tensor, shape: Sequence[int], before: fx.Node
) -> fx.Node:
    """The rows of `source` in the order of `table`, seen as `shape`."""
    width = rewrite.shape_of(source)[-1]
    flat = reshaped(graph, source, [len(table), width], before)
    index = rewrite.add_constant(graph, "rows", table.to(torch.int32), before)
    moved = rewrite.call(graph, aten.index_select.default, (flat, 0, index), before=before)
    return reshaped(graph, moved, shape, before)


def reshaped(graph: fx.GraphModule, node: fx.Node, shape: Sequence[int], before: fx.Node) -> fx.Node:
    """`node` in another shape."""
    if rewrite.shape_of(node) == tuple(shape):
        return node
    return rewrite.call(graph, aten.reshape.default, (node, list(shape)), before=before)


def _table(graph: fx.GraphModule, chain: Sequence[fx.Node]) -> torch.Tensor | None:
    source, result = chain[0].args[0], chain[-1]
    assert isinstance(source, fx.Node)
    shape, width = rewrite.shape_of(source), (rewrite.shape_of(result) or (1,))[-1]
    count = math.prod(shape)
    if not shape or shape[-1] != width or not 0 < count <= MOST:
        return None
    numbers = torch.arange(count).reshape(shape)
    for node in chain:
        numbers = _applied(graph, node, numbers)
    found = numbers.reshape(-1, width)
    table = found[:, 0].div(width, rounding_mode="floor")
    return table if torch.equal(found, table[:, None] * width + torch.arange(width)) else None


def _applied(graph: fx.GraphModule, node: fx.Node, numbers: torch.Tensor) -> torch.Tensor:
    assert callable(node.target)
    if rewrite.calls(node, aten.index_select.default):
        return torch.index_select(numbers, int(node.args[1]), rewrite.constant(graph, node.args[2]))  # type: ignore[arg-type]
    if rewrite.calls(node, aten.reshape.default):
        return numbers.reshape(rewrite.shape_of(node))
    if rewrite.calls(node, aten.clone.default):
        return numbers
    result: torch.Tensor = node.target(numbers, *node.args[1:])
    return result
