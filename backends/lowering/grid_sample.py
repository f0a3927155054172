"""grid_sampler_2d and _3d: the input read at computed real positions, as ATen/native/GridSampler.h computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .index_math import Expr, argument, define, sizes
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
    low, two = ex.constant(twice_low / 2, dtype), ex.constant(2, dtype)
    span = ex.constant((twice_high - twice_low) / 2, dtype)
    distance = tirx.abs(x - low)
    flips = tirx.floor(distance / span)
    rest = distance - flips * span
    even = flips.equal(tirx.floor(flips / two) * two)
    return tirx.Select(even, rest + low, span - rest + low)


def _padded_position(x: Expr, extent: int, padding: int, align_corners: bool, dtype: str) -> Expr:
    if padding != REFLECTION:
        return x
    return _reflected(x, *((0, 2 * (extent - 1)) if align_corners else (-1, 2 * extent - 1)), dtype)


def _clip(x: Expr, low: Expr, high: Expr) -> Expr:
    """NaN goes to the low end: a conversion to integers is defined whatever the grid holds."""
    # x stands there twice, not thrice: a thread of a GPU has the formulas of all eight corners in one expression.
    return tirx.Select(x > low, tirx.min(x, high), low)


def _place(x: Expr, extent: int, padding: int, dtype: str) -> Expr:
    """A whole position as an integer: at most one outside, or on the border where the padding says so."""
    outside = int(padding == ZEROS)
    low, high = ex.constant(-outside, dtype), ex.constant(extent - 1 + outside, dtype)
    return tirx.Cast("int32", _clip(x, low, high))


def _border(x: Expr, extent: int, padding: int, dtype: str) -> Expr:
    if padding == ZEROS:
        return x
    return _clip(x, ex.constant(0, dtype), ex.constant(extent - 1, dtype))


def _stage(shape: Sequence[int], value: Callable[..., Expr], name: str) -> te.Tensor:
    # Positions and weights are tensors of their own: every channel reads them, and their formulas repeat operands.
    return te.compute(tuple(shape), value, name=name)


def _taps(
    x: te.Tensor, extent: int, mode: int, padding: int, align_corners: bool, dtype: str
) -> tuple[te.Tensor, te.Tensor | None]:
    """The elements read along one dim, [taps, N, *result], and their weights; nearest has the one weight 1."""
    shape, one = sizes(x), ex.constant(1, dtype)

    def padded(tensor: te.Tensor) -> te.Tensor:
        turned = _stage(
            sizes(tensor),
            lambda *i: _padded_position(tensor(*i), extent, padding, align_corners, dtype),
            "mirrored",
        )
        return _stage(sizes(tensor), lambda *i: _border(turned(*i), extent, padding, dtype), "position")

    def places(count: int, position: Callable[..., Expr]) -> te.Tensor:
        return _stage((count, *shape), lambda *i: _place(position(*i), extent, padding, dtype), "place")

    if mode == NEAREST:
        at = padded(x)
        return places(1, lambda k, *i: tirx.nearbyint(at(*i))), None
    if mode == BILINEAR:
        at = padded(x)

        def weight(k: Expr, *i: Expr) -> Expr:
            low = tirx.floor(at(*i))
            return tirx.Select(k == 0, low + one - at(*i), at(*i) - low)

        return (
            places(2, lambda k, *i: tirx.floor(at(*i)) + ex.cast(k, dtype)),
            _stage((2, *shape), weight, "weight"),
        )
    taps = _stage((4, *shape), lambda k, *i: tirx.floor(x(*i)) + ex.cast(k, dtype) - one, "tap")
    at = padded(taps)

    def cubic(k: Expr, *i: Expr) -> Expr:
        first, second, third, fourth = cubic_weights(x(*i) - tirx.floor(x(*i)), dtype)
        return tirx.Select(k < 2, tirx.Select(k == 0, first, second), tirx.Select(k == 2, third, fourth))

    return places(4, at), _stage((4, *shape), cubic, "weight")


def _there(place: te.Tensor, extent: int) -> te.Tensor:
    """1 where a place lies in the input, 0 outside."""

    def value(*i: Expr) -> Expr:
        return ex.cast(tirx.all(place(*i) >= 0, place(*i) < extent), "int32")

    return _stage(sizes(place), value, "there")


def _clamped(place: te.Tensor, extent: int) -> te.Tensor:
    return _stage(sizes(place), lambda *i: tirx.max(tirx.min(place(*i), extent - 1), 0), "clamped")


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
    if 0 in out.shape:
        return define(out, lambda *i: ex.constant(0, dtype), "grid_sample")

    def taps(d: int, extent: int) -> tuple[te.Tensor, te.Tensor | None]:
        def coordinate(*i: Expr) -> Expr:
            # The grid names the innermost dim first.
            x = ex.cast(grid(*i, len(extents) - 1 - d), dtype)
            return _unnormalized(x, extent, align_corners, dtype)

        x = _stage(sizes(grid)[:-1], coordinate, "coordinate")
        return _taps(x, extent, interpolation_mode, padding_mode, align_corners, dtype)

    along = [taps(d, extent) for d, extent in enumerate(extents)]
    if padding_mode == ZEROS:
        there_along = [_there(place, extent) for (place, _), extent in zip(along, extents, strict=True)]
        along = [(_clamped(place, extent), weight) for (place, weight), extent in zip(along, extents, strict=True)]

    def value(n: Expr, c: Expr, *at: Expr) -> Expr:
        def element(corner: Sequence[int]) -> Expr:
            places = [place(k, n, *at) for k, (place, _) in zip(corner, along, strict=True)]
            if padding_mode != ZEROS:
                return source(n, c, *places)
            # Read at the border and dropped, rather than not read: a branch for every corner costs more.
            inside = [there(k, n, *at) for k, there in zip(corner, there_along, strict=True)]
            return tirx.Select(reduce(tirx.bitwise_and, inside) != 0, source(n, c, *places), ex.constant(0, dtype))

        def mix(corner: tuple[int, ...]) -> Expr:
            if len(corner) == len(extents):
                return element(corner)
            place, weight = along[len(corner)]
            terms = [mix((*corner, k)) for k in range(sizes(place)[0])]
            if weight is None:
                return terms[0]
            scaled = [term * weight(k, n, *at) for k, term in enumerate(terms)]
            return sum(scaled[1:], scaled[0])

        return mix(())

    return define(out, value, "grid_sample")
