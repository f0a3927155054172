"""Attention whose two products are of bytes, block by block as attention.py; passes/dialect_attention.py bit for bit.

head       k rounded row by row, packed transposed in words of four channels [ceil(S_k/NR)][ceil(D/4)][NR], with
           -128 times the sum of a key's bytes and its unit; v rounded column by column, words of four keys
           [ceil(D_v/NV)][ceil(S_k/4)][NV], and its units; once per task and key head
block      rows of q rounded, plus 128, in words; sums of a tile begin with the keys' offsets; scores in float32
softmax    y = 255 * 2^f * 2^n + M: the low byte of y is the weight, and y - M adds up exactly, NaN with it
values     words of four weights times words of v

[p p p p | p p p p | ...]  x  [v0 v1 v2 v3] per lane         vpdpbusd: unsigned left, signed right bytes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...passes.dialect_attention import LEAST_SCORE, LOG2_E, POWERS
from .attention_block import Block
from .attention_operands import Heads, Rows
from .dot_product import Dot, bytes_dot
from .dot_tile import FLIP, Tile, step
from .int8_rows import MAGNITUDE, largest_bits, stepping, unit_of
from .loops import between, constant, span, spread
from .packing import pack_panel_transposed

GROUP = 4  # bytes of a word
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest whole number (vector_math.py)
_ONES = 127  # the exponent's bias: with it in the low bits, a shift by 23 makes 2^n


def attention_dot(hw: Hardware) -> Dot:
    """Four products of unsigned and signed bytes a lane, by instruction where the machine has one."""
    dot = bytes_dot(hw)
    return dot if dot.left == "uint8" else bytes_dot(hw, emulated=True)


class Int8Block(Block):
    """A block of rows whose products are of bytes; its plan is never in place."""

    @staticmethod
    def helpers(hw: Hardware) -> tuple[str, ...]:
        return (attention_dot(hw).helpers,)

    def _operands(self, size: int) -> None:
        p, s, t = self.p, self.plan.scores, self.plan.values
        self.dot = attention_dot(self.hw)
        self.words, self.key_words = -(-p.depth // GROUP), -(-p.keys // GROUP)
        self.acc = T.alloc_buffer((size,), "int32", scope="local")
        self.k = T.alloc_buffer((s.panels, self.words, s.columns), "int32", scope="global")
        self.offset = T.alloc_buffer((s.panels * s.columns,), "int32", scope="global")
        self.k_unit = T.alloc_buffer((s.panels * s.columns,), "float32", scope="global")
        self.v = T.alloc_buffer((t.panels, self.key_words, t.columns), "int32", scope="global")
        self.v_unit = T.alloc_buffer((t.panels * t.columns,), "float32", scope="global")
        self.v_inverse = T.alloc_buffer((t.panels * t.columns,), "float32", scope="global")
        self.staged = T.alloc_buffer((s.columns * self.words,), "int32", scope="global")
        self.q = T.alloc_buffer((self.rows * self.words,), "int32", scope="global")
        self.q_unit = T.alloc_buffer((self.rows,), "float32", scope="global")
        self.weights = T.alloc_buffer((self.rows * (self.stride // GROUP),), "int32", scope="global")

    def pack(self, k: Heads, v: Heads, b: Any, h: Any) -> None:
        """Round one head's keys and values, and lay them out in panels."""
        p, s, t = self.p, self.plan.scores, self.plan.values
        with T.serial(0, s.panels) as panel:
            with T.serial(0, s.columns) as j:
                key = panel * s.columns + j
                with T.If(key < p.keys):
                    with T.Then():
                        unit = self._round_row(lambda d, n: k.at(b, h, key, span(d, n)), self.staged, j, False)
                        T.buffer_store(self.k_unit, unit, [key])
                    with T.Else():
                        T.buffer_store(self.k_unit, constant(0.0), [key])
                        with T.serial(0, self.words) as word:
                            T.buffer_store(self.staged, tirx.const(0, "int32"), [j * self.words + word])
            pack_panel_transposed(
                lambda value, d, j: T.buffer_store(self.k, value, [panel, d, j]),
                lambda n, d: self.staged[_moved(d, n * self.words)],
                *(self.words, 0, s.columns, s.columns, self.lanes),
            )
            self._offsets(panel)
        with T.serial(0, t.panels) as panel:
            _each_part(panel, t.columns, p.value_depth, self.lanes, lambda c, n: self._pack_values(v, b, h, c, n))

    def _round_row(self, load: Callable[[Any, int], Any], words: Any, row: Any, flipped: bool) -> Any:
        """Store a row of `words` as bytes, plus 128 where `flipped`; returns its unit."""
        depth = self.p.depth
        inverse, unit = unit_of(largest_bits(load, depth, self.dot))
        steps = stepping(load, inverse)
        flips = tirx.const(-0x7F7F7F80 if flipped else 0, "int32")  # 0x80808080
        position, width = 0, GROUP * self.lanes
        while width >= 2 * GROUP:
            count = (depth - position) // width
            n = width // GROUP
            if count:
                with T.serial(0, count) as i:
                    first = position + i * width
                    value = T.reinterpret(f"int32x{n}", steps(first, width))
                    at = span(row * self.words + position // GROUP + i * n, n)
                    T.buffer_store(words, tirx.bitwise_xor(value, spread(flips, n)), [at])
            position += count * width
            width //= 2
        for word in range(position // GROUP, self.words):
            value = flips
            for i in range(min(GROUP, depth - word * GROUP)):
                byte = tirx.bitwise_and(tirx.Cast("int32", steps(word * GROUP + i, 1)), tirx.const(255, "int32"))
                value = tirx.bitwise_xor(value, byte << tirx.const(8 * i, "int32"))
            T.buffer_store(words, value, [row * self.words + word])
        return unit

    def _offsets(self, panel: Any) -> None:
        """-128 times the sum of each key's bytes, which the rows' 128 add to its sums."""
        s, lanes = self.plan.scores, self.lanes
        ones = tirx.const(0x01010101, "int32")
        with T.serial(0, s.columns // lanes) as j:
            at = span(0, lanes)
            T.buffer_store(self.acc, spread(tirx.const(0, "int32"), lanes), [at])
            with T.serial(0, self.words) as word:
                key = self.k[panel, word, span(j * lanes, lanes)]
                T.buffer_store(self.acc, self.dot.multiply(self.acc[at], [ones], key), [at])
            value = self.acc[at] * spread(tirx.const(-FLIP, "int32"), lanes)
            T.buffer_store(self.offset, value, [span(panel * s.columns + j * lanes, lanes)])

    def _pack_values(self, v: Heads, b: Any, h: Any, channel: Any, n: int) -> None:
        """Channels `channel` to `channel + n` of all values; channels past the last are left as they are."""
        p, t = self.p, self.plan.values
        panel, column = tirx.floordiv(channel, t.columns), tirx.floormod(channel, t.columns)
        place, integers = span(channel, n), "int32" if n == 1 else f"int32x{n}"
        most = T.alloc_buffer((n,), "int32", scope="local")
        at = span(0, n)
        T.buffer_store(most, spread(tirx.const(0, "int32"), n), [at])
        with T.serial(0, p.keys) as key:
            bits = T.reinterpret(integers, v.at(b, h, key, place))
            T.buffer_store(most, tirx.max(most[at], tirx.bitwise_and(bits, _all(MAGNITUDE, n))), [at])
        inverse, unit = unit_of(most[at], n)
        T.buffer_store(self.v_inverse, inverse, [place])
        T.buffer_store(self.v_unit, unit, [place])

        def word(first: Any, count: int) -> None:
            steps = spread(tirx.const(0, "int32"), n)
            for i in range(count):
                value = v.at(b, h, first + i, place) * self.v_inverse[place]
                step = tirx.call_llvm_pure_intrin(integers, "llvm.lrint", value)
                steps = tirx.bitwise_or(steps, tirx.bitwise_and(step, _all(255, n)) << _all(8 * i, n))
            T.buffer_store(self.v, steps, [panel, tirx.floordiv(first, GROUP), span(column, n)])

        with T.serial(0, p.keys // GROUP) as i:
            word(i * GROUP, GROUP)
        if p.keys % GROUP:
            word(p.keys // GROUP * GROUP, p.keys % GROUP)

    def _take_rows(self, x: Rows, start: Any, stop: Any) -> None:
        """Round the block's rows of q, next to each other, and set their maxima to -inf."""
        lanes = self.lanes
        with T.serial(0, stop - start) as r:
            head, query = self._where(x, start + r)
            unit = self._round_row(lambda d, n: x.q.at(x.b, head, query, span(d, n)), self.q, r, True)
            T.buffer_store(self.q_unit, unit * constant(self.scale), [r])
            T.buffer_store(self.partial, constant(float("-inf"), lanes), [span(r * lanes, lanes)])

    def _multiply_scores(self, rows: int, row: Any, panel: Any) -> None:
        s, lanes = self.plan.scores, self.lanes
        for a in range(rows):
            for j in range(0, s.columns, lanes):
                begin = self.offset[span(panel * s.columns + j, lanes)]
                T.buffer_store(self.acc, begin, [span(a * s.columns + j, lanes)])
        self._multiply(
            *(rows, s.columns, self.words),
            lambda a, d: self.q[(row + a) * self.words + d],
            lambda d, vector: self.k[panel, d, span(vector * lanes, lanes)],
        )

    def _multiply(self, rows: int, columns: int, steps: Any, left: Any, right: Any) -> None:
        tile = Tile(rows, columns // self.lanes)
        with T.serial(0, steps) as k:
            step(self.acc, tile, self.dot, lambda row: [left(row, k)], lambda vector: right(k, vector))

    def _products(self, at: Any, column: Any, lanes: int) -> Any:
        return tirx.Cast(_floats(lanes), self.acc[at]) * self.k_unit[span(column, lanes)]

    def _score(self, value: Any, x: Rows, r: Any, where: tuple[Any, Any], key: Any, lanes: int, biased: bool) -> Any:
        unit = spread(self.q_unit[r], lanes)
        if not biased or self.bias is None:
            return value * unit
        return self.bias(value, x.b, *where, key, lanes, unit)

    def _weigh(self, at: Any, shift: Any, word: Any) -> Any:
        """Store the weights of the scores `at` in words from `word` on, and return them as floats."""
        lanes = self.lanes

        def fused(a: Any, b: Any, c: Any) -> Any:
            return T.bind(tirx.call_llvm_pure_intrin(_floats(lanes), "llvm.fma", a, b, c))

        x = T.bind(self.scores[at] - shift)
        least, log2_e = constant(LEAST_SCORE, lanes), constant(LOG2_E, lanes)
        x = T.bind(tirx.Select(x < least, least, x))  # NaN stays
        biased, plain = constant(_ROUND + _ONES, lanes), constant(_ROUND, lanes)
        shifted = fused(x, log2_e, biased)
        f = fused(x, log2_e, biased - shifted)
        y = constant(POWERS[-1], lanes)
        for coefficient in reversed(POWERS[:-1]):
            y = fused(y, f, constant(coefficient, lanes))
        integers = f"int32x{lanes}"
        power = T.reinterpret(_floats(lanes), T.reinterpret(integers, shifted) << _all(23, lanes))
        y = fused(y, power, plain)
        n = lanes // GROUP
        low = tirx.Cast(f"int8x{lanes}", T.reinterpret(integers, y))
        T.buffer_store(self.weights, T.reinterpret("int32" if n == 1 else f"int32x{n}", low), [span(word, n)])
        return y - plain

    def _multiply_values(self, rows: int, row: Any, panel: Any, keys: Any) -> None:
        t, lanes = self.plan.values, self.lanes
        for place in range(0, rows * t.columns, lanes):
            T.buffer_store(self.acc, spread(tirx.const(0, "int32"), lanes), [span(place, lanes)])
        stride = self.stride // GROUP
        self._multiply(
            *(rows, t.columns, tirx.floordiv(keys + (GROUP - 1), GROUP)),
            lambda a, k: self.weights[(row + a) * stride + k],
            lambda k, vector: self.v[panel, k, span(vector * lanes, lanes)],
        )

    def _result(self, at: Any, r: Any, column: Any) -> Any:
        lanes = self.lanes
        sums = tirx.Cast(_floats(lanes), self.acc[at])
        return sums * spread(self.inverse[r], lanes) * self.v_unit[span(column, lanes)]


def _floats(lanes: int) -> str:
    return "float32" if lanes == 1 else f"float32x{lanes}"


def _all(value: int, lanes: int) -> Any:
    return spread(tirx.const(value, "int32"), lanes)


def _moved(place: Any, by: Any) -> Any:
    """An index, or a vector of neighbours, `by` further on."""
    return T.ramp(place.base + by, 1, place.lanes) if isinstance(place, tirx.Ramp) else place + by


def _each_part(panel: Any, columns: int, total: int, lanes: int, emit: Callable[[Any, int], None]) -> None:
    """emit(first, how many) for the vectors of a panel, and for what of the last is no whole vector one by one."""

    def part(first: Any, width: int) -> None:
        if width // lanes:
            with T.serial(0, width // lanes) as j:
                emit(first + j * lanes, lanes)
        if width % lanes:
            with between(width // lanes * lanes, width) as j:
                emit(first + j, 1)

    full, tail = divmod(total, columns)
    if not tail:
        part(panel * columns, columns)
    elif not full:
        part(0, tail)
    else:
        with T.If(panel < full):
            with T.Then():
                part(panel * columns, columns)
            with T.Else():
                part(full * columns, tail)
