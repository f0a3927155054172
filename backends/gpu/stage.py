"""One operand of a product on its way to the threads of a block: memory, registers, shared memory.

shared      two of [depth][width + PAD]     one is read while the next is written
registers   what a thread carries of the next tile while it multiplies with this one

along the width (k, j..j+3 are neighbours in memory)     one 128-bit load, one 128-bit store
along the sum   (k..k+3, j are neighbours)               one 128-bit load, four stores that turn it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import constant, span
from .tile import LANES, PAD


@dataclass(frozen=True)
class Operand:
    """`read(k, place)` is the element at `k` of the sum and `place` of the width: `lanes` neighbours in memory.

    `depth` and `width` are how much there is; `lanes` divides that along which the neighbours lie.
    """

    read: Callable[[Any, Any], Any]
    depth: int
    width: int
    along: Literal["width", "depth"]
    lanes: int


class Stage:
    """The tiles of one operand in a block, `depth` x `width` each."""

    def __init__(
        self, operand: Operand, depth: int, width: int, threads: int, thread: Any, dtype: str = "float32"
    ) -> None:
        """Declare registers and shared memory; `thread` is this thread's number, `dtype` what is stored there."""
        self.dtype = dtype
        # 16 bytes behind a row: matrix units take strides of whole 16 bytes.
        self.stride = width + (PAD if dtype == "float32" else 2 * PAD)
        self.operand, self.depth, self.width = operand, depth, width
        self.threads, self.thread = threads, thread
        self.pieces = depth * width // operand.lanes
        self.registers = T.alloc_buffer((self._turns * operand.lanes,), "float32", scope="local")
        # Rounded one by one: for vectors, see product.finish_vector.
        size = self._turns * operand.lanes
        self.rounded = None if dtype == "float32" else T.alloc_buffer((size,), dtype, scope="local")
        # Two buffers of one dimension: TVM would put barriers between slots of one, and cut the padding of rows.
        self.shared = [T.alloc_buffer((depth * self.stride,), dtype, scope="shared") for _ in range(2)]

    @property
    def _turns(self) -> int:
        return -(-self.pieces // self.threads)

    def fetch(self, first_k: Any, first: Any) -> None:
        """Load the tile at `first_k` of the sum and `first` of the width into registers, zeros past the ends."""
        operand = self.operand
        for turn in range(self._turns):
            k, place = self._place(turn)
            k, place = first_k + k, first + place
            value = operand.read(k, place)
            conditions = [k < operand.depth]  # past the last tile of the sum lies one that is fetched and never read
            conditions += [place < operand.width] if operand.width % self.width else []
            value = tirx.if_then_else(tirx.all(*conditions), value, constant(0.0, operand.lanes))
            T.buffer_store(self.registers, value, [span(turn * operand.lanes, operand.lanes)])

    def tile(self, slot: int, k: Any, place: Any) -> Any:
        """The 4 neighbours from `place` of the width at `k`, in tile `slot`."""
        return self.shared[slot][span(k * self.stride + place, LANES)]

    def put(self, slot: int) -> None:
        """Store what was fetched as tile `slot`, 0 or 1."""
        for turn in range(self._turns):
            k, place = self._place(turn)
            if self.pieces % self.threads and turn == self._turns - 1:
                with T.If(turn * self.threads + self.thread < self.pieces), T.Then():
                    self._put(turn, slot, k, place)
            else:
                self._put(turn, slot, k, place)

    def _put(self, turn: int, slot: int, k: Any, place: Any) -> None:
        shared, lanes, stride = self.shared[slot], self.operand.lanes, self.stride
        first = turn * lanes
        if self.rounded is not None:
            for i in range(lanes):
                T.buffer_store(self.rounded, tirx.Cast(self.dtype, self.registers[first + i]), [first + i])
        carried = self.registers if self.rounded is None else self.rounded
        if self.operand.along == "width":
            T.buffer_store(shared, carried[span(first, lanes)], [span(k * stride + place, lanes)])
            return
        for i in range(lanes):
            T.buffer_store(shared, carried[first + i], [(k + i) * stride + place])

    def _place(self, turn: int) -> tuple[Any, Any]:
        """Where in the tile the piece of this thread and turn begins: along the sum, along the width."""
        lanes = self.operand.lanes
        piece = self.thread + turn * self.threads
        across = (self.width if self.operand.along == "width" else self.depth) // lanes
        outer, inner = tirx.floordiv(piece, across), tirx.floormod(piece, across) * lanes
        return (outer, inner) if self.operand.along == "width" else (inner, outer)
