"""Fragments on AMD's matrix units, whose lanes are documented: MFMA on CDNA, WMMA on RDNA 3 and 4.

    lane l holds of an operand [16 lines][16 of the sum]                of the sums [16 left][16 right]
    MFMA, 64 lanes       line l % 16, four of the sum from l / 16 * 4   right l % 16, four of the left from l / 16 * 4
    WMMA, 32 lanes       line l % 16, eight from l / 16 * 8             right l % 16, eight from l / 16 * 8
    WMMA of RDNA 3       line l % 16, all 16: both halves have them     right l % 16, every second one from l / 16

AMD, "AMD Instinct MI200", "RDNA 3" and "RDNA 4" instruction set architecture (matrix arithmetic instructions; wave
matrix multiply accumulate), AMD's matrix instruction calculator, and GPUOpen, "How to accelerate AI applications on
RDNA 3 using WMMA". The operands are exchanged, so that a lane's sums are neighbours in a row of the result: 128-bit
stores, and nothing through shared memory. On RDNA 3 lane l loads line l / 2 + l % 2 * 8 of what is the left operand
then: every second sum is a neighbour of the last one too.

bfloat16 is kept as its bits (rounding.py), which both kinds of instructions take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu
from ..kernels.loops import constant, span
from .matrix_product import Units
from .matrix_tile import SIDE
from .product import Finish, room
from .rounding import as_kept
from .stage import Pieces, Stage
from .tile import LANES

_WIDEST = 8  # of 16 bits, in 128
_MFMA = {
    "float16": "llvm.amdgcn.mfma.f32.16x16x16f16",
    "bfloat16": "llvm.amdgcn.mfma.f32.16x16x16bf16.1k",
}
_WMMA = {"float16": "llvm.amdgcn.wmma.f32.16x16x16.f16", "bfloat16": "llvm.amdgcn.wmma.f32.16x16x16.bf16"}


@dataclass(frozen=True)
class Form:
    """How the `wave` lanes of a wave hold fragments: `copies` of them the same part of an operand."""

    wave: int
    copies: int = 1

    @property
    def each(self) -> int:
        """Elements of an operand in a lane, neighbours of the sum."""
        return SIDE * SIDE * self.copies // self.wave

    @property
    def sums(self) -> int:
        """Sums in a lane, neighbours of a row."""
        return SIDE * SIDE // self.wave

    def line(self, lane: Any) -> Any:
        """Of the right operand, and of the result: the row."""
        return tirx.floormod(lane, SIDE)

    def left_line(self, lane: Any) -> Any:
        """Of the left operand: the column."""
        line = self.line(lane)
        if self.copies == 1:
            return line
        return tirx.floordiv(line, 2) + tirx.floormod(line, 2) * self.sums

    def depth(self, lane: Any) -> Any:
        """The first of its elements of the sum."""
        return tirx.floordiv(lane, SIDE) * self.each if self.copies == 1 else 0

    def first(self, lane: Any) -> Any:
        """The first column of its sums."""
        return tirx.floordiv(lane, SIDE) * self.sums

    def multiply(self, dtype: str, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None:
        """Add columns[16][16 of the sum] rows[16][16 of the sum]^T to `sums`; where this lane's parts begin."""
        operands = [columns[span(column_at, self.each)], rows[span(row_at, self.each)], sums[span(at, self.sums)]]
        name = _WMMA[dtype]
        if self.wave == 64:
            name = _MFMA[dtype]
            operands += [tirx.const(0, "int32")] * 3  # nothing broadcast, nothing permuted
        added = T.call_llvm_pure_intrin(f"float32x{self.sums}", name, *operands)
        T.buffer_store(sums, added, [span(at, self.sums)])


def form_of(hw: Hardware) -> Form:
    """That of the matrix units of a GPU of AMD's."""
    assert isinstance(hw, Gpu)
    return Form(hw.warp_threads or 64, hw.operand_copies)


