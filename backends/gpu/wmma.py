"""Fragments on NVIDIA's tensor cores, by CUDA's warp matrix functions (wmma, m16n16k16).

Sums go through shared memory, because who holds which element of a fragment is not specified: then bias, residual and
activation in float32, and 128-bit stores.

CUDA C++ programming guide, "Warp matrix functions": sm_70 and later, for bfloat16 sm_80 and later.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .matrix_product import Units
from .matrix_tile import SIDE
from .product import Finish
from .stage import Pieces, Stage

_FRAGMENT = SIDE * SIDE


class Wmma(Units):
    """A block whose warps hold fragments as wmma does."""

    def declare(self) -> None:
        """Declare the fragments, sums of zero."""
        tile = self.tile
        self.staged = T.alloc_buffer((tile.down * tile.across * _FRAGMENT,), "float32", scope="shared")
        self.x = _fragments(self.high, self.dtype, "wmma.matrix_a")
        self.y = _fragments(self.wide, self.dtype, "wmma.matrix_b")
        self.sums = _fragments(self.high * self.wide, "float32", "wmma.accumulator")
        for i in range(self.high * self.wide):
            zero = tirx.const(0.0, "float32")
            T.evaluate(T.tvm_fill_fragment(self.sums.data, SIDE, SIDE, SIDE, i, zero))

    def multiply(self, slot: int, k: int) -> None:
        """Add the products of 16 of the sum, from `k` of the tiles in `slot`."""
        self._load(self.a, self.x, slot, k, self.row, self.high, "row_major" if self.a.deep else "col_major")
        self._load(self.b, self.y, slot, k, self.column, self.wide, "col_major" if self.b.deep else "row_major")
        for i in range(self.high):
            for j in range(self.wide):
                at, sums = i * self.wide + j, self.sums.data
                T.evaluate(T.tvm_mma_sync(sums, at, self.x.data, i, self.y.data, j, sums, at))

    def _load(self, stage: Stage | Pieces, held: Any, slot: int, k: int, first: Any, count: int, layout: str) -> None:
        for i in range(count):
            start = (first + i * SIDE) * stage.stride + k if stage.deep else k * stage.stride + first + i * SIDE
            pointer = _pointer(stage.shared[slot], self.dtype, start, SIDE * stage.stride)
            T.evaluate(T.tvm_load_matrix_sync(held.data, SIDE, SIDE, SIDE, i, pointer, stage.stride, layout))

    def store(self, finish: Finish, out: Any, extents: tuple[int, int]) -> None:
        """Write the sums, nothing past the ends."""

        def write(at: int, base: Any) -> None:
            # TVM puts it where the tiles were, which have another dtype: an access pointer would be refused for that.
            pointer = T.address_of(self.staged[base])
            T.evaluate(T.tvm_store_matrix_sync(self.sums.data, SIDE, SIDE, SIDE, at, pointer, SIDE, "row_major"))

        self.store_staged(self.staged, write, finish, out, extents)


def _fragments(count: int, dtype: str, scope: str) -> Any:
    return T.alloc_buffer((count * _FRAGMENT,), dtype, scope=scope)


def _pointer(buffer: Any, dtype: str, start: Any, extent: int) -> Any:
    """For reading."""
    return T.tvm_access_ptr(T.type_annotation(dtype), buffer.data, start, extent, 1)
