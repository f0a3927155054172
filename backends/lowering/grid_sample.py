"""grid_sampler_2d and _3d: the input read at computed real positions, as ATen/native/GridSampler.h computes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .index_math import Expr, Index, argument, define, guarded, sizes
from .registry import Out, lowers
from .resize import cubic_weights

aten = torch.ops.aten

BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)


def _unnormalized(x: Expr, extent: int, align_corners: bool, dtype: str) -> Expr:
    """From -1 .. 1 to element positions; corners are centres of elements if aligned, else their outer edges."""
    one, two = ex.constant(1, dtype), ex.constant(2, dtype)
    if align_corners:
        return (x + one) / two * ex.constant(extent - 1, dtype)
    return ((x + one) * ex.constant(extent, dtype) - one) / two


def _reflected(x: Expr, twice_low: int, twice_high: int, dtype: str) -> Expr:
    """Mirrored at the ends (given doubled, since they may be half-integers) until it lies between them."""
    if twice_low == twice_high:
        return ex.constant(0, dtype)
    low = ex.constant(twice_low / 2, dtype)
    span = ex.constant((twice_high - twice_low) / 2, dtype)

    def fold(distance: Expr) -> Expr:
        flips = tirx.floor(distance / span)
        rest = distance - flips * span
        even = flips.equal(tirx.floor(flips / ex.constant(2, dtype)) * ex.constant(2, dtype))
        return tirx.Select(even, rest + low, span - rest + low)

    return ex.let(tirx.abs(x - low), fold)


def _padded_position(x: Expr, extent: int, padding: int, align_corners: bool, dtype: str) -> Expr:
    if padding == REFLECTION:
        ends = (0, 2 * (extent - 1)) if align_corners else (-1, 2 * extent - 1)
        x = _reflected(x, *ends, dtype)
    if padding in (BORDER, REFLECTION):
        return _clamped(x, 0, extent - 1, dtype)
    return x


def _clamped(x: Expr, low: float, high: float, dtype: str) -> Expr:
    # NaN goes to the low end.
    bottom, top = ex.constant(low, dtype), ex.constant(high, dtype)
    return tirx.Select(x > bottom, tirx.Select(x < top, x, top), bottom)


def _place(x: Expr, extent: int, dtype: str) -> Expr:
    """A whole position as an integer; anything far outside is just outside, so that the conversion is defined."""
    return tirx.Cast("int32", _clamped(x, -1, extent, dtype))


def _read(source: te.Tensor, lead: Sequence[Expr], places: Sequence[Expr], dtype: str) -> Expr:
    """The element at `places`, zero outside."""
    extents = sizes(source)[len(lead) :]
    conditions = [
        c for place, extent in zip(places, extents, strict=True) for c in (place >= 0, place < extent)
    ]
    return guarded(conditions, ex.cast(source(*lead, *places), dtype), ex.constant(0, dtype))


def _multilinear(source: te.Tensor, lead: Index, positions: Sequence[Expr], dtype: str) -> Expr:
    extents, one = sizes(source)[2:], ex.constant(1, dtype)
    taps = []
    for x, extent in zip(positions, extents, strict=True):
        low = tirx.floor(x)
        taps.append(
            [
                (_place(low, extent, dtype), low + one - x),
                (_place(low + one, extent, dtype), x - low),
            ]
        )
    total: Expr = ex.constant(0, dtype)
    for corner in itertools.product(*taps):
        weight = one
        for _, part in corner:
            weight = weight * part
        total = total + _read(source, lead, [place for place, _ in corner], dtype) * weight
    return total


def _bicubic(
    source: te.Tensor, lead: Index, positions: Sequence[Expr], padding: int, align_corners: bool, dtype: str
) -> Expr:
    extents, along = sizes(source)[2:], []
    for x, extent in zip(positions, extents, strict=True):
        low = tirx.floor(x)
        places = []
        for k in (-1, 0, 1, 2):
            tap = _padded_position(low + ex.constant(k, dtype), extent, padding, align_corners, dtype)
            places.append(_place(tap, extent, dtype))
        along.append(list(zip(places, cubic_weights(x - low, dtype), strict=True)))
    total: Expr = ex.constant(0, dtype)
    for row, row_weight in along[0]:
        line: Expr = ex.constant(0, dtype)
        for column, weight in along[1]:
            line = line + _read(source, lead, [row, column], dtype) * weight
        total = total + line * row_weight
    return total


def _can(node: fx.Node) -> str | None:
    if argument(node, "input").meta["val"].dtype not in (torch.float32, torch.float64):
        return "grid_sampler of a half-precision tensor, whose positions torch rounds its own way"
    return None


@lowers(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default, can=_can)
def grid_sampler(
    out: Out,
    source: te.Tensor,
    grid: te.Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> te.Tensor:
    """source [N, C, *spatial] read at grid [N, *result, (x, y[, z])], coordinates from -1 to 1."""
    extents, dtype = sizes(source)[2:], out.dtype

    def value(*i: Expr) -> Expr:
        lead = (i[0], i[1])
        positions = []
        for d, extent in enumerate(extents):
            # The grid names the innermost dim first.
            x = ex.cast(grid(i[0], *i[2:], len(extents) - 1 - d), dtype)
            x = _unnormalized(x, extent, align_corners, dtype)
            if interpolation_mode != BICUBIC:
                x = _padded_position(x, extent, padding_mode, align_corners, dtype)
            positions.append(x)
        if interpolation_mode == BILINEAR:
            return _multilinear(source, lead, positions, dtype)
        if interpolation_mode == NEAREST:
            places = [
                _place(tirx.nearbyint(x), extent, dtype) for x, extent in zip(positions, extents, strict=True)
            ]
            return _read(source, lead, places, dtype)
        return _bicubic(source, lead, positions, padding_mode, align_corners, dtype)

    return define(out, value, "grid_sample")
