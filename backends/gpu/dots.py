"""Products of few rows (a decode step): every weight is read once, by 128-bit loads, and no tile is filled in vain.

    a block      4 warps, each with 1, 2 or 4 columns of the result and all of its rows
    a lane       4 (weights in float32) or 8 (in 16 bits) neighbours of the sum, then those a warp further on

    for every piece of the sum:   the weights of the columns; for every row: x, and its products with them
    sums over the lanes by shuffles; lane r finishes row r

Registers: rows x columns sums, columns x 8 weights, 8 of x: 15 x 4 + 32 + 8 at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..kernels.loops import Shape, constant, span, typed_kernel
from .product import Finish, finish_vector, flat_result, room
from .tile import LANES

MOST_ROWS = 15
_WARPS = 4  # of a block
_WORDS = 4  # of 32 bits, in 128


@dataclass(frozen=True)
class Dots:
    """Columns of a warp; `dtype` is that of the weights."""

    columns: int
    dtype: str
    blocks: int
    warp_threads: int

    @property
    def piece(self) -> int:
        """Neighbours of the sum that a lane takes at a time."""
        return _WORDS if self.dtype == "float32" else 2 * _WORDS

    @property
    def reason(self) -> str:
        """What the report says of it."""
        return f"{self.columns} columns a warp, {self.dtype} weights, {self.blocks} blocks"


def plan_dots(hw: Hardware, columns: int, dtype: str) -> Dots:
    """The most columns a warp that leave no unit without a block: each more reads x less often."""
    warp = int(getattr(hw, "warp_threads", None) or 32)
    plans = [Dots(count, dtype, ceil(columns / (_WARPS * count)), warp) for count in (4, 2, 1)]
    return next((plan for plan in plans if plan.blocks >= hw.cores), plans[-1])


def dots(
    plan: Dots,
    extents: tuple[int, int, int],
    buffers: Sequence[tuple[Shape, str]],
    out: Shape,
    finish: Callable[[Sequence[Any]], Finish],
) -> Any:
    """The kernel of x[rows, depth] w[columns, depth]^T, for `extents` rows, columns, depth.

    `buffers` begin with x (float32) and w (float32, or two of 16 bits in an int32); `finish(buffers)` gets the others.
    The depth is a multiple of the plan's piece.
    """

    def body(*given: Any) -> None:
        with (
            T.launch_thread("blockIdx.x", plan.blocks) as block,
            T.launch_thread("threadIdx.x", _WARPS * plan.warp_threads) as thread,
        ):
            _Warp(plan, extents, given, block, thread).emit(finish(given[2:-1]))

    return typed_kernel("dots", buffers, [(out, "float32")], body)


class _Warp:
    """What one warp does."""

    def __init__(
        self, plan: Dots, extents: tuple[int, int, int], buffers: Sequence[Any], block: Any, thread: Any
    ) -> None:
        self.plan = plan
        self.rows, self.columns, self.depth = extents
        x, w, *_, out = buffers
        self.x, self.out = flat_result(x), flat_result(out)
        words = self.columns * self.depth * _WORDS // plan.piece
        self.weights = T.decl_buffer((words,), w.dtype, data=w.data)
        self.lane = tirx.floormod(thread, plan.warp_threads)
        self.first = (block * _WARPS + tirx.floordiv(thread, plan.warp_threads)) * plan.columns
        self.sums = T.alloc_buffer((self.rows * plan.columns,), "float32", scope="local")
        self.held = T.alloc_buffer((plan.columns * _WORDS,), w.dtype, scope="local")
        self.row = T.alloc_buffer((plan.piece,), "float32", scope="local")
        self.wide = T.alloc_buffer((plan.columns * plan.piece,), "float32", scope="local")

    def emit(self, finish: Finish) -> None:
        """The statements."""
        for i in range(self.rows * self.plan.columns):
            T.buffer_store(self.sums, constant(0.0), [i])
        stride = self.plan.warp_threads * self.plan.piece
        with T.serial(0, ceil(self.depth / stride)) as step:
            k = step * stride + self.lane * self.plan.piece
            if self.depth % stride:
                with T.If(k < self.depth), T.Then():
                    self._add(k)
            else:
                self._add(k)
        self._share()
        self._store(finish)

    def _add(self, k: Any) -> None:
        plan, piece = self.plan, self.plan.piece
        for c in range(plan.columns):
            column = tirx.min(self.first + c, self.columns - 1)
            word = tirx.floordiv(column * self.depth + k, piece) * _WORDS
            T.buffer_store(self.held, self.weights[span(word, _WORDS)], [span(c * _WORDS, _WORDS)])
        for i in range(plan.columns * piece):
            T.buffer_store(self.wide, self._weight(i), [i])
        for r in range(self.rows):
            for i in range(0, piece, LANES):
                T.buffer_store(self.row, self.x[span(r * self.depth + k + i, LANES)], [span(i, LANES)])
            for c in range(plan.columns):
                at = r * plan.columns + c
                for i in range(piece):
                    T.buffer_store(self.sums, self.sums[at] + self.row[i] * self.wide[c * piece + i], [at])

    def _weight(self, i: int) -> Any:
        """Element `i` of the weights that this lane holds, in float32."""
        return self.held[i] if self.plan.dtype == "float32" else widened(self.held[i // 2], i % 2, self.plan.dtype)

    def _share(self) -> None:
        """Add up over the lanes of the warp; each has the sums."""
        width, mask = self.plan.warp_threads, tirx.const(-1, "int32")
        distance = width // 2
        while distance:
            for i in range(self.rows * self.plan.columns):
                other = tirx.bitwise_xor(self.lane, distance)
                there = T.bind(T.tvm_warp_shuffle(mask, self.sums[i], other, width, width))
                T.buffer_store(self.sums, self.sums[i] + there, [i])
            distance //= 2

    def _store(self, finish: Finish) -> None:
        """Lane r finishes row r, whose sums it has like all the others."""
        columns, lanes = self.plan.columns, finish.lanes
        held = room(self.out)
        mine = T.alloc_buffer((columns,), "float32", scope="local")
        for r in range(self.rows):
            with T.If(self.lane == r), T.Then():
                for c in range(columns):
                    T.buffer_store(mine, self.sums[r * columns + c], [c])
        for c in range(0, columns, lanes):
            conditions = [self.lane < self.rows]
            conditions += [self.first + c < self.columns] if self.columns % (_WARPS * columns) else []
            with T.If(tirx.all(*conditions)), T.Then():
                finish_vector(finish, mine, c, held, self.out, self.lane, self.first + c)


def widened(word: Any, half: int, dtype: str) -> Any:
    """The lower (0) or upper (1) element of 16 bits in a word, in float32."""
    if dtype == "bfloat16":  # the upper half of a float32
        bits = tirx.bitwise_and(word, tirx.const(-65536, "int32")) if half else tirx.shift_left(word, 16)
        return T.reinterpret("float32", bits)
    bits = tirx.Cast("uint16", tirx.bitwise_and(tirx.shift_right(word, 16 * half), tirx.const(0xFFFF, "int32")))
    return tirx.Cast("float32", T.reinterpret("float16", bits))
