"""Attention on matrix units: online softmax (attention.py) between two products of 16 bits with sums in float32.

    a block      4 (2, 1) warps with 16 queries each, of one head; keys and values in shared memory, two tiles of each
    a warp       16 queries x 32 (16) keys of scores, 16 queries x all columns of the result, in registers

    queries through shared memory into registers; fetch tile 0, put it, barrier
    for every two tiles, twice:
        fetch the next keys; s = q k^T; put them; s = s scale + mask
        top' = max(top, s); p = exp(s - top'); sum = sum exp(top - top') + p
        fetch the next values; result = result exp(top - top') + p v; put the values; barrier

The powers p of a lane are what it holds of the left operand of p v: neither shared memory nor a shuffle is between the
products (Tao and others, FlashAttention-2, 2023). Rounded: q, k, v and p, which is at most 1; the sum has p unrounded.

Registers of a head of 64 (128): result 32 (64), queries 16 (32), scores 16 (8), powers 8 (4), fetched 16 (16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu
from ..kernels.attention_plan import Problem
from ..kernels.loops import Shape, constant, flat, span, typed_kernel
from .attention_mask import Mask
from .copies import wait_for_copies
from .matrix_tile import SIDE
from .own_memory import assign, barrier, registers
from .product import flat_result, room, store_vector
from .product_call import as_words, lanes
from .rounding import rounded
from .stage import HalfStage, Halves, Operand, Stage

_WARPS = (4, 2, 1)
_SHALLOW = 64  # heads whose tiles have 32 keys, not 16
_FETCHED = 16  # values of a tile that a thread carries, at most


class Lanes(Protocol):
    """How lanes hold fragments: mma.MmaLanes, amd_fragments.AmdLanes."""

    dtype: str
    rows: int
    each: int
    neighbours: int
    part: int

    @property
    def sharing(self) -> tuple[int, ...]: ...
    def row(self, number: int) -> Any: ...
    def column(self, number: int) -> Any: ...
    def at(self, row: int, number: int) -> int: ...
    def load_rows(self, held: Any, at: int, tile: Any, stride: int, row: Any, k: int) -> None: ...
    def load_columns(self, held: Any, at: int, tile: Any, stride: int, column: Any, k: int) -> None: ...
    def load_columns_turned(self, held: Any, at: int, tile: Any, stride: int, column: int, k: int) -> None: ...
    def multiply(self, sums: Any, at: int, rows: Any, row_at: int, columns: Any, column_at: int) -> None: ...


@dataclass(frozen=True)
class MatrixPlan:
    """Warps of a block, with 16 queries each, and keys of a tile."""

    warps: int
    keys: int
    dtype: str
    blocks: int
    warp_threads: int = 32
    copies: int = 1  # lanes that hold the same part of an operand

    @property
    def queries(self) -> int:
        """Of a block."""
        return self.warps * SIDE

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * self.warp_threads

    @property
    def reason(self) -> str:
        """What the report says of it."""
        return (
            f"{self.queries} queries x {self.keys} keys a block on matrix units, online softmax, {self.blocks} blocks"
        )


def plan_matrix_attention(hw: Hardware, p: Problem, dtype: str) -> MatrixPlan:
    """The most warps a block that give every unit a block, or as few as can carry a tile of keys."""
    warp = int(getattr(hw, "warp_threads", None) or 32)
    copies = hw.operand_copies if isinstance(hw, Gpu) else 1
    deepest = max(_padded(p.depth), _padded(p.value_depth))
    keys = 2 * SIDE if deepest <= _SHALLOW else SIDE
    plans = [
        MatrixPlan(warps, keys, dtype, p.batch * p.heads * ceil(p.queries / (warps * SIDE)), warp, copies)
        for warps in _WARPS
        if warps * warp * _FETCHED >= keys * deepest
    ]
    return next((plan for plan in plans if plan.blocks >= hw.cores), plans[-1])


def matrix_attention(
    p: Problem,
    plan: MatrixPlan,
    scale: float,
    shapes: tuple[Shape, Shape, Shape, Shape],
    units: Callable[[str, Any], Lanes],
    causal: bool = False,
    mask: tuple[Shape, str, Shape] | None = None,
    fill: float | None = None,
    dtypes: Sequence[str] = ("float32",) * 4,
    asynchronous: bool = False,
) -> Any:
    """As `attention.attention`; `units(dtype, lane)` says how lanes hold fragments.

    `dtypes` of q, k, v and the result: float32, or that of the plan. `asynchronous`: the device copies what is 16 bits
    in memory past the registers.
    """
    operands = list(zip(shapes[:3], dtypes[:3], strict=True))
    if mask is not None:
        operands.append((mask[2], mask[1]))

    def body(*buffers: Any) -> None:
        tiles = ceil(p.queries / plan.queries)
        with (
            T.launch_thread("blockIdx.x", p.batch * p.heads * tiles) as block,
            T.launch_thread("threadIdx.x", plan.threads) as thread,
        ):
            number, first = tirx.floordiv(block, tiles), tirx.floormod(block, tiles) * plan.queries
            stopped: tuple[Any, ...] = () if mask is None else (mask[0], mask[1], flat(buffers[3]))
            # Tiles come in twos: the last one may lie past the end as a whole.
            masked = Mask(p, number, causal, p.keys % (2 * plan.keys) > 0, fill, *stopped)
            lane = units(plan.dtype, tirx.floormod(thread, plan.warp_threads))
            _Block(p, plan, scale, lane, masked, (*buffers[:3], buffers[-1]), first, thread, asynchronous).emit()

    return typed_kernel("attention", operands, [(shapes[3], dtypes[3])], body)


class _Block:
    """What one block does."""

    def __init__(
        self,
        p: Problem,
        plan: MatrixPlan,
        scale: float,
        lane: Lanes,
        mask: Mask,
        buffers: tuple[Any, ...],
        first: Any,
        thread: Any,
        asynchronous: bool,
    ) -> None:
        self.p, self.plan, self.scale, self.lane, self.mask, self.first = p, plan, scale, lane, mask, first
        self.row = tirx.floordiv(thread, plan.warp_threads) * SIDE
        self.thread, self.asynchronous = thread, asynchronous
        q, k, v, out = buffers
        self.out = flat_result(out, None if str(out.dtype) == "float32" else lane.dtype)
        number = mask.number
        head = tirx.floormod(number, p.heads)
        group = tirx.floordiv(number, p.heads) * p.key_heads + tirx.floordiv(head, p.heads // p.key_heads)
        self.depth, self.width = _padded(p.depth), _padded(p.value_depth)
        self.q = self._stage(_lines(q, number, p.queries, p.depth), self.depth, plan.queries, 1)
        self.k = self._stage(_lines(k, group, p.keys, p.depth), self.depth, self.plan.keys)
        self.v = self._stage(_lines(v, group, p.keys, p.value_depth, turned=True), self.plan.keys, self.width)

    def _stage(self, operand: Operand | Halves, depth: int, width: int, slots: int = 2) -> Stage | HalfStage:
        threads, thread, dtype = self.plan.threads, self.thread, self.lane.dtype
        if isinstance(operand, Halves):
            return HalfStage(operand, depth, width, threads, thread, dtype, self.asynchronous, slots)
        return Stage(operand, depth, width, threads, thread, dtype, slots)

    def emit(self) -> None:
        """The statements."""
        p, lane, dtype = self.p, self.lane, self.lane.dtype
        self.operand = lane.part * self.plan.copies  # of a fragment in a lane
        self.queries = registers(self.depth // SIDE * self.operand, dtype)
        self.held = registers(self.operand, dtype)
        self.scores = registers(self.plan.keys // SIDE * lane.part)
        self.powers = registers(self.plan.keys // SIDE * lane.part, dtype)
        self.result = registers(self.width // SIDE * lane.part)
        self.top, self.total, self.new, self.factor = (registers(lane.rows) for _ in range(4))
        for r in range(lane.rows):
            assign(self.top, r, tirx.const(-math.inf, "float32"))
            assign(self.total, r, constant(0.0))
        for i in range(self.width // SIDE * lane.part):
            assign(self.result, i, constant(0.0))
        self.q.fetch(0, self.first, 0)
        self.q.put(0)
        self._arrived(self.q)
        for i in range(self.depth // SIDE):
            lane.load_rows(self.queries, i * self.operand, self.q.shared[0], self.q.stride, self.row, i * SIDE)
        tiles = ceil(p.keys / self.plan.keys)
        count: Any = tiles
        if self.mask.causal:
            count = tirx.min(tirx.floordiv(self.first + self.plan.queries - 1, self.plan.keys) + 1, tiles)
        barrier()  # TVM puts the queries where keys come
        self._fetch_keys(0, tiles, 0)
        self.k.put(0)
        self.v.fetch(0, 0, 0)
        self.v.put(0)
        self._arrived(self.k, self.v)
        with T.serial(0, tirx.floordiv(count + 1, 2)) as pair:
            for slot in (0, 1):
                tile = pair * 2 + slot
                self._fetch_keys(tile + 1, tiles, 1 - slot)
                self._score(slot, tile * self.plan.keys)
                self.k.put(1 - slot)
                self._soften()
                self.v.fetch(tile + 1, 0, 1 - slot)
                self._mix(slot)
                self.v.put(1 - slot)
                self._arrived(self.k, self.v)
        self._store()

    @staticmethod
    def _arrived(*stages: Stage | HalfStage) -> None:
        """Wait until all threads have put, or copied, what they fetched."""
        if any(isinstance(stage, HalfStage) and stage.asynchronous for stage in stages):
            wait_for_copies()
        barrier()

    def _fetch_keys(self, tile: Any, tiles: int, slot: int) -> None:
        # Past the last tile there is none to read: its scores are stopped by their numbers.
        self.k.fetch(0, tirx.min(tile, tiles - 1) * self.plan.keys, slot)

    def _score(self, slot: int, first_key: Any) -> None:
        """Scores of this lane, scaled and masked."""
        lane = self.lane
        for i in range(self.plan.keys // SIDE * lane.part):
            assign(self.scores, i, constant(0.0))
        for i in range(self.plan.keys // SIDE):
            for k in range(self.depth // SIDE):
                lane.load_columns(self.held, 0, self.k.shared[slot], self.k.stride, i * SIDE, k * SIDE)
                lane.multiply(self.scores, i * lane.part, self.queries, k * self.operand, self.held, 0)
        for i, r, n in self._places(self.plan.keys):
            at = i * lane.part + lane.at(r, n)
            query, key = self.first + self.row + lane.row(r), first_key + i * SIDE + lane.column(n)
            assign(self.scores, at, self.mask.score(self.scores[at] * constant(self.scale), query, key))

    def _places(self, columns: int, row: int | None = None) -> list[tuple[int, int, int]]:
        """Fragment, row and number of every value of this lane, or of one row of it."""
        rows = range(self.lane.rows) if row is None else (row,)
        return [(i, r, n) for r in rows for i in range(columns // SIDE) for n in range(self.lane.each)]

    def _soften(self) -> None:
        """Scores to powers of the new maximum; the factor of what came before."""
        lane, lowest = self.lane, tirx.const(-math.inf, "float32")
        mine = [
            [i * lane.part + lane.at(r, n) for i, _, n in self._places(self.plan.keys, r)] for r in range(lane.rows)
        ]
        for r, places in enumerate(mine):
            assign(self.new, r, self._folded(places, tirx.max))
        self._exchange(tirx.max)
        for r, places in enumerate(mine):
            assign(self.new, r, tirx.max(self.new[r], self.top[r]))
            before = tirx.Select(self.top[r] <= lowest, constant(0.0), tirx.exp(self.top[r] - self.new[r]))
            assign(self.factor, r, before)
            assign(self.top, r, self.new[r])
            for at in places:
                power = tirx.Select(self.scores[at] <= lowest, constant(0.0), tirx.exp(self.scores[at] - self.top[r]))
                assign(self.scores, at, power)
                assign(self.powers, at, rounded(self.scores[at], lane.dtype))
            assign(self.new, r, self._folded(places, lambda x, y: x + y))
        self._exchange(lambda x, y: x + y)
        for r in range(lane.rows):
            assign(self.total, r, self.total[r] * self.factor[r] + self.new[r])

    def _folded(self, places: list[int], combine: Callable[[Any, Any], Any]) -> Any:
        whole = self.scores[places[0]]
        for at in places[1:]:
            whole = combine(whole, self.scores[at])
        return whole

    def _exchange(self, combine: Callable[[Any, Any], Any]) -> None:
        """Reduce `new` over the lanes that share rows; each has the result."""
        width, number = self.plan.warp_threads, tirx.floormod(self.thread, self.plan.warp_threads)
        for distance in self.lane.sharing:
            for r in range(self.lane.rows):
                other = tirx.bitwise_xor(number, distance)
                there = T.bind(T.tvm_warp_shuffle(tirx.const(-1, "int32"), self.new[r], other, width, width))
                assign(self.new, r, combine(self.new[r], there))

    def _mix(self, slot: int) -> None:
        lane = self.lane
        for i, r, n in self._places(self.width):
            at = i * lane.part + lane.at(r, n)
            assign(self.result, at, self.result[at] * self.factor[r])
        for k in range(self.plan.keys // SIDE):
            powers, at = self._powers_of(k)
            for i in range(self.width // SIDE):
                lane.load_columns_turned(self.held, 0, self.v.shared[slot], self.v.stride, i * SIDE, k * SIDE)
                lane.multiply(self.result, i * lane.part, powers, at, self.held, 0)

    def _powers_of(self, k: int) -> tuple[Any, int]:
        """Where the powers of keys `k` * 16 lie, as an operand has them.

        Of two copies each half of the wave has one half of the keys, and needs both in their order.
        """
        part, words = self.lane.part, self.lane.part // 2
        if self.plan.copies == 1:
            return self.powers, k * part
        both = registers(2 * part, self.lane.dtype)
        mine, to = (
            T.decl_buffer((size,), "int32", data=buffer.data, scope="local")
            for buffer, size in ((self.powers, self.plan.keys // SIDE * words), (both, 2 * words))
        )
        width = self.plan.warp_threads
        number = tirx.floormod(self.thread, width)
        lower = number < SIDE
        for i in range(words):
            own = T.bind(mine[k * words + i])
            other = tirx.bitwise_xor(number, SIDE)
            there = T.bind(T.tvm_warp_shuffle(tirx.const(-1, "int32"), own, other, width, width))
            assign(to, i, tirx.Select(lower, own, there))
            assign(to, words + i, tirx.Select(lower, there, own))
        return both, 0

    def _store(self) -> None:
        p, lane, held = self.p, self.lane, room(self.out)
        wide = lane.neighbours if p.value_depth % lane.neighbours == 0 else 1
        for r in range(lane.rows):
            query = self.first + self.row + lane.row(r)
            instead = constant(1.0 if self.mask.fill is None else math.nan)
            assign(self.factor, r, tirx.Select(self.total[r] <= constant(0.0), instead, self.total[r]))
            for i, _, n in self._places(self.width, r):
                at = i * lane.part + lane.at(r, n)
                assign(self.result, at, self.result[at] / self.factor[r])
            for i, _, n in self._places(self.width, r):
                if n % wide:
                    continue
                column, at = i * SIDE + lane.column(n), i * lane.part + lane.at(r, n)
                conditions = [query < p.queries] if p.queries % self.plan.queries else []
                conditions += [column < p.value_depth] if p.value_depth % SIDE else []
                place = (self.mask.number * p.queries + query) * p.value_depth + column
                if conditions:
                    with T.If(tirx.all(*conditions)), T.Then():
                        store_vector(self.result, at, held, self.out, span(place, wide), wide)
                else:
                    store_vector(self.result, at, held, self.out, span(place, wide), wide)


def _lines(buffer: Any, number: Any, extent: int, length: int, turned: bool = False) -> Operand | Halves:
    """The `extent` lines of `length` of head `number`, along the sum, or along the width where `turned`."""
    wide = lanes(length)
    dense = flat(buffer)
    if str(buffer.dtype) != "float32":
        words = as_words(buffer)
        if turned:
            return Halves(words, lambda k, c: ((number * extent + k) * length + c, None), extent, length, "width")
        return Halves(words, lambda k, c: ((number * extent + c) * length + k, None), length, extent)

    def read(along: Any, line: Any) -> Any:
        return dense[span((number * extent + line) * length + along, wide)]

    if turned:
        return Operand(lambda line, along: read(along, line), extent, length, "width", wide)
    return Operand(read, length, extent, "depth", wide)


def _padded(extent: int) -> int:
    return -(-extent // SIDE) * SIDE
