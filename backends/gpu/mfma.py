"""Fragments on AMD's matrix cores: V_MFMA_F32_16X16X16_F16 and _BF16_1K, on CDNA 2 and later, waves of 64.

    lane l holds, of a fragment [16][16 of the sum]     line l % 16, four of the sum from l / 16 * 4
    and of the sums [16][16]                            column l % 16, four rows from l / 16 * 4

AMD, "AMD Instinct MI200" instruction set architecture, section 7 (matrix arithmetic instructions), and AMD's matrix
instruction calculator. The operands are exchanged, so that a lane's four sums are neighbours in a row of the result:
one 128-bit store, and nothing through shared memory.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import constant, span
from .matrix_product import Units
from .matrix_tile import SIDE
from .product import Finish, room
from .stage import Pieces, Stage
from .tile import LANES

_FOUR = 4  # of the sum in a lane's part of a fragment
_INTRINSICS = {
    "float16": "llvm.amdgcn.mfma.f32.16x16x16f16",
    "bfloat16": "llvm.amdgcn.mfma.f32.16x16x16bf16.1k",  # takes the bits as int16
}


class Mfma(Units):
    """A block whose waves hold fragments as MFMA does."""

    def declare(self) -> None:
        """Declare the fragments, sums of zero."""
        self.x = T.alloc_buffer((self.high * _FOUR,), self.dtype, scope="local")
        self.y = T.alloc_buffer((self.wide * _FOUR,), self.dtype, scope="local")
        self.sums = T.alloc_buffer((self.high * self.wide * LANES,), "float32", scope="local")
        for i in range(self.high * self.wide):
            T.buffer_store(self.sums, constant(0.0, LANES), [span(i * LANES, LANES)])

    def multiply(self, slot: int, k: int) -> None:
        """Add the products of 16 of the sum, from `k` of the tiles in `slot`."""
        self._load(self.a, self.x, slot, k, self.row, self.high)
        self._load(self.b, self.y, slot, k, self.column, self.wide)
        for i in range(self.high):
            for j in range(self.wide):
                self.add_product(j * _FOUR, i * _FOUR, (i * self.wide + j) * LANES)

    def add_product(self, columns: int, rows: int, sums: int) -> None:
        """y[16 columns][16 of the sum] x[16 rows][16 of the sum]^T, added to sums; where this lane's parts begin."""
        _add_product(self.dtype, self.sums, sums, self.x, rows, self.y, columns)

    def _load(self, stage: Stage | Pieces, held: Any, slot: int, k: int, first: Any, count: int) -> None:
        line = tirx.floormod(self.lane, SIDE)
        depth = tirx.floordiv(self.lane, SIDE) * _FOUR + k
        for i in range(count):
            place = first + i * SIDE + line
            if stage.deep:
                value = stage.shared[slot][span(place * stage.stride + depth, _FOUR)]
                T.buffer_store(held, value, [span(i * _FOUR, _FOUR)])
                continue
            for n in range(_FOUR):
                T.buffer_store(held, stage.shared[slot][(depth + n) * stage.stride + place], [i * _FOUR + n])

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends: a lane has four neighbours of each fragment."""
        held = room(out)
        line, four = tirx.floormod(self.lane, SIDE), tirx.floordiv(self.lane, SIDE) * LANES
        for at in range(self.high * self.wide):
            row = self.first[0] + self.row + at // self.wide * SIDE + line
            column = self.first[1] + self.column + at % self.wide * SIDE + four
            for j in range(0, LANES, finish.lanes):
                self.finish(finish, self.sums, at * LANES + j, held, out, (row, column + j), extents)


class MfmaLanes:
    """As MmaLanes (mma.py): where a lane's values of 16 x 16 fragments belong, and what is done with fragments."""

    rows, each, neighbours = 1, _FOUR, _FOUR
    sharing = (16, 32)
    part = _FOUR

    def __init__(self, dtype: str, lane: Any) -> None:
        """`lane` is this thread's number in its wave."""
        self.dtype = dtype
        self.line, self.four = tirx.floormod(lane, SIDE), tirx.floordiv(lane, SIDE) * _FOUR

    def row(self, number: int) -> Any:
        """That of this lane."""
        return self.line

    def column(self, number: int) -> Any:
        """That of value `number`."""
        return self.four + number

    def at(self, row: int, number: int) -> int:
        """Where among the values of a fragment value `number` is."""
        return number

    def load_rows(self, held: Any, at: int, tile: Any, stride: int, row: Any, k: int) -> None:
        """Rows from `row`, 16 of the sum from `k`; neighbours of the sum are neighbours in `tile`."""
        value = tile[span((row + self.line) * stride + k + self.four, _FOUR)]
        T.buffer_store(held, value, [span(at, _FOUR)])

    load_columns = load_rows

    def load_columns_turned(self, held: Any, at: int, tile: Any, stride: int, column: int, k: int) -> None:
        """As `load_columns`, where neighbouring columns are neighbours in `tile`."""
        for n in range(_FOUR):
            T.buffer_store(held, tile[(k + self.four + n) * stride + column + self.line], [at + n])

    def multiply(self, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None:
        """Add a product of 16 x 16 x 16 to `sums`; where the parts of this lane begin."""
        _add_product(self.dtype, sums, at, rows, row_at, columns, column_at)


def _add_product(dtype: str, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None:
    first, second = columns[span(column_at, _FOUR)], rows[span(row_at, _FOUR)]
    if dtype == "bfloat16":
        first, second = (T.reinterpret(f"int16x{_FOUR}", value) for value in (first, second))
    place = span(at, LANES)
    zeros = [tirx.const(0, "int32")] * 3  # nothing broadcast, nothing permuted
    added = T.call_llvm_pure_intrin(f"float32x{LANES}", _INTRINSICS[dtype], first, second, sums[place], *zeros)
    T.buffer_store(sums, added, [place])
