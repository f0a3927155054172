"""Scaled dot-product attention, softmax(q . k^T * scale + mask) . v, head by head with the scores in cache.

    head       k is packed transposed [ceil(S_k/NR)][D][NR], v [ceil(D_v/NV)][S_k][NV]; once per task and key head
    block      some query rows: scores[rows][S_k] by row tiles MR x NR, scaled as they are stored; then row by row
               the mask, the maximum, e^(score - maximum) and its sum; then row tiles MR x NV of scores . v, divided
               by the sums as they are stored. The block is sized so that its scores stay in L2, so no online
               rescaling is needed.
    causal     panels of k wholly above the diagonal are skipped, and so are their rows of v

    tasks      (batch, head, part of the query blocks): equal shares for the cores

A row that is masked everywhere gives zeros, as torch does (`_safe_softmax`); NaN scores give NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling, choose_tiling
from .gemv import across
from .loops import Shape, between, constant, share, span, spread, typed_kernel, view
from .matmul import clear, each_row_tile, each_vector, first_row, multiply_tile
from .packing import pack_panel, pack_panel_transposed
from .vector_math import exp_nonpositive

Layout = Literal["BHSD", "BSHD"]


@dataclass(frozen=True)
class Placement:
    """Where an operand's element [b, h, s, d] lies in its buffer, in floats: offset + b, h, s times strides, + d."""

    offset: int
    batch: int
    head: int
    position: int


def dense(layout: Layout, heads: int, positions: int, depth: int) -> Placement:
    """The placement of a buffer that holds just that operand."""
    if layout == "BHSD":
        return Placement(0, heads * positions * depth, positions * depth, depth)
    return Placement(0, heads * positions * depth, depth, heads * depth)


