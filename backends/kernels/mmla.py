"""int8 products by smmla and usmmla: 2 x 8 by 8 x 2 bytes an instruction, twice those of a dot product; sums in int32.

    acc        [ p0 c0 | p0 c1 | p1 c0 | p1 c1 ]     two pixels (rows of a matrix) by two columns
    staged x   16 bytes a step: 8 channels of p0, the same 8 of p1
    w packed   [panel][step][NR / 2][2][8]           16 bytes: 8 channels of c0, the same of c1; zeros past the last
    tile       P pairs of pixels x NR = 2 V columns: P * V accumulators, P steps of x, V of w

               c0 c1    c2 c3
              +------+ +------+
    p0, p1    | acc0 | | acc1 |    a step: V vectors of w, P of x, P * V instructions
    p2, p3    | acc2 | | acc3 |    registers: P * V + P + V + 1 <= vector registers
              +------+ +------+

A matrix product is a convolution of one row of pixels by one tap.

staged     the input is copied first, by pairs: one tap of a window reads pixels p and p + stride, so windows of several
           columns need every neighbouring pair (two bytes for each of the input), windows of one only those that
           outputs pair up. Padding is filled in, with the zero point.
units      (panel, line of outputs, tile of the line), in equal runs for the cores: a panel stays while lines pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import choose_tiling
from .conv_plan import Conv
from .dot_matmul import STAGING_SHARE, pack_words
from .dot_product import Dot, importing, matrix_text
from .dot_tile import Finish, finish_rows, store_panel
from .loops import Shape, between, share, span, typed_kernel, view

DEPTH = 8  # bytes of a step
LANES = 4  # sums of an instruction
FEWEST_ROWS = 4  # of the left operand: fewer are not worth pairs


@dataclass(frozen=True)
class MmlaPlan:
    """How the nest is cut."""

    pairs: int
    vectors: int
    panels: int
    tasks: int
    cycles: float
    efficiency: float

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return 2 * self.vectors


def mmla_dot(hw: Hardware, source: str) -> Dot | None:
    """The instruction for a left operand of `source` ("int8" or "uint8"), int8 weights; None where there is none."""
    if hw.isa != "aarch64" or not hw.matrix_instructions("int8"):
        return None
    what = "smmla" if source == "int8" else "usmmla"
    name = f"gw_{what}"

    def multiply(acc: Any, left: Sequence[Any], weight: Any) -> Any:
        return tirx.call_pure_extern(f"int32x{LANES}", name, acc, left[0], weight)

    return Dot(what, LANES, DEPTH, "int32", source, "int32", 1, 0, matrix_text(name, what), multiply)


@lru_cache(maxsize=256)
def choose_mmla(conv: Conv, hw: Hardware) -> MmlaPlan:
    """The tile with the least predicted cycles, and the number of tasks."""
    pairs = conv.batch * conv.rows.out * -(-conv.columns.out // 2)
    steps = conv.kernel[0] * conv.kernel[1] * -(-conv.channels // DEPTH)
    # As a float32 product of pairs by steps: a vector of four sums for two columns.
    loading = replace(hw, vector_registers=hw.vector_registers - 1)
    fitting = [choose_tiling(loading, pairs, 2 * conv.filters, steps, fixed_columns=LANES * v) for v in (2, 4, 6)]
    best = min(fitting, key=lambda tiling: tiling.cycles)
    line = -(-conv.columns.out // 2)
    size = -(-line // -(-line // best.rows))  # of equal tiles of a line
    vectors = best.columns // LANES
    panels = -(-conv.filters // (2 * vectors))
    tasks = min(best.tasks, panels * conv.batch * conv.rows.out * -(-line // size))
    return MmlaPlan(size, vectors, panels, tasks, best.cycles, best.efficiency)


def pack_mmla(weight: torch.Tensor, plan: MmlaPlan) -> torch.Tensor:
    """Rearrange weight[N, K] or [N, C, KH, KW] (int8) as the kernel reads it, as int32."""
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    filters, channels, kh, kw = weight.shape
    filled = weight.new_zeros((filters, kh, kw, -(-channels // DEPTH) * DEPTH))
    filled[..., :channels] = weight.permute(0, 2, 3, 1)
    return pack_words(filled.view(filters, -1), DEPTH, plan.columns).view(torch.int32)


def mmla_conv(
    conv: Conv,
    source: str,
    dot: Dot,
    plan: MmlaPlan,
    finish: Finish,
    input_shape: Shape | None = None,
    output_shape: Shape | None = None,
    fill: int = 0,
) -> Any:
    """Return the kernel (x, packed weights, the finish's operands..., out); padding counts as `fill`.

    input_shape and output_shape are the buffers' own shapes.
    """
    assert conv.groups == 1
    steps = conv.kernel[0] * conv.kernel[1] * -(-conv.channels // DEPTH)
    packed = (plan.panels, steps, plan.vectors * LANES)
    operands = [(input_shape or conv.input_shape, source), (packed, "int32"), *finish.operands]

    def body(x: Any, weight: Any, *rest: Any) -> None:
        rows = (prod(conv.output_shape[:3]), conv.filters)
        with importing(dot.helpers):
            nest = _Nest(conv, source, dot, plan, finish, view(x, conv.input_shape), weight, rest[:-1],
                         view(rest[-1], rows), fill)  # fmt: skip
            nest.emit()

    name = "int8_matmul" if conv.pointwise else "int8_conv"
    return typed_kernel(name, operands, [(output_shape or conv.output_shape, finish.result)], body)


@dataclass(frozen=True)
class _Nest:
    conv: Conv
    source: str
    dot: Dot
    plan: MmlaPlan
    finish: Finish
    x: Any
    weight: Any
    read: Sequence[Any]
    out: Any
    fill: int

    @property
    def deep(self) -> int:
        """Steps of one tap."""
        return -(-self.conv.channels // DEPTH)

    @property
    def dense(self) -> bool:
        """Whether every neighbouring pair of pixels is staged."""
        return self.conv.kernel[1] > 1

    @property
    def staged_shape(self) -> tuple[int, int, int]:
        """Images, rows that the windows reach, and pairs in a row."""
        rows, columns = self.conv.rows, self.conv.columns
        height = (rows.out - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1
        pairs = -(-columns.out // 2)
        reach = (pairs - 1) * 2 * columns.stride + (columns.kernel - 1) * columns.dilation + 1
        return self.conv.batch, height, reach if self.dense else pairs

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        staged = self._stage()
        line = -(-conv.columns.out // 2)
        tiles = -(-line // plan.pairs)
        small, larger = divmod(line, tiles)
        lines = conv.batch * conv.rows.out
        tasks = plan.tasks
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            size = plan.pairs * plan.vectors * LANES
            acc = T.alloc_buffer((size,), "int32", scope="local")
            spill = T.alloc_buffer((size,), "int32", scope="local")
            with between(*share(plan.panels * lines * tiles, tasks, task)) as unit:
                t = T.bind(tirx.floormod(unit, tiles))
                row = T.bind(tirx.floormod(tirx.floordiv(unit, tiles), lines))
                panel = T.bind(tirx.floordiv(unit, tiles * lines))
                if larger:
                    with T.If(t < larger):
                        with T.Then():
                            self._tile(acc, spill, staged, small + 1, panel, row, t * (small + 1))
                        with T.Else():
                            self._tile(acc, spill, staged, small, panel, row, t * small + larger)
                else:
                    self._tile(acc, spill, staged, small, panel, row, t * small)

    def _stage(self) -> Any:
        """[image, row, pair, step][2 pixels][8 bytes], as int32."""
        conv, deep = self.conv, self.deep
        images, height, width = self.staged_shape
        staged = T.alloc_buffer((images * height * width * deep * LANES,), "int32", scope="global")
        entries = images * height * width
        tasks = max(1, min(self.plan.tasks, entries * deep * 16 // STAGING_SHARE))
        top, left = conv.padding[0], conv.padding[2]
        apart = 1 if self.dense else 2 * conv.stride[1]
        word = sum((self.fill & 0xFF) << 8 * i for i in range(4))
        border = tirx.Broadcast(tirx.const(word - (1 << 32) if word >> 31 else word, "int32"), 2)
        loop = T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1)
        with loop as task, between(*share(entries, tasks, task)) as entry:
            image = T.bind(tirx.floordiv(entry, height * width))
            row = T.bind(tirx.floormod(tirx.floordiv(entry, width), height) - top)
            first = T.bind(tirx.floormod(entry, width) * apart - left)
            for half in range(2):
                column = T.bind(first + half * conv.stride[1])
                inside = [row >= 0, row < conv.height, column >= 0, column < conv.width]
                at = T.bind(entry * (deep * LANES) + 2 * half)
                with T.If(tirx.all(*inside)):
                    with T.Then():
                        self._pixel(staged, at, lambda c, n, column=column: self.x[image, row, column, span(c, n)])  # type: ignore[misc]
                    with T.Else(), T.serial(0, deep) as k:
                        T.buffer_store(staged, border, [span(at + k * LANES, 2)])
        return staged

    def _pixel(self, staged: Any, at: Any, load: Callable[[Any, int], Any]) -> None:
        """Copy the channels of one pixel, 8 a step. Weights beyond the last channel are zero."""
        whole, rest = divmod(self.conv.channels, DEPTH)
        if whole:
            with T.serial(0, whole) as k:
                T.buffer_store(staged, T.reinterpret("int32x2", load(k * DEPTH, DEPTH)), [span(at + k * LANES, 2)])
        for first in range(0, rest, 4):
            word: Any = tirx.const(0, "uint32")
            for i in range(first, min(rest, first + 4)):
                byte = load(whole * DEPTH + i, 1)
                byte = T.reinterpret("uint8", byte) if self.source == "int8" else byte
                word = tirx.bitwise_or(word, tirx.Cast("uint32", byte) << tirx.const(8 * (i - first), "uint32"))
            T.buffer_store(staged, T.reinterpret("int32", word), [at + whole * LANES + first // 4])

    def _tile(self, acc: Any, spill: Any, staged: Any, pairs: int, panel: Any, line: Any, first: Any) -> None:
        """Pairs [first, first + pairs) of an output line (of all images')."""
        conv, plan, deep = self.conv, self.plan, self.deep
        _, height, width = self.staged_shape
        zero = tirx.Broadcast(tirx.const(0, "int32"), LANES)
        for i in range(pairs * plan.vectors):
            T.buffer_store(acc, zero, [span(i * LANES, LANES)])
        apart = (2 * conv.stride[1] if self.dense else 1) * deep
        image, row = line // conv.rows.out, line % conv.rows.out
        corner = T.bind(((image * height + row * conv.stride[0]) * width) * deep + first * apart)
        taps = conv.kernel[1]

        def run(start: Any, step: Any, steps: int) -> None:
            self._multiply(acc, staged, pairs, panel, T.bind(start), T.bind(step), apart, steps)

        with T.serial(0, conv.kernel[0]) as kh:
            begin = T.bind(corner + kh * (conv.dilation[0] * width * deep))
            if conv.dilation[1] == 1:
                run(begin, kh * (taps * deep), taps * deep)
            else:
                with T.serial(0, taps) as kw:
                    run(begin + kw * (conv.dilation[1] * deep), (kh * taps + kw) * deep, deep)
        self._store(acc, spill, pairs, panel, line, first)

    def _multiply(
        self, acc: Any, staged: Any, pairs: int, panel: Any, start: Any, step: Any, apart: int, steps: int
    ) -> None:
        def one(k: Any) -> None:
            right = [T.bind(self.weight[panel, step + k, span(v * LANES, LANES)]) for v in range(self.plan.vectors)]
            for p in range(pairs):
                left = T.bind(staged[span((start + p * apart + k) * LANES, LANES)])
                for v in range(self.plan.vectors):
                    at = span((p * self.plan.vectors + v) * LANES, LANES)
                    T.buffer_store(acc, self.dot.multiply(acc[at], [left], right[v]), [at])

        if steps > 1:
            with T.serial(0, steps // 2) as k:
                one(2 * k)
                one(2 * k + 1)
        if steps % 2:
            one(steps - 1)

    def _store(self, acc: Any, spill: Any, pairs: int, panel: Any, line: Any, first: Any) -> None:
        """Sort the sums into rows, and finish those that exist."""
        conv, plan = self.conv, self.plan
        columns = plan.columns
        for p in range(pairs):
            for v in range(0, plan.vectors, 2):
                at = (p * plan.vectors + v) * LANES
                two = [acc[span(at, LANES)], acc[span(at + LANES, LANES)]]
                for half in range(2):
                    lanes = [tirx.const(n, "int32") for n in (2 * half, 2 * half + 1, 4 + 2 * half, 5 + 2 * half)]
                    value = tirx.Shuffle(two, lanes)
                    T.buffer_store(spill, value, [span((2 * p + half) * columns + v * 2, LANES)])
        rows = tirx.min(2 * pairs, conv.columns.out - 2 * first) if conv.columns.out % 2 else 2 * pairs
        row = T.bind(line * conv.columns.out + 2 * first)

        def finished(column: Any, width: int) -> None:
            finish_rows(spill, rows, columns, LANES, row, column, width, self.finish, self.read, self.out)

        store_panel(conv.filters, columns, panel, finished)
