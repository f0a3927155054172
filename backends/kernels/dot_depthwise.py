"""Depthwise 2-D convolution of bytes, NHWC, one filter a channel: out = finish(sum over taps (x - zero) * w).

A dot product of bytes sums four neighbours of a lane, and here the four are taps of one column of the window:

    x rows      r0  a b c d ...      a word a channel       dot products, one for each tap column and vector
    of four     r1  e f g h ...  ->  [a e i m] [b f j n] ..  acc[pixel] += word[column] . w[rows, column]
    taps        r2  i j k l ...
                r3  m n o p ...      a window of 3 rows reads its last row twice, the second time with the weight 0

patch      the rows that some output rows read, of a block of B channels, are copied to scratch first: padded with the
           zero point, in the sign that the instruction takes, and in the order that in-lane unpacks undo, so that sums
           come out in the order of channels
block      B = 4 m channels, m lanes of 32 bits: four vectors of accumulators a pixel
tile       P neighbouring pixels; words are made once for all the pixels that read a column

    registers  4 P accumulators + 4 words + 4 rows on their way: 4 P + 8 <= vector registers; weights come from L1

w packed   [block][ceil(KH / 4)][KW][B] words, each four rows of one tap column

Fewer channels than a block has: the last block begins earlier and stores the end of what it sums; where there are fewer
than the smallest block has, the patch is filled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import core_l2_bytes
from .conv_plan import Conv
from .dot_product import Dot, bytes_dot, importing
from .dot_tile import Finish, fill_word, flips
from .loops import Shape, between, flat, share, span, typed_kernel, view
from .window import balanced

ROWS = 4  # taps of a dot product
SMALLEST = 16  # channels of a block: four lanes
WRITTEN_COLUMNS = 9  # tap columns that are written out


@dataclass(frozen=True)
class Block:
    """`count` blocks of `width` channels from `start` on, of each of which the channels from `first` are stored."""

    start: int
    width: int
    count: int = 1
    first: int = 0
    last: int = 0  # one past those that exist; `width` but where all channels are fewer

    @property
    def lanes(self) -> int:
        """Lanes of one of its vectors."""
        return self.width // 4


@dataclass(frozen=True)
class DotDepthwisePlan:
    """How the nest is cut."""

    dot: Dot  # at full width
    blocks: tuple[Block, ...]
    pixels: int
    patch_rows: int  # output rows of one patch
    row_blocks: int
    channel_blocks: int

    @property
    def tasks(self) -> int:
        """Pieces of one image that may run at once."""
        return self.row_blocks * self.channel_blocks


def blocks_of(channels: int, widest: int) -> tuple[Block, ...]:
    """Channels in blocks of the widest kind, then halves; what is left goes to a block that begins earlier."""
    found, start, width = [], 0, widest
    while width >= SMALLEST:
        if count := (channels - start) // width:
            found.append(Block(start, width, count, 0, width))
            start += count * width
        width //= 2
    if start < channels and channels >= SMALLEST:
        found.append(Block(channels - SMALLEST, SMALLEST, 1, SMALLEST - (channels - start), SMALLEST))
    elif start < channels:
        found.append(Block(0, SMALLEST, 1, 0, channels))
    return tuple(found)


def choose_dot_depthwise(conv: Conv, hw: Hardware, *, emulated: bool = False) -> DotDepthwisePlan:
    """Blocks of channels, a tile that fits the registers, patches that fit the cache, and a split over the cores."""
    dot = bytes_dot(hw, emulated=emulated)
    blocks = blocks_of(conv.channels, 4 * dot.lanes)
    pixels = max(1, min(conv.columns.out, (hw.vector_registers - 8 - dot.spare) // 4, 6))
    rows = conv.rows.out
    parts = 1
    if conv.flops / 2 / dot.lanes > 2 * hw.launch_us * hw.cycles_per_us:
        parts = hw.cores
    # Blocks of channels read nothing twice; rows where the blocks are too few to share out evenly.
    many = blocks[0].count
    shares = {
        (min(parts, rows), 1): -(-rows // min(parts, rows)) / rows,
        (1, min(parts, many)): -(-many // min(parts, many)) / many,
    }
    row_blocks, channel_blocks = min(shares, key=lambda k: (round(shares[k], 2), k[0]))
    most = -(-rows // row_blocks)
    line = blocks[0].width * _reach(conv)[1]
    l1 = hw.cache(1)
    room = (l1.size_bytes if l1 else 32 * 1024) // 2
    if line * _rows_of(conv, min(4, most)) > room:
        room = core_l2_bytes(hw) // 8
    patch = 1
    while patch < most and line * _rows_of(conv, patch + 1) <= room:
        patch += 1
    return DotDepthwisePlan(dot, blocks, pixels, -(-most // -(-most // patch)), row_blocks, channel_blocks)


def _rows_of(conv: Conv, outputs: int) -> int:
    """Input rows under the windows of `outputs` neighbouring output rows."""
    axis = conv.rows
    return (outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1


def _reach(conv: Conv) -> tuple[int, int]:
    """Rows and columns of the image that windows reach over, padding included."""
    axis = conv.columns
    return _rows_of(conv, conv.rows.out), (axis.out - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1


def pack_depthwise(weight: torch.Tensor, plan: DotDepthwisePlan) -> torch.Tensor:
    """Rearrange weight[C, 1, KH, KW] (int8) as the kernel reads it."""
    channels, _, kh, kw = weight.shape
    groups = -(-kh // ROWS)
    filled = weight.new_zeros((max(channels, SMALLEST), groups * ROWS, kw))
    filled[:channels, :kh] = weight[:, 0]
    words = filled.view(-1, groups, ROWS, kw).permute(1, 3, 0, 2).reshape(-1).view(torch.int32).view(groups, kw, -1)
    parts = []
    for block in plan.blocks:
        for i in range(block.count):
            start = block.start + i * block.width
            parts.append(words[:, :, start : start + block.width].reshape(-1))
    return torch.cat(parts)


def dot_depthwise(name: str, conv: Conv, source: str, plan: DotDepthwisePlan, finish: Finish, *, zero: int = 0) -> Any:
    """Return the kernel (x, packed weights, the finish's operands..., out); padding counts as `zero` of x's dtype."""
    assert conv.groups == conv.channels == conv.filters
    groups, taps = -(-conv.kernel[0] // ROWS), conv.kernel[1]
    size = groups * taps * sum(block.count * block.width for block in plan.blocks)
    operands: list[tuple[Shape, str]] = [(conv.input_shape, source), ((size,), "int32"), *finish.operands]

    def body(x: Any, weight: Any, *rest: Any) -> None:
        dots = {block.lanes: _narrower(plan.dot, block.lanes) for block in plan.blocks}
        texts = [text for lanes, dot in dots.items() for text in (dot.helpers, _moves(lanes))]
        with importing(*texts):
            out = view(rest[-1], (prod(conv.output_shape[:3]), conv.filters))
            _Nest(conv, source, plan, dots, finish, flat(x), weight, rest[:-1], out, zero).emit()

    return typed_kernel(name, operands, [(conv.output_shape, finish.result)], body)


def _narrower(dot: Dot, lanes: int) -> Dot:
    assert dot.at is not None
    return dot if dot.lanes == lanes else dot.at(lanes)


@dataclass(frozen=True)
class _Nest:
    conv: Conv
    source: str
    plan: DotDepthwisePlan
    dots: dict[int, Dot]
    finish: Finish
    x: Any
    weight: Any
    read: Sequence[Any]
    out: Any
    zero: int

    @property
    def row_groups(self) -> int:
        """Dot products that a column of taps takes."""
        return -(-self.conv.kernel[0] // ROWS)

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        tasks = conv.batch * plan.tasks
        widest = plan.blocks[0].width
        size = _rows_of(conv, plan.patch_rows) * _reach(conv)[1] * widest
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            acc = T.alloc_buffer((plan.pixels * widest,), "int32", scope="local")
            spill = T.alloc_buffer((widest,), "int32", scope="local")
            patch = T.alloc_buffer((size // 4,), "int32", scope="global")
            image = T.bind(task // plan.tasks)
            rows = share(conv.rows.out, plan.row_blocks, task // plan.channel_blocks % plan.row_blocks)
            part = task % plan.channel_blocks
            packed = 0
            for i, block in enumerate(plan.blocks):
                whole = i == 0 and plan.channel_blocks > 1
                some = share(block.count, plan.channel_blocks, part) if whole else (0, block.count)
                if i and plan.channel_blocks > 1:  # what is left over goes to the last task
                    with T.If(part == plan.channel_blocks - 1), T.Then():
                        self._block(acc, spill, patch, image, block, some, rows, packed)
                else:
                    self._block(acc, spill, patch, image, block, some, rows, packed)
                packed += self.row_groups * conv.kernel[1] * block.width * block.count

    def _block(
        self, acc: Any, spill: Any, patch: Any, image: Any, block: Block, some: Any, rows: Any, packed: int
    ) -> None:
        """The blocks of one width."""
        conv, step = self.conv, self.plan.patch_rows
        first, last = T.bind(rows[0]), T.bind(rows[1])
        each = self.row_groups * conv.kernel[1] * block.width
        with between(*some) as i, T.serial(0, tirx.floordiv(last - first + step - 1, step)) as part:
            start = T.bind(block.start + i * block.width)
            weights = T.bind(packed + i * each)
            begin = T.bind(first + part * step)
            count = T.bind(tirx.min(step, last - begin))
            self._fill(patch, image, block, start, begin, count)
            with T.serial(0, count) as row:
                for pixels, column, repeat in _tiles(conv.columns.out, self.plan.pixels):
                    with T.serial(0, repeat) as j:
                        self._tile(acc, patch, block, weights, row, column + j * pixels, pixels)
                        out = T.bind(((image * conv.rows.out + begin + row) * conv.columns.out) + column + j * pixels)
                        self._store(acc, spill, block, out, start, pixels)

    def _fill(self, patch: Any, image: Any, block: Block, start: Any, begin: Any, count: Any) -> None:
        """Copy what `count` output rows from `begin` on read to scratch."""
        conv, lanes = self.conv, block.lanes
        width = _reach(conv)[1]
        top, left = conv.padding[0], conv.padding[2]
        border = tirx.const(fill_word(self.source, self.dots[lanes], self.zero), "int32")
        filled = tirx.Broadcast(border, lanes)
        inside = max(0, min(conv.width, width - left))
        rows = T.bind((count - 1) * conv.rows.stride + ((conv.rows.kernel - 1) * conv.rows.dilation + 1))

        def blank(at: Any, columns: int) -> None:
            if columns > 0:
                with T.serial(0, columns) as c:
                    T.buffer_store(patch, filled, [span((at + c) * lanes, lanes)])

        with T.serial(0, rows) as r:
            line = T.bind(begin * conv.rows.stride - top + r)
            at = T.bind(r * width)
            with T.If(T.And(line >= 0, line < conv.height)):
                with T.Then():
                    blank(at, min(left, width))
                    source = T.bind((image * conv.height + line) * conv.width * conv.channels + start)
                    with T.serial(0, inside) as c:
                        self._copy(patch, block, T.bind(source + c * conv.channels), at + left + c)
                    blank(at + (left + inside), width - left - inside)
                with T.Else():
                    blank(at, width)

    def _copy(self, patch: Any, block: Block, at: Any, place: Any) -> None:
        """A pixel's bytes from `at` to scratch, in the order of the patch."""
        lanes = block.lanes
        flip = tirx.const(fill_word(self.source, self.dots[lanes]), "int32")
        flipped = flips(self.source, self.dots[lanes])
        if block.last == block.width:
            words = T.reinterpret(f"int32x{lanes}", self.x[span(at, block.width)])
            words = tirx.bitwise_xor(words, tirx.Broadcast(flip, lanes)) if flipped else words
            words = tirx.call_pure_extern(f"int32x{lanes}", f"gw_apart_{lanes}", words)
            T.buffer_store(patch, words, [span(place * lanes, lanes)])
            return
        for to, word in enumerate(_apart(lanes)):  # fewer channels than a block has
            value: Any = tirx.const(0, "uint32")
            for j, c in enumerate(range(4 * word, min(4 * word + 4, block.last))):
                byte = self.x[at + c]
                byte = T.reinterpret("uint8", byte) if self.source == "int8" else byte
                value = tirx.bitwise_or(value, tirx.Cast("uint32", byte) << tirx.const(8 * j, "uint32"))
            value = T.reinterpret("int32", value) if 4 * word < block.last else tirx.const(0, "int32")
            T.buffer_store(patch, tirx.bitwise_xor(value, flip) if flipped else value, [place * lanes + to])

    def _tile(self, acc: Any, patch: Any, block: Block, weights: Any, row: Any, column: Any, pixels: int) -> None:
        """The sums of `pixels` pixels."""
        conv, lanes = self.conv, block.lanes
        for i in range(4 * pixels):
            T.buffer_store(acc, tirx.Broadcast(tirx.const(0, "int32"), lanes), [span(i * lanes, lanes)])
        width, taps, stride, apart = _reach(conv)[1], conv.kernel[1], conv.stride[1], conv.dilation[1]
        corner = T.bind((row * conv.stride[0]) * width + column * stride)

        def group(g: Any, rows: int) -> None:
            line = T.bind(corner + g * (ROWS * conv.dilation[0] * width))
            below = [min(r, rows - 1) * conv.dilation[0] * width for r in range(ROWS)]

            def add(at: Any, readers: Sequence[tuple[int, Any]]) -> None:
                values = [T.bind(patch[span((at + b) * lanes, lanes)]) for b in dict.fromkeys(below)]
                chosen = [values[min(r, len(values) - 1)] for r in range(ROWS)]
                for k in range(4):
                    words = tirx.call_pure_extern(f"int32x{lanes}", f"gw_taps_{lanes}_{k}", *chosen)
                    words = T.bind(words)
                    for p, kw in readers:
                        w = self.weight[span(weights + (g * taps + kw) * block.width + k * lanes, lanes)]
                        here = [span((p * 4 + k) * lanes, lanes)]
                        T.buffer_store(acc, self.dots[lanes].multiply(acc[here[0]], [words], w), here)

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

        whole, rest = divmod(conv.kernel[0], ROWS)
        if whole == 1:
            group(0, ROWS)
        elif whole:
            with T.serial(0, whole) as g:
                group(g, ROWS)
        if rest:
            group(whole, rest)

    def _store(self, acc: Any, spill: Any, block: Block, out: Any, start: Any, pixels: int) -> None:
        """Finish and store the sums of a tile."""
        lanes, finish = block.lanes, self.finish
        whole = (block.first, block.last) == (0, block.width)
        for p in range(pixels):
            if whole and not finish.heavy:
                for k in range(4):
                    value = acc[span((p * 4 + k) * lanes, lanes)]
                    finish.store(value, out + p, start + k * lanes, lanes, self.read, self.out)
                continue
            for k in range(4):
                T.buffer_store(spill, acc[span((p * 4 + k) * lanes, lanes)], [span(k * lanes, lanes)])
            if whole:
                with T.serial(0, 4) as v:
                    value = T.bind(spill[span(v * lanes, lanes)])
                    finish.store(value, out + p, start + v * lanes, lanes, self.read, self.out)
            else:
                with between(block.first, block.last) as c:
                    finish.store(T.bind(spill[c]), out + p, start + c, 1, self.read, self.out)


def _tiles(total: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of a row: pixels, where the first begins, how many."""
    sizes, start = balanced(total, most), 0
    for pixels in dict.fromkeys(sizes):
        count = sizes.count(pixels)
        yield pixels, start, count
        start += count * pixels


def _moves(lanes: int) -> str:
    """gw_apart: the order of a patch, words of a 16-byte lane from as many quarters of the block; gw_taps_k: of four
    rows, the words of the k-th quarter."""
    quarter = lanes // 4
    i, b, h = f"<{lanes} x i32>", f"<{4 * lanes} x i8>", f"<{2 * lanes} x i16>"
    head = "define linkonce_odr"
    plain = "alwaysinline nounwind memory(none)"
    text = f"""
{head} {i} @gw_apart_{lanes}({i} %x) {plain} {{
  %r = shufflevector {i} %x, {i} poison, {_mask(_apart(lanes))}
  ret {i} %r
}}
"""
    for k in range(4):
        high_bytes, high_words = divmod(k, 2)
        bytes_ = [
            source + 16 * lane + 8 * high_bytes + n
            for lane in range(quarter)
            for n in range(8)
            for source in (0, 4 * lanes)
        ]
        words = [
            source + 8 * lane + 4 * high_words + n
            for lane in range(quarter)
            for n in range(4)
            for source in (0, 2 * lanes)
        ]
        text += f"""
{head} {i} @gw_taps_{lanes}_{k}({i} %r0, {i} %r1, {i} %r2, {i} %r3) {plain} {{
  %a = bitcast {i} %r0 to {b}
  %b = bitcast {i} %r1 to {b}
  %c = bitcast {i} %r2 to {b}
  %d = bitcast {i} %r3 to {b}
  %s = shufflevector {b} %a, {b} %b, {_mask(bytes_)}
  %t = shufflevector {b} %c, {b} %d, {_mask(bytes_)}
  %u = bitcast {b} %s to {h}
  %v = bitcast {b} %t to {h}
  %w = shufflevector {h} %u, {h} %v, {_mask(words)}
  %r = bitcast {h} %w to {i}
  ret {i} %r
}}
"""
    return text


def _apart(lanes: int) -> list[int]:
    """Which word of a pixel stands at each place of a patch."""
    return [lanes // 4 * k + lane for lane in range(lanes // 4) for k in range(4)]


def _mask(order: Sequence[int]) -> str:
    return f"<{len(order)} x i32> <{', '.join(f'i32 {n}' for n in order)}>"
