"""Products on tensor cores: operands rounded to float16 or bfloat16 on their way into shared memory, sums in float32.

    a block      8 (4) warps side by side and below each other; a warp has 2 to 4 x 2 fragments of 16 x 16 sums
    a step       32 of the sum: two m16n16k16 multiplications (wmma) for every pair of fragments

    fetch tile 0, put it, barrier
    for every two:    twice: fetch the next one into registers; multiply with this one; put the next one; barrier
    every fragment:   through shared memory, because who holds which element of it is not specified; then bias,
                      residual and activation in float32, and 128-bit stores

CUDA C++ programming guide, "Warp matrix functions": sm_70 and later, for bfloat16 sm_80 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..kernels.loops import Shape, span
from .product import Finish, finish_vector, flat_result, tiled
from .stage import Operand, Stage
from .tile import BYTES_PER_CYCLE, LANES, STEP_CYCLES

SIDE = 16  # of a fragment
_WARP = 32
_STAGED = SIDE + LANES  # floats from one row of a staged fragment to the next
_FRAGMENT = SIDE * SIDE


@dataclass(frozen=True)
class MatrixTile:
    """The part of a product that a block computes: `down` x `across` warps share it."""

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    blocks: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.down * self.across * _WARP

    @property
    def reason(self) -> str:
        """What the report says of it."""
        warps = f"{self.down}x{self.across} warps"
        return f"{self.rows}x{self.columns}x{self.depth} a block on tensor cores, {warps}, {self.blocks} blocks"


_CANDIDATES = ((128, 128, 32, 2, 4), (128, 64, 32, 4, 2), (64, 64, 32, 2, 2))


def choose_matrix_tile(hw: Hardware, batch: int, rows: int, columns: int, depth: int, dtype: str) -> MatrixTile:
    """The tile that takes `hw` the fewest cycles, by the rule of tile.py with the rate of its matrix units."""
    peak = hw.peak_flops(dtype)
    rate = peak / (2e6 * hw.clock_mhz * hw.cores) if peak and hw.clock_mhz else 512.0

    def cycles(candidate: tuple[int, ...]) -> float:
        height, width, step, *_ = candidate
        block = depth * max(height * width / rate, 4.0 * (height + width) / BYTES_PER_CYCLE)
        blocks = batch * ceil(rows / height) * ceil(columns / width)
        return max(ceil(blocks / hw.cores) * block, ceil(depth / step) * STEP_CYCLES)

    best = min(_CANDIDATES, key=cycles)
    return MatrixTile(*best, batch * ceil(rows / best[0]) * ceil(columns / best[1]))


def matrix_product(
    name: str,
    tile: MatrixTile,
    batch: int,
    rows: int,
    columns: int,
    dtype: str,
    operands: Sequence[Shape],
    out: Shape,
    parts: Callable[[Sequence[Any], Any, Any], tuple[Operand, Operand, Finish]],
) -> Any:
    """As `product.product`; `dtype` is what operands are rounded to."""

    def block(left: Operand, right: Operand, finish: Finish, out: Any, first: tuple[Any, Any], thread: Any) -> None:
        sums = _Block(tile, dtype, left, right, first, thread)
        sums.add_up()
        sums.store(finish, flat_result(out), (rows, columns))

    return tiled(name, tile, batch, (rows, columns), operands, out, parts, block)


class _Block:
    """What one block does."""

    def __init__(
        self, tile: MatrixTile, dtype: str, left: Operand, right: Operand, first: tuple[Any, Any], thread: Any
    ) -> None:
        self.tile, self.dtype, self.first, self.depth = tile, dtype, first, left.depth
        self.lane, warp = tirx.floormod(thread, _WARP), tirx.floordiv(thread, _WARP)
        self.warp = warp
        self.high, self.wide = (
            tile.rows // tile.down // SIDE,
            tile.columns // tile.across // SIDE,
        )  # fragments of a warp
        self.row = tirx.floordiv(warp, tile.across) * (self.high * SIDE)
        self.column = tirx.floormod(warp, tile.across) * (self.wide * SIDE)
        self.a = Stage(left, tile.depth, tile.rows, tile.threads, thread, dtype)
        self.b = Stage(right, tile.depth, tile.columns, tile.threads, thread, dtype)
        self.staged = T.alloc_buffer((tile.down * tile.across * SIDE * _STAGED,), "float32", scope="shared")
        self.x = _fragments(self.high, dtype, "wmma.matrix_a")
        self.y = _fragments(self.wide, dtype, "wmma.matrix_b")
        self.sums = _fragments(self.high * self.wide, "float32", "wmma.accumulator")

    def add_up(self) -> None:
        """The sums of all fragments."""
        for i in range(self.high * self.wide):
            zero = tirx.const(0.0, "float32")
            T.evaluate(T.tvm_fill_fragment(self.sums.data, SIDE, SIDE, SIDE, i, zero))
        self._fetch(0)
        self._put(0)
        with T.serial(0, ceil(self.depth / (2 * self.tile.depth))) as pair:
            for slot in (0, 1):
                self._fetch(pair * 2 + slot + 1)
                for k in range(0, self.tile.depth, SIDE):
                    self._multiply(slot, k)
                self._put(1 - slot)

    def _fetch(self, step: Any) -> None:
        self.a.fetch(step * self.tile.depth, self.first[0])
        self.b.fetch(step * self.tile.depth, self.first[1])

    def _put(self, slot: int) -> None:
        self.a.put(slot)
        self.b.put(slot)
        T.evaluate(T.tvm_storage_sync("shared"))

    def _multiply(self, slot: int, k: int) -> None:
        """Both operands lie with the sum outside: columns of a, rows of b."""
        for stage, held, first, count, layout in (
            (self.a, self.x, self.row, self.high, "col_major"),
            (self.b, self.y, self.column, self.wide, "row_major"),
        ):
            for i in range(count):
                start = k * stage.stride + first + i * SIDE
                pointer = _pointer(stage.shared[slot], self.dtype, start, SIDE * stage.stride, "r")
                T.evaluate(T.tvm_load_matrix_sync(held.data, SIDE, SIDE, SIDE, i, pointer, stage.stride, layout))
        for i in range(self.high):
            for j in range(self.wide):
                at, sums = i * self.wide + j, self.sums.data
                T.evaluate(T.tvm_mma_sync(sums, at, self.x.data, i, self.y.data, j, sums, at))

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends: a lane has half a row of each fragment."""
        values = T.alloc_buffer((SIDE // 2,), "float32", scope="local")
        held = T.alloc_buffer((LANES,), "float32", scope="local")
        base = self.warp * (SIDE * _STAGED)
        line, half = tirx.floordiv(self.lane, 2), tirx.floormod(self.lane, 2) * (SIDE // 2)
        for at in range(self.high * self.wide):
            if at:
                T.evaluate(T.tvm_storage_sync("shared"))
            pointer = _pointer(self.staged, "float32", base, SIDE * _STAGED, "w")
            data = self.sums.data
            T.evaluate(T.tvm_store_matrix_sync(data, SIDE, SIDE, SIDE, at, pointer, _STAGED, "row_major"))
            T.evaluate(T.tvm_storage_sync("shared"))
            row = self.first[0] + self.row + at // self.wide * SIDE + line
            column = self.first[1] + self.column + at % self.wide * SIDE + half
            for j in range(0, SIDE // 2, LANES):
                T.buffer_store(values, self.staged[span(base + line * _STAGED + half + j, LANES)], [span(j, LANES)])
            for j in range(0, SIDE // 2, finish.lanes):
                conditions = [row < extents[0]] if extents[0] % self.tile.rows else []
                conditions += [column + j < extents[1]] if extents[1] % self.tile.columns else []
                if conditions:
                    with T.If(tirx.all(*conditions)), T.Then():
                        finish_vector(finish, values, j, held, out, row, column + j)
                else:
                    finish_vector(finish, values, j, held, out, row, column + j)


def _fragments(count: int, dtype: str, scope: str) -> Any:
    return T.alloc_buffer((count * _FRAGMENT,), dtype, scope=scope)


def _pointer(buffer: Any, dtype: str, start: Any, extent: int, mode: str) -> Any:
    return T.tvm_access_ptr(T.type_annotation(dtype), buffer.data, start, extent, 1 if mode == "r" else 2)
