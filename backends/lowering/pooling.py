"""Pooling over windows: max with or without indices, average, adaptive; 1 to 3 spatial dims, NCHW or NHWC.

Windows that need no padding read the input without a condition, so their innermost loop vectorises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from ...passes import dialect
from . import expressions as ex
from .index_math import Expr, Index, define, guarded, sizes, spread, within
from .registry import Out, lowers

aten = torch.ops.aten


def _axes(out: Out, count: int, layout: str = "NCHW") -> list[int]:
    """Which dims are spatial: the last ones, or those before the channels."""
    last = len(out.shape) - (layout == "NHWC")
    return list(range(last - count, last))


def lowest(dtype: str) -> Expr:
    """What every number of `dtype` is at least."""
    if ex.is_float(dtype):
        return tirx.const(-math.inf, dtype)
    return tirx.const(torch.iinfo(ex.torch_dtype(dtype)).min, dtype)


class Windows:
    """The windows of a pooling: which input element lies at window position `w` of output element `i`."""

    def __init__(
        self,
        source: te.Tensor,
        out: Out,
        axes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.source, self.axes = source, axes
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.extents = [sizes(source)[axis] for axis in axes]
        self.counts = [out.shape[axis] for axis in axes]

    def reduce_axes(self) -> list[Any]:
        """Loop variables over the window."""
        return [te.reduce_axis((0, k), f"w{d}") for d, k in enumerate(self.kernel)]

    def place(self, index: Sequence[Expr], window: Sequence[Expr]) -> tuple[Index, list[Expr]]:
        """The input index, and the conditions under which it is inside the input."""
        full, conditions = list(index), []
        for d, axis in enumerate(self.axes):
            step, before, gap = self.stride[d], self.padding[d], self.dilation[d]
            position = index[axis] * step + window[d] * gap
            full[axis] = position - before if before else position
            reach = (-before, (self.counts[d] - 1) * step + (self.kernel[d] - 1) * gap - before)
            conditions += within(full[axis], 0, self.extents[d], reach)
        return tuple(full), conditions

    def value(self, index: Sequence[Expr], window: Sequence[Expr], outside: Expr) -> Expr:
        """The input element, `outside` in the padding."""
        full, conditions = self.place(index, window)
        return guarded(conditions, self.source(*full), outside)


def _windows(
    source: te.Tensor,
    out: Out,
    count: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any = 1,
    layout: str = "NCHW",
) -> Windows:
    kernel = spread(kernel, count)
    stride = spread(stride, count) if not isinstance(stride, Sequence) or len(stride) else kernel
    axes = _axes(out, count, layout)
    return Windows(source, out, axes, kernel, stride, spread(padding, count), spread(dilation, count))


def _max(out: Out, windows: Windows) -> te.Tensor:
    """The largest element of every window, NaN if there is one."""
    dtype = out.dtype
    largest = te.comm_reducer(ex.maximum, lambda _: lowest(dtype), name="max")

    def value(*i: Expr) -> Expr:
        axes = windows.reduce_axes()
        return largest(windows.value(i, axes, lowest(dtype)), axis=axes)

    return define(out, value, "max_pool")


def _take_larger(old: Sequence[Expr], new: Sequence[Expr]) -> tuple[Expr, Expr]:
    # As torch scans: the first of equals, the last NaN; the first element of a window of nothing but -inf.
    better = tirx.any(new[0] > old[0], ex.is_nan(new[0]), old[1] < 0)
    return tirx.Select(better, new[0], old[0]), tirx.Select(better, new[1], old[1])


def _max_with_indices(
    outs: tuple[Out, ...], element: Callable[..., tuple[Expr, Expr]], reduce_axes: Callable[[], list[Any]]
) -> tuple[te.Tensor, ...]:
    """The largest element (value, place) of every window, and its place."""
    values, indices = outs
    if 0 in values.shape:
        return tuple(define(out, lambda *i: 0, "max_pool") for out in outs)
    best = te.comm_reducer(_take_larger, lambda *_: (lowest(values.dtype), tirx.const(-1, "int32")), name="argmax")

    def value(*i: Expr) -> Any:
        axes = reduce_axes()
        return best(element(i, axes), axis=axes)

    largest, place = te.compute(values.shape, value, name="max_pool")
    return largest, define(indices, lambda *i: place(*i), "max_pool_indices")


def _max_pool(count: int, with_indices: bool) -> Callable[..., Any]:
    def plain(
        out: Out,
        source: te.Tensor,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> te.Tensor:
        return _max(out, _windows(source, out, count, kernel_size, stride, padding, dilation))

    def indexed(
        outs: tuple[Out, ...],
        source: te.Tensor,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> tuple[te.Tensor, ...]:
        windows = _windows(source, outs[0], count, kernel_size, stride, padding, dilation)

        def element(i: Index, w: Sequence[Any]) -> tuple[Expr, Expr]:
            full, conditions = windows.place(i, w)
            place = _plane_place(full, windows.axes, windows.extents)
            value = guarded(conditions, source(*full), lowest(str(source.dtype)))
            return value, tirx.Select(tirx.all(*conditions), place, -1) if conditions else place

        return _max_with_indices(outs, element, windows.reduce_axes)

    return indexed if with_indices else plain


def _plane_place(index: Sequence[Expr], axes: Sequence[int], extents: Sequence[int]) -> Expr:
    place: Expr = 0
    for axis, extent in zip(axes, extents, strict=True):
        place = place * extent + index[axis]
    return tirx.Cast("int32", place)


for _operator, _rank, _with_indices in (
    (aten.max_pool1d.default, 1, False),
    (aten.max_pool2d.default, 2, False),
    (aten.max_pool3d.default, 3, False),
    (aten.max_pool1d_with_indices.default, 1, True),
    (aten.max_pool2d_with_indices.default, 2, True),
    (aten.max_pool3d_with_indices.default, 3, True),
):
    lowers(_operator)(_max_pool(_rank, _with_indices))


def _average(out: Out, windows: Windows, after: Sequence[int], counted: bool, divisor: int | None) -> te.Tensor:
    """The sum of every window over the number of its elements (those in the padding too, if `counted`) or `divisor`."""
    dtype = ex.compute_dtype(out.dtype)
    zero = ex.constant(0, str(windows.source.dtype))

    def total(*i: Expr) -> Expr:
        axes = windows.reduce_axes()
        return te.sum(ex.cast(windows.value(i, axes, zero), dtype), axis=axes)

    sums = define(Out(out.shape, dtype), total, "pool_sum")

    def average(*i: Expr) -> Expr:
        count = ex.constant(divisor, dtype) if divisor else _count(windows, i, after, counted, dtype)
        return sums(*i) / count if ex.is_float(dtype) else tirx.truncdiv(sums(*i), count)

    return define(out, average, "avg_pool")


def _count(windows: Windows, index: Sequence[Expr], after: Sequence[int], counted: bool, dtype: str) -> Expr:
    whole, counts = 1, []
    for d, axis in enumerate(windows.axes):
        k, step, before, extent = windows.kernel[d], windows.stride[d], windows.padding[d], windows.extents[d]
        low, high = (-before, extent + after[d]) if counted else (0, extent)
        last = (windows.counts[d] - 1) * step - before
        if -before >= low and last + k <= high:
            whole *= k
            continue
        start = index[axis] * step - before
        counts.append(tirx.min(start + k, high) - tirx.max(start, low))
    if not counts:
        return ex.constant(whole, dtype)
    return ex.cast(math.prod(counts, start=tirx.const(whole, str(counts[0].ty))), dtype)


def _avg_pool(count: int) -> Callable[..., te.Tensor]:
    def average(
        out: Out,
        source: te.Tensor,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> te.Tensor:
        windows = _windows(source, out, count, kernel_size, stride, padding)
        return _average(out, windows, windows.padding, count_include_pad, divisor_override)

    return average


lowers(aten.avg_pool1d.default)(_avg_pool(1))
lowers(aten.avg_pool2d.default)(_avg_pool(2))
lowers(aten.avg_pool3d.default)(_avg_pool(3))


@lowers(dialect.max_pool2d)
def max_pool2d(
    out: Out,
    source: te.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    layout: str,
) -> te.Tensor:
    """Max pooling in either layout, padding (top, bottom, left, right)."""
    return _max(out, _windows(source, out, 2, kernel, stride, padding[::2], dilation, layout))


@lowers(dialect.avg_pool2d)
def avg_pool2d(
    out: Out,
    source: te.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    layout: str,
) -> te.Tensor:
    """Average pooling in either layout, padding (top, bottom, left, right)."""
    windows = _windows(source, out, 2, kernel, stride, padding[::2], 1, layout)
    return _average(out, windows, padding[1::2], count_include_pad, divisor)


class Bins:
    """The windows of an adaptive pooling: output element i covers floor(i n / o) to ceil((i + 1) n / o)."""

    def __init__(self, source: te.Tensor, out: Out, axes: Sequence[int]) -> None:
        self.source, self.axes = source, axes
        self.extents = [sizes(source)[axis] for axis in axes]
        self.counts = [out.shape[axis] for axis in axes]

    def reduce_axes(self) -> list[Any]:
        """Loop variables over the longest window."""
        longest = [
            max(self._end(n, o, i) - self._start(n, o, i) for i in range(o))
            for n, o in zip(self.extents, self.counts, strict=True)
        ]
        return [te.reduce_axis((0, k), f"w{d}") for d, k in enumerate(longest)]

    @staticmethod
    def _start(n: int, o: int, i: Expr) -> Expr:
        return i * (n // o) if n % o == 0 else i * n // o

    @staticmethod
    def _end(n: int, o: int, i: Expr) -> Expr:
        return (i + 1) * (n // o) if n % o == 0 else ((i + 1) * n + o - 1) // o

    def place(self, index: Sequence[Expr], window: Sequence[Expr]) -> tuple[Index, list[Expr]]:
        """The input index, and the conditions under which it belongs to the window."""
        full, conditions = list(index), []
        for d, (axis, n, o) in enumerate(zip(self.axes, self.extents, self.counts, strict=True)):
            full[axis] = self._start(n, o, index[axis]) + window[d]
            if n % o:
                conditions.append(full[axis] < self._end(n, o, index[axis]))
        return tuple(full), conditions

    def count(self, index: Sequence[Expr]) -> list[Expr]:
        """How long the window is along every spatial dim."""
        triples = zip(self.axes, self.extents, self.counts, strict=True)
        return [
            n // o if n % o == 0 else self._end(n, o, index[axis]) - self._start(n, o, index[axis])
            for axis, n, o in triples
        ]


def _window_sums(out: Out, bins: Bins, dtype: str) -> te.Tensor:
    """The sums over all bins of all axes at once, which are of one size."""

    def total(*i: Expr) -> Expr:
        axes = bins.reduce_axes()
        full, _ = bins.place(i, axes)
        return te.sum(ex.cast(bins.source(*full), dtype), axis=axes)

    return define(Out(out.shape, dtype), total, "pool_sum")


def _bin_sums(source: te.Tensor, out: Out, axis: int, dtype: str) -> te.Tensor:
    """The sums over the bins of one axis."""
    shape = [*sizes(source)]
    shape[axis] = out.shape[axis]
    bins = Bins(source, Out(tuple(shape), dtype), [axis])

    def total(*i: Expr) -> Expr:
        axes = bins.reduce_axes()
        full, conditions = bins.place(i, axes)
        value = guarded(conditions, source(*full), ex.constant(0, str(source.dtype)))
        return te.sum(ex.cast(value, dtype), axis=axes)

    return define(Out(tuple(shape), dtype), total, "pool_sum")


def _adaptive_avg_pool(count: int) -> Callable[..., te.Tensor]:
    def average(out: Out, source: te.Tensor, output_size: Any) -> te.Tensor:
        axes = _axes(out, count)
        bins = Bins(source, out, axes)
        dtype = ex.compute_dtype(out.dtype)
        if any(n % o for n, o in zip(bins.extents, bins.counts, strict=True)):
            # One axis after the other: all but the last add whole rows, and a bin's condition is asked once a row.
            sums = source
            for axis in axes:
                sums = _bin_sums(sums, out, axis, dtype)
        else:
            sums = _window_sums(out, bins, dtype)

        def mean(*i: Expr) -> Expr:
            lengths = bins.count(i)
            whole = math.prod(n for n in lengths if isinstance(n, int))
            result = sums(*i) / ex.constant(whole, dtype)
            for length in lengths:
                result = result if isinstance(length, int) else result / ex.cast(length, dtype)
            return result

        return define(out, mean, "adaptive_avg_pool")

    return average


def _adaptive_max_pool(count: int) -> Callable[..., Any]:
    def largest(outs: tuple[Out, ...], source: te.Tensor, output_size: Any) -> tuple[te.Tensor, ...]:
        bins = Bins(source, outs[0], _axes(outs[0], count))

        def element(i: Index, w: Sequence[Any]) -> tuple[Expr, Expr]:
            full, conditions = bins.place(i, w)
            place = _plane_place(full, bins.axes, bins.extents)
            value = guarded(conditions, source(*full), lowest(str(source.dtype)))
            return value, tirx.Select(tirx.all(*conditions), place, -1) if conditions else place

        return _max_with_indices(outs, element, bins.reduce_axes)

    return largest


for _rank, _operators in enumerate(
    (
        (aten.adaptive_avg_pool1d.default,),
        (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default),
        (aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default),
    ),
    start=1,
):
    lowers(*_operators)(_adaptive_avg_pool(_rank))
lowers(aten.adaptive_max_pool1d.default)(_adaptive_max_pool(1))
lowers(aten.adaptive_max_pool2d.default)(_adaptive_max_pool(2))
lowers(aten.adaptive_max_pool3d.default)(_adaptive_max_pool(3))
