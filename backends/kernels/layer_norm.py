"""Normalisation of rows: layer_norm, rms_norm, and group_norm, whose rows are the groups of one image.

Two passes before the writing one: the mean, then the mean of (x - mean)^2. The sum of squares minus the square of the
sum would save a pass over L1, and cancel where the mean is large against the spread. The second pass also finds what
the rounded mean leaves (Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .loops import flat, kernel_function, span, spread
from .rows import Rows, accumulators, choose_rows, each_row, each_task, each_vector, fill, fold, masked, vector

# Of one vector over the three passes, and of a row beside them: three folds, three divisions and a square root, each
# waiting for the one before. Measured at 401 and 768 columns with AVX2.
CYCLES, ROW_CYCLES = 7.1, 265.0


def _add(a: Any, b: Any) -> Any:
    return a + b


@dataclass(frozen=True)
class _Row:
    """The scalars of one row: its elements become (x - mean - rest) * scale."""

    mean: Any  # None for rms_norm
    rest: Any  # the mean's rounding error
    scale: Any

    def centre(self, value: Any, lanes: int) -> Any:
        """`value` less the mean; the first difference is exact where it is small."""
        return value if self.mean is None else (value - spread(self.mean, lanes)) - spread(self.rest, lanes)


def _scratch(rows: Rows) -> tuple[Any, Any]:
    return accumulators(rows), accumulators(rows)


def _statistics(rows: Rows, x: Any, scratch: tuple[Any, Any], base: Any, eps: float, centred: bool) -> _Row:
    """The scalars of the row at `base`; without `centred` the scale is that of the mean of squares."""
    lanes = rows.lanes
    acc, sums = scratch
    count, zero = tirx.const(float(rows.length), "float32"), vector(0.0, lanes)
    mean: Any = None
    if centred:
        fill(rows, sums, 0.0)

        def add(column: Any, u: int, mask: Any) -> None:
            at = span(u * lanes, lanes)
            T.buffer_store(sums, sums[at] + masked(mask, x[span(base + column, lanes)], zero), [at])

        each_vector(rows, add)
        mean = T.bind(fold(rows, sums, _add) / count)
        fill(rows, sums, 0.0)
    fill(rows, acc, 0.0)

    def add_square(column: Any, u: int, mask: Any) -> None:
        at = span(u * lanes, lanes)
        value = x[span(base + column, lanes)]
        value = T.bind(masked(mask, value if mean is None else value - spread(mean, lanes), zero))
        T.buffer_store(acc, acc[at] + value * value, [at])
        if mean is not None:
            T.buffer_store(sums, sums[at] + value, [at])

    each_vector(rows, add_square)
    square = fold(rows, acc, _add) / count
    rest: Any = None
    if centred:
        rest = T.bind(fold(rows, sums, _add) / count)
        square = square - rest * rest
    return _Row(mean, rest, T.bind(tirx.const(1.0, "float32") / tirx.sqrt(square + tirx.const(eps, "float32"))))


def layer_norm(
    shape: tuple[int, ...],
    dims: int,
    hw: Hardware,
    eps: float,
    weight: bool = True,
    bias: bool = True,
    centred: bool = True,
    statistics: bool = False,
) -> Any:
    """PrimFunc (in [shape], weight?, bias? [the last `dims` of shape], out [shape], mean?, rstd?).

    `centred=False` is rms_norm: no mean is subtracted. With `statistics` the row's mean and 1 / sqrt(variance + eps)
    are results too, of the shape with its last `dims` all 1.
    """
    rows = norm_rows(shape, dims, hw)
    lanes = rows.lanes
    inner = shape[len(shape) - dims :]
    affine = int(weight) + int(bias)

    def body(source: Any, *rest: Any) -> None:
        x, y = flat(source), flat(rest[affine])
        gain = flat(rest[0]) if weight else None
        offset = flat(rest[affine - 1]) if bias else None
        kept = [flat(buffer) for buffer in rest[affine + 1 :]]
        with each_task(rows) as bounds:
            scratch = _scratch(rows)
            with each_row(rows, bounds) as (row, base):
                scalars = _statistics(rows, x, scratch, base, eps, centred)
                _keep(kept, row, scalars)

                def write(column: Any, u: int, _: Any) -> None:
                    value = scalars.centre(x[span(base + column, lanes)], lanes) * spread(scalars.scale, lanes)
                    if gain is not None:
                        value = value * gain[span(column, lanes)]
                    if offset is not None:
                        value = value + offset[span(column, lanes)]
                    T.buffer_store(y, value, [span(base + column, lanes)])

                each_vector(rows, write)

    ones = (*shape[: len(shape) - dims], *[1] * dims)
    results = [shape, *[ones] * (2 if statistics else 0)]
    return kernel_function("layer_norm" if centred else "rms_norm", [shape, *[inner] * affine], results, body)


def _keep(buffers: list[Any], row: Any, scalars: _Row) -> None:
    if buffers:
        T.buffer_store(buffers[0], scalars.mean + scalars.rest, [row])
        T.buffer_store(buffers[1], scalars.scale, [row])


def norm_rows(shape: tuple[int, ...], dims: int, hw: Hardware) -> Rows:
    """How a tensor of that shape, normalised over its last `dims`, is cut."""
    cut = len(shape) - dims
    return choose_rows(math.prod(shape[:cut]), math.prod(shape[cut:]), CYCLES, hw)


def group_rows(shape: tuple[int, ...], groups: int, hw: Hardware) -> Rows:
    """The groups of a [N, C, ...] tensor as rows."""
    return choose_rows(shape[0] * groups, math.prod(shape[1:]) // groups, CYCLES, hw)


def group_norm(
    shape: tuple[int, ...],
    groups: int,
    hw: Hardware,
    eps: float,
    weight: bool = True,
    bias: bool = True,
    statistics: bool = False,
) -> Any:
    """PrimFunc (in [N, C, ...], weight? [C], bias? [C], out [N, C, ...], mean? [N, groups], rstd? [N, groups])."""
    rows = group_rows(shape, groups, hw)
    channels = shape[1] // groups
    plane = rows.length // channels
    one = choose_rows(1, plane, CYCLES, hw)
    affine = int(weight) + int(bias)

    def body(source: Any, *rest: Any) -> None:
        x, y = flat(source), flat(rest[affine])
        kept = [flat(buffer) for buffer in rest[affine + 1 :]]
        with each_task(rows) as bounds:
            scratch = _scratch(rows)
            with each_row(rows, bounds) as (row, base):
                scalars = _statistics(rows, x, scratch, base, eps, True)
                _keep(kept, row, scalars)
                with T.serial(0, channels) as channel:
                    index = T.bind(row % groups * channels + channel)
                    start = T.bind(base + channel * plane)
                    gain = T.bind(scalars.scale * rest[0][index] if weight else scalars.scale)
                    shift = T.bind(rest[affine - 1][index]) if bias else None

                    def write(column: Any, u: int, _: Any) -> None:
                        here = span(start + column, one.lanes)
                        value = scalars.centre(x[here], one.lanes) * spread(gain, one.lanes)
                        T.buffer_store(y, value if shift is None else value + spread(shift, one.lanes), [here])

                    each_vector(one, write)

    results = [shape, *[(shape[0], groups)] * (2 if statistics else 0)]
    return kernel_function("group_norm", [shape, *[(shape[1],)] * affine], results, body)
