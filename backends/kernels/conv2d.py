"""Direct 2-D convolution, NHWC, weights packed at compile time: out = act(conv(x, w) + bias + residual).

x, out     [N, H, W, C], no padded copy, no blocked channels; x of few channels [N, C, H, W] on request: then a run of
           taps is one per kw, its elements H * W apart
w packed   for each group, panels of NR output channels: [KH][KW][C / groups][NR]; the last panel of a group
           may be narrower (a multiple of the vector; zeros past the last channel)
tile       MR neighbouring pixels of a row x NR channels, V = NR / lanes vectors wide

                NR = V vectors
              +-------+-------+
    pixel 0   | acc 0 | acc 1 |    for kh (clipped to the rows that exist):
    pixel 1   | acc 2 | acc 3 |      for (kw, c), one run of contiguous floats in NHWC:
     ...      |  ...  |  ...  |        load V vectors of w; per pixel broadcast x, V multiply-adds
              +-------+-------+
registers: MR * V + V + 1 <= vector registers

border     a tile that touches the left or right edge has its own code, in which each kw covers only the pixels
           whose input exists: no padding is stored, and no zero is multiplied
tasks      row blocks x panels (or groups): equal shares for the cores, a block's input rows stay in L2
groups     one after the other while the block's input stays in L2, else row by row: a narrow group alone would fetch
           parts of the cache lines of every pixel again and again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script import builder as T

from .conv_plan import Conv, Plan
from .epilogue import apply_activation, is_heavy
from .loops import between, flat, kernel_function, share, span
from .register_tile import clear, multiply_add
from .window import Axis, Placement, Run, Span, pieces, runs


def conv2d(conv: Conv, plan: Plan, planar: bool = False) -> Any:
    """Return the kernel (x, packed weight[, bias][, residual], out); `planar`: x lies in NCHW, and is not grouped."""
    batch, height, width, channels = conv.input_shape
    shape = (batch, channels, height, width) if planar else conv.input_shape
    operands: list[tuple[int, ...]] = [shape, (packed_elements(conv, plan),)]
    operands += [(conv.filters,)] * conv.bias + [conv.output_shape] * conv.residual

    def body(x: Any, weight: Any, *rest: Any) -> None:
        bias = rest[0] if conv.bias else None
        residual = rest[-2] if conv.residual else None
        emit_conv2d(conv, plan, x, weight, bias, residual, rest[-1], planar=planar)

    return kernel_function("conv2d", operands, [conv.output_shape], body)


def packed_elements(conv: Conv, plan: Plan) -> int:
    """Floats of the packed weight."""
    return conv.groups * plan.padded_filters * conv.group_channels * conv.kernel[0] * conv.kernel[1]


def emit_conv2d(
    conv: Conv,
    plan: Plan,
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    out: Any,
    place: Placement | None = None,
    inside: Axis | None = None,
    planar: bool = False,
) -> None:
    """Emit the nest over buffers of a kernel; `place` puts the outputs into a larger image.

    `inside`: x is a padded copy; taps that fall on the padding of this axis for all pixels of a tile are left out.
    """
    place = place or Placement(conv.rows.out, conv.columns.out)
    conv = replace(conv, groups=conv.groups // plan.merged)
    _Nest(
        conv,
        plan,
        flat(x),
        weight,
        bias,
        None if residual is None else flat(residual),
        flat(out),
        place,
        inside,
        planar,
    ).emit()


@dataclass(frozen=True)
class _Panel:
    """One panel being emitted: its width and where it lies (loop variables allowed)."""

    vectors: int
    channels: int  # that exist; the rest of the panel is zero padding
    group: Any
    channel: Any  # first output channel
    weight: Any  # offset of its weights


@dataclass(frozen=True)
class _Nest:
    """Emits the loop nest; `conv` has its groups merged already."""

    conv: Conv
    plan: Plan
    x: Any
    weight: Any
    bias: Any | None
    residual: Any | None
    out: Any
    place: Placement
    inside: Axis | None = None
    planar: bool = False

    @property
    def pixel(self) -> int:
        """Elements of x from one pixel of a row to the next."""
        return 1 if self.planar else self.conv.channels

    @property
    def plane(self) -> int:
        """Elements of x from one channel of a pixel to the next."""
        return self.conv.height * self.conv.width if self.planar else 1

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        units = conv.groups if conv.groups > 1 else plan.panels + (1 if plan.tail_vectors else 0)
        tasks = plan.tasks
        with (T.parallel if tasks > 1 else T.serial)(0, tasks) as task:
            accumulators = max(plan.vectors * plan.pixels, plan.tail_vectors * plan.tail_pixels)
            acc = T.alloc_buffer((accumulators * plan.lanes,), "float32", scope="local")
            block = T.bind(task // plan.unit_blocks)
            image = T.bind(block // plan.row_blocks)
            rows = share(conv.rows.out, plan.row_blocks, block % plan.row_blocks)
            first, last = share(units, plan.unit_blocks, task % plan.unit_blocks)
            rows, first, last = (T.bind(rows[0]), T.bind(rows[1])), T.bind(first), T.bind(last)
            if conv.groups == 1:
                self._panels(acc, image, rows, 0, first, last)
            elif plan.row_by_row:
                with between(*rows) as row, between(first, last) as group:
                    self._panels(acc, image, (row, row + 1), group, 0, units)
            else:
                with between(first, last) as group:
                    self._panels(acc, image, rows, group, 0, units)

    def _panels(self, acc: Any, image: Any, rows: tuple[Any, Any], group: Any, first: Any, last: Any) -> None:
        """Panels [first, last) of one group; with several groups always all of them."""
        conv, plan = self.conv, self.plan
        wide, depth = plan.vectors * plan.lanes, conv.kernel[0] * conv.kernel[1] * conv.group_channels
        every = conv.groups > 1
        group_weight = group * (plan.padded_filters * depth)

        def panel(index: Any, vectors: int) -> None:
            channels = vectors * plan.lanes
            exists = min(channels, conv.group_filters - index * wide) if isinstance(index, int) else channels
            self._rows(
                acc,
                image,
                rows,
                _Panel(
                    vectors,
                    exists,
                    group,
                    group * conv.group_filters + index * wide,
                    group_weight + index * (wide * depth),
                ),
            )

        ragged = conv.group_filters % plan.lanes != 0 and not plan.tail_vectors
        alike = plan.panels - (1 if ragged else 0)  # panels whose channels all exist
        if alike:
            if every:
                with T.serial(0, alike) as index:
                    panel(index, plan.vectors)
            else:
                with between(first, T.min(last, alike)) as index:
                    panel(index, plan.vectors)
        if plan.tail_vectors or ragged:
            vectors = plan.vectors if ragged else plan.tail_vectors
            if every:
                panel(alike, vectors)
            else:
                with T.If(last > alike), T.Then():
                    panel(alike, vectors)

    def _rows(self, acc: Any, image: Any, rows: tuple[Any, Any], panel: _Panel) -> None:
        conv, plan = self.conv, self.plan
        pixels = plan.pixels if panel.vectors == plan.vectors else plan.tail_pixels
        with between(rows[0], rows[1]) as row:
            place = self.place
            written = image * place.height + place.start[0] + row * place.step[0]
            out_row = T.bind(written * place.width + place.start[1])
            images = image * (conv.height * (conv.channels if self.planar else 1))
            in_row = T.bind((images + conv.rows.first(row)) * conv.width)
            first, taps = conv.rows.dynamic_taps(row)
            for run in runs(conv.columns, pixels):
                if run.count == 1:
                    self._tile(acc, panel, run, out_row + run.start * place.step[1], in_row, run.start, (first, taps))
                    continue
                with T.serial(0, run.count) as i:
                    column = run.start + i * run.pixels
                    self._tile(acc, panel, run, out_row + column * place.step[1], in_row, column, (first, taps))

    def _tile(
        self,
        acc: Any,
        panel: _Panel,
        run: Run,
        out_pixel: Any,
        in_row: Any,
        column: Any,
        taps: tuple[Any, Any],
    ) -> None:
        """One register tile: pixels [column, column + run.pixels) of a row."""
        conv, lanes, vectors = self.conv, self.plan.lanes, panel.vectors
        clear(acc, run.pixels, vectors, lanes)
        corner = T.bind((in_row + conv.columns.first(column)) * self.pixel + panel.group * conv.group_channels)
        contiguous = conv.groups == 1 and conv.dilation[1] == 1 and not self.planar
        with T.serial(0, taps[1]) as i:
            kh = taps[0] + i
            x_row = T.bind(corner + kh * (conv.dilation[0] * conv.width * self.pixel))
            w_row = T.bind(panel.weight + kh * (conv.kernel[1] * conv.group_channels * vectors * lanes))
            for s in self._spans(run, column):
                x_tap, w_tap = conv.dilation[1] * self.pixel, conv.group_channels * vectors * lanes
                if contiguous or s.taps == 1:
                    self._reduce(
                        acc,
                        vectors,
                        (s.low, s.high),
                        x_row + s.tap * x_tap,
                        w_row + s.tap * w_tap,
                        s.taps * conv.group_channels,
                    )
                    continue
                with between(s.tap, s.tap + s.taps) as kw:
                    self._reduce(
                        acc,
                        vectors,
                        (s.low, s.high),
                        x_row + kw * x_tap,
                        w_row + kw * w_tap,
                        conv.group_channels,
                    )
        self._store(acc, panel, run.pixels, out_pixel)

    def _spans(self, run: Run, column: Any) -> Sequence[Span]:
        if self.inside is None:
            return run.spans
        return [Span(*self.inside.union_of_taps(column, run.pixels), 0, run.pixels)]

    def _reduce(self, acc: Any, vectors: int, pixels: tuple[int, int], x: Any, w: Any, steps: int) -> None:
        """Multiply-add `steps` inputs of each pixel, `plane` apart, with as many rows of the panel."""
        lanes, apart, plane = self.plan.lanes, self.conv.stride[1] * self.pixel, self.plane
        x, w = T.bind(x), T.bind(w)
        multiply_add(
            acc,
            range(*pixels),
            vectors,
            lanes,
            steps,
            lambda p, k, n: self.x[span(x + p * apart + k * plane, n)],
            lambda k, v: self.weight[span(w + (k * vectors + v) * lanes, lanes)],
            by_element=self.plan.by_element and plane == 1,
        )

    def _store(self, acc: Any, panel: _Panel, pixels: int, out_pixel: Any) -> None:
        lanes, vectors = self.plan.lanes, panel.vectors
        heavy = is_heavy(self.conv.activation)
        apart = self.place.step[1] * self.conv.filters
        base = T.bind(out_pixel * self.conv.filters + panel.channel)
        parts = pieces(panel.channels, lanes)
        for p in range(pixels):
            for offset, width in parts:
                at = span(base + p * apart + offset, width)
                value = acc[span(p * vectors * lanes + offset, width)]
                if self.bias is not None:
                    value = value + self.bias[span(panel.channel + offset, width)]
                if self.residual is not None:
                    value = value + self.residual[at]
                T.buffer_store(self.out, value if heavy else self._activate(value), [at])
        if heavy:
            with T.serial(0, pixels) as p:
                for offset, width in parts:
                    at = span(base + p * apart + offset, width)
                    T.buffer_store(self.out, self._activate(self.out[at]), [at])

    def _activate(self, value: Any) -> Any:
        return apply_activation(T.bind(value), self.conv.activation, self.conv.args)
