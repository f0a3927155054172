"""Operators that put a tensor into a larger one or rearrange its blocks: pads, slice scatters, pixel shuffles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tvm import te, tirx

from . import expressions as ex
from .index_math import (
    Expr,
    axis_of,
    define,
    guarded,
    replace,
    reshape_index,
    sizes,
    spread,
    within,
)
from .movement import slice_range
from .registry import Out, lowers

aten = torch.ops.aten


def _sides(pad: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """torch's pad list (last dim first) as (before, after) of every dim."""
    given = [(pad[k], pad[k + 1]) for k in range(0, len(pad), 2)]
    return [(0, 0)] * (rank - len(given)) + given[::-1]


def pad_zeros(source: te.Tensor, sides: Sequence[tuple[int, int]], value: float = 0) -> te.Tensor:
    """`source` with (before, after) elements of `value` around it; `source` itself where there are none."""
    if not any(before or after for before, after in sides):
        return source
    shape = tuple(n + before + after for n, (before, after) in zip(sizes(source), sides, strict=True))
    out = Out(shape, str(source.dtype))
    return define(out, lambda *i: _padded(source, i, sides, out, value), "pad")


def _padded(source: te.Tensor, index: Sequence[Expr], sides: Sequence[tuple[int, int]], out: Out, fill: float) -> Expr:
    shape = sizes(source)
    if 0 in shape:
        return ex.constant(fill, out.dtype)
    places, conditions = [], []
    for i, extent, full, (before, _) in zip(index, shape, out.shape, sides, strict=True):
        place = i - before if before else i
        places.append(place)
        conditions += within(place, 0, extent, (-before, full - 1 - before))
    return guarded(conditions, source(*places), ex.constant(fill, out.dtype))


@lowers(aten.constant_pad_nd.default)
def constant_pad(out: Out, source: te.Tensor, pad: Sequence[int], value: float = 0) -> te.Tensor:
    """Surround with a constant; negative widths cut off."""
    sides = _sides(pad, len(out.shape))
    return define(out, lambda *i: _padded(source, i, sides, out, value), "pad")


def _pad_by_index(out: Out, source: te.Tensor, pad: Sequence[int], place: Callable[[Expr, int], Expr]) -> te.Tensor:
    sides, shape = _sides(pad, len(out.shape)), sizes(source)

    def value(*i: Expr) -> Expr:
        moved = [x - before for x, (before, _) in zip(i, sides, strict=True)]
        index = [x if side == (0, 0) else place(x, extent) for x, extent, side in zip(moved, shape, sides, strict=True)]
        # Between the two borders of the innermost dim neighbours read neighbours; the condition lets a schedule see it.
        before = sides[-1][0]
        middle = within(moved[-1], 0, shape[-1], (-before, out.shape[-1] - 1 - before))
        return guarded(middle, source(*index[:-1], moved[-1]), source(*index))

    return define(out, value, "pad")


