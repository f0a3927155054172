"""A convolution and the depthwise convolution that alone reads it, as one nest; the image in between is never stored.

    out = act2(depthwise(act1(conv(x, w1) + bias1), w2) + bias2)

A depthwise sum stays within its channel, so a panel of NR channels goes through both by itself: the rows of the image
in between lie in scratch, a few at a time, dense in the panel's channels.

    x [H][W][C]             scratch [rows][pad W pad][NR]          out [OH][OW][channels]
    +---------+   w1 panel  +-------+  row r0  (kept from before)   w2 panel   +---+---+---+
    |  rows   | ==========> |0     0|  row r1  (kept from before)  ==========> |   | * |   |
    |  r2 r3  |  MR x NR    |0     0|  row r2  <- new              MR2 pixels  +---+---+---+
    +---------+             +-------+  row r3  <- new              x 1 vector  panel *, some rows

tasks      row blocks x panels; cores that share out panels compute nothing twice, row blocks compute the rows
           under their common border twice
registers  product: MR * V + V + 1;  depthwise: MR2 + KW + 1;  one block of accumulators serves both
zeros      around the rows in scratch stand for padding, so that every depthwise tile is the same straight code

A 1x1 convolution takes its pixels MR at a time across row ends; the last tile overlaps the one before it. Any other
goes row by row, its window clipped as in `conv2d`; its input may be NCHW, of which it only broadcasts scalars.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv_depthwise_plan import Pair, PairPlan
from .depthwise import Sum, emit_tile
from .epilogue import apply_activation, is_heavy
from .loops import between, constant, flat, kernel_function, share, span
from .register_tile import clear, multiply_add
from .sweep import Tile
from .window import Axis, Run, runs

UNROLLED_STEPS = 32  # products of one row of taps that are written out


def conv_depthwise(pair: Pair, plan: PairPlan) -> Any:
    """Return the kernel (x, w1[, bias1], w2[, bias2], out); constants packed as in `conv_depthwise_plan`."""
    width = plan.panels * plan.columns
    operands: list[tuple[int, ...]] = [pair.input_shape, (width * pair.depth,)]
    operands += [(width,)] * pair.first.bias + [(width * pair.taps,)] + [(width,)] * pair.second.bias

    def body(x: Any, weight: Any, *rest: Any) -> None:
        given = list(rest)
        bias = given.pop(0) if pair.first.bias else None
        taps = given.pop(0)
        second_bias = given.pop(0) if pair.second.bias else None
        _Nest(pair, plan, flat(x), weight, bias, taps, second_bias, flat(given[0])).emit()

    return kernel_function("conv_depthwise", operands, [pair.second.output_shape], body)


@dataclass(frozen=True)
class _Nest:
    pair: Pair
    plan: PairPlan
    x: Any
    weight: Any
    bias: Any | None
    taps: Any
    second_bias: Any | None
    out: Any

    def emit(self) -> None:
        pair, plan = self.pair, self.plan
        second, lanes = pair.second, plan.lanes
        tasks = second.batch * plan.tasks
        with (T.parallel if tasks > 1 else T.serial)(0, tasks) as task:
            acc = T.alloc_buffer((max(plan.pixels * plan.vectors, plan.swept) * lanes,), "float32", scope="local")
            hidden = T.alloc_buffer((plan.rows * self._pitch,), "float32", scope="global")
            image = T.bind(task // plan.tasks)
            first_row, last_row = share(second.rows.out, plan.row_blocks, task // plan.panel_blocks % plan.row_blocks)
            first_row, last_row = T.bind(first_row), T.bind(last_row)
            first, last = share(plan.panels, plan.panel_blocks, task % plan.panel_blocks)
            with between(T.bind(first), T.bind(last)) as panel:
                blocks = tirx.floordiv(last_row - first_row + plan.block - 1, plan.block)
                with T.serial(0, blocks) as block:
                    begin = T.bind(first_row + block * plan.block)
                    end = T.bind(tirx.min(begin + plan.block, last_row))
                    low = T.bind(second.rows.first(begin))
                    high = T.bind(second.rows.first(end - 1) + self._reach)
                    # The block before has left all rows below this one's first.
                    kept = T.bind(tirx.Select(block > 0, max(self._reach - second.rows.stride, 0), 0))
                    self._keep(hidden, plan.block * second.rows.stride, kept)
                    self._produce(acc, hidden, image, panel, low, T.bind(low + kept), high)
                    self._sum(acc, hidden, image, panel, low, (begin, end))

    @property
    def _reach(self) -> int:
        """Rows in between that one output row reads."""
        rows = self.pair.second.rows
        return rows.dilation * (rows.kernel - 1) + 1

    @property
    def _pitch(self) -> int:
        """Floats of one row of the scratch, padding included."""
        return (self.pair.second.width + sum(self.pair.second.padding[2:])) * self.plan.columns

    @property
    def _left(self) -> int:
        """Floats of padding ahead of a row."""
        return self.pair.second.padding[2] * self.plan.columns

    def _keep(self, hidden: Any, down: int, rows: Any) -> None:
        """Move `rows` rows, `down` rows into the scratch, to its start."""
        if self._reach <= self.pair.second.rows.stride:
            return
        lanes = self.plan.lanes
        with T.serial(0, rows * (self._pitch // lanes)) as i:
            value = hidden[span(down * self._pitch + i * lanes, lanes)]
            T.buffer_store(hidden, value, [span(i * lanes, lanes)])

    def _produce(self, acc: Any, hidden: Any, image: Any, panel: Any, low: Any, start: Any, high: Any) -> None:
        """Rows [start, high) of the image in between; the scratch begins with row `low`, zeros outside the image."""
        first, plan = self.pair.first, self.plan
        size = first.rows.out
        begin, end = T.bind(tirx.max(tirx.min(start, size), 0)), T.bind(tirx.max(tirx.min(high, size), 0))
        if first.pointwise:
            self._pointwise(acc, hidden, image, panel, low, begin, end)
        else:
            with between(begin, end) as r:
                self._row(acc, hidden, image, panel, r, T.bind((r - low) * self._pitch + self._left))
        top, bottom, left, right = self.pair.second.padding
        row = first.columns.out * plan.columns
        with between(begin, end) as r:
            line = T.bind((r - low) * self._pitch)
            if is_heavy(first.activation):
                with T.serial(0, row // plan.lanes) as i:
                    at = span(line + self._left + i * plan.lanes, plan.lanes)
                    T.buffer_store(hidden, apply_activation(T.bind(hidden[at]), first.activation, first.args), [at])
            self._zero(hidden, line, left * plan.columns)
            self._zero(hidden, line + (self._left + row), right * plan.columns)
        if top:
            outside = tirx.max(tirx.min(high, 0) - start, 0)
            self._zero(hidden, (start - low) * self._pitch, outside * self._pitch)
        if bottom:
            after = T.bind(tirx.max(start, size))
            self._zero(hidden, (after - low) * self._pitch, tirx.max(high - after, 0) * self._pitch)

    def _zero(self, hidden: Any, start: Any, floats: Any) -> None:
        """Store zeros."""
        lanes = self.plan.lanes
        if isinstance(floats, int) and not floats:
            return
        start = T.bind(start)
        with T.serial(0, tirx.floordiv(floats, lanes)) as i:
            T.buffer_store(hidden, constant(0.0, lanes), [span(start + i * lanes, lanes)])

    def _pointwise(self, acc: Any, hidden: Any, image: Any, panel: Any, low: Any, begin: Any, end: Any) -> None:
        """Rows [begin, end) as the product of their pixels, across row ends."""
        pair, plan = self.pair, self.plan
        depth, most, width = pair.depth, plan.pixels, pair.first.width
        pixel, pixels = T.bind((image * pair.first.height + begin) * width), T.bind((end - begin) * width)
        to = T.bind((begin - low) * self._pitch + self._left)
        between_rows = self._pitch - width * plan.columns
        w = T.bind(panel * (depth * plan.columns))
        with T.serial(0, tirx.floordiv(pixels + most - 1, most)) as i:
            p = T.bind(tirx.min(i * most, pixels - most))
            x = T.bind((pixel + p) * depth)
            clear(acc, most, plan.vectors, plan.lanes)
            multiply_add(
                acc,
                range(most),
                plan.vectors,
                plan.lanes,
                depth,
                lambda row, k, n: self.x[span(x + row * depth + k, n)],
                lambda k, v: self.weight[span(w + (k * plan.vectors + v) * plan.lanes, plan.lanes)],
                by_element=plan.by_element,
            )
            places = [to + (p + j) * plan.columns for j in range(most)]
            if between_rows:
                places = [place + tirx.floordiv(p + j, width) * between_rows for j, place in enumerate(places)]
            self._store(acc, hidden, panel, [T.bind(place) for place in places])

    def _row(self, acc: Any, hidden: Any, image: Any, panel: Any, row: Any, to: Any) -> None:
        """One row of the image in between, tile by tile."""
        first, plan = self.pair.first, self.plan
        taps = first.rows.dynamic_taps(row)
        w = T.bind(panel * (self.pair.depth * plan.columns))

        def tile(run: Run, column: Any) -> None:
            clear(acc, run.pixels, plan.vectors, plan.lanes)
            with T.serial(0, taps[1]) as i:
                kh = taps[0] + i
                line = T.bind(first.rows.first(row) + kh * first.dilation[0])
                self._taps(
                    acc,
                    run,
                    image,
                    line,
                    first.columns.first(column),
                    w + kh * (self.pair.depth // first.kernel[0] * plan.columns),
                )
            start = T.bind(to + column * plan.columns)
            self._store(acc, hidden, panel, [start + p * plan.columns for p in range(run.pixels)])

        for run in runs(first.columns, plan.pixels):
            if run.count == 1:
                tile(run, run.start)
            else:
                with T.serial(0, run.count) as i:
                    tile(run, run.start + i * run.pixels)

    def _taps(self, acc: Any, run: Run, image: Any, line: Any, column: Any, w: Any) -> None:
        """Add the products of one row of taps."""
        first, plan = self.pair.first, self.plan
        channels, plane = first.channels, first.height * first.width
        apart = 1 if self.pair.planar else channels
        channel_step = plane if self.pair.planar else 1
        start = image * (plane * channels) + (line * first.width + column) * apart
        start, w = T.bind(start), T.bind(w)
        for s in run.spans:

            def add(kw: Any, c: Any, steps: int, pixels: range = range(s.low, s.high)) -> None:
                multiply_add(
                    acc,
                    pixels,
                    plan.vectors,
                    plan.lanes,
                    steps,
                    lambda p, k, n: self.x[
                        span(start + (p * first.stride[1] + kw * first.dilation[1]) * apart + (c + k) * channel_step, n)
                    ],
                    lambda k, v: self.weight[
                        span(w + ((kw * channels + c + k) * plan.vectors + v) * plan.lanes, plan.lanes)
                    ],
                    by_element=plan.by_element and channel_step == 1,
                )

            if s.taps * channels <= UNROLLED_STEPS:
                for kw in range(s.tap, s.tap + s.taps):
                    for c in range(channels):
                        add(kw, c, 1)
            else:
                with between(s.tap, s.tap + s.taps) as kw:
                    add(kw, 0, channels)

    def _store(self, acc: Any, hidden: Any, panel: Any, places: list[Any]) -> None:
        """Bias, a light activation, and each pixel of the tile goes to its place in the scratch."""
        first, plan = self.pair.first, self.plan
        heavy = is_heavy(first.activation)
        for v in range(plan.vectors):
            bias = None
            if self.bias is not None:
                bias = T.bind(self.bias[span(panel * plan.columns + v * plan.lanes, plan.lanes)])
            for p, place in enumerate(places):
                value = acc[span((p * plan.vectors + v) * plan.lanes, plan.lanes)]
                if bias is not None:
                    value = value + bias
                if not heavy:
                    value = apply_activation(T.bind(value), first.activation, first.args)
                T.buffer_store(hidden, value, [span(place + v * plan.lanes, plan.lanes)])

    def _sum(self, acc: Any, hidden: Any, image: Any, panel: Any, low: Any, rows: tuple[Any, Any]) -> None:
        """The depthwise sums of output rows [rows): the last panel may be narrower."""
        channels, plan = self.pair.second.channels, self.plan
        full, rest = divmod(channels, plan.columns)

        def vectors(width: int) -> None:
            whole, odd = divmod(width, plan.lanes)
            with between(*rows) as row:
                for run in runs(_inside(self.pair.second.columns), plan.swept):
                    with T.serial(0, run.count) as i:
                        column = run.start + i * run.pixels
                        if whole:
                            with T.serial(0, whole) as v:
                                self._depthwise(acc, hidden, image, panel, low, run, (row, column), v, plan.lanes)
                        if odd:
                            self._depthwise(acc, hidden, image, panel, low, run, (row, column), whole, odd)

        if not rest:
            vectors(plan.columns)
        elif not full:
            vectors(rest)
        else:
            with T.If(panel < full):
                with T.Then():
                    vectors(plan.columns)
                with T.Else():
                    vectors(rest)

    def _depthwise(
        self,
        acc: Any,
        hidden: Any,
        image: Any,
        panel: Any,
        low: Any,
        run: Run,
        place: tuple[Any, Any],
        vector: Any,
        width: int,
    ) -> None:
        """One register tile of the depthwise sums; the first `width` lanes exist."""
        second, plan = self.pair.second, self.plan
        row, column = place
        rows, columns = second.rows, second.columns
        inner = vector * plan.lanes
        outer = panel * plan.columns + inner
        out_pixel = (image * rows.out + row) * columns.out + column
        tile = Tile(
            run,
            plan.lanes,
            T.bind(outer),
            row,
            column,
            T.bind((rows.first(row) - low) * self._pitch + column * (columns.stride * plan.columns) + inner),
            T.bind(out_pixel * second.channels + outer),
            0,
            rows.kernel,
            rows.dilation * self._pitch,
            columns.dilation * plan.columns,
            columns.stride * plan.columns,
            second.channels,
        )
        weight = T.bind(panel * (self.pair.taps * plan.columns) + inner)
        emit_tile(
            acc,
            tile,
            hidden,
            Sum(
                self.taps, weight, plan.columns, columns.kernel, self.second_bias, None, second.activation, second.args
            ),
            self.out,
            width,
        )


def _inside(axis: Axis) -> Axis:
    """The axis of the padded rows."""
    return replace(axis, size=(axis.out - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1, before=0)
