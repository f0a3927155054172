"""Attention reads its heads where they lie, and writes them where they are wanted.

    attention(permute(x), permute(y), permute(z))     -> strided_attention(x, y, z)    heads side by side in a row
    attention(permute(split(qkv)[0]), ...)            -> strided_attention(qkv, qkv, qkv)
    permute(attention(q, k, v))                       -> strided_attention(q, k, v)    rows of all heads
    attention(permute(rows(x)), ...), rows(attention) -> strided_attention(x, ..., rows)    windows of an image

A move is undone as far up as the operand is still one stride a batch, head and position, and its channels neighbours:
through permutes, reshapes and copies, and through the parts that a split, a slice or a select cuts. A gather of whole
rows behind that is undone by a table (`head_rows`), where q, k and v have the same one.

Refused where nothing is moved, for empty operands, and for another dtype than float32: no other has a kernel that
reads by strides. A result that something else reads as well keeps its move.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .fuse_reshape_transpose import map_of
from .moves.head_rows import Place, by_table, scattered, table_of
from .moves.index_map import Digit, from_moves
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class _Reading:
    """The elements of `source` at offset + the sum of digits, grouped as [batch, head, position, channel]."""

    source: fx.Node
    offset: int
    dims: tuple[tuple[Digit, ...], ...]
    tabled: Place | None = None  # the place where a table numbers the rows

    @property
    def place(self) -> Place | None:
        """Offset and the strides of batch, head and position; None where those do not exist or channels are apart."""
        if self.tabled is not None:
            return self.tabled
        strides = [_single_stride(digits) for digits in self.dims]
        if None in strides or strides[3] not in (0, 1):  # 0: a single channel
            return None
        return (self.offset, *strides[:3])  # type: ignore[return-value]


def fuse_head_moves(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let every attention do the moves of its operands and of its result; returns how many attentions changed."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, dialect.attention):
            count += _rewrite(graph, node)
    return rewrite.finish(graph, count)


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> bool:
    a = rewrite.arguments(node)
    operands = [a[name] for name in ("q", "k", "v")]
    shapes = [rewrite.shape_of(operand) for operand in operands]
    if any(not math.prod(shape) for shape in shapes):
        keep(log, node, "no heads with elements in operands of shapes %s", shapes)
        return False
    if rewrite.packed(node.meta["val"]).dtype != torch.float32:
        keep(log, node, "no kernel reads %s by strides", node.meta["val"].dtype)
        return False
    found = [_read(operand) for operand in operands]
    last, written = _written(node)
    kept = [_whole(operand).place for operand in operands]
    rows, found = _rows_read(graph, node, found, shapes)
    out_rows, last, written = _rows_written(graph, node, last, written)
    moved = rows is not None or out_rows is not None
    if not moved and [reading.place for reading in found] == kept and written == _whole(node).place:
        keep(log, node, "its operands and its result are moved by nobody")
        return False
    (batch, heads, queries, depth), (_, key_heads, keys, _), (*_, value_depth) = shapes
    places = [number for reading in found for number in reading.place or ()] + list(written)
    tables = [
        None if t is None else rewrite.add_constant(graph, "rows", t.to(torch.int32), last) for t in (rows, out_rows)
    ]
    args = (
        *[reading.source for reading in found],
        a["mask"],
        a["is_causal"],
        a["scale"],
        [batch, heads, key_heads, queries, keys, depth, value_depth],
        places,
        list(rewrite.shape_of(last)),
        a["fill"],
        *(tables if moved else []),
    )
    value = rewrite.packed(last.meta["val"])
    new = rewrite.call(graph, dialect.strided_attention, args, before=last, value=value, source=node)
    rewrite.replace_chain(node, last, new)
    return True


def _read(operand: fx.Node) -> _Reading:
    """Where the elements of `operand` come from: the furthest source that still has a place."""
    best = reading = _whole(operand)
    while (above := _above(reading)) is not None:
        reading = above
        if reading.place is not None:
            best = reading
    return best


def _whole(node: fx.Node) -> _Reading:
    """The elements of a node from the node itself."""
    shape = rewrite.shape_of(node)
    dims = tuple((Digit(n, stride),) if n > 1 else () for n, stride in zip(shape, _dense(shape), strict=True))
    return _Reading(node, 0, dims)


def _written(node: fx.Node) -> tuple[fx.Node, tuple[int, int, int, int]]:
    """The move behind the attention that it can do, and where that puts [batch, head, position, channel]."""
    shape = rewrite.shape_of(node)
    dense = _whole(node).place
    assert dense is not None
    user = rewrite.sole_user(node)
    moved = map_of(user) if user is not None else None
    if user is None or moved is None:
        return node, dense
    in_shape, dims, _ = moved.moves()
    back = [dims.index(i) for i in range(len(dims))]
    inverse = from_moves(moved.shape, [in_shape[d] for d in dims], back, shape)
    reading = _through(_whole(node), user, inverse.digits, 0)
    place = None if reading is None else reading.place
    if place is None:
        keep(log, user, "the result is not written by strides")
        return node, dense
    return user, place


def _rows_read(
    graph: fx.GraphModule, node: fx.Node, found: list[_Reading], shapes: Sequence[Sequence[int]]
) -> tuple[torch.Tensor | None, list[_Reading]]:
    """The one table by which q, k and v are read, and the readings below it; None, and the readings, without one."""
    tables, below = [], []
    for reading, extents in zip(found, shapes, strict=True):
        table = table_of(graph, reading.source)
        if table is None or reading.place is None:
            return None, found
        width = rewrite.shape_of(reading.source)[-1]
        located = by_table(reading.place, extents, table, width)
        if located is None:
            keep(log, node, "the gathers of its operands cut heads")
            return None, found
        tables.append(located[1])
        below.append(_Reading(reading.source.args[0], located[0][0], (), located[0]))  # type: ignore[arg-type]
    if not all(torch.equal(tables[0], table) for table in tables):
        keep(log, node, "its operands are gathered by several tables")
        return None, found
    return tables[0], below


def _rows_written(
    graph: fx.GraphModule, node: fx.Node, last: fx.Node, written: tuple[int, int, int, int]
) -> tuple[torch.Tensor | None, fx.Node, tuple[int, int, int, int]]:
    """The table by which the result is written, with the gather that it does as well; None, and as it was, without."""
    user = rewrite.sole_user(last)
    while user is not None and rewrite.calls(user, aten.reshape.default):
        user = rewrite.sole_user(user)
    table = None if user is None else table_of(graph, user)
    if user is None or table is None:
        return None, last, written
    located = scattered(written, rewrite.shape_of(node), table, rewrite.shape_of(user)[-1])
    if located is None:
        keep(log, user, "it gathers rows that cut the result's heads")
        return None, last, written
    return located[1], user, located[0]


def _above(reading: _Reading) -> _Reading | None:
    """The same elements, read from what the source moves or cuts."""
    node = reading.source
    moved = map_of(node)
    if moved is not None:
        return _through(reading, node.args[0], moved.digits, 0)
    cut = _cut(node)
    if cut is None:
        return None
    source, dim, start = cut
    whole = rewrite.shape_of(source)
    strides = _dense(whole)
    kept = list(rewrite.shape_of(node))
    if len(kept) < len(whole):  # a select has lost the dim
        kept.insert(dim, 1)
    radix = [Digit(n, stride) for n, stride in zip(kept, strides, strict=True)]
    return _through(reading, source, radix, start * strides[dim])


def _cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(source, dim, first index) of a part that a split, an unbind, a slice or a select cuts out."""
    if node.target is operator.getitem:
        whole, index = node.args
        assert isinstance(whole, fx.Node)
        assert isinstance(index, int)
        if rewrite.calls(whole, aten.split_with_sizes.default):
            a = rewrite.arguments(whole)
            return a["self"], a["dim"] % len(rewrite.shape_of(a["self"])), sum(a["split_sizes"][:index])
        if rewrite.calls(whole, aten.split.Tensor):
            a = rewrite.arguments(whole)
            return a["self"], a["dim"] % len(rewrite.shape_of(a["self"])), a["split_size"] * index
        if rewrite.calls(whole, aten.unbind.int):
            a = rewrite.arguments(whole)
            return a["self"], a["dim"] % len(rewrite.shape_of(a["self"])), index
        return None
    if rewrite.calls(node, aten.slice.Tensor):
        a = rewrite.arguments(node)
        shape = rewrite.shape_of(a["self"])
        dim, start = a["dim"] % len(shape), a["start"] or 0
        start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
        return (a["self"], dim, start) if a["step"] == 1 else None
    if rewrite.calls(node, aten.select.int):
        a = rewrite.arguments(node)
        shape = rewrite.shape_of(a["self"])
        dim = a["dim"] % len(shape)
        return a["self"], dim, a["index"] % shape[dim]
    return None


