"""Max and average pooling, NHWC.

The nest is that of `sweep`: vectors of channels, a tile of neighbouring pixels, padding never read. Max pooling starts
from -inf; average pooling divides by the window's size as torch counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .loops import constant, flat, kernel_function, span, spread
from .sweep import SweepPlan, Tile, Windows, each_tap, sweep
from .window import Axis


def max_pool2d(windows: Windows, plan: SweepPlan) -> Any:
    """Return the kernel (x, out) of the maximum over each window; a NaN in a window is its maximum, as in torch."""
    return _pool(windows, plan, -math.inf, nan_maximum, lambda value, tile, p: value)


def avg_pool2d(
    windows: Windows,
    plan: SweepPlan,
    *,
    count_include_pad: bool = True,
    padding_after: tuple[int, int] = (0, 0),
    divisor: int | None = None,
) -> Any:
    """Return the kernel (x, out) of the mean over each window.

    The sum is divided by `divisor`, or by the inputs in the window, or with count_include_pad by its taps on inputs
    and on padding; ceil mode lets a window reach beyond the padding, `padding_after` = (bottom, right).
    """

    def mean(value: Any, tile: Tile, p: int) -> Any:
        if divisor is not None:
            return value / constant(divisor, tile.lanes)
        sizes = []
        for axis, after, position in (
            (windows.rows, padding_after[0], tile.row),
            (windows.columns, padding_after[1], tile.column + p),
        ):
            sizes.append(_counted(axis, after, position) if count_include_pad else _existing(axis, position))
        return value / spread(tirx.Cast("float32", sizes[0] * sizes[1]), tile.lanes)

    return _pool(windows, plan, 0.0, lambda sum_, x: sum_ + x, mean)


def nan_maximum(a: Any, b: Any) -> Any:
    """max(a, b), NaN where either is: each compare keeps the other operand when it fails, and or-ing the two keeps
    the all-ones exponent of a NaN while equal results stay as they are."""
    bits = str(a.ty.dtype).replace("float", "int")
    first, second = tirx.Select(a > b, a, b), tirx.Select(b > a, b, a)
    return tirx.reinterpret(str(a.ty.dtype), tirx.reinterpret(bits, first) | tirx.reinterpret(bits, second))


def _pool(
    windows: Windows,
    plan: SweepPlan,
    start: float,
    join: Callable[[Any, Any], Any],
    finish: Callable[[Any, Tile, int], Any],
) -> Any:
    def body(x: Any, out: Any) -> None:
        x, out = flat(x), flat(out)

        def emit(acc: Any, tile: Tile) -> None:
            at = [span(p * tile.lanes, tile.lanes) for p in range(tile.run.pixels)]
            for p in range(tile.run.pixels):
                T.buffer_store(acc, constant(start, tile.lanes), [at[p]])

            def tap(p: int, read: Any, kh: Any, kw: Any) -> None:
                T.buffer_store(acc, join(T.bind(acc[at[p]]), T.bind(x[span(read, tile.lanes)])), [at[p]])

            each_tap(tile, tap)
            for p in range(tile.run.pixels):
                written = span(tile.out + p * tile.out_pixel, tile.lanes)
                T.buffer_store(out, finish(acc[at[p]], tile, p), [written])

        sweep(windows, plan, emit)

    return kernel_function("pool2d", [windows.input_shape], [windows.output_shape], body)


def _existing(axis: Axis, position: Any) -> Any:
    """Inputs in the window of output `position`, at least one so that an empty sum stays 0."""
    if isinstance(position, int):
        low, high = axis.taps(position)
        return max(1, high - low)
    _, count = axis.dynamic_taps(position)
    return count if isinstance(count, int) else tirx.max(count, 1)


def _counted(axis: Axis, after: int, position: Any) -> Any:
    """Taps of the window of output `position` on inputs and padding."""
    # The last window is the only one that may reach beyond the padding.
    reach = axis.first(axis.out - 1) + axis.kernel - (axis.size + after)
    if reach <= 0:
        return axis.kernel
    least = tirx.min if not isinstance(position, int) else min
    return least(axis.kernel, axis.size + after - axis.first(position))
