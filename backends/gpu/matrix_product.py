"""Products on matrix units: operands in float16 or bfloat16 in shared memory, sums in float32.

    a block      8 (4) warps side by side and below each other; a warp has 1 to 4 x 1 to 4 fragments of 16 x 16 sums
    a step       32 of the sum: two multiplications of 16 for every pair of fragments

    fetch tile 0, put it, barrier
    for every two:    twice: fetch the next one into registers, or copy it past them; multiply with this one; put the
                      next one; barrier

What is float32 in memory is rounded on its way; weights are 16 bits in memory, and so are activations that only such
products read (passes/store_rounded.py). How fragments are multiplied, and what
becomes of the sums: wmma.py (NVIDIA), amd_fragments.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import Shape, span
from .copies import wait_for_copies
from .matrix_tile import SIDE, MatrixTile
from .product import Finish, Parts, finish_vector, flat_result, room, tiled
from .stage import HalfStage, Halves, Operand, Pieces, Stage, Weights, WeightStage
from .tile import LANES


def matrix_product(
    name: str,
    tile: MatrixTile,
    batch: int,
    rows: int,
    columns: int,
    dtype: str,
    operands: Sequence[tuple[Shape, str]],
    out: Shape,
    parts: Parts,
    units: Callable[..., Units],
    asynchronous: bool = False,
    stored: str = "float32",
) -> Any:
    """As `product.product`; `dtype` is what operands are rounded to, `units` the kind of matrix units.

    `asynchronous`: the device copies what is 16 bits in memory past the registers. `stored`: the dtype of the result.
    """

    def block(left: Any, right: Any, finish: Finish, out: Any, first: tuple[Any, Any], thread: Any) -> None:
        sums = units(tile, dtype, left, right, first, thread, asynchronous)
        sums.add_up(tile.part(left.depth))
        kept = None if str(out.dtype) == "float32" else sums.dtype
        sums.store(finish, flat_result(out, kept), (rows, columns))

    return tiled(name, tile, batch, (rows, columns), operands, (out, stored), parts, block)


class Units:
    """What one block does, but for the fragments."""

    step = SIDE  # of the sum, that `multiply` takes

    def __init__(
        self,
        tile: MatrixTile,
        dtype: str,
        left: Operand | Halves,
        right: Operand | Weights,
        first: tuple[Any, Any],
        thread: Any,
        asynchronous: bool,
    ) -> None:
        self.tile, self.dtype, self.first = tile, dtype, first
        self.lane = tirx.floormod(thread, tile.warp_threads)
        self.warp = tirx.floordiv(thread, tile.warp_threads)
        self.high = tile.rows // tile.down // SIDE  # fragments of a warp
        self.wide = tile.columns // tile.across // SIDE
        self.row = tirx.floordiv(self.warp, tile.across) * (self.high * SIDE)
        self.column = tirx.floormod(self.warp, tile.across) * (self.wide * SIDE)
        self.a: Stage | Pieces
        if isinstance(left, Halves):
            self.a = HalfStage(left, tile.depth, tile.rows, tile.threads, thread, dtype, asynchronous)
        else:
            self.a = Stage(left, tile.depth, tile.rows, tile.threads, thread, dtype)
        self.b: Stage | Pieces
        if isinstance(right, Weights):
            self.b = WeightStage(right, tile.depth, tile.columns, tile.threads, thread, dtype, asynchronous)
        else:
            self.b = Stage(right, tile.depth, tile.columns, tile.threads, thread, dtype)
        self.copies = asynchronous and (isinstance(left, Halves) or isinstance(right, Weights))
        self.declare()

    def declare(self) -> None:
        """Declare the fragments, sums of zero."""
        raise NotImplementedError

    def multiply(self, slot: int, k: int) -> None:
        """Add the products of `step` of the sum, from `k` of the tiles in `slot`."""
        raise NotImplementedError

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends."""
        raise NotImplementedError

    def add_up(self, depth: int) -> None:
        """The sums of all fragments, over `depth`."""
        self._fetch(0, 0)
        self._put(0)
        with T.serial(0, ceil(depth / (2 * self.tile.depth))) as pair:
            for slot in (0, 1):
                self._fetch(pair * 2 + slot + 1, 1 - slot)
                for k in range(0, self.tile.depth, self.step):
                    self.multiply(slot, k)
                self._put(1 - slot)

    def _fetch(self, step: Any, slot: int) -> None:
        self.a.fetch(step, self.first[0], slot)
        self.b.fetch(step, self.first[1], slot)

    def _put(self, slot: int) -> None:
        self.a.put(slot)
        self.b.put(slot)
        if self.copies:
            wait_for_copies()
        T.evaluate(T.tvm_storage_sync("shared"))

    def store_staged(
        self,
        staged: Any,
        write: Callable[[int, Any], None],
        finish: Finish,
        out: Any,
        extents: tuple[int, int],
    ) -> None:
        """Write the sums through shared memory: `write(at, base)` puts fragment `at` of this warp there by rows.

        A lane has half a row of each fragment then: bias, residual and activation in float32, and 128-bit stores.
        """
        values = T.alloc_buffer((SIDE // 2,), "float32", scope="local")
        held = room(out)
        base = self.warp * (SIDE * SIDE)
        line, half = tirx.floordiv(self.lane, 2), tirx.floormod(self.lane, 2) * (SIDE // 2)
        for at in range(self.high * self.wide):
            if at:
                T.evaluate(T.tvm_storage_sync("shared"))
            write(at, base)
            T.evaluate(T.tvm_storage_sync("shared"))
            row = self.first[0] + self.row + at // self.wide * SIDE + line
            column = self.first[1] + self.column + at % self.wide * SIDE + half
            for j in range(0, SIDE // 2, LANES):
                T.buffer_store(values, staged[span(base + line * SIDE + half + j, LANES)], [span(j, LANES)])
            for j in range(0, SIDE // 2, finish.lanes):
                self.finish(finish, values, j, held, out, (row, column + j), extents)

    def finish(
        self,
        finish: Finish,
        values: Any,
        at: int,
        held: Any,
        out: Any,
        place: tuple[Any, Any],
        extents: tuple[int, int],
    ) -> None:
        """Store the `finish.lanes` values from `at`, which belong to row and column `place`, unless past the ends."""
        row, column = place
        conditions = [row < extents[0]] if extents[0] % self.tile.rows else []
        conditions += [column < extents[1]] if extents[1] % self.tile.columns else []
        if conditions:
            with T.If(tirx.all(*conditions)), T.Then():
                finish_vector(finish, values, at, held, out, row, column)
        else:
            finish_vector(finish, values, at, held, out, row, column)
