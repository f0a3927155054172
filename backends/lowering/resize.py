"""Resampling to another size: nearest, linear (1 to 3 dims), cubic.

Source positions are computed as torch's CPU kernels do (ATen/native/UpSample.h): in float32, float64 for float64.
Nearest positions are integers known at compile time; where i * in // out gives the same ones, that is the index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .index_math import Expr, argument, define, sizes
from .registry import Out, lowers

aten = torch.ops.aten

Tap = tuple[Expr, Expr]  # a source index and its weight


def _scale(size_in: int, size_out: int, scale: float | None, align_corners: bool, dtype: str) -> float:
    """Source elements per result element, rounded as torch rounds it."""
    real = np.float64 if dtype == "float64" else np.float32
    if align_corners:
        return float(real(size_in - 1) / real(size_out - 1)) if size_out > 1 else 0.0
    return float(real(1.0 / scale) if scale else real(size_in) / real(size_out))


def _nearest_index(i: Expr, size_in: int, size_out: int, scale: float | None, exact: bool, dtype: str) -> Expr:
    step = _scale(size_in, size_out, scale, False, dtype)
    half = 0.5 if exact else 0.0
    places = np.arange(size_out, dtype=dtype)  # sums and products with Python numbers stay in this dtype
    table = np.minimum(np.floor((places + half) * step).astype(np.int64), size_in - 1)
    forms: list[tuple[Callable[[Any], Any], Expr]] = [
        (lambda k: k, i),
        (lambda k: k * size_in // size_out, i // (size_out // size_in) if size_out % size_in == 0 else None),
        (lambda k: k * size_in // size_out, i * size_in // size_out),
        (lambda k: (2 * k + 1) * size_in // (2 * size_out), (i * 2 + 1) * size_in // (2 * size_out)),
    ]
    for formula, index in forms:
        if index is not None and np.array_equal(formula(np.arange(size_out)), table):
            return index
    position = (ex.cast(i, dtype) + ex.constant(half, dtype)) * ex.constant(step, dtype)
    return tirx.min(tirx.Cast("int32", tirx.floor(position)), size_in - 1)


def _real(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _nearest(count: int, exact: bool, vector: bool) -> Callable[..., te.Tensor]:
    def nearest(out: Out, source: te.Tensor, output_size: Any = None, *scales: Any, **named: Any) -> te.Tensor:
        given = _given(count, vector, (*scales, *named.values()))
        first = len(out.shape) - count
        inputs = sizes(source)[first:]

        def value(*i: Expr) -> Expr:
            places = [
                _nearest_index(i[first + d], inputs[d], out.shape[first + d], given[d], exact, _real(out.dtype))
                for d in range(count)
            ]
            return source(*i[:first], *places)

        return define(out, value, "upsample_nearest")

    return nearest


def _given(count: int, vector: bool, scales: Sequence[Any]) -> list[float | None]:
    """The scale factors of a call: one list in the .vec overloads, else one argument per dim."""
    if vector:
        return list(scales[0]) if scales and scales[0] else [None] * count
    return [*scales, *[None] * count][:count]


def _source_position(
    i: Expr, size_in: int, size_out: int, scale: float | None, align_corners: bool, cubic: bool, dtype: str
) -> Expr:
    step = ex.constant(_scale(size_in, size_out, scale, align_corners, dtype), dtype)
    place = ex.cast(i, dtype)
    if align_corners:
        return place * step
    half = ex.constant(0.5, dtype)
    position = step * (place + half) - half
    return position if cubic else tirx.max(position, ex.constant(0, dtype))


def _split(position: Expr, size_in: int, dtype: str) -> tuple[Expr, Expr]:
    """The element before a position, and how far behind it the position lies (0 to 1)."""
    low = tirx.min(tirx.Cast("int32", tirx.floor(position)), size_in - 1)
    zero, one = ex.constant(0, dtype), ex.constant(1, dtype)
    return low, tirx.min(tirx.max(position - ex.cast(low, dtype), zero), one)


def _linear_taps(
    i: Expr, size_in: int, size_out: int, scale: float | None, align_corners: bool, dtype: str
) -> list[Tap]:
    one = ex.constant(1, dtype)
    position = _source_position(i, size_in, size_out, scale, align_corners, False, dtype)
    low, rest = _split(position, size_in, dtype)
    return [(low, one - rest), (tirx.min(low + 1, size_in - 1), rest)]


def cubic_weights(t: Expr, dtype: str) -> list[Expr]:
    """The weights of the four elements around a position `t` behind the second (Keys 1981, a = -0.75)."""
    a, one = -0.75, ex.constant(1, dtype)

    def near(x: Expr) -> Expr:
        return ((a + 2) * x - (a + 3)) * x * x + one

    def far(x: Expr) -> Expr:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(t + one), near(t), near(one - t), far(one - t + one)]


def _cubic_taps(
    i: Expr, size_in: int, size_out: int, scale: float | None, align_corners: bool, dtype: str
) -> list[Tap]:
    position = _source_position(i, size_in, size_out, scale, align_corners, True, dtype)
    low, rest = _split(position, size_in, dtype)
    places = [tirx.max(tirx.min(low + k, size_in - 1), 0) for k in (-1, 0, 1, 2)]
    return list(zip(places, cubic_weights(rest, dtype), strict=True))


def _only_floats(node: fx.Node) -> str | None:
    formal = node.target._schema.arguments[0].name  # type: ignore[union-attr]
    dtype = argument(node, formal).meta["val"].dtype
    return None if dtype.is_floating_point else f"interpolation of {dtype}, which torch rounds its own way"


def _resampled(source: te.Tensor, axis: int, size_out: int, taps: Callable[[Expr], list[Tap]], dtype: str) -> te.Tensor:
    """`source` with `size_out` elements along `axis`; their places and weights are tables, computed once."""
    count = len(taps(tirx.const(0, "int32")))

    def table(k: int, part: int, name: str) -> te.Tensor:
        return te.compute((size_out,), lambda i: taps(i)[k][part], name=name)

    tables = [(table(k, 0, "place"), table(k, 1, "weight")) for k in range(count)]
    shape = [*sizes(source)[:axis], size_out, *sizes(source)[axis + 1 :]]

    def value(*i: Expr) -> Expr:
        at = i[axis]
        terms = [ex.cast(source(*i[:axis], place(at), *i[axis + 1 :]), dtype) * weight(at) for place, weight in tables]
        return sum(terms[1:], terms[0])

    return te.compute(tuple(shape), value, name="resampled")


def _weighted(count: int, taps: Callable[..., list[Tap]], vector: bool) -> Callable[..., te.Tensor]:
    def weighted(
        out: Out, source: te.Tensor, output_size: Any, align_corners: bool, *scales: Any, **named: Any
    ) -> te.Tensor:
        given = _given(count, vector, (*scales, *named.values()))
        first, dtype = len(out.shape) - count, _real(out.dtype)
        inputs, outputs = sizes(source)[first:], out.shape[first:]
        # The innermost dim first: its elements are gathered, which for a larger result is less often in fewer rows.
        value = source
        for d in reversed(range(count)):
            if inputs[d] != outputs[d]:
                value = _resampled(
                    value,
                    first + d,
                    outputs[d],
                    lambda i, d=d: taps(i, inputs[d], outputs[d], given[d], align_corners, dtype),  # type: ignore[misc]
                    dtype,
                )
        return define(out, lambda *i: value(*i), "upsample")

    return weighted


for _rank in (1, 2, 3):
    for _name, _exact in (("upsample_nearest", False), ("_upsample_nearest_exact", True)):
        _packet = getattr(aten, f"{_name}{_rank}d")
        lowers(_packet.default)(_nearest(_rank, _exact, False))
        lowers(_packet.vec)(_nearest(_rank, _exact, True))
for _packet, _rank, _taps in (
    (aten.upsample_linear1d, 1, _linear_taps),
    (aten.upsample_bilinear2d, 2, _linear_taps),
    (aten.upsample_trilinear3d, 3, _linear_taps),
    (aten.upsample_bicubic2d, 2, _cubic_taps),
):
    lowers(_packet.default, can=_only_floats)(_weighted(_rank, _taps, False))
    lowers(_packet.vec, can=_only_floats)(_weighted(_rank, _taps, True))
