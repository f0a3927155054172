"""Products with weights that are 2 of 4, on NVIDIA's sparse tensor cores: mma.sp m16n8k32, of sm_80 and later.

The sparse operand is the left one, so that a warp has fragments of the result turned: 16 columns (weights) x 8 rows.

    lane l holds, of 16 columns x 8 rows      columns l / 4 and l / 4 + 8; of each, rows l % 4 * 2 and the next one

A step is 32 of the sum; which two of four are kept is in one word a lane for every two steps (sparse_weights.py), which
comes from memory while the two before it are multiplied. Sums go through shared memory as those of wmma do.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import constant, span
from .matrix_product import Units
from .matrix_tile import SIDE
from .mma import MmaLanes, multiply_sparse
from .product import Finish
from .sparse_weights import PAIR, STEP
from .stage import WeightStage
from .tile import LANES

_FRAGMENT = SIDE * SIDE
_PART = SIDE // 2  # values of a lane: of 16 x 16 sums, of the weights of a step, of half a step of rows


class SparseMma(Units):
    """A block whose warps hold fragments as mma.sp does."""

    step = STEP

    def declare(self) -> None:
        """Declare the fragments, sums of zero."""
        tile = self.tile
        self.lanes = MmaLanes(self.dtype, self.lane)
        self.staged = T.alloc_buffer((tile.down * tile.across * _FRAGMENT,), "float32", scope="shared")
        self.x = T.alloc_buffer((2 * _PART,), self.dtype, scope="local")
        self.y = T.alloc_buffer((self.wide * _PART,), self.dtype, scope="local")
        self.sums = T.alloc_buffer((self.high * self.wide * _PART,), "float32", scope="local")
        self.places, self.coming = (T.alloc_buffer((self.wide,), "int32", scope="local") for _ in range(2))
        for i in range(0, self.high * self.wide * _PART, LANES):
            T.buffer_store(self.sums, constant(0.0, LANES), [span(i, LANES)])

    def multiply(self, slot: int, k: int) -> None:
        """Add the products of 32 of the sum, the tiles in `slot`."""
        for j in range(self.wide):
            column = self.column + j * SIDE
            self.lanes.load_rows(self.y, j * _PART, self.b.shared[slot], self.b.stride, column, k // 2)
        for i in range(self.high):
            row = self.row + i * SIDE
            for half in (0, 1):
                place = half * _PART
                self.lanes.load_columns(self.x, place, self.a.shared[slot], self.a.stride, row, k + half * SIDE)
            for j in range(self.wide):
                sums = (self.sums, (i * self.wide + j) * _PART)
                multiply_sparse(self.dtype, sums, (self.y, j * _PART), (self.x, 0), self.places[j], slot)

    def _fetch(self, step: Any, slot: int) -> None:
        super()._fetch(step, slot)
        if slot:
            return
        stage = self.b
        assert isinstance(stage, WeightStage)
        pairs = stage.length * 2 // PAIR
        pair = tirx.min(tirx.floordiv(stage.start * 2, PAIR) + tirx.floordiv(step, 2), pairs - 1)
        for j in range(self.wide):
            fragment = tirx.floordiv(self.first[1] + self.column, SIDE) + j
            word = stage.places + (fragment * pairs + pair) * self.tile.warp_threads + self.lane
            T.buffer_store(self.coming, stage.words[word], [j])

    def _put(self, slot: int) -> None:
        super()._put(slot)
        for j in range(self.wide if slot == 0 else 0):
            T.buffer_store(self.places, self.coming[j], [j])

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends."""

        def write(at: int, base: Any) -> None:
            for n in range(_PART):
                row = tirx.floormod(self.lane, 4) * 2 + (n // 4 * 8 + n % 2)
                column = tirx.floordiv(self.lane, 4) + n // 2 % 2 * 8
                T.buffer_store(self.staged, self.sums[at * _PART + n], [base + row * SIDE + column])

        self.store_staged(self.staged, write, finish, out, extents)
