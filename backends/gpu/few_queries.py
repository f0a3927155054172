"""Attention of few queries (a decode step): keys and values are read once, by 128-bit loads, past shared memory.

    a block      4 warps, at most 8 queries of the heads that share keys, a part of the keys
    a team       2 to 32 lanes, which have a key at a time: a lane 4 (8 of 16 bits) neighbours of its k and v
    a step       up to 4 keys of each team

    for every step:   load k and v; for every query: s = q k^T scale + mask, summed over the team by shuffles;
                      top' = max(top, s); p = exp(s - top'); sum = sum exp(top - top') + p; the same of result and p v
    maxima, sums and results of the teams to shared memory; barrier; they are added up, in their order

Where units would have no block, parts of the keys have blocks of their own, and a second kernel adds those up as the
teams are ("flash decoding": Dao, Haziza, Massa and Sizov, 2023). The order of additions is the same in every run.

Registers of 8 queries of a head of 64 in float32: queries 32, results 32, k and v 32, maxima and sums 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.attention_plan import Problem
from ..kernels.loops import Shape, constant, flat, span, typed_kernel
from .attention_mask import Mask
from .dots import widened
from .few_queries_plan import FewPlan, parts_shape, reach
from .own_memory import assign, barrier, registers, shared
from .product import room, store_vector
from .tile import LANES

_LOWEST = -math.inf
_THREADS = 128  # of a block of the second kernel


def few_queries(
    p: Problem,
    plan: FewPlan,
    scale: float,
    shapes: tuple[Shape, Shape, Shape, Shape],
    causal: bool = False,
    mask: tuple[Shape, str, Shape] | None = None,
    fill: float | None = None,
    dtype: str = "float32",
) -> Any:
    """As `attention.attention`, of tensors of `dtype`; with parts of the keys the result is that of `parts_shape`."""
    operands = [(shape, dtype) for shape in shapes[:3]]
    if mask is not None:
        operands.append((mask[2], mask[1]))
    out = (shapes[3], dtype) if plan.parts == 1 else (parts_shape(p, plan), "float32")

    def body(*buffers: Any) -> None:
        with (
            T.launch_thread("blockIdx.x", plan.blocks) as block,
            T.launch_thread("threadIdx.x", plan.threads) as thread,
        ):
            _Block(p, plan, scale, causal, mask, fill, buffers, block, thread).emit()

    return typed_kernel("few_queries", operands, [out], body)


def add_key_parts(p: Problem, plan: FewPlan, out: Shape, fill: float | None, dtype: str = "float32") -> Any:
    """The second kernel: a thread adds up 4 (1) neighbours of a result over the parts."""
    shape = parts_shape(p, plan)
    rows, count, stride = shape
    width = p.value_depth
    lanes = LANES if width % LANES == 0 else 1
    pieces = rows * width // lanes

    def body(parts: Any, out: Any) -> None:
        with (
            T.launch_thread("blockIdx.x", ceil(pieces / _THREADS)) as block,
            T.launch_thread("threadIdx.x", _THREADS) as thread,
        ):
            given, result, piece = flat(parts), flat(out), block * _THREADS + thread

            def add() -> None:
                row, column = tirx.floordiv(piece, width // lanes), tirx.floormod(piece, width // lanes) * lanes
                start = row * (count * stride)
                sums = _Sums(lanes)
                sums.add_up(
                    count,
                    lambda n: given[start + n * stride + width],
                    lambda n: given[start + n * stride + width + 1],
                    lambda n: given[span(start + n * stride + column, lanes)],
                )
                sums.divide(fill)
                store_vector(sums.values, 0, room(result), result, span(row * width + column, lanes), lanes)

            if pieces % _THREADS:
                with T.If(piece < pieces), T.Then():
                    add()
            else:
                add()

    return typed_kernel("add_key_parts", [(shape, "float32")], [(out, dtype)], body)


class _Sums:
    """`lanes` neighbours of a result, added up over what had different maxima."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.values, self.loaded = registers(lanes), registers(lanes)
        self.top, self.total, self.factor = (registers(1) for _ in range(3))

    def add_up(
        self, count: int, top: Callable[[Any], Any], total: Callable[[Any], Any], result: Callable[[Any], Any]
    ) -> None:
        """Over `count` maxima, sums and results."""
        assign(self.top, 0, tirx.const(_LOWEST, "float32"))
        assign(self.total, 0, constant(0.0))
        for i in range(self.lanes):
            assign(self.values, i, constant(0.0))
        with T.serial(0, count) as n:
            assign(self.top, 0, tirx.max(self.top[0], top(n)))
        with T.serial(0, count) as n:
            assign(self.factor, 0, _power(T.bind(top(n)), self.top[0]))
            assign(self.total, 0, self.total[0] + self.factor[0] * total(n))
            T.buffer_store(self.loaded, result(n), [span(0, self.lanes)])
            for i in range(self.lanes):
                assign(self.values, i, self.values[i] + self.factor[0] * self.loaded[i])

    def divide(self, fill: float | None) -> None:
        """By the sum; zeros where nothing was let through, NaN with `fill`."""
        instead = constant(1.0 if fill is None else math.nan)
        assign(self.total, 0, tirx.Select(self.total[0] <= constant(0.0), instead, self.total[0]))
        for i in range(self.lanes):
            assign(self.values, i, self.values[i] / self.total[0])


