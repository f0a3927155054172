"""Direct 2-D convolution over a padded copy of the input, for windows so wide that few tiles see the same taps.

    x       [N, H, W, C]
    staged  [N, top + H + bottom, left + W + right, C]     zeros around: one code for all tiles
    out     the nest of `conv2d` on `staged`, without padding

`conv2d` writes code for every tile that sees taps of its own, so that nothing is padded and no zero is multiplied:
three tiles for a 3 x 3 window. A window of 128 taps over 50 outputs has no two tiles alike, and its code took LLVM 4
seconds. Here the taps of a tile are loop bounds; the copy and the zeros at a tile's own edge take the code's place.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv2d import emit_conv2d, packed_elements
from .conv_plan import Conv, Plan
from .loops import between, constant, flat, kernel_function, share, span
from .window import runs

MOST_SPANS = 64  # loops over taps that one panel's tiles may be written out as; an 11 x 11 window has at most 40
TILE_PIXELS = 8  # about a register tile: the plan is not known yet


def wants_staging(conv: Conv) -> bool:
    """Whether the tiles of an output row see too many different runs of taps."""
    if prod(staged(conv).input_shape) >= 2**31:  # more than a 32-bit index counts
        return False
    return any(conv.padding) and sum(len(run.spans) for run in runs(conv.columns, TILE_PIXELS)) > MOST_SPANS


def staged(conv: Conv) -> Conv:
    """The convolution over the padded copy."""
    top, bottom, left, right = conv.padding
    return replace(conv, height=top + conv.height + bottom, width=left + conv.width + right, padding=(0, 0, 0, 0))


def conv2d_staged(conv: Conv, plan: Plan) -> Any:
    """Return the kernel (x, packed weight[, bias][, residual], out); plan and packed weight are of `staged(conv)`."""
    inner = staged(conv)
    operands: list[tuple[int, ...]] = [conv.input_shape, (packed_elements(inner, plan),)]
    operands += [(conv.filters,)] * conv.bias + [conv.output_shape] * conv.residual

    def body(x: Any, weight: Any, *rest: Any) -> None:
        copy = T.alloc_buffer(inner.input_shape, "float32", scope="global")
        _fill(conv, inner, plan, flat(x), flat(copy))
        bias = rest[0] if conv.bias else None
        emit_conv2d(inner, plan, copy, weight, bias, rest[-2] if conv.residual else None, rest[-1], inside=conv.columns)

    return kernel_function("conv2d_staged", operands, [conv.output_shape], body)


def _fill(conv: Conv, inner: Conv, plan: Plan, x: Any, copy: Any) -> None:
    """Copy every row of the input between its zeros."""
    top, _, left, right = conv.padding
    before, row, after = left * conv.channels, conv.width * conv.channels, right * conv.channels
    line = before + row + after
    lines = conv.batch * inner.height
    tasks = lines if plan.tasks > 1 else 1
    with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task, between(*share(lines, tasks, task)) as number:
        image, y = tirx.floordiv(number, inner.height), tirx.floormod(number, inner.height) - top
        at = T.bind(number * line)
        with T.If(tirx.And(y >= 0, y < conv.height)):
            with T.Then():
                source = T.bind((image * conv.height + y) * row)
                _clear(copy, at, before, plan.lanes)
                _each(
                    row,
                    plan.lanes,
                    lambda i, n: T.buffer_store(copy, x[span(source + i, n)], [span(at + before + i, n)]),
                )
                _clear(copy, at + (before + row), after, plan.lanes)
            with T.Else():
                _clear(copy, at, line, plan.lanes)


def _clear(copy: Any, start: Any, count: int, lanes: int) -> None:
    _each(count, lanes, lambda i, n: T.buffer_store(copy, constant(0.0, n), [span(start + i, n)]))


def _each(count: int, lanes: int, emit: Any) -> None:
    """Call emit(offset, width) in loops over `count` neighbours: whole vectors, then one by one."""
    if count >= lanes:
        with T.serial(0, count // lanes) as vector:
            emit(vector * lanes, lanes)
    if count % lanes:
        with T.serial(0, count % lanes) as i:
            emit(count // lanes * lanes + i, 1)
