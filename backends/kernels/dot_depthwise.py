"""Depthwise 2-D convolution of bytes, NHWC, one filter a channel: out = finish(sum over taps (x - zero) * w).

A dot product of bytes sums four neighbours of a lane, and here the four are taps of one column of the window:

    x rows      r0  a b c d ...      a word a channel       dot products, one for each tap column and vector
    of four     r1  e f g h ...  ->  [a e i m] [b f j n] ..  acc[pixel] += word[column] . w[rows, column]
    taps        r2  i j k l ...
                r3  m n o p ...      a window of 3 rows leaves one over: the same words, with the weights one place
                                     on, serve the output row below

words      of the rows that R output rows read, of a block of B channels, are made once, in scratch: padded with the
           zero point, in the sign that the instruction takes; those of the weights for each block, filled up with zeros
block      B = 4 m channels, m lanes of 32 bits. Unpacks in lanes leave its channels in four vectors of another order
           (in_lane.py), which offsets, scales and biases are stored in; the packs that make bytes of the
           results undo it
tile       R output rows of P neighbouring pixels, one of the four vectors at a time; sums begin at the offsets

    registers  R P accumulators + R KW weights + 1 word: 2 R P <= vector registers leaves room for both

w packed   [KH][KW][C] bytes; its words lie in scratch as [ceil(KH / 4)][KW][R][B], each four rows of one tap column

Fewer channels than a block has: the last block begins earlier and stores the end of what it sums; where there are fewer
than the smallest block has, its lanes are filled up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv_plan import Conv
from .dot_depthwise_plan import ROWS, SMALLEST, Block, DotDepthwisePlan, image_width
from .dot_product import Dot, importing
from .dot_tile import fill_word, flips
from .in_lane import natural_text, pack_text, steps_text, taps_text, wide_text
from .int8_product import Requantize
from .loops import Shape, between, flat, share, span, spread, typed_kernel, view
from .window import balanced

WRITTEN_COLUMNS = 9  # tap columns that are written out


def dot_depthwise(
    name: str, conv: Conv, source: str, plan: DotDepthwisePlan, finish: Requantize, *, zero: int = 0
) -> Any:
    """Return the kernel (x, packed weights[, offset], scale[, bias][, residual], out), in which offset, scale and bias
    are packed for `plan`; padding counts as `zero` of x's dtype.
    """
    assert conv.groups == conv.channels == conv.filters
    size = prod(conv.kernel) * max(conv.channels, SMALLEST)
    operands: list[tuple[Shape, str]] = [(conv.input_shape, source), ((size,), "int8")]
    operands += [((plan.channels,), "int32")] * finish.offset
    operands += [((plan.channels,), "float32")] * (1 + finish.bias)
    if finish.residual is not None:
        operands.append((conv.output_shape, finish.residual.dtype))

    def body(x: Any, weight: Any, *rest: Any) -> None:
        dots = {block.lanes: _narrower(plan.dot, block.lanes) for block in plan.blocks}
        texts = [text for lanes, dot in dots.items() for text in (dot.helpers, *_moves(lanes, plan, finish))]
        with importing(*texts):
            out = view(rest[-1], (prod(conv.output_shape[:3]), conv.filters))
            _Nest(conv, source, plan, dots, finish, flat(x), weight, rest[:-1], out, zero).emit()

    return typed_kernel(name, operands, [(conv.output_shape, finish.result)], body)


def _moves(lanes: int, plan: DotDepthwisePlan, finish: Requantize) -> Iterator[str]:
    yield taps_text(lanes)
    if finish.residual is not None and finish.residual.dtype != "float32":
        yield wide_text(lanes, finish.residual.dtype)
    if finish.result == "float32" or (finish.residual is not None and finish.residual.dtype == "float32"):
        yield natural_text(lanes)
    if finish.result != "float32":
        yield pack_text(lanes, finish.result, plan.instruction)
        yield steps_text(lanes, plan.instruction)


def _narrower(dot: Dot, lanes: int) -> Dot:
    assert dot.at is not None
    return dot if dot.lanes == lanes else dot.at(lanes)


@dataclass(frozen=True)
class _Nest:
    conv: Conv
    source: str
    plan: DotDepthwisePlan
    dots: dict[int, Dot]
    finish: Requantize
    x: Any
    weight: Any
    read: Sequence[Any]
    out: Any
    zero: int
    weight_words: Any = None  # scratch of a task

    @property
    def row_groups(self) -> int:
        """Dot products that a column of taps takes."""
        return -(-self.conv.kernel[0] // ROWS)

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        tasks = conv.batch * plan.tasks
        widest = plan.blocks[0].width
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            most = max(plan.rows * plan.pixels, self.alone)
            acc = T.alloc_buffer((most * widest // 4,), "int32", scope="local")
            words = T.alloc_buffer((self.row_groups * image_width(conv) * widest,), "int32", scope="global")
            taps = T.alloc_buffer((self.row_groups * conv.kernel[1] * plan.rows * widest,), "int32", scope="global")
            nest = replace(self, weight_words=taps)
            image = T.bind(task // plan.tasks)
            rows = share(conv.rows.out, plan.row_blocks, task // plan.channel_blocks % plan.row_blocks)
            part = task % plan.channel_blocks
            packed = 0
            for i, block in enumerate(plan.blocks):
                whole = i == 0 and plan.channel_blocks > 1
                some = share(block.count, plan.channel_blocks, part) if whole else (0, block.count)
                if i and plan.channel_blocks > 1:  # what is left over goes to the last task
                    with T.If(part == plan.channel_blocks - 1), T.Then():
                        nest._block(acc, words, image, block, some, rows, packed)
                else:
                    nest._block(acc, words, image, block, some, rows, packed)
                packed += block.width * block.count

    @property
    def alone(self) -> int:
        """Pixels of a tile of one row, where rows are left over from tiles of several; else 0."""
        plan, rows = self.plan, self.conv.rows.out
        if rows % (plan.row_blocks * plan.rows) == 0:
            return 0
        return min(plan.rows * plan.pixels, self.conv.columns.out)

    def _block(self, acc: Any, words: Any, image: Any, block: Block, some: Any, rows: Any, packed: int) -> None:
        """The blocks of one width; `packed` channels lie in front of the first one's constants."""
        together = self.plan.rows
        first, last = T.bind(rows[0]), T.bind(rows[1])
        whole = T.bind(tirx.floordiv(last - first, together))
        with between(*some) as i:
            start = T.bind(block.start + i * block.width)
            constants = T.bind(packed + i * block.width)
            self._stage_weights(block, start)

            def lines(row: Any, height: int, width: int) -> None:
                self._stage(words, image, block, start, row, height)
                for pixels, column, repeat in _tiles(self.conv.columns.out, width):
                    with T.serial(0, repeat) as j:
                        left = T.bind(column + j * pixels)
                        out = [
                            T.bind(((image * self.conv.rows.out + row + o) * self.conv.columns.out) + left + p)
                            for o in range(height)
                            for p in range(pixels)
                        ]
                        self._tile(acc, words, block, start, constants, left, (height, pixels), out)

            with T.serial(0, whole) as several:
                lines(T.bind(first + several * together), together, self.plan.pixels)
            if self.alone:
                with T.serial(0, last - first - whole * together) as single:
                    lines(T.bind(first + whole * together + single), 1, self.alone)

    def _stage_weights(self, block: Block, start: Any) -> None:
        """Make the words of the weights: those of an output row `o` lie `o` strides below those of the first."""
        conv, lanes, together = self.conv, block.lanes, self.plan.rows
        channels, (height, taps) = max(conv.channels, SMALLEST), conv.kernel
        none = spread(tirx.const(0, "int32"), lanes)
        with T.serial(0, taps) as kw:
            for g in range(self.row_groups):
                for o in range(together):
                    first = g * ROWS - o * conv.stride[0]
                    four = [
                        T.reinterpret(
                            f"int32x{lanes}", self.weight[span((row * taps + kw) * channels + start, block.width)]
                        )
                        if 0 <= row < height
                        else none
                        for row in range(first, first + ROWS)
                    ]
                    at = T.bind(((g * taps + kw) * together + o) * block.width)
                    for k in range(4):
                        made = tirx.call_pure_extern(f"int32x{lanes}", f"gw_taps_{lanes}_{k}", *four)
                        T.buffer_store(self.weight_words, made, [span(at + k * lanes, lanes)])

    def _stage(self, words: Any, image: Any, block: Block, start: Any, row: Any, height: int) -> None:
        """Make the words of the rows that `height` output rows from `row` on read."""
        conv, lanes, width = self.conv, block.lanes, image_width(self.conv)
        top, left = conv.padding[0], conv.padding[2]
        border = tirx.const(fill_word(self.source, self.dots[lanes], self.zero), "int32")
        filled = tirx.Broadcast(border, lanes)
        inside = max(0, min(conv.width, width - left))
        rows = conv.kernel[0] + (height - 1) * conv.stride[0]
        for g in range(-(-rows // ROWS)):
            count = min(ROWS, rows - g * ROWS)
            above = T.bind(row * conv.stride[0] - top + g * (ROWS * conv.dilation[0]))
            lines = [T.bind(above + r * conv.dilation[0]) for r in range(count)]

            def put(column: Any, values: Sequence[Any], g: int = g) -> None:
                four = [values[min(r, len(values) - 1)] for r in range(ROWS)]
                for k in range(4):
                    made = tirx.call_pure_extern(f"int32x{lanes}", f"gw_taps_{lanes}_{k}", *four)
                    T.buffer_store(words, made, [span(((g * width + column) * 4 + k) * lanes, lanes)])

            for begin, many in ((0, min(left, width)), (left + inside, width - left - inside)):
                if many > 0:
                    with T.serial(0, many) as c:
                        put(begin + c, [filled])
            if not inside:
                continue

            def columns(guarded: bool, lines: list[Any] = lines, put: Any = put) -> None:
                # A line outside is read at the border, and not used.
                near = [tirx.max(0, tirx.min(line, conv.height - 1)) if guarded else line for line in lines]
                starts = [T.bind((image * conv.height + line) * (conv.width * conv.channels) + start) for line in near]
                with T.serial(0, inside) as c:
                    values = [T.bind(self._read(block, T.bind(at + c * conv.channels))) for at in starts]
                    if guarded:
                        there = [tirx.all(line >= 0, line < conv.height) for line in lines]
                        values = [
                            T.bind(tirx.Select(is_there, value, filled))
                            for is_there, value in zip(there, values, strict=True)
                        ]
                    put(left + c, values)

            with T.If(tirx.all(lines[0] >= 0, lines[-1] < conv.height)):
                with T.Then():
                    columns(guarded=False)
                with T.Else():
                    columns(guarded=True)

    def _read(self, block: Block, at: Any) -> Any:
        """A pixel's bytes from `at` on as words, in the sign that the instruction takes."""
        lanes = block.lanes
        if block.last == block.width:
            stored = self.x[span(at, block.width)]
        else:
            stored = self._filled(block, self.source, lambda c: self.x[at + c])
        value = T.reinterpret(f"int32x{lanes}", stored)
        if not flips(self.source, self.dots[lanes]):
            return value
        flip = tirx.const(fill_word(self.source, self.dots[lanes]), "int32")
        return tirx.bitwise_xor(value, tirx.Broadcast(flip, lanes))

    def _filled(self, block: Block, dtype: str, read: Callable[[Any], Any]) -> Any:
        """`width` elements of a block that has fewer: zeros behind those that there are."""
        edge = T.alloc_buffer((block.width,), dtype, scope="local")
        for c in range(block.width):
            T.buffer_store(edge, read(c) if c < block.last else tirx.const(0, dtype), [c])
        return edge[span(0, block.width)]

    def _tile(
        self,
        acc: Any,
        words: Any,
        block: Block,
        start: Any,
        constants: Any,
        left: Any,
        size: tuple[int, int],
        out: Sequence[Any],
    ) -> None:
        """The results of some rows x pixels, whose places in the output are `out`."""
        lanes, places = block.lanes, len(out)
        steps: list[list[Any]] = [[] for _ in out]
        for quarter in range(4):
            self._sums(acc, words, block, constants, left, size, quarter)
            reals = self._reals(
                [acc[span(at * lanes, lanes)] for at in range(places)], block, out, start, constants, quarter
            )
            for at, real in enumerate(reals):
                steps[at].append(T.bind(real if self.finish.result == "float32" else self._rounded(real, lanes)))
        for at in range(places):
            self._store(steps[at], block, out[at], start)

    def _sums(
        self, acc: Any, words: Any, block: Block, constants: Any, left: Any, size: tuple[int, int], quarter: int
    ) -> None:
        """The sums of one of the four vectors of each pixel."""
        conv, lanes, together = self.conv, block.lanes, self.plan.rows
        height, pixels = size
        begin: Any = spread(tirx.const(0, "int32"), lanes)
        if self.finish.offset:
            begin = T.bind(self.read[0][span(constants + quarter * lanes, lanes)])
        for at in range(height * pixels):
            T.buffer_store(acc, begin, [span(at * lanes, lanes)])
        taps, stride, apart = conv.kernel[1], conv.stride[1], conv.dilation[1]
        corner = T.bind(left * stride)

        def group(g: Any) -> None:
            line = T.bind(corner + g * image_width(conv))

            def add(at: Any, readers: Sequence[tuple[int, Any]]) -> None:
                word = T.bind(words[span((at * 4 + quarter) * lanes, lanes)])
                for p, kw in readers:
                    for o in range(height):
                        place = ((g * taps + kw) * together + o) * block.width + quarter * lanes
                        here = span((o * pixels + p) * lanes, lanes)
                        weight = self.weight_words[span(place, lanes)]
                        T.buffer_store(acc, self.dots[lanes].multiply(acc[here], [word], weight), [here])

            if taps <= WRITTEN_COLUMNS:
                columns: dict[int, list[tuple[int, Any]]] = {}
                for p in range(pixels):
                    for kw in range(taps):
                        columns.setdefault(p * stride + kw * apart, []).append((p, kw))
                for offset in sorted(columns):
                    add(line + offset, columns[offset])
            else:
                with T.serial(0, taps) as kw:
                    for p in range(pixels):
                        add(line + (p * stride + kw * apart), [(p, kw)])

        if self.row_groups <= 2:
            for g in range(self.row_groups):
                group(g)
        else:
            with T.serial(0, self.row_groups) as g:
                group(g)

    def _reals(
        self, sums: Sequence[Any], block: Block, out: Sequence[Any], start: Any, constants: Any, quarter: int
    ) -> list[Any]:
        """A vector of sums of each place in real units."""
        lanes, finish = block.lanes, self.finish
        channels = span(constants + quarter * lanes, lanes)
        scale = self.read[finish.offset][channels]
        addends: list[Any] = [self.read[finish.offset + 1][channels] if finish.bias else None] * len(sums)
        if finish.residual is not None:
            addends = [
                T.bind(finish.added(bias, self._residual(block, place, start, quarter), lanes))
                for bias, place in zip(addends, out, strict=True)
            ]
        if not finish.heavy:
            return [finish.real(value, scale, added, lanes) for value, added in zip(sums, addends, strict=True)]
        # Dozens of operations: a loop over scratch instead of unrolled code.
        spill = T.alloc_buffer((len(sums) * lanes,), "int32", scope="local")
        reals = T.alloc_buffer((len(sums) * lanes,), "float32", scope="local")
        for at, (value, added) in enumerate(zip(sums, addends, strict=True)):
            T.buffer_store(spill, value, [span(at * lanes, lanes)])
            if added is not None:
                T.buffer_store(reals, added, [span(at * lanes, lanes)])
        with T.serial(0, len(sums)) as i:
            here = span(i * lanes, lanes)
            real = finish.real(spill[here], scale, None if addends[0] is None else reals[here], lanes)
            T.buffer_store(reals, real, [here])
        return [T.bind(reals[span(at * lanes, lanes)]) for at in range(len(sums))]

    def _residual(self, block: Block, out: Any, start: Any, quarter: int) -> Any:
        """The k-th quarter of what is added to a pixel."""
        assert self.finish.residual is not None
        lanes, dtype = block.lanes, self.finish.residual.dtype
        residual = view(self.read[-1], (prod(self.conv.output_shape[:3]), self.conv.filters))
        if block.last < block.width:
            stored = self._filled(block, dtype, lambda c: residual[out, c])
            if dtype == "float32":  # of the smallest block, which is in order
                return tirx.Shuffle([stored], [tirx.const(quarter * lanes + i, "int32") for i in range(lanes)])
        elif dtype == "float32":
            natural = [residual[out, span(start + m * lanes, lanes)] for m in range(4)]
            return tirx.call_pure_extern(f"float32x{lanes}", f"gw_quarter_{lanes}_{quarter}", *natural)
        else:
            stored = residual[out, span(start, block.width)]
        return tirx.call_pure_extern(f"int32x{lanes}", f"gw_wide_{dtype}_{lanes}_{quarter}", stored)

    def _rounded(self, value: Any, lanes: int) -> Any:
        """Real values as integers of the result's range."""
        finish = self.finish
        least, most = finish.bounds() or finish.ends
        y = finish.scaled(value, lanes)
        # What is too low, and NaN, becomes the least integer by the instruction, and the packs clip it.
        if not (self.plan.instruction and least == finish.ends[0] and finish.zero >= 0):
            y = tirx.max(y, spread(tirx.const(least, "float32"), lanes))
        y = tirx.min(spread(tirx.const(most, "float32"), lanes), y)
        steps = tirx.call_pure_extern(f"int32x{lanes}", f"gw_steps_{lanes}", y)
        return steps + spread(tirx.const(finish.zero, "int32"), lanes)

    def _store(self, quarters: Sequence[Any], block: Block, out: Any, start: Any) -> None:
        """Store the results of one pixel, four vectors, in natural order."""
        lanes, result = block.lanes, self.finish.result
        if result == "float32":
            calls = [(f"float32x{lanes}", f"gw_natural_{lanes}_{m}", *quarters) for m in range(4)]
        else:
            calls = [(f"{result}x{4 * lanes}", f"gw_pack_{result}_{lanes}", *quarters)]
        size = block.width // len(calls)
        if (block.first, block.last) == (0, block.width):
            for i, call in enumerate(calls):
                T.buffer_store(self.out, tirx.call_pure_extern(*call), [out, span(start + i * size, size)])
            return
        edge = T.alloc_buffer((block.width,), result, scope="local")
        for i, call in enumerate(calls):
            T.buffer_store(edge, tirx.call_pure_extern(*call), [span(i * size, size)])
        with between(block.first, block.last) as c:
            T.buffer_store(self.out, edge[c], [out, start + c])


def _tiles(total: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of a row: pixels, where the first begins, how many."""
    sizes, start = balanced(total, most), 0
    for pixels in dict.fromkeys(sizes):
        count = sizes.count(pixels)
        yield pixels, start, count
        start += count * pixels