class AmdUnits(Units):
    """A block whose waves hold fragments in a form; `functools.partial` of it with the form is a kind of Units."""

    def __init__(self, form: Form, tile: Any, dtype: str, *rest: Any) -> None:
        self.form, self.multiplied = form, dtype
        super().__init__(tile, as_kept(dtype), *rest)

    def declare(self) -> None:
        """Declare the fragments, sums of zero."""
        form = self.form
        self.x = T.alloc_buffer((self.high * form.each,), self.dtype, scope="local")
        self.y = T.alloc_buffer((self.wide * form.each,), self.dtype, scope="local")
        self.sums = T.alloc_buffer((self.high * self.wide * form.sums,), "float32", scope="local")
        for i in range(0, self.high * self.wide * form.sums, LANES):
            T.buffer_store(self.sums, constant(0.0, LANES), [span(i, LANES)])

    def multiply(self, slot: int, k: int) -> None:
        """Add the products of 16 of the sum, from `k` of the tiles in `slot`."""
        form = self.form
        self._load(self.a, self.x, slot, k, self.row + form.line(self.lane), self.high)
        self._load(self.b, self.y, slot, k, self.column + form.left_line(self.lane), self.wide)
        for i in range(self.high):
            for j in range(self.wide):
                at = (i * self.wide + j) * form.sums
                form.multiply(self.multiplied, self.sums, at, self.x, i * form.each, self.y, j * form.each)

    def _load(self, stage: Stage | Pieces, held: Any, slot: int, k: int, line: Any, count: int) -> None:
        depth = self.form.depth(self.lane) + k
        for i in range(count):
            place, at = line + i * SIDE, i * self.form.each
            if stage.deep:
                _load_neighbours(self.form, held, at, stage.shared[slot], place * stage.stride + depth)
            else:
                _load_apart(self.form, held, at, stage.shared[slot], depth * stage.stride + place, stage.stride)

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends: a lane has neighbours of each fragment."""
        held, form = room(out), self.form
        line, first = form.line(self.lane), form.first(self.lane)
        for at in range(self.high * self.wide):
            row = self.first[0] + self.row + at // self.wide * SIDE + line
            column = self.first[1] + self.column + at % self.wide * SIDE + first
            for j in range(0, form.sums, finish.lanes):
                self.finish(finish, self.sums, at * form.sums + j, held, out, (row, column + j), extents)


class AmdLanes:
    """As MmaLanes (mma.py): where a lane's values of 16 x 16 fragments belong, and what is done with fragments."""

    rows, neighbours = 1, LANES

    def __init__(self, form: Form, dtype: str, lane: Any) -> None:
        """`lane` is this thread's number in its wave."""
        self.form, self.multiplied, self.dtype = form, dtype, as_kept(dtype)
        self.lane = lane
        self.each = self.part = form.sums
        self.sharing = tuple(SIDE << i for i in range((form.wave // SIDE).bit_length() - 1))

    def row(self, number: int) -> Any:
        """That of this lane."""
        return self.form.line(self.lane)

    def column(self, number: int) -> Any:
        """That of value `number`."""
        return self.form.first(self.lane) + number

    def at(self, row: int, number: int) -> int:
        """Where among the values of a fragment value `number` is."""
        return number

    def load_rows(self, held: Any, at: int, tile: Any, stride: int, row: Any, k: int) -> None:
        """Rows from `row`, 16 of the sum from `k`; neighbours of the sum are neighbours in `tile`."""
        line, depth = self.form.line(self.lane), self.form.depth(self.lane)
        _load_neighbours(self.form, held, at, tile, (row + line) * stride + k + depth)

    def load_columns(self, held: Any, at: int, tile: Any, stride: int, column: Any, k: int) -> None:
        """As `load_rows`, for the other operand."""
        line, depth = self.form.left_line(self.lane), self.form.depth(self.lane)
        _load_neighbours(self.form, held, at, tile, (column + line) * stride + k + depth)

    def load_columns_turned(self, held: Any, at: int, tile: Any, stride: int, column: int, k: int) -> None:
        """As `load_columns`, where neighbouring columns are neighbours in `tile`."""
        line, depth = self.form.left_line(self.lane), self.form.depth(self.lane)
        _load_apart(self.form, held, at, tile, (k + depth) * stride + column + line, stride)

    def multiply(self, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None:
        """Add a product of 16 x 16 x 16 to `sums`; where the parts of this lane begin."""
        self.form.multiply(self.multiplied, sums, at, rows, row_at, columns, column_at)


def _load_neighbours(form: Form, held: Any, at: int, tile: Any, start: Any) -> None:
    wide = min(form.each, _WIDEST)
    for n in range(0, form.each, wide):
        T.buffer_store(held, tile[span(start + n, wide)], [span(at + n, wide)])


def _load_apart(form: Form, held: Any, at: int, tile: Any, start: Any, stride: int) -> None:
    for n in range(form.each):
        T.buffer_store(held, tile[start + n * stride], [at + n])
