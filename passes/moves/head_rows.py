"""Heads whose rows lie where a table says, for `fuse_head_moves`.

    [b, h, s, d] at o + b * B + h * H + s * P + d of y, and y row i = x row table[i], rows N wide
    -> at o mod N + rows[b, s] * N + h * H + d of x, with rows[b, s] = table[(o + b * B + s * P) / N]

which needs B and P to be whole rows, and the heads of a position to lie within one row. What is written goes the other
way: row i of y goes to the row j of the result with table[j] = i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from .. import rewrite
from .row_moves import inverse

aten = torch.ops.aten

Place = tuple[int, int, int, int]  # offset, and strides of batch, head and position


def table_of(graph: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The table of a gather of rows that drops and repeats none; None for any other node."""
    if not rewrite.calls(node, aten.index_select.default) or node.args[1] != 0 or len(rewrite.shape_of(node)) != 2:
        return None
    index = rewrite.constant(graph, node.args[2])
    count = rewrite.shape_of(node)[0]
    if index is None or not torch.equal(index.sort().values, torch.arange(count, dtype=index.dtype)):
        return None
    return index.long()


def by_table(
    place: Place, extents: Sequence[int], table: torch.Tensor, width: int
) -> tuple[Place, torch.Tensor] | None:
    """The place within a row and rows[b, s], for extents [batch, heads, positions, depth]; None where rows are cut."""
    batch, heads, positions, depth = extents
    offset, batch_stride, head_stride, position_stride = place
    if (batch > 1 and batch_stride % width) or (positions > 1 and position_stride % width):
        return None
    if not 0 <= offset % width + (heads - 1) * head_stride + depth - 1 < width:
        return None
    first = offset // width
    steps = torch.arange(batch)[:, None] * (batch_stride // width) + torch.arange(positions) * (
        position_stride // width
    )
    return (offset % width, 0, head_stride, width), table[first + steps]


def scattered(
    place: Place, extents: Sequence[int], table: torch.Tensor, width: int
) -> tuple[Place, torch.Tensor] | None:
    """As `by_table`, for what is written before a gather moves its rows."""
    return by_table(place, extents, inverse(table), width)
