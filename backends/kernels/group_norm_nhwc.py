"""group_norm of images in NHWC: each group is a few neighbouring channels of all pixels of an image.

    tasks      images x shares of the channels that hold whole groups
    passes     mean; (x - mean) and its square; writing: each runs down the pixels, the task's channels innermost
    pixels     eight at a time are added up in registers, then into one partial sum per channel

         c0 c1 | c2 c3 |        sums of 512 pixels go into a second row of sums, so that the error grows with
    p0    .  . |  .  . |        the root of pixels / 512, not of pixels; the sums of a group's channels are
    p1    .  . |  .  . |        added last. Mean and spread are found as in `layer_norm`.

Registers: eight pixels of a vector added up in pairs, a mean: at most 6 beside what is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .loops import between, flat, kernel_function, span, spread

_TOGETHER, _BLOCK = 8, 512  # pixels


def channel_shares(shape: Sequence[int], groups: int, hw: Hardware) -> int:
    """Into how many equal shares of whole groups the channels of an image are cut: enough for every core."""
    wanted = max(1, -(-hw.cores // shape[0]))
    elements = math.prod(shape)
    if elements / hw.lanes("float32") / (hw.clock_mhz or 2000.0) < 2 * hw.launch_us:
        wanted = 1
    fitting = [n for n in range(1, groups + 1) if groups % n == 0]
    return next((n for n in fitting if n >= wanted), fitting[-1])


def group_norm_nhwc(
    shape: tuple[int, ...], groups: int, hw: Hardware, eps: float, weight: bool = True, bias: bool = True
) -> Any:
    """PrimFunc (in [N, ..., C], weight? [C], bias? [C], out [N, ..., C])."""
    batch, channels = shape[0], shape[-1]
    pixels, width = math.prod(shape[1:-1]), channels // groups
    shares = channel_shares(shape, groups, hw)
    own = channels // shares
    count = tirx.const(float(pixels * width), "float32")

    def each(emit: Callable[[Any, int], None]) -> None:
        """emit(channel, lanes) over the task's channels; the rest in ever shorter vectors."""
        lanes, done = hw.lanes("float32"), 0
        while done < own:
            vectors = (own - done) // lanes
            if vectors > 1:
                with T.serial(0, vectors) as i:
                    emit(done + i * lanes, lanes)
            elif vectors:
                emit(done, lanes)
            done, lanes = done + vectors * lanes, lanes // 2

    def fill(*rows: Any) -> None:
        def zero(c: Any, lanes: int) -> None:
            for row in rows:
                T.buffer_store(row, spread(tirx.const(0.0, "float32"), lanes), [span(c, lanes)])

        each(zero)

    def accumulate(row: Any, c: Any, lanes: int, value: Any) -> None:
        T.buffer_store(row, row[span(c, lanes)] + value, [span(c, lanes)])

    def sums(totals: list[Any], partial: list[Any], terms: Callable[[Any, Any, int], list[Any]]) -> None:
        """totals[k] = the sums over all pixels of terms(pixel, channel, lanes)[k]."""

        def strip(pixel: Any, together: int) -> None:
            def vector(c: Any, lanes: int) -> None:
                found = [[T.bind(t) for t in terms(pixel + p, c, lanes)] for p in range(together)]
                for k, row in enumerate(partial[: len(totals)]):
                    accumulate(row, c, lanes, _in_pairs([f[k] for f in found]))

            each(vector)

        def block(start: Any, length: int) -> None:
            rows = partial[: len(totals)]
            fill(*rows)
            whole, left = divmod(length, _TOGETHER)
            if whole:
                with T.serial(0, whole) as i:
                    strip(start + i * _TOGETHER, _TOGETHER)
            if left:
                with between(whole * _TOGETHER, length) as p:
                    strip(start + p, 1)

            def add(c: Any, lanes: int) -> None:
                for total, row in zip(totals, rows, strict=True):
                    accumulate(total, c, lanes, row[span(c, lanes)])

            each(add)

        fill(*totals)
        blocks, left = divmod(pixels, _BLOCK)
        if blocks:
            with T.serial(0, blocks) as b:
                block(b * _BLOCK, _BLOCK)
        if left:
            block(blocks * _BLOCK, left)

    def each_group(totals: list[Any], finish: Callable[[Any, list[Any]], None]) -> None:
        """finish(channel, sums of its group) for every channel of the task."""
        scalars = [T.alloc_buffer((1,), "float32", scope="local") for _ in totals]
        with T.serial(0, own // width) as g:
            for scalar in scalars:
                T.buffer_store(scalar, tirx.const(0.0, "float32"), [0])
            with T.serial(0, width) as c:
                for total, scalar in zip(totals, scalars, strict=True):
                    T.buffer_store(scalar, scalar[0] + total[g * width + c], [0])
            values = [T.bind(scalar[0] / count) for scalar in scalars]
            with T.serial(0, width) as c:
                finish(g * width + c, values)

    def body(source: Any, *rest: Any) -> None:
        x, y = flat(source), flat(rest[-1])
        with (T.parallel if batch * shares > 1 else T.serial)(0, batch * shares) as task:
            first = T.bind(task % shares * own)
            base = T.bind(task // shares * (pixels * channels) + first)
            rows = [T.alloc_buffer((own,), "float32", scope="local") for _ in range(6)]
            partial, total, square, mean, gain = rows[:2], rows[2], rows[3], rows[4], rows[5]

            def at(pixel: Any, c: Any, lanes: int) -> Any:
                return span(base + pixel * channels + c, lanes)

            sums([total], partial, lambda p, c, n: [x[at(p, c, n)]])
            each_group([total], lambda c, values: T.buffer_store(mean, values[0], [c]))

            def centred(pixel: Any, c: Any, lanes: int) -> list[Any]:
                value = T.bind(x[at(pixel, c, lanes)] - mean[span(c, lanes)])
                return [value, value * value]

            sums([total, square], partial, centred)
            residue = partial[0]

            def finish(c: Any, values: list[Any]) -> None:
                variance = values[1] - values[0] * values[0]
                scale = tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(eps, "float32"))
                T.buffer_store(residue, values[0], [c])
                T.buffer_store(gain, scale * rest[0][first + c] if weight else scale, [c])

            each_group([total, square], finish)

            def write(pixel: Any, c: Any, lanes: int) -> None:
                here = span(c, lanes)
                value = ((x[at(pixel, c, lanes)] - mean[here]) - residue[here]) * gain[here]
                if bias:
                    value = value + rest[-2][span(first + c, lanes)]
                T.buffer_store(y, value, [at(pixel, c, lanes)])

            with T.serial(0, pixels) as pixel:
                each(lambda c, lanes: write(pixel, c, lanes))

    affine = [(channels,)] * (int(weight) + int(bias))
    return kernel_function("group_norm_nhwc", [shape, *affine], [shape], body)


def _in_pairs(values: list[Any]) -> Any:
    while len(values) > 1:
        pairs = [T.bind(a + b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