@dataclass(frozen=True)
class Problem:
    """The extents of one attention: queries S_q x D against keys S_k x D and values S_k x D_v."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    depth: int
    value_depth: int


@dataclass(frozen=True)
class Plan:
    """The tiles of the two products (the same row tiles), the query blocks and the split over cores."""

    scores: Tiling
    values: Tiling
    blocks: int
    parts: int  # tasks of one head
    tasks: int
    reason: str


def plan_attention(hw: Hardware, p: Problem, causal: bool, query_stride_bytes: int | None = None) -> Plan:
    """Choose tiles, block size and split from the hardware's facts.

    `query_stride_bytes` separates a head's queries; by default they are dense.
    """
    stride = 4 * p.depth if query_stride_bytes is None else query_stride_bytes
    scores, values = min(
        (_tiles(hw, p, rows, stride) for rows in range(1, min(p.queries, 16) + 1)),
        key=lambda pair: pair[0].cycles * pair[0].tasks + pair[1].cycles * pair[1].tasks,
    )
    l2 = hw.cache(2)
    size = l2.size_bytes // l2.shared_by_cores if l2 else 256 * 1024
    rows = max(1, min(64, size // 4 // (4 * p.keys)))  # the scores of a block take a quarter of L2 at most
    blocks = min(scores.row_tiles, max(1, -(-p.queries // rows)))
    pairs = p.batch * p.heads
    tasks = min(hw.cores, pairs * blocks)
    flops = 2.0 * pairs * p.queries * p.keys * (p.depth + p.value_depth) * (0.6 if causal else 1.0)
    peak = hw.peak_flops("float32") or 2e9 * hw.cores * 2 * hw.lanes("float32") * hw.fma_per_cycle
    if flops / (peak / hw.cores) * 1e6 < 2 * hw.launch_us:
        tasks = 1
    parts = 1
    while parts < blocks and -(-pairs * parts // tasks) * tasks > 1.05 * pairs * parts:
        parts += 1
    reason = (
        f"{pairs} heads x {blocks} blocks of {-(-p.queries // blocks)} queries, tiles {scores.rows}x{scores.columns} "
        f"and {values.rows}x{values.columns}, {tasks} {'task' if tasks == 1 else 'tasks'}"
    )
    return Plan(replace(scores, row_chunks=blocks), replace(values, row_chunks=blocks), blocks, parts, tasks, reason)


def _tiles(hw: Hardware, p: Problem, rows: int, stride: int) -> tuple[Tiling, Tiling]:
    """The tilings of q . k^T and of scores . v on row tiles of `rows`."""
    pairs = p.batch * p.heads
    return (
        choose_tiling(hw, p.queries, p.keys, p.depth, row_stride_bytes=stride, repeats=pairs, fixed_rows=rows),
        choose_tiling(
            hw, p.queries, p.value_depth, p.keys, row_stride_bytes=4 * p.keys + 64, repeats=pairs, fixed_rows=rows
        ),
    )


def attention(
    p: Problem,
    hw: Hardware,
    scale: float,
    *,
    causal: bool = False,
    mask: tuple[Shape, str] | None = None,
    mask_buffer: Shape | None = None,
    layout: Layout = "BHSD",
    placements: tuple[Placement, Placement, Placement, Placement] | None = None,
    buffer_shapes: tuple[Shape, Shape, Shape, Shape] | None = None,
    plan: Plan | None = None,
) -> Any:
    """Return the kernel (q, k, v[, mask], out).

    `mask` is (shape, "float32" added or "bool" true = attend), broadcastable to [batch, heads, S_q, S_k]. q, k, v
    and out lie as `layout` says, or wherever `placements` puts them in buffers of `buffer_shapes` (so that one buffer
    can hold q, k and v side by side; out must be dense). `mask_buffer` is the mask's declared shape where another.
    """
    plan = plan or plan_attention(hw, p, causal)
    extents = (
        (p.heads, p.queries, p.depth),
        (p.key_heads, p.keys, p.depth),
        (p.key_heads, p.keys, p.value_depth),
        (p.heads, p.queries, p.value_depth),
    )
    places = placements or tuple(dense(layout, *extent) for extent in extents)
    declared = buffer_shapes or tuple(
        (p.batch, h, s, d) if layout == "BHSD" else (p.batch, s, h, d) for h, s, d in extents
    )

    def body(*buffers: Any) -> None:
        q, k, v, out = (
            _Heads(view(buffer, (prod(shape),)), place)
            for buffer, shape, place in zip((*buffers[:3], buffers[-1]), declared, places, strict=True)
        )
        bias = _mask(view(buffers[3], (1,) * (4 - len(mask[0])) + mask[0]), mask[1]) if mask else None
        with T.parallel(0, plan.tasks) if plan.tasks > 1 else T.serial(0, 1) as task:
            block = _Block(p, plan, causal, scale, bias)
            packed_head = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(packed_head, tirx.const(-1, "int32"), [0])
            with between(*share(p.batch * p.heads * plan.parts, plan.tasks, task)) as unit:
                pair = tirx.floordiv(unit, plan.parts)
                part = tirx.floormod(unit, plan.parts)
                b, h = tirx.floordiv(pair, p.heads), tirx.floormod(pair, p.heads)
                kh = tirx.floordiv(h, p.heads // p.key_heads)
                with T.If(packed_head[0] != b * p.key_heads + kh), T.Then():
                    block.pack(k, v, b, kh)
                    T.buffer_store(packed_head, b * p.key_heads + kh, [0])
                with between(*share(plan.blocks, plan.parts, part)) as index:
                    block.run(q, out, b, h, index)

    operands = [(shape, "float32") for shape in declared[:3]]
    operands += [(mask_buffer or mask[0], mask[1])] if mask else []
    return typed_kernel("attention", operands, [(declared[3], "float32")], body)


@dataclass(frozen=True)
class _Heads:
    """A flat buffer read as [batch, head, position, channel]."""

    buffer: Any
    placement: Placement

    def place(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The index of an element, or of neighbouring channels."""
        p = self.placement
        return p.offset + b * p.batch + h * p.head + s * p.position + d

    def at(self, b: Any, h: Any, s: Any, d: Any) -> Any:
        """The element, or a vector of channels."""
        return self.buffer[self.place(b, h, s, d)]