def _through(reading: _Reading, source: object, radix: Sequence[Digit], offset: int) -> _Reading | None:
    """`reading` in terms of the source, of which the linear index has the digits `radix`, outermost first.

    None where a dim is no whole digits, or where offset and dims add up to more than a digit holds: they would carry.
    """
    assert isinstance(source, fx.Node)
    weights = [math.prod(digit.extent for digit in radix[i + 1 :]) for i in range(len(radix))]
    used = [reading.offset // weight % digit.extent for weight, digit in zip(weights, radix, strict=True)]
    offset += sum(count * digit.stride for count, digit in zip(used, radix, strict=True))
    dims = []
    for digits in reading.dims:
        parts: list[Digit] = []
        for digit in digits:
            split = _split(digit, radix, weights)
            if split is None:
                return None
            for position, extent, step in split:
                used[position] += (extent - 1) * step
                parts.append(Digit(extent, step * radix[position].stride))
        dims.append(tuple(parts))
    if any(most >= digit.extent for most, digit in zip(used, radix, strict=True)):
        return None
    return _Reading(source, offset, tuple(dims))


def _split(digit: Digit, radix: Sequence[Digit], weights: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """`digit` as parts (position in `radix`, extent, step within that digit), outermost first."""
    found: list[tuple[int, int, int]] = []
    extent, stride = digit.extent, digit.stride
    for position in reversed(range(len(radix))):
        weight, whole = weights[position], radix[position].extent
        if extent == 1 or stride >= weight * whole:
            continue
        if stride % weight:
            return None
        step = stride // weight
        inside = min(extent, whole // step)
        if whole % step or extent % inside or (inside < extent and inside * step != whole):
            return None
        found.append((position, inside, step))
        extent, stride = extent // inside, weight * whole
    return found[::-1] if extent == 1 else None


def _single_stride(digits: Sequence[Digit]) -> int | None:
    """The stride that the digits have as one; 0 for a dim of one, None where they are not one digit."""
    for outer, inner in pairwise(digits):
        if outer.stride != inner.stride * inner.extent:
            return None
    return digits[-1].stride if digits else 0


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
