"""Reads at computed places: embedding, gather, advanced indexing, masks, binary search.

torch raises for an index out of range; compiled code does not check. The address is clamped, so such an index
reads the nearest element and never memory outside the tensor. Negative indices count from the end where torch lets
them (advanced indexing, take) and are out of range elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from ...passes import dialect_mixed
from . import expressions as ex
from .imperative import Elements, grid, local, loop_nest, when
from .index_math import (
    Expr,
    Index,
    address,
    argument,
    axis_of,
    define,
    replace,
    sizes,
    unravel,
)
from .registry import Out, lowers

aten = torch.ops.aten


@lowers(aten.embedding.default)
def embedding(
    out: Out,
    weight: te.Tensor,
    indices: te.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> te.Tensor:
    """Rows of `weight`; padding_idx concerns gradients only."""
    rows = sizes(weight)[0]
    return define(out, lambda *i: weight(address(indices(*i[:-1]), rows), i[-1]), "embedding")


@lowers(dialect_mixed.embedding_w8)
def embedding_w8(out: Out, weight: te.Tensor, scale: te.Tensor, indices: te.Tensor) -> te.Tensor:
    """Rows of int8, each times its scale."""
    rows = sizes(weight)[0]

    def value(*i: Expr) -> Expr:
        row = address(indices(*i[:-1]), rows)
        return weight(row, i[-1]).astype("float32") * scale(row)

    return define(out, value, "embedding_w8")


@lowers(aten.gather.default)
def gather(out: Out, source: te.Tensor, dim: int, index: te.Tensor, *, sparse_grad: bool = False) -> te.Tensor:
    """result[.., i, ..] = source[.., index[.., i, ..], ..]."""
    axis = axis_of(dim, len(out.shape))

    def value(*i: Expr) -> Expr:
        if not source.shape:
            return source()
        place = address(ex.read(index, i), sizes(source)[axis])
        return source(*replace(i, axis, place))

    return define(out, value, "gather")


@lowers(aten.index_select.default)
def index_select(out: Out, source: te.Tensor, dim: int, index: te.Tensor) -> te.Tensor:
    """Positions of a dim in the order of `index`."""
    axis = axis_of(dim, len(out.shape))

    def value(*i: Expr) -> Expr:
        if not source.shape:
            return source()
        which = index(i[axis]) if index.shape else index()
        return source(*replace(i, axis, address(which, sizes(source)[axis])))

    return define(out, value, "index_select")


def refuse_masks(node: fx.Node) -> str | None:
    """Advanced indexing by a boolean tensor has a result whose shape depends on data."""
    for index in argument(node, "indices"):
        if index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8):
            return "indexing by a boolean mask: the shape depends on data"
    return None


def index_layout(indices: Sequence[te.Tensor | None], rank: int) -> tuple[list[int], int, tuple[int, ...]]:
    """Which dims of a rank-`rank` tensor are indexed, where their joint dims go in the result, and the latter's shape.

    The joint dims take the place of the indexed ones if those are adjacent, else they come first (as in NumPy).
    """
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    joint = torch.broadcast_shapes(*(sizes(indices[axis]) for axis in axes))  # type: ignore[no-untyped-call]
    adjacent = axes == list(range(axes[0], axes[0] + len(axes))) if axes else True
    return axes, (axes[0] if adjacent and axes else 0), tuple(joint)


def indexed(
    index: Sequence[Expr],
    indices: Sequence[Any],
    shape: Sequence[int],
    layout: tuple[list[int], int, tuple[int, ...]],
) -> Index:
    """The element of a `shape`-shaped tensor that advanced indexing puts at `index`."""
    axes, place, joint = layout
    among = index[place : place + len(joint)]
    rest = iter((*index[:place], *index[place + len(joint) :]))
    result: list[Expr] = []
    for axis, extent in enumerate(shape):
        if axis in axes:
            which = indices[axis]
            tail = among[len(among) - len(which.shape) :]
            position = [0 if int(n) == 1 else i for i, n in zip(tail, which.shape, strict=True)]
            result.append(address(_at(which, position), extent, wrap=True))
        else:
            result.append(next(rest))
    return tuple(result)


def _at(tensor: te.Tensor | Elements, position: Sequence[Expr]) -> Expr:
    return tensor[tuple(position)] if isinstance(tensor, Elements) else tensor(*position)


@lowers(aten.index.Tensor, aten._unsafe_index.Tensor, can=refuse_masks)
def index_(out: Out, source: te.Tensor, indices: Sequence[te.Tensor | None]) -> te.Tensor:
    """Advanced indexing by integer tensors, which broadcast together; None keeps a dim."""
    shape = sizes(source)
    layout = index_layout(indices, len(shape))
    return define(out, lambda *i: source(*indexed(i, indices, shape, layout)), "index")


@lowers(aten.take.default)
def take(out: Out, source: te.Tensor, index: te.Tensor) -> te.Tensor:
    """Elements of the tensor read as one row."""
    shape = sizes(source)

    def value(*i: Expr) -> Expr:
        return source(*unravel(address(index(*i), math.prod(shape), wrap=True), shape))

    return define(out, value, "take")


def _can_one_hot(node: fx.Node) -> str | None:
    if argument(node, "num_classes") < 0:
        return "one_hot without num_classes: the shape depends on data"
    return None


@lowers(aten.one_hot.default, can=_can_one_hot)
def one_hot(out: Out, source: te.Tensor, num_classes: int = -1) -> te.Tensor:
    """1 at the class, 0 elsewhere."""
    return define(out, lambda *i: ex.cast(source(*i[:-1]), "int64").equal(i[-1]), "one_hot")


def _search(
    out: Out, sequence: te.Tensor, values: te.Tensor | float, right: bool, sorter: te.Tensor | None
) -> te.Tensor:
    if 0 in out.shape or 0 in sizes(sequence):
        return define(out, lambda *i: ex.constant(0, out.dtype), "searchsorted")
    inputs = [t for t in (sequence, values, sorter) if isinstance(t, te.Tensor)]
    compared = ex.result_type(sequence, values)
    length = sizes(sequence)[-1]

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        rows, result = ins[0], outs[0]
        with grid(out.shape, parallel=True) as i:
            value = ex.cast(ins[1][i], compared) if isinstance(values, te.Tensor) else ex.constant(values, compared)
            row = i[:-1] if len(rows.shape) > 1 else ()
            low, high = local("int32"), local("int32")
            low[0], high[0] = 0, length
            with T.serial(0, length.bit_length()), when(low[0] < high[0]):
                middle = (low[0] + high[0]) >> 1
                place = middle if sorter is None else address(ins[-1][(*row, middle)], length)
                element = ex.cast(rows[(*row, place)], compared)
                # Which of the two tests torch makes decides where NaN goes.
                with T.If(element > value if right else element >= value):
                    with T.Then():
                        high[0] = middle
                    with T.Else():
                        low[0] = middle + 1
            result[i] = tirx.Cast(out.dtype, low[0])

    return loop_nest([out], inputs, body, "searchsorted")[0]


@lowers(aten.bucketize.Tensor)
def bucketize(
    out: Out, source: te.Tensor, boundaries: te.Tensor, *, out_int32: bool = False, right: bool = False
) -> te.Tensor:
    """The bucket between sorted boundaries of every element."""
    return _search(out, boundaries, source, right, None)


@lowers(aten.searchsorted.Tensor)
def searchsorted(
    out: Out,
    sorted_sequence: te.Tensor,
    source: te.Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: te.Tensor | None = None,
) -> te.Tensor:
    """Where every element would go in the sorted rows of `sorted_sequence`."""
    return _search(out, sorted_sequence, source, right or side == "right", sorter)


@lowers(aten.searchsorted.Scalar)
def searchsorted_scalar(
    out: Out,
    sorted_sequence: te.Tensor,
    source: float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: te.Tensor | None = None,
) -> te.Tensor:
    """Where a number would go in the sorted `sorted_sequence`."""
    return _search(out, sorted_sequence, source, right or side == "right", sorter)
