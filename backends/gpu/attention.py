"""Attention in one kernel: softmax(q k^T scale + mask) v with the softmax taken along as keys come in (online).

    a block      64 (32, 16) queries of one head; keys and values pass through shared memory, a tile at a time
    a thread     4 (2, 1) queries x 4 keys of the scores, the same queries x every 16th column of the result;
                 the 16 threads of a row hold its maximum and sum, and find them by shuffles

    for every tile of keys:
        k into shared memory, turned; barrier
        s = q k^T scale + mask; top' = max(top, s); p = exp(s - top'); sum = sum exp(top - top') + p; p to shared memory
        barrier; v into the place of k; barrier
        result = result exp(top - top') + p v; barrier

Tao and others, FlashAttention-2 (2023), and Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
Shared memory: (queries x depth + keys x max(depth, value depth) + queries x keys) floats and padding, 48 KB at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..kernels.attention_plan import Problem
from ..kernels.loops import Shape, constant, flat, span, typed_kernel
from .attention_mask import Mask
from .own_memory import assign, barrier, registers, shared
from .tile import LANES

ACROSS = 16  # threads of a row
THREADS = 256
DOWN = THREADS // ACROSS
_PAD = 4
_SHARED_BYTES = 48 << 10


@dataclass(frozen=True)
class Plan:
    """Queries and keys of a block's tile."""

    queries: int
    keys: int
    blocks: int

    @property
    def reason(self) -> str:
        """What the report says of it."""
        return f"{self.queries} queries x {self.keys} keys a block, online softmax, {self.blocks} blocks"


