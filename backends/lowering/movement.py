"""Operators that move elements without computing: views, permutations, slices, joins, repetitions, diagonals.

Each is an index map `result[i] = source[f(i)]`. The driver turns pure views into aliases of their operand; the
forms here serve when a view is fused with a neighbour. Tensors are contiguous in compiled code, whatever strides torch
gave them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from ...passes import dialect
from . import expressions as ex
from .index_math import (
    Expr,
    Index,
    argument,
    axis_of,
    define,
    guarded,
    offsets,
    ravel,
    replace,
    reshape_index,
    sizes,
    spread,
    unravel,
)
from .registry import Out, lowers

aten = torch.ops.aten


@lowers(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.view_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.lift_fresh.default,
)
def reshape(out: Out, source: te.Tensor, *args: Any, **kwargs: Any) -> te.Tensor:
    """Keep the elements in their order; only the shape is new, and out.shape says it."""
    shape = sizes(source)
    return define(out, lambda *i: source(*reshape_index(i, out.shape, shape)), "reshape")


def _permuted(out: Out, source: te.Tensor, dims: Sequence[int]) -> te.Tensor:
    """result dim k is source dim dims[k]."""
    places = [list(dims).index(axis) for axis in range(len(dims))]
    return define(out, lambda *i: source(*(i[place] for place in places)), "permute")


@lowers(aten.permute.default)
def permute(out: Out, source: te.Tensor, dims: Sequence[int]) -> te.Tensor:
    """Reorder the dims."""
    rank = len(source.shape)
    return _permuted(out, source, [axis_of(d, rank) for d in dims])


@lowers(aten.transpose.int)
def transpose(out: Out, source: te.Tensor, dim0: int, dim1: int) -> te.Tensor:
    """Exchange two dims."""
    dims = list(range(len(source.shape)))
    if dims:
        a, b = axis_of(dim0, len(dims)), axis_of(dim1, len(dims))
        dims[a], dims[b] = dims[b], dims[a]
    return _permuted(out, source, dims)


@lowers(aten.t.default, aten.numpy_T.default)
def reverse_dims(out: Out, source: te.Tensor) -> te.Tensor:
    """Reverse the order of the dims."""
    return _permuted(out, source, range(len(source.shape))[::-1])


@lowers(aten.mT.default)
def transpose_matrix(out: Out, source: te.Tensor) -> te.Tensor:
    """Exchange the last two dims."""
    return transpose(out, source, -2, -1)


@lowers(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def movedim(
    out: Out, source: te.Tensor, from_: int | Sequence[int], to: int | Sequence[int], **kwargs: Any
) -> te.Tensor:
    """Move dims `from_` to the places `to`; the others keep their order."""
    rank = len(source.shape)
    moved = dict(
        zip(
            (axis_of(d, rank) for d in spread(to, 1)),
            (axis_of(d, rank) for d in spread(from_, 1)),
            strict=True,
        )
    )
    rest = iter([axis for axis in range(rank) if axis not in moved.values()])
    return _permuted(out, source, [moved[place] if place in moved else next(rest) for place in range(rank)])


@lowers(dialect.permute)
def reshape_permute(
    out: Out, source: te.Tensor, in_shape: Sequence[int], dims: Sequence[int], out_shape: Sequence[int]
) -> te.Tensor:
    """source.reshape(in_shape).permute(dims).reshape(out_shape)."""
    shape = sizes(source)
    count = math.prod(shape)
    known = math.prod(d for d in in_shape if d >= 0)
    folded = [count // known if d < 0 else d for d in in_shape] if count else list(in_shape)
    order = [axis_of(d, len(folded)) for d in dims]
    turned = [folded[d] for d in order]

    def value(*i: Expr) -> Expr:
        inner = reshape_index(i, out.shape, turned)
        back = tuple(inner[order.index(axis)] for axis in range(len(folded)))
        return source(*reshape_index(back, folded, shape))

    return define(out, value, "permute")


@lowers(aten.expand_as.default, aten.broadcast_to.default)
def expand(out: Out, source: te.Tensor, *args: Any, **kwargs: Any) -> te.Tensor:
    """Repeat along new dims and along those of extent 1."""
    return define(out, lambda *i: ex.read(source, i), "expand")


def slice_range(start: int | None, end: int | None, extent: int) -> tuple[int, int]:
    """The range start:end of a dim as torch clamps it, start <= end."""
    first, last, _ = slice(start, end).indices(extent)
    return first, max(first, last)


@lowers(aten.slice.Tensor)
def slice_(
    out: Out, source: te.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> te.Tensor:
    """Every step-th element of a dim from start on."""
    axis = axis_of(dim, len(source.shape))
    first, _ = slice_range(start, end, sizes(source)[axis])
    return define(out, lambda *i: source(*replace(i, axis, i[axis] * step + first)), "slice")


@lowers(aten.select.int)
def select(out: Out, source: te.Tensor, dim: int, index: int) -> te.Tensor:
    """One position of a dim, which disappears."""
    axis = axis_of(dim, len(source.shape))
    place = index % max(sizes(source)[axis], 1)
    return define(out, lambda *i: source(*i[:axis], place, *i[axis:]), "select")


@lowers(aten.narrow.default)
def narrow(out: Out, source: te.Tensor, dim: int, start: int, length: int) -> te.Tensor:
    """`length` elements of a dim from `start` on."""
    axis = axis_of(dim, len(source.shape))
    first = start + sizes(source)[axis] if start < 0 else start
    return define(out, lambda *i: source(*replace(i, axis, i[axis] + first)), "narrow")


@lowers(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
)
def split(outs: tuple[Out, ...], source: te.Tensor, pieces: Any, dim: int = 0) -> tuple[te.Tensor, ...]:
    """Consecutive pieces of a dim; the results' shapes say how long each is."""
    axis = axis_of(dim, len(source.shape))
    starts = offsets([out.shape[axis] for out in outs])

    def piece(out: Out, first: int) -> te.Tensor:
        return define(out, lambda *i: source(*replace(i, axis, i[axis] + first)), "split")

    return tuple(piece(out, first) for out, first in zip(outs, starts, strict=True))