class _Block:
    """What one block does."""

    def __init__(
        self,
        p: Problem,
        plan: FewPlan,
        scale: float,
        causal: bool,
        mask: tuple[Shape, str, Shape] | None,
        fill: float | None,
        buffers: Sequence[Any],
        block: Any,
        thread: Any,
    ) -> None:
        self.p, self.plan, self.scale, self.fill, self.thread = p, plan, scale, fill, thread
        self.seen = reach(p, causal)
        self.part = tirx.floormod(block, plan.parts)
        number = tirx.floordiv(block, plan.parts)
        self.pair = tirx.floordiv(number, plan.chunks)  # of batch and head of keys
        self.team, self.lane = tirx.floordiv(thread, plan.team), tirx.floormod(thread, plan.team)
        self.together = p.heads // p.key_heads * p.queries
        self.first = tirx.floormod(number, plan.chunks) * plan.rows
        self.q, self.k, self.v = (_Lines(buffer, plan) for buffer in buffers[:3])
        self.out = flat(buffers[-1])
        stopped: tuple[Any, ...] = () if mask is None else (mask[0], mask[1], flat(buffers[3]))
        past = self.seen % plan.step > 0
        self.masks = [
            Mask(p, self.pair * (p.heads // p.key_heads) + tirx.floordiv(row, p.queries), causal, past, fill, *stopped)
            for row in map(self._row, range(plan.rows))
        ]

    def _row(self, i: int) -> Any:
        """Query `i` of the block, among those of the pair; the last one again past the end."""
        return tirx.min(self.first + i, self.together - 1)

    def emit(self) -> None:
        """The statements."""
        p, plan = self.p, self.plan
        mine, rows = plan.lanes * plan.pieces, plan.rows
        self.queries, self.result = registers(rows * mine), registers(rows * mine)
        self.keys, self.values = registers(plan.unrolled * mine), registers(plan.unrolled * mine)
        self.scores, self.new, self.factor = registers(plan.unrolled), registers(1), registers(1)
        self.top, self.total = registers(rows), registers(rows)
        for i in range(rows):
            assign(self.top, i, tirx.const(_LOWEST, "float32"))
            assign(self.total, i, constant(0.0))
            self.q.load(self.queries, i * mine, self.pair * self.together + self._row(i), p.depth, self.lane)
        for i in range(rows * mine):
            assign(self.result, i, constant(0.0))
        steps: Any = ceil(plan.keys / plan.step)
        if plan.parts > 1:
            steps = tirx.min(steps, ceil(self.seen / plan.step) - self.part * steps)
        with T.serial(0, steps) as step:
            first = self.part * plan.keys + step * plan.step + self.team
            keys = [first + u * plan.teams for u in range(plan.unrolled)]
            for lines, held, length in ((self.k, self.keys, p.depth), (self.v, self.values, p.value_depth)):
                for u, key in enumerate(keys):
                    inside = [key < self.seen] if self.seen % plan.step else []
                    lines.load(held, u * mine, self.pair * p.keys + key, length, self.lane, inside)
            for i in range(rows):
                self._score(i, keys)
                self._add(i)
        self._share()

    def _score(self, i: int, keys: Sequence[Any]) -> None:
        """The scores of query `i` and the keys of the step; all lanes of a team have them."""
        plan, mine = self.plan, self.plan.lanes * self.plan.pieces
        for u in range(plan.unrolled):
            assign(self.scores, u, constant(0.0))
            for n in range(mine):
                assign(self.scores, u, self.scores[u] + self.queries[i * mine + n] * self.keys[u * mine + n])
        distance = plan.team // 2
        while distance:
            for u in range(plan.unrolled):
                other = tirx.bitwise_xor(self.lane, distance)
                mask = tirx.const(-1, "int32")
                there = T.bind(T.tvm_warp_shuffle(mask, self.scores[u], other, plan.team, plan.warp_threads))
                assign(self.scores, u, self.scores[u] + there)
            distance //= 2
        query = tirx.floormod(self._row(i), self.p.queries)
        for u, key in enumerate(keys):
            score = self.masks[i].score(self.scores[u] * constant(self.scale), query, key)
            assign(self.scores, u, score)

    def _add(self, i: int) -> None:
        """Their powers, and the values with those, to the sums of query `i`."""
        plan, mine = self.plan, self.plan.lanes * self.plan.pieces
        assign(self.new, 0, self.top[i])
        for u in range(plan.unrolled):
            assign(self.new, 0, tirx.max(self.new[0], self.scores[u]))
        assign(self.factor, 0, _power(self.top[i], self.new[0]))
        assign(self.top, i, self.new[0])
        assign(self.total, i, self.total[i] * self.factor[0])
        for u in range(plan.unrolled):
            assign(self.scores, u, _power(self.scores[u], self.new[0]))
            assign(self.total, i, self.total[i] + self.scores[u])
        for n in range(mine):
            assign(self.result, i * mine + n, self.result[i * mine + n] * self.factor[0])
            for u in range(plan.unrolled):
                power = self.scores[u] * self.values[u * mine + n]
                assign(self.result, i * mine + n, self.result[i * mine + n] + power)

    def _share(self) -> None:
        """Add up over the teams, and write."""
        p, plan = self.p, self.plan
        mine, held = plan.lanes * plan.pieces, plan.teams * plan.rows
        tops, totals, results = shared(held), shared(held), shared(held * plan.width)
        vector = min(plan.lanes, LANES)
        for i in range(plan.rows):
            place = self.team * plan.rows + i
            for n in range(0, mine, vector):
                column = (n // plan.lanes * plan.team + self.lane) * plan.lanes + n % plan.lanes
                value = self.result[span(i * mine + n, vector)]
                T.buffer_store(results, value, [span(place * plan.width + column, vector)])
            with T.If(self.lane == 0), T.Then():
                assign(tops, place, self.top[i])
                assign(totals, place, self.total[i])
        barrier()
        lanes = LANES if plan.lanes % LANES == 0 else 1
        across = p.value_depth // lanes
        pieces = plan.rows * across
        sums, out = _Sums(lanes), room(self.out)
        for turn in range(ceil(pieces / plan.threads)):
            piece = self.thread + turn * plan.threads
            row, column = tirx.floordiv(piece, across), tirx.floormod(piece, across) * lanes
            conditions = [piece < pieces] if (turn + 1) * plan.threads > pieces else []
            conditions += [self.first + row < self.together] if self.together % plan.rows else []

            def write(row: Any = row, column: Any = column) -> None:
                sums.add_up(
                    plan.teams,
                    lambda n: tops[n * plan.rows + row],
                    lambda n: totals[n * plan.rows + row],
                    lambda n: results[span((n * plan.rows + row) * plan.width + column, lanes)],
                )
                self._write(sums, out, self.pair * self.together + self.first + row, column)

            if conditions:
                with T.If(tirx.all(*conditions)), T.Then():
                    write()
            else:
                write()

    def _write(self, sums: _Sums, held: Any, row: Any, column: Any) -> None:
        width = self.p.value_depth
        if self.plan.parts == 1:
            sums.divide(self.fill)
            store_vector(sums.values, 0, held, self.out, span(row * width + column, sums.lanes), sums.lanes)
            return
        start = (row * self.plan.parts + self.part) * parts_shape(self.p, self.plan)[2]
        store_vector(sums.values, 0, held, self.out, span(start + column, sums.lanes), sums.lanes)
        with T.If(column == 0), T.Then():
            assign(self.out, start + width, sums.top[0])
            assign(self.out, start + width + 1, sums.total[0])


class _Lines:
    """Rows of q, k or v, in float32 or 16 bits."""

    def __init__(self, buffer: Any, plan: FewPlan) -> None:
        self.plan, self.dtype = plan, str(buffer.dtype)
        self.words = plan.lanes * 2 // 4 if self.dtype != "float32" and plan.lanes > 1 else 0
        self.values = flat(buffer)
        if self.words:
            size = prod(int(extent) for extent in buffer.shape) // 2
            self.values = T.decl_buffer((size,), "int32", data=buffer.data)
            self.held = T.alloc_buffer((self.words,), "int32", scope="local")

    def load(self, to: Any, at: int, row: Any, length: int, lane: Any, inside: Sequence[Any] = ()) -> None:
        """This lane's elements of `row`, which has `length`, to registers from `at`; zeros past the ends."""
        plan = self.plan
        for piece in range(plan.pieces):
            column = (piece * plan.team + lane) * plan.lanes
            conditions = [*inside, *([column < length] if (piece + 1) * plan.team * plan.lanes > length else [])]
            element, first = row * length + column, at + piece * plan.lanes
            if self.words:
                value = self._guarded(span(tirx.floordiv(element, 2), self.words), conditions, self.words, "int32")
                T.buffer_store(self.held, value, [span(0, self.words)])
                for i in range(plan.lanes):
                    assign(to, first + i, widened(self.held[i // 2], i % 2, self.dtype))
            else:
                value = self._guarded(span(element, plan.lanes), conditions, plan.lanes, self.dtype)
                value = value if self.dtype == "float32" else tirx.Cast("float32", value)
                T.buffer_store(to, value, [span(first, plan.lanes)])

    def _guarded(self, index: Any, conditions: Sequence[Any], lanes: int, dtype: str) -> Any:
        if not conditions:
            return self.values[index]
        zero = tirx.const(0, dtype)
        zeros = zero if lanes == 1 else tirx.Broadcast(zero, lanes)
        return tirx.if_then_else(tirx.all(*conditions), self.values[index], zeros)


def _power(score: Any, top: Any) -> Any:
    """exp(score - top), 0 of what is not let through."""
    return tirx.Select(score <= tirx.const(_LOWEST, "float32"), constant(0.0), tirx.exp(score - top))