@lowers(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def reflection_pad(out: Out, source: te.Tensor, padding: Sequence[int]) -> te.Tensor:
    """Surround with the mirror image, the edge not repeated."""

    def mirrored(x: Expr, extent: int) -> Expr:
        return tirx.Select(x < 0, -x, tirx.Select(x >= extent, 2 * (extent - 1) - x, x))

    return _pad_by_index(out, source, padding, mirrored)


@lowers(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def replication_pad(out: Out, source: te.Tensor, padding: Sequence[int]) -> te.Tensor:
    """Surround with the nearest element."""
    return _pad_by_index(out, source, padding, lambda x, extent: tirx.max(tirx.min(x, extent - 1), 0))


@lowers(aten.slice_scatter.default)
def slice_scatter(
    out: Out,
    source: te.Tensor,
    src: te.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> te.Tensor:
    """`source` with the slice start:end:step of a dim replaced by `src`."""
    axis = axis_of(dim, len(out.shape))
    extent = out.shape[axis]
    first, last = slice_range(start, end, extent)

    def value(*i: Expr) -> Expr:
        if first == last:
            return source(*i)
        conditions = within(i[axis], first, last, (0, extent - 1))
        before = -(-first // step)  # turns added so that nothing negative is divided: TVM has erred on that on GPUs
        ahead = i[axis] + (before * step - first)
        if step != 1:
            conditions.append(ahead % step == 0)
        place = ahead // step - before if step != 1 else i[axis] - first
        return guarded(conditions, ex.cast(src(*replace(i, axis, place)), out.dtype), source(*i))

    return define(out, value, "slice_scatter")


@lowers(aten.select_scatter.default)
def select_scatter(out: Out, source: te.Tensor, src: te.Tensor, dim: int, index: int) -> te.Tensor:
    """`source` with one position of a dim replaced by `src`."""
    axis = axis_of(dim, len(out.shape))
    place = index % max(out.shape[axis], 1)

    def value(*i: Expr) -> Expr:
        there = ex.cast(src(*i[:axis], *i[axis + 1 :]), out.dtype)
        return tirx.if_then_else(i[axis] == place, there, source(*i))

    return define(out, value, "select_scatter")


@lowers(aten.diagonal_scatter.default)
def diagonal_scatter(
    out: Out, source: te.Tensor, src: te.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> te.Tensor:
    """`source` with a diagonal of two dims replaced by `src`."""
    rank = len(out.shape)
    first, second = axis_of(dim1, rank), axis_of(dim2, rank)
    length = sizes(src)[-1]

    def value(*i: Expr) -> Expr:
        if 0 in sizes(src):
            return source(*i)
        rest = [x for k, x in enumerate(i) if k not in (first, second)]
        place = i[first] - max(-offset, 0)
        on = [i[second] - i[first] == offset, place >= 0, place < length]
        return guarded(on, ex.cast(src(*rest, place), out.dtype), source(*i))

    return define(out, value, "diagonal_scatter")


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(out: Out, source: te.Tensor, upscale_factor: int) -> te.Tensor:
    """[..., C r^2, H, W] to [..., C, H r, W r]."""
    r = upscale_factor

    def value(*i: Expr) -> Expr:
        *rest, c, y, x = i
        return source(*rest, c * (r * r) + (y % r) * r + x % r, y // r, x // r)

    return define(out, value, "pixel_shuffle")


@lowers(aten.pixel_unshuffle.default)
def pixel_unshuffle(out: Out, source: te.Tensor, downscale_factor: int) -> te.Tensor:
    """[..., C, H r, W r] to [..., C r^2, H, W]."""
    r = downscale_factor

    def value(*i: Expr) -> Expr:
        *rest, c, y, x = i
        return source(*rest, c // (r * r), y * r + c // r % r, x * r + c % r)

    return define(out, value, "pixel_unshuffle")


@lowers(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(out: Out, source: te.Tensor, groups: int) -> te.Tensor:
    """Transpose the channels (dim 1) read as [groups, C / groups]."""
    each = out.shape[1] // groups

    def value(*i: Expr) -> Expr:
        return source(*replace(i, 1, i[1] % groups * each + i[1] // groups))

    return define(out, value, "channel_shuffle")


@lowers(aten.im2col.default)
def im2col(
    out: Out,
    source: te.Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> te.Tensor:
    """[..., C, H, W] to the columns [..., C kh kw, windows]; what lies outside is zero."""
    (kh, kw), (dh, dw) = spread(kernel_size, 2), spread(dilation, 2)
    (ph, pw), (sh, sw) = spread(padding, 2), spread(stride, 2)
    *lead, channels, height, width = sizes(source)
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    padded = pad_zeros(source, [*((0, 0) for _ in lead), (0, 0), (ph, ph), (pw, pw)])
    split = (*lead, channels, kh, kw, rows, columns)

    def value(*i: Expr) -> Expr:
        *rest, c, ky, kx, y, x = reshape_index(i, out.shape, split)
        return padded(*rest, c, y * sh + ky * dh, x * sw + kx * dw)

    return define(out, value, "im2col")


@lowers(aten.col2im.default)
def col2im(
    out: Out,
    source: te.Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> te.Tensor:
    """The columns [..., C kh kw, windows] added up where im2col took them from: [..., C, H, W]."""
    (kh, kw), (dh, dw) = spread(kernel_size, 2), spread(dilation, 2)
    (ph, pw), (sh, sw) = spread(padding, 2), spread(stride, 2)
    *lead, channels, height, width = out.shape
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    split = (*lead, channels, kh, kw, rows, columns)
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")

    def value(*i: Expr) -> Expr:
        *rest, c, y, x = i
        # So many windows further that nothing negative is divided: TVM has erred on that on GPUs.
        down, right = -(-(kh - 1) * dh // sh), -(-(kw - 1) * dw // sw)
        top, left = y + (ph + down * sh) - ky * dh, x + (pw + right * sw) - kx * dw
        inside = [top >= down * sh, left >= right * sw, top < (rows + down) * sh, left < (columns + right) * sw]
        inside += [top % sh == 0, left % sw == 0]
        place = reshape_index((*rest, c, ky, kx, top // sh - down, left // sw - right), split, sizes(source))
        return te.sum(guarded(inside, source(*place), ex.constant(0, out.dtype)), axis=[ky, kx])

    return define(out, value, "col2im")