@lowers(aten.unbind.int)
def unbind(outs: tuple[Out, ...], source: te.Tensor, dim: int = 0) -> tuple[te.Tensor, ...]:
    """Every position of a dim as a tensor of its own."""
    return tuple(select(out, source, dim, place) for place, out in enumerate(outs))


@lowers(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(out: Out, tensors: Sequence[te.Tensor], dim: int = 0) -> te.Tensor:
    """Join along a dim, in the promoted dtype; torch overlooks operands of shape (0,) whatever the rank."""
    axis = axis_of(dim, len(out.shape))
    parts = [t for t in tensors if 0 not in sizes(t)]
    starts = offsets([sizes(t)[axis] for t in parts])

    def value(*i: Expr) -> Expr:
        result = None
        for part, first in reversed(list(zip(parts, starts, strict=True))):
            here = ex.cast(part(*replace(i, axis, i[axis] - first)), out.dtype)
            end = first + sizes(part)[axis]
            result = here if result is None else tirx.if_then_else(i[axis] < end, here, result)
        return result

    return define(out, value, "cat")


@lowers(aten.stack.default)
def stack(out: Out, tensors: Sequence[te.Tensor], dim: int = 0) -> te.Tensor:
    """Join along a new dim."""
    axis = axis_of(dim, len(out.shape))

    def value(*i: Expr) -> Expr:
        index = (*i[:axis], *i[axis + 1 :])
        result = ex.cast(tensors[-1](*index), out.dtype)
        for place in range(len(tensors) - 2, -1, -1):
            here = ex.cast(tensors[place](*index), out.dtype)
            result = tirx.if_then_else(i[axis] <= place, here, result)
        return result

    return define(out, value, "stack")


@lowers(aten.flip.default)
def flip(out: Out, source: te.Tensor, dims: Sequence[int]) -> te.Tensor:
    """Reverse the order along dims."""
    axes = {axis_of(d, len(out.shape)) for d in dims}
    return define(
        out,
        lambda *i: source(*(out.shape[k] - 1 - x if k in axes else x for k, x in enumerate(i))),
        "flip",
    )


@lowers(aten.roll.default)
def roll(out: Out, source: te.Tensor, shifts: int | Sequence[int], dims: Sequence[int] = ()) -> te.Tensor:
    """Rotate along dims; without dims, the tensor read as one row."""
    amounts = spread(shifts, 1)
    if not dims:
        count = math.prod(out.shape)
        return define(
            out,
            lambda *i: source(*unravel(_rotated(ravel(i, out.shape), amounts[0], count), out.shape)),
            "roll",
        )
    turns: dict[int, int] = {}
    for d, amount in zip(spread(dims, 1), amounts, strict=True):
        axis = axis_of(d, len(out.shape))
        turns[axis] = turns.get(axis, 0) + amount

    def value(*i: Expr) -> Expr:
        return source(*(_rotated(x, turns.get(k, 0), out.shape[k]) for k, x in enumerate(i)))

    return define(out, value, "roll")


def _rotated(position: Expr, shift: int, extent: int) -> Expr:
    back = shift % extent
    if back == 0:
        return position
    return tirx.Select(position < back, position + (extent - back), position - back)


@lowers(aten.repeat.default, aten.tile.default)
def repeat(out: Out, source: te.Tensor, repeats: Sequence[int]) -> te.Tensor:
    """The tensor laid side by side with itself; dims are added in front as needed."""
    shape = sizes(source)

    def value(*i: Expr) -> Expr:
        tail = i[len(i) - len(shape) :]
        full = out.shape[len(i) - len(shape) :]
        return source(
            *(
                0 if extent == 1 else x if extent == whole else x % extent
                for x, extent, whole in zip(tail, shape, full, strict=True)
            )
        )

    return define(out, value, "repeat")


@lowers(aten.repeat_interleave.self_int)
def repeat_interleave(
    out: Out, source: te.Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> te.Tensor:
    """Every element `repeats` times in a row; without a dim, of the tensor read as one row."""
    shape = sizes(source)
    if dim is None:
        return define(out, lambda *i: source(*unravel(i[0] // repeats, shape)), "repeat_interleave")
    axis = axis_of(dim, len(out.shape))
    # Of a 0-dim tensor torch makes a row.
    return define(
        out,
        lambda *i: source(*replace(i, axis, i[axis] // repeats)) if shape else source(),
        "repeat_interleave",
    )


@lowers(aten.unfold.default)
def unfold(out: Out, source: te.Tensor, dimension: int, size: int, step: int) -> te.Tensor:
    """Windows of a dim, `step` apart; their elements are the new last dim."""
    axis = axis_of(dimension, len(source.shape))
    if not source.shape:
        return define(out, lambda *i: source(), "unfold")
    return define(out, lambda *i: source(*replace(i[:-1], axis, i[axis] * step + i[-1])), "unfold")


def _can_stride(node: fx.Node) -> str | None:
    source = argument(node, "self").meta["val"]
    if not source.is_contiguous() or source.storage_offset():
        return "as_strided of a tensor that is not contiguous"
    size, stride = argument(node, "size"), argument(node, "stride")
    start = argument(node, "storage_offset") or 0
    last = start + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= source.numel() or min(stride, default=0) < 0):
        return "as_strided reaches beyond the tensor it was given"
    return None


@lowers(aten.as_strided.default, can=_can_stride)
def as_strided(
    out: Out, source: te.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> te.Tensor:
    """Elements at storage_offset + sum(index * stride)."""
    start, shape = storage_offset or 0, sizes(source)

    def value(*i: Expr) -> Expr:
        flat = start + sum((x * step for x, step in zip(i, stride, strict=True)), 0)
        return source(*unravel(flat, shape))

    return define(out, value, "as_strided")


def diagonal_index(index: Sequence[Expr], place: Expr, offset: int, dim1: int, dim2: int, rank: int) -> Index:
    """`index` over the other dims, with element `place` of the diagonal `offset` of dims dim1 and dim2 put in."""
    rest = iter(index)
    row, column = place + max(-offset, 0), place + max(offset, 0)
    first, second = axis_of(dim1, rank), axis_of(dim2, rank)
    return tuple(row if k == first else column if k == second else next(rest) for k in range(rank))


@lowers(aten.diagonal.default)
def diagonal(out: Out, source: te.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> te.Tensor:
    """A diagonal of two dims, as the new last dim."""
    rank = len(source.shape)
    return define(out, lambda *i: source(*diagonal_index(i[:-1], i[-1], offset, dim1, dim2, rank)), "diagonal")


@lowers(aten.diag_embed.default)
def diag_embed(out: Out, source: te.Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> te.Tensor:
    """Matrices (in dims dim1 and dim2) with the last dim on a diagonal and zeros elsewhere."""
    first, second = axis_of(dim1, len(out.shape)), axis_of(dim2, len(out.shape))

    def value(*i: Expr) -> Expr:
        rest = [x for k, x in enumerate(i) if k not in (first, second)]
        row, column = i[first], i[second]
        on = [column - row == offset, row >= max(-offset, 0), column >= max(offset, 0)]
        return guarded(on, source(*rest, row - max(-offset, 0)), ex.constant(0, out.dtype))

    return define(out, value, "diag_embed")