def _mask(buffer: Any, dtype: str) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """A function (score, batch, head, query, key) -> masked score."""
    shape = tuple(int(n) for n in buffer.shape)

    def apply(score: Any, *where: Any) -> Any:
        value = buffer[tuple(0 if extent == 1 else index for extent, index in zip(shape, where, strict=True))]
        return score + value if dtype == "float32" else tirx.Select(value, score, constant(float("-inf")))

    return apply


class _Block:
    """One task's scratch, and the emission of one query block into it."""

    def __init__(self, p: Problem, plan: Plan, causal: bool, scale: float, bias: Any | None) -> None:
        self.p, self.plan, self.causal, self.scale, self.bias = p, plan, causal, scale, bias
        s, v = plan.scores, plan.values
        self.lanes = s.lanes
        rows = -(-s.row_tiles // plan.blocks) * s.rows
        width = s.panels * s.columns
        # One cache line more: a row stride that is a multiple of 4096 bytes would put a tile's rows in one L1 set.
        stride = width + 64 // 4
        self.acc = T.alloc_buffer((s.rows * max(s.columns, v.columns),), "float32", scope="local")
        self.k = T.alloc_buffer((s.panels, p.depth, s.columns), "float32", scope="global")
        self.v = T.alloc_buffer((v.panels, p.keys, v.columns), "float32", scope="global")
        self.scores = T.alloc_buffer((rows, stride), "float32", scope="global")
        self.inverse = T.alloc_buffer((rows,), "float32", scope="local")
        self.lane = T.alloc_buffer((4 * self.lanes,), "float32", scope="local")
        self.edge = T.alloc_buffer((v.rows * v.columns,), "float32", scope="local")

    def pack(self, k: _Heads, v: _Heads, b: Any, h: Any) -> None:
        """Lay out one head's keys (transposed) and values in panels."""
        p, s, t = self.p, self.plan.scores, self.plan.values
        with T.serial(0, s.panels) as panel:
            pack_panel_transposed(
                lambda value, d, j: T.buffer_store(self.k, value, [panel, d, j]),
                lambda n, d: k.at(b, h, n, d),
                p.depth,
                panel * s.columns,
                p.keys,
                s.columns,
                self.lanes,
            )
        with T.serial(0, t.panels) as panel:
            pack_panel(
                lambda value, n, j: T.buffer_store(self.v, value, [panel, n, j]),
                lambda n, d: v.at(b, h, n, d),
                p.keys,
                panel * t.columns,
                p.value_depth,
                t.columns,
                self.lanes,
            )

    def run(self, q: _Heads, out: _Heads, b: Any, h: Any, index: Any) -> None:
        """Scores, softmax and values of query block `index`."""
        p, s, t = self.p, self.plan.scores, self.plan.values
        start = first_row(s, index)
        stop = first_row(s, index + 1) if self.plan.blocks > 1 else p.queries
        panels: Any = s.panels
        keys: Any = p.keys
        if self.causal:  # the last row of the block attends to keys 0..stop-1
            keys = tirx.min(p.keys, stop)
            panels = tirx.floordiv(keys + (s.columns - 1), s.columns)
        with T.serial(0, panels) as panel:
            each_row_tile(s, index, lambda rows, row: self._score_tile(q, b, h, rows, row, start, panel))
        with T.serial(0, stop - start) as r:
            self._softmax(b, h, start + r, r, keys, panels)
        with T.serial(0, t.panels) as panel:
            each_row_tile(s, index, lambda rows, row: self._value_tile(out, b, h, rows, row, start, panel, keys))

    def _score_tile(self, q: _Heads, b: Any, h: Any, rows: int, row: Any, start: Any, panel: Any) -> None:
        s = self.plan.scores
        clear(self.acc, rows, s)
        multiply_tile(
            self.acc,
            rows,
            s,
            self.p.depth,
            lambda a, d: q.at(b, h, row + a, d),
            lambda d, column: self.k[panel, d, span(column, self.lanes)],
        )
        scale = constant(self.scale, self.lanes)
        each_vector(
            rows,
            s,
            lambda at, a, j: T.buffer_store(
                self.scores,
                self.acc[at] * scale,
                [row - start + a, span(panel * s.columns + j, self.lanes)],
            ),
        )

    def _softmax(self, b: Any, h: Any, row: Any, r: Any, keys: Any, panels: Any) -> None:
        s, lanes = self.plan.scores, self.lanes
        if self.bias is not None:
            with T.serial(0, keys) as j:
                T.buffer_store(self.scores, self.bias(self.scores[r, j], b, h, row, j), [r, j])
        # Columns that do not exist, or lie above the diagonal, up to the end of the last panel.
        attended = tirx.min(keys, row + 1) if self.causal else keys
        if self.causal or self.p.keys % s.columns:
            with between(attended, panels * s.columns) as j:
                T.buffer_store(self.scores, constant(float("-inf")), [r, j])

        # Up to four chains of vectors hide the latency of the maximum and of the sum.
        vectors = s.columns // lanes
        chains = next(n for n in (4, 3, 2, 1) if vectors % n == 0)
        lane = [span(j * lanes, lanes) for j in range(chains)]
        groups = panels * (vectors // chains)

        def score(group: Any, j: int) -> Any:
            return span((group * chains + j) * lanes, lanes)

        for at in lane:
            T.buffer_store(self.lane, constant(float("-inf"), lanes), [at])
        with T.serial(0, groups) as group:
            for j, at in enumerate(lane):
                T.buffer_store(self.lane, tirx.max(self.lane[at], self.scores[r, score(group, j)]), [at])
        highest = T.bind(across([self.lane[at] for at in lane], tirx.max, lanes))
        # A row of -inf only: e^(-inf - 0) = 0 everywhere, instead of -inf - -inf.
        shift = T.bind(tirx.Select(highest == constant(float("-inf")), constant(0.0), highest))
        for at in lane:
            T.buffer_store(self.lane, constant(0.0, lanes), [at])
        with T.serial(0, groups) as group:
            for j, at in enumerate(lane):
                place = score(group, j)
                value = T.bind(exp_nonpositive(self.scores[r, place] - spread(shift, lanes)))
                T.buffer_store(self.scores, value, [r, place])
                T.buffer_store(self.lane, self.lane[at] + value, [at])
        total = T.bind(across([self.lane[at] for at in lane], lambda x, y: x + y, lanes))
        inverse = tirx.Select(total == constant(0.0), constant(0.0), constant(1.0) / total)
        T.buffer_store(self.inverse, inverse, [r])

    def _value_tile(self, out: _Heads, b: Any, h: Any, rows: int, row: Any, start: Any, panel: Any, keys: Any) -> None:
        t, lanes = self.plan.values, self.lanes
        clear(self.acc, rows, t)
        multiply_tile(
            self.acc,
            rows,
            t,
            keys,
            lambda a, k: self.scores[row - start + a, k],
            lambda k, column: self.v[panel, k, span(column, lanes)],
        )

        def value(at: Any, a: Any) -> Any:
            return self.acc[at] * spread(self.inverse[row - start + a], lanes)

        def store() -> None:
            each_vector(
                rows,
                t,
                lambda at, a, j: T.buffer_store(
                    out.buffer, value(at, a), [out.place(b, h, row + a, span(panel * t.columns + j, lanes))]
                ),
            )

        def store_part(width: int) -> None:
            each_vector(rows, t, lambda at, a, j: T.buffer_store(self.edge, value(at, a), [at]))
            with T.serial(0, rows) as a, T.serial(0, width) as j:
                place = out.place(b, h, row + a, panel * t.columns + j)
                T.buffer_store(out.buffer, self.edge[a * t.columns + j], [place])

        full, tail = divmod(self.p.value_depth, t.columns)
        if not tail:
            store()
        elif not full:
            store_part(tail)
        else:
            with T.If(panel < full):
                with T.Then():
                    store()
                with T.Else():
                    store_part(tail)


def problem(q: Shape, k: Shape, v: Shape) -> Problem:
    """The extents of operands of shapes [..., H, S, D]; a missing head or batch dimension counts one."""
    q, k, v = ((1,) * (3 - len(shape)) + shape for shape in (q, k, v))
    return Problem(prod(q[:-3]), q[-3], k[-3], q[-2], k[-2], q[-1], v[-1])
