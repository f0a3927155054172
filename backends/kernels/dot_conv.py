"""Direct 2-D convolution of narrow operands, NHWC, one group: out = finish(conv(x, w)), sums in 32 bits.

    staged     [N, H + padding, W + padding, words]    x in words of `group` channels, its border filled: a copy of
               the input in the dtype that the dot product takes, after which no tile knows of borders
    w packed   [ceil(K / NR)][KH][KW][ceil(C / group)][NR][group]
    tile       MR neighbouring pixels of a row x NR = V * lanes channels

                NR = V vectors
              +-------+-------+
    pixel 0   | acc 0 | acc 1 |    for kh, for (kw, words of c), one run of neighbouring words in the staged row:
    pixel 1   | acc 2 | acc 3 |      load V vectors of w; per pixel one word in every lane, V dot products
     ...      |  ...  |  ...  |
              +-------+-------+
    registers  MR * V + V + 1 + spare <= vector registers

Padding costs the products of its zeros, staging H * W * C conversions beside H * W * C * K * KH * KW products; in
exchange any channel count, padding and dtype of the input is one code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import core_l2_bytes
from .conv_plan import Conv
from .dot_matmul import pack_words
from .dot_product import Dot, choose_dot_tiling, importing
from .dot_tile import Finish, Tile, accumulate, allocate, begin, fill_word, stage, store_panel, store_tile
from .int8_rows import largest_bits, stepping, unit_of
from .loops import between, flat, share, span, typed_kernel, view
from .window import balanced


@dataclass(frozen=True)
class DotConvPlan:
    """How the nest is cut."""

    pixels: int
    vectors: int
    panels: int
    row_blocks: int  # of all images' output rows
    panel_blocks: int
    efficiency: float
    cores: int
    by_element: bool = False  # the image is read by vectors of words, whose lanes are factors

    @property
    def tasks(self) -> int:
        """Pieces of work that may run at once."""
        return self.row_blocks * self.panel_blocks


def choose_dot_conv(conv: Conv, dot: Dot, hw: Hardware) -> DotConvPlan:
    """The tile of the product of a row of pixels with the filters, and blocks of rows or of panels for the cores."""
    depth = conv.kernel[0] * conv.kernel[1] * (-(-conv.channels // dot.group) * dot.group)
    one = replace(hw, cores=1)
    tiling = choose_dot_tiling(one, dot, conv.columns.out, conv.filters, depth)
    panels = -(-conv.filters // tiling.columns)
    rows = conv.batch * conv.rows.out
    cycles = tiling.cycles * rows
    weights = 4 * depth // dot.group * conv.filters
    row_blocks = panel_blocks = 1
    if cycles > 2 * hw.launch_us * hw.cycles_per_us:
        # Rows, so that a core reads its rows of the input only; panels where the rows are too few to share out evenly
        # or all the weights are too many for a core's L2.
        row_blocks = min(rows, hw.cores)
        uneven = -(-rows // row_blocks) * row_blocks / rows
        if (uneven > 1.1 or weights > core_l2_bytes(hw)) and panels >= hw.cores:
            row_blocks, panel_blocks = 1, hw.cores
    return DotConvPlan(
        tiling.rows,
        tiling.columns // dot.lanes,
        panels,
        row_blocks,
        panel_blocks,
        tiling.efficiency,
        hw.cores,
        tiling.by_element,
    )


def pack_conv(weight: torch.Tensor, dot: Dot, plan: DotConvPlan) -> torch.Tensor:
    """Rearrange weight[K, C, KH, KW] (bfloat16 or int8) as the kernel reads it."""
    filters, channels, kh, kw = weight.shape
    steps = -(-channels // dot.group)
    filled = weight.new_zeros((filters, kh, kw, steps * dot.group))
    filled[..., :channels] = weight.permute(0, 2, 3, 1)
    packed = pack_words(filled.view(filters, -1), dot.group, plan.vectors * dot.lanes)
    return packed.view(torch.int32) if dot.weight == "int32" else packed


def dot_conv(
    name: str,
    conv: Conv,
    source: str,
    dot: Dot,
    plan: DotConvPlan,
    finish: Finish,
    *texts: str,
    fill: int = 0,
    by_images: bool = False,
) -> Any:
    """Return the kernel (x, packed weights, the finish's operands..., out); padding counts as `fill` of x's dtype.

    `by_images`: `source` is float32, and each image is rounded to bytes by its largest value; `finish` reads the units.
    """
    assert conv.groups == 1
    steps = conv.kernel[0] * conv.kernel[1] * -(-conv.channels // dot.group)
    weight_shape = (plan.panels, steps, plan.vectors * dot.lanes * dot.weights_per_lane)
    operands = [(conv.input_shape, source), (weight_shape, dot.weight), *finish.operands]

    def body(x: Any, weight: Any, *rest: Any) -> None:
        with importing(dot.helpers, *texts):
            out = view(rest[-1], (prod(conv.output_shape[:3]), conv.filters))
            _Nest(conv, source, dot, plan, finish, x, weight, rest[:-1], out, fill, by_images).emit()

    return typed_kernel(name, operands, [(conv.output_shape, finish.result)], body)


@dataclass(frozen=True)
class _Nest:
    conv: Conv
    source: str
    dot: Dot
    plan: DotConvPlan
    finish: Finish
    x: Any
    weight: Any
    read: Sequence[Any]
    out: Any
    fill: int
    by_images: bool = False

    @property
    def stored(self) -> str:
        """The dtype that words are made of."""
        return "int8" if self.by_images else self.source

    @property
    def words(self) -> int:
        """Words of one pixel."""
        return -(-self.conv.channels // self.dot.group)

    @property
    def staged_shape(self) -> tuple[int, int, int, int]:
        """The staged input: as high and wide as the windows reach."""
        conv = self.conv
        height, width = (
            (axis.out - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1 for axis in (conv.rows, conv.columns)
        )
        return conv.batch, height, width, self.words

    def emit(self) -> None:
        if not self.by_images:
            self._tiles(self._words())
            return
        inverses, units = self._units()
        replace(self, read=(*self.read, units))._tiles(self._words(inverses))

    def _units(self) -> tuple[Any, Any]:
        """For each image what its values are multiplied by, and the unit of a step."""
        conv = self.conv
        lines, length = conv.batch * conv.height, conv.width * conv.channels
        x = view(self.x, (lines, length))
        most = T.alloc_buffer((lines,), "int32", scope="global")
        inverses, units = (T.alloc_buffer((conv.batch,), "float32", scope="global") for _ in range(2))
        tasks = min(self._cores, lines)
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task, between(*share(lines, tasks, task)) as line:
            T.buffer_store(most, largest_bits(lambda k, n: x[line, span(k, n)], length, self.dot), [line])
        with T.serial(0, conv.batch) as image:
            bits = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(bits, tirx.const(0, "int32"), [0])
            with T.serial(0, conv.height) as row:
                T.buffer_store(bits, tirx.max(bits[0], most[image * conv.height + row]), [0])
            inverse, unit = unit_of(T.bind(bits[0]))
            T.buffer_store(inverses, inverse, [image])
            T.buffer_store(units, unit, [image])
        return inverses, units

    @property
    def _cores(self) -> int:
        return self.plan.cores if self.plan.tasks > 1 else 1

    def _tiles(self, words: Any) -> None:
        conv, dot, plan = self.conv, self.dot, self.plan
        with T.parallel(0, plan.tasks) if plan.tasks > 1 else T.serial(0, 1) as task:
            acc, spill = allocate(Tile(plan.pixels, plan.vectors), dot, conv.filters, self.finish)
            rows = share(conv.batch * conv.rows.out, plan.row_blocks, task // plan.panel_blocks)
            panels = share(plan.panels, plan.panel_blocks, task % plan.panel_blocks)
            with between(*panels) as panel, between(*rows) as row:
                start = 0
                sizes = balanced(conv.columns.out, plan.pixels)
                for pixels in dict.fromkeys(sizes):
                    count = sizes.count(pixels)
                    with T.serial(0, count) as i:
                        self._tile(acc, spill, words, pixels, row, start + i * pixels, panel)
                    start += count * pixels

    def _words(self, inverses: Any = None) -> Any:
        """The input as words, padded; the input itself where that is how it lies. `inverses`: of `_units`."""
        conv, dot = self.conv, self.dot
        shape = self.staged_shape
        same = shape[1:3] == (conv.height, conv.width) and not any(conv.padding)
        if same and self.source == dot.left and conv.channels % dot.group == 0:
            return T.decl_buffer((prod(shape),), dot.word, data=self.x.data)
        staged = T.alloc_buffer(shape, dot.word, scope="global")
        x, border = self.x, tirx.const(fill_word(self.stored, dot, self.fill), dot.word)
        top, left = conv.padding[0], conv.padding[2]
        bottom, right = max(0, shape[1] - top - conv.height), max(0, shape[2] - left - conv.width)
        height, width = shape[1] - top - bottom, shape[2] - left - right

        def blank(image: Any, row: Any, first: int, count: int) -> None:
            if count * self.words:
                with T.serial(0, count) as column, T.serial(0, self.words) as word:
                    T.buffer_store(staged, border, [image, row, first + column, word])

        tasks = min(self._cores, conv.batch * shape[1])
        lines = conv.batch * shape[1]
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task, between(*share(lines, tasks, task)) as line:
            image, row = line // shape[1], line % shape[1]
            with T.If(T.And(row >= top, row < top + height)):
                with T.Then():
                    blank(image, row, 0, left)
                    with T.serial(0, width) as column:

                        def load(c: Any, lanes: int) -> Any:
                            return x[image, row - top, column, span(c, lanes)]

                        stage(
                            load if inverses is None else stepping(load, inverses[image]),
                            lambda value, word, lanes: T.buffer_store(
                                staged, value, [image, row, left + column, span(word, lanes)]
                            ),
                            conv.channels,
                            self.stored,
                            dot,
                        )
                    blank(image, row, left + width, right)
                with T.Else():
                    blank(image, row, 0, shape[2])
        return flat(staged)

    def _tile(self, acc: Any, spill: Any, words: Any, pixels: int, row: Any, column: Any, panel: Any) -> None:
        """One register tile: pixels [column, column + pixels) of an output row (of all images' rows)."""
        conv, dot, plan = self.conv, self.dot, self.plan
        _, height, width, deep = self.staged_shape
        tile = Tile(pixels, plan.vectors)
        begin(acc, spill, tile, dot)
        image, line = row // conv.rows.out, row % conv.rows.out
        corner = T.bind(((image * height + line * conv.stride[0]) * width + column * conv.stride[1]) * deep)
        taps = conv.kernel[1]
        apart = conv.stride[1] * deep
        wide = dot.lanes * dot.weights_per_lane

        def run(first_word: Any, first_step: Any, steps: int) -> None:
            accumulate(
                acc,
                spill,
                tile,
                dot,
                steps,
                lambda p, k, n: words[span(first_word + p * apart + k, n)],
                lambda k, v: self.weight[panel, first_step + k, span(v * wide, wide)],
                plan.by_element,
            )

        # Rows of padding add nothing where its words are zero.
        padded = fill_word(self.stored, dot, self.fill) != 0
        first, rows = (0, conv.kernel[0]) if padded else conv.rows.dynamic_taps(line)
        with between(first, first + rows) as kh:
            line_start = T.bind(corner + kh * (conv.dilation[0] * width * deep))
            if conv.dilation[1] == 1:
                run(line_start, kh * (taps * deep), taps * deep)
            else:
                with T.serial(0, taps) as kw:
                    run(line_start + kw * (conv.dilation[1] * deep), (kh * taps + kw) * deep, deep)
        self._store(acc, spill, tile, row * conv.columns.out + column, panel)

    def _store(self, acc: Any, spill: Any, tile: Tile, pixel: Any, panel: Any) -> None:
        columns = self.plan.vectors * self.dot.lanes

        def store(column: Any, width: int) -> None:
            store_tile(acc, spill, tile, self.dot, pixel, column, width, self.finish, self.read, self.out)

        store_panel(self.conv.filters, columns, panel, store)