def plan_attention(hw: Hardware, p: Problem) -> Plan | None:
    """The largest tile that fits shared memory and gives every unit a block, or the smallest that fits.

    None where none fits.
    """
    allowed = min(_SHARED_BYTES, getattr(hw, "shared_bytes_per_block", None) or _SHARED_BYTES)
    fits: list[Plan] = []
    for queries in (64, 32, 16):
        for keys in (64, 32, 16):
            plan = Plan(queries, keys, p.batch * p.heads * -(-p.queries // queries))
            if _shared_floats(plan, p) * 4 <= allowed:
                fits.append(plan)
                break
    busy = [plan for plan in fits if plan.blocks >= hw.cores]
    return next(iter(busy), fits[-1] if fits else None)


def _shared_floats(plan: Plan, p: Problem) -> int:
    depth, width = _padded(p.depth), _padded(p.value_depth)
    passing = max(depth * (plan.keys + _PAD), plan.keys * (width + _PAD))
    return depth * (plan.queries + _PAD) + passing + plan.queries * (plan.keys + _PAD)


def _padded(extent: int) -> int:
    return -(-extent // ACROSS) * ACROSS


def attention(
    p: Problem,
    plan: Plan,
    scale: float,
    shapes: tuple[Shape, Shape, Shape, Shape],
    causal: bool = False,
    mask: tuple[Shape, str, Shape] | None = None,
    fill: float | None = None,
) -> Any:
    """Return the kernel (q, k, v[, mask], out) over dense buffers of `shapes`.

    `mask` is its extents [batch, heads, queries, keys], each full or 1, its dtype ("bool": True is let through;
    "float32": added), and the shape of its buffer. A row of which nothing is let through is zeros, NaN with `fill`;
    with `fill` what a mask of bool stops has that score.
    """
    operands = [(shape, "float32") for shape in shapes[:3]]
    if mask is not None:
        operands.append((mask[2], mask[1]))

    def body(*buffers: Any) -> None:
        tiles = -(-p.queries // plan.queries)
        with (
            T.launch_thread("blockIdx.x", p.batch * p.heads * tiles) as block,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            _Block(p, plan, scale, causal, mask, fill, buffers, block, thread, tiles).emit()

    return typed_kernel("attention", operands, [(shapes[3], "float32")], body)


class _Block:
    """What one block does."""

    def __init__(
        self,
        p: Problem,
        plan: Plan,
        scale: float,
        causal: bool,
        mask: tuple[Shape, str, Shape] | None,
        fill: float | None,
        buffers: tuple[Any, ...],
        block: Any,
        thread: Any,
        tiles: int,
    ) -> None:
        self.p, self.plan, self.scale, self.causal, self.fill = p, plan, scale, causal, fill
        self.thread = thread
        self.row, self.lane = tirx.floordiv(thread, ACROSS), tirx.floormod(thread, ACROSS)
        self.first = tirx.floormod(block, tiles) * plan.queries
        self.number = tirx.floordiv(block, tiles)  # of batch and head
        head = tirx.floormod(self.number, p.heads)
        self.group = tirx.floordiv(self.number, p.heads) * p.key_heads + tirx.floordiv(head, p.heads // p.key_heads)
        self.q, self.k, self.v = (flat(buffer) for buffer in buffers[:3])
        stopped: tuple[Any, ...] = () if mask is None else (mask[0], mask[1], flat(buffers[3]))
        self.mask = Mask(p, self.number, causal, p.keys % plan.keys > 0, fill, *stopped)
        self.out = flat(buffers[-1])
        self.rows = plan.queries // DOWN
        self.columns = plan.keys // ACROSS
        self.depth, self.width = _padded(p.depth), _padded(p.value_depth)
        self.wide = self.width // ACROSS

    def emit(self) -> None:
        """The statements."""
        p, plan, rows = self.p, self.plan, self.rows
        self.queries = shared(self.depth * (plan.queries + _PAD))
        self.passing = shared(max(self.depth * (plan.keys + _PAD), plan.keys * (self.width + _PAD)))
        self.powers = shared(plan.queries * (plan.keys + _PAD))
        self.top, self.total = registers(rows), registers(rows)
        self.result, self.scores = registers(rows * self.wide), registers(rows * self.columns)
        self.new, self.factor = registers(rows), registers(rows)
        for i in range(rows):
            assign(self.top, i, tirx.const(-math.inf, "float32"))
            assign(self.total, i, constant(0.0))
            for j in range(self.wide):
                assign(self.result, i * self.wide + j, constant(0.0))
        turned_q = self._turning(self.queries, plan.queries + _PAD)
        self._load(self.q, self.number * p.queries, self.first, p.queries, p.depth, self.depth, plan.queries, turned_q)
        tiles = -(-p.keys // plan.keys)
        count: Any = tiles
        if self.causal:
            count = tirx.min(tirx.floordiv(self.first + plan.queries - 1, plan.keys) + 1, tiles)
        with T.serial(0, count) as tile:
            first_key = tile * plan.keys
            turned_k = self._turning(self.passing, plan.keys + _PAD)
            self._load(self.k, self.group * p.keys, first_key, p.keys, p.depth, self.depth, plan.keys, turned_k)
            barrier()
            self._score(first_key)
            self._soften()
            barrier()
            self._load(
                self.v, self.group * p.keys, first_key, p.keys, p.value_depth, self.width, plan.keys, self._put_v
            )
            barrier()
            self._mix()
            barrier()
        self._store()

    def _load(
        self, source: Any, before: Any, first: Any, extent: int, length: int, padded: int, rows: int, put: Any
    ) -> None:
        """Rows first..first + rows of `source`, which has `extent` of them after `before`; zeros past the ends."""
        lanes = LANES if length % LANES == 0 else 1
        across = padded // lanes
        pieces = rows * across
        for turn in range(-(-pieces // THREADS)):
            piece = self.thread + turn * THREADS

            def move(piece: Any = piece) -> None:
                row, column = tirx.floordiv(piece, across), tirx.floormod(piece, across) * lanes
                inside = tirx.all(first + row < extent, column < length)
                value = source[span((before + first + row) * length + column, lanes)]
                put(row, column, lanes, tirx.if_then_else(inside, value, constant(0.0, lanes)))

            if (turn + 1) * THREADS > pieces:
                with T.If(piece < pieces), T.Then():
                    move()
            else:
                move()

    def _turning(self, tile: Any, stride: int) -> Any:
        """How rows are stored as the columns of `tile`, whose rows lie `stride` apart."""

        def put(row: Any, column: Any, lanes: int, value: Any) -> None:
            moved = registers(lanes)
            T.buffer_store(moved, value, [span(0, lanes)])
            for i in range(lanes):
                assign(tile, (column + i) * stride + row, moved[i])

        return put

    def _put_v(self, row: Any, column: Any, lanes: int, value: Any) -> None:
        T.buffer_store(self.passing, value, [span(row * (self.width + _PAD) + column, lanes)])

    def _score(self, first_key: Any) -> None:
        """Scores of this thread: rows row + i * DOWN, keys lane + j * ACROSS of the tile, masked."""
        rows, columns, stride = self.rows, self.columns, self.plan.keys + _PAD
        for i in range(rows * columns):
            assign(self.scores, i, constant(0.0))
        with T.serial(0, self.p.depth) as d:
            a = [T.bind(self.queries[d * (self.plan.queries + _PAD) + self.row + i * DOWN]) for i in range(rows)]
            b = [T.bind(self.passing[d * stride + self.lane + j * ACROSS]) for j in range(columns)]
            for i in range(rows):
                for j in range(columns):
                    assign(self.scores, i * columns + j, self.scores[i * columns + j] + a[i] * b[j])
        for i in range(rows):
            for j in range(columns):
                query, key = self.first + self.row + i * DOWN, first_key + self.lane + j * ACROSS
                at = i * columns + j
                assign(self.scores, at, self.mask.score(self.scores[at] * constant(self.scale), query, key))

    def _soften(self) -> None:
        """Scores to powers of the new maximum, in shared memory; the factor of what came before."""
        rows, columns = self.rows, self.columns
        lowest = tirx.const(-math.inf, "float32")
        for i in range(rows):
            largest = self.scores[i * columns]
            for j in range(1, columns):
                largest = tirx.max(largest, self.scores[i * columns + j])
            assign(self.new, i, largest)
        self._exchange(self.new, tirx.max)
        for i in range(rows):
            assign(self.new, i, tirx.max(self.new[i], self.top[i]))
            before = tirx.Select(self.top[i] <= lowest, constant(0.0), tirx.exp(self.top[i] - self.new[i]))
            assign(self.factor, i, before)
            assign(self.top, i, self.new[i])
            for j in range(columns):
                at = i * columns + j
                power = tirx.Select(self.scores[at] <= lowest, constant(0.0), tirx.exp(self.scores[at] - self.top[i]))
                assign(self.scores, at, power)
                place = (self.row + i * DOWN) * (self.plan.keys + _PAD) + self.lane + j * ACROSS
                assign(self.powers, place, self.scores[at])
            whole = self.scores[i * columns]
            for j in range(1, columns):
                whole = whole + self.scores[i * columns + j]
            assign(self.new, i, whole)
        self._exchange(self.new, lambda x, y: x + y)
        for i in range(rows):
            assign(self.total, i, self.total[i] * self.factor[i] + self.new[i])

    def _exchange(self, values: Any, combine: Any) -> None:
        """Reduce over the 16 threads of a row; each has the result."""
        distance = ACROSS // 2
        while distance:
            for i in range(self.rows):
                other = tirx.bitwise_xor(self.lane, distance)
                mask = tirx.const(-1, "int32")
                there = T.bind(T.tvm_warp_shuffle(mask, values[i], other, ACROSS, 32))
                assign(values, i, combine(values[i], there))
            distance //= 2

    def _mix(self) -> None:
        rows, wide, stride = self.rows, self.wide, self.width + _PAD
        for i in range(rows):
            for j in range(wide):
                assign(self.result, i * wide + j, self.result[i * wide + j] * self.factor[i])
        with T.serial(0, self.plan.keys) as key:
            a = [T.bind(self.powers[(self.row + i * DOWN) * (self.plan.keys + _PAD) + key]) for i in range(rows)]
            b = [T.bind(self.passing[key * stride + self.lane + j * ACROSS]) for j in range(wide)]
            for i in range(rows):
                for j in range(wide):
                    assign(self.result, i * wide + j, self.result[i * wide + j] + a[i] * b[j])

    def _store(self) -> None:
        p, wide = self.p, self.wide
        for i in range(self.rows):
            query = self.first + self.row + i * DOWN
            empty = self.total[i] <= constant(0.0)
            instead = constant(1.0 if self.fill is None else math.nan)
            assign(self.factor, i, tirx.Select(empty, instead, self.total[i]))
            for j in range(wide):
                column = self.lane + j * ACROSS
                conditions = [query < p.queries] if p.queries % self.plan.queries else []
                conditions += [column < p.value_depth] if p.value_depth % ACROSS else []
                value = self.result[i * wide + j] / self.factor[i]
                place = (self.number * p.queries + query) * p.value_depth + column
                if conditions:
                    with T.If(tirx.all(*conditions)), T.Then():
                        T.buffer_store(self.out, value, [place])
                else:
                    T.buffer_store(self.out, value, [place])
