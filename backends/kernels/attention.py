"""Scaled dot-product attention, softmax(q . k^T * scale + mask) . v, block by block with the scores in L1.

    head       k is packed transposed [ceil(S_k/NR)][D][NR], v [ceil(D_v/NV)][S_k][NV]; once per task and key head
    block      some rows of q, scaled, side by side; scores[rows][S_k] by row tiles MR x NR, masked as they are stored,
               with the largest of each lane; e^(score - maximum) and its sum, row by row; then row tiles MR x NV of
               scores . v, divided by the sums as they are stored
    causal     panels of k wholly above the diagonal are skipped, and so are their rows of v

               k columns ->             lanes
             +-----+-----+-----+      +-------+
      q rows | MR x NR   |     |  ->  |maximum|  one row each; a square of `lanes` rows is folded at once
             +-----+-----+-----+      +-------+

    in place   few rows: NR dot products of one row with NR keys at once (NR accumulators + one vector of q); results
               by rows of v, D_v / lanes accumulators + one broadcast, a chunk of v for all rows while it is in L1
    tasks      units (batch, group of heads, part of the blocks), dealt out in equal runs

A row of -inf only gives zeros, as torch does (`_safe_softmax`), or NaN where `fill` is given, as softmax does; NaN
gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .attention_operands import Bias, Heads, Rows, located, masking
from .attention_plan import CHUNK, Layout, Placement, Plan, Problem, dense, plan_attention, value_columns
from .loops import Shape, between, constant, share, span, spread, typed_kernel, view
from .matmul import clear, each_row_tile, each_vector, first_row, multiply_tile
from .packing import fold_lanes, pack_panel, pack_panel_transposed
from .vector_math import exp_nonpositive


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
    fill: float | None = None,
    tables: tuple[bool, bool] = (False, False),
) -> Any:
    """Return the kernel (q, k, v[, mask][, rows][, rows of out], out).

    `mask` is (shape, "float32" added or "bool" true = attend), broadcastable to [batch, heads, S_q, S_k]. q, k, v
    and out lie as `layout` says, or wherever `placements` puts them in buffers of `buffer_shapes` (so that one buffer
    can hold q, k and v side by side; out must be dense). `mask_buffer` is the mask's declared shape where another.
    `tables`: whether int32 numbers [batch, positions] stand for the positions of q, k and v, and of out. `fill` is what
    keys score that a bool mask hides, None as in torch.
    """
    extents = (
        (p.heads, p.queries, p.depth),
        (p.key_heads, p.keys, p.depth),
        (p.key_heads, p.keys, p.value_depth),
        (p.heads, p.queries, p.value_depth),
    )
    places = placements or tuple(dense(layout, *extent) for extent in extents)
    plan = plan or plan_attention(hw, p, causal, mask is not None, places[2].position)
    declared = buffer_shapes or tuple(
        (p.batch, h, s, d) if layout == "BHSD" else (p.batch, s, h, d) for h, s, d in extents
    )
    heads = p.heads // plan.group

    def body(*buffers: Any) -> None:
        q, k, v, out = located(buffers, declared, places, tables)
        bias = masking(view(buffers[3], (1,) * (4 - len(mask[0])) + mask[0]), mask[1], fill) if mask else None
        with T.parallel(0, plan.tasks) if plan.tasks > 1 else T.serial(0, 1) as task:
            block = _Block(hw, p, plan, causal, scale, bias, 0.0 if fill is None else float("nan"))
            packed_head = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(packed_head, tirx.const(-1, "int32"), [0])
            # A known number of tiles would be unrolled, and then some of the copies spill accumulators. No task has a
            # number so large that this bit is set.
            hidden = tirx.bitwise_and(task, tirx.const(1 << 20, "int32"))
            with between(*share(p.batch * heads * plan.parts, plan.tasks, task)) as unit:
                pair = tirx.floordiv(unit, plan.parts)
                part = tirx.floormod(unit, plan.parts)
                b, h = tirx.floordiv(pair, heads), tirx.floormod(pair, heads)
                kh = tirx.floordiv(h, heads // p.key_heads)
                if not plan.in_place:
                    with T.If(packed_head[0] != b * p.key_heads + kh), T.Then():
                        block.pack(k, v, b, kh)
                        T.buffer_store(packed_head, b * p.key_heads + kh, [0])
                with between(*share(plan.blocks, plan.parts, part)) as index:
                    block.run(Rows(q, k, v, out, b, h, kh), index + hidden)

    operands = [(shape, "float32") for shape in declared[:3]]
    operands += [(mask_buffer or mask[0], mask[1])] if mask else []
    operands += [((p.batch, p.queries), "int32")] * sum(tables)
    return typed_kernel("attention", operands, [(declared[3], "float32")], body)


class _Block:
    """One task's scratch, and the emission of one block of rows into it."""

    def __init__(
        self, hw: Hardware, p: Problem, plan: Plan, causal: bool, scale: float, bias: Bias | None, empty: float
    ) -> None:
        self.hw, self.p, self.plan, self.causal = hw, p, plan, causal
        self.scale, self.bias, self.empty = scale, bias, empty  # the last is what stands for 1 / 0
        s, v = plan.scores, plan.values
        self.lanes = lanes = s.lanes
        self.rows = -(-s.row_tiles // plan.blocks) * s.rows
        # One cache line more: a row stride that is a multiple of 4096 bytes would put a tile's rows in one L1 set.
        self.stride = s.panels * s.columns + 64 // 4
        padded = -(-self.rows // lanes) * lanes
        wide = value_columns(hw, p.value_depth) if plan.in_place else 0
        size = max(s.columns * lanes, wide) if plan.in_place else s.rows * max(s.columns, v.columns)
        self.acc = T.alloc_buffer((size,), "float32", scope="local")
        if not plan.in_place:
            self.k = T.alloc_buffer((s.panels, p.depth, s.columns), "float32", scope="global")
            self.v = T.alloc_buffer((v.panels, p.keys, v.columns), "float32", scope="global")
        self.q = T.alloc_buffer((self.rows * p.depth,), "float32", scope="global")
        self.scores = T.alloc_buffer((self.rows * self.stride,), "float32", scope="global")
        self.partial = T.alloc_buffer((padded * lanes,), "float32", scope="global")  # a row's maxima, then its sums
        self.shift = T.alloc_buffer((padded,), "float32", scope="global")
        self.inverse = T.alloc_buffer((padded,), "float32", scope="global")
        self.lane = T.alloc_buffer((4 * lanes,), "float32", scope="local")
        self.edge = T.alloc_buffer((size,), "float32", scope="local")

    def pack(self, k: Heads, v: Heads, b: Any, h: Any) -> None:
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

    def run(self, x: Rows, index: Any) -> None:
        """Scores, softmax and values of the rows of block `index`."""
        p, s, t = self.p, self.plan.scores, self.plan.values
        start = first_row(s, index) if self.plan.blocks > 1 else 0
        stop = first_row(s, index + 1) if self.plan.blocks > 1 else p.queries * self.plan.group
        panels: Any = s.panels
        keys: Any = p.keys
        if self.causal and self.plan.group == 1 and not self.plan.in_place:
            keys = tirx.min(p.keys, stop)  # the last row of the block attends to keys 0..stop-1
            panels = tirx.floordiv(keys + (s.columns - 1), s.columns)
        self._take_rows(x, start, stop)
        if self.plan.in_place:
            self._scores_in_place(x, stop)
        else:
            with T.serial(0, panels) as panel:
                each_row_tile(s, index, lambda rows, row: self._score_tile(x, rows, row, start, panel))
        self._softmax(stop - start, panels)
        if self.plan.in_place:
            self._values_in_place(x, stop)
        else:
            with T.serial(0, t.panels) as panel:
                each_row_tile(s, index, lambda rows, row: self._value_tile(x, rows, row, start, panel, keys))

    def _where(self, x: Rows, row: Any) -> tuple[Any, Any]:
        """The head and the query of a row."""
        group, queries = self.plan.group, self.p.queries
        if group == 1:
            return x.h, row
        if queries == 1:
            return x.h * group + row, 0
        return x.h * group + tirx.floordiv(row, queries), tirx.floormod(row, queries)

    def _take_rows(self, x: Rows, start: Any, stop: Any) -> None:
        """Copy the block's rows of q, scaled, next to each other, and set their maxima to -inf."""
        depth, lanes = self.p.depth, self.lanes
        with T.serial(0, stop - start) as r:
            head, query = self._where(x, start + r)
            with T.serial(0, depth // lanes) as j:
                value = x.q.at(x.b, head, query, span(j * lanes, lanes)) * constant(self.scale, lanes)
                T.buffer_store(self.q, value, [span(r * depth + j * lanes, lanes)])
            with between(depth // lanes * lanes, depth) as d:
                T.buffer_store(self.q, x.q.at(x.b, head, query, d) * constant(self.scale), [r * depth + d])
            T.buffer_store(self.partial, constant(float("-inf"), lanes), [span(r * lanes, lanes)])

    def _keep(self, values: list[Any], r: Any, column: Any) -> None:
        """Store neighbouring vectors of scores from `column` on, and take them into the maxima of row `r`.

        The maximum is an intrinsic: of a select that is stored where one of its operands came from, LLVM makes a
        masked store: 22 of them took 4 % of GPT-2's attention.
        """
        lanes, at = self.lanes, span(r * self.lanes, self.lanes)
        largest = values[0]
        for j, value in enumerate(values):
            T.buffer_store(self.scores, value, [span(r * self.stride + column + j * lanes, lanes)])
            largest = tirx.max(largest, value) if j else value
        kind = "float32" if lanes == 1 else f"float32x{lanes}"
        largest = tirx.call_llvm_pure_intrin(kind, "llvm.maxnum", self.partial[at], largest)
        T.buffer_store(self.partial, largest, [at])

    def _attended(self, value: Any, column: Any, query: Any) -> Any:
        """`value`, -inf in the lanes of keys that the query must not see or that do not exist."""
        lanes = self.lanes
        keys = tirx.min(self.p.keys, query + 1) if self.causal else self.p.keys
        seen = T.ramp(column, 1, lanes) < tirx.Broadcast(keys, lanes)
        return tirx.Select(seen, value, constant(float("-inf"), lanes))

    def _score_tile(self, x: Rows, rows: int, row: Any, start: Any, panel: Any) -> None:
        s, p, lanes, depth = self.plan.scores, self.p, self.lanes, self.p.depth
        clear(self.acc, rows, s)
        multiply_tile(
            self.acc,
            rows,
            s,
            depth,
            lambda a, d, n: self.q[span((row - start + a) * depth + d, n)],
            lambda d, column: self.k[panel, d, span(column, lanes)],
        )

        def whole(source: Any, masked: bool, biased: bool) -> None:
            with T.unroll(0, rows) as a:
                where = self._where(x, row + a)
                values = []
                for j in range(0, s.columns, lanes):
                    column = panel * s.columns + j
                    value = source[span(a * s.columns + j, lanes)]
                    if biased and self.bias is not None:
                        value = self.bias(value, x.b, *where, column, lanes)
                    values.append(T.bind(self._attended(value, column, where[1]) if masked else value))
                self._keep(values, row - start + a, panel * s.columns)

        def partly() -> None:
            """Where the panel ends past the last key, the mask is read one by one."""
            if self.bias is None:
                whole(self.acc, masked=True, biased=False)
                return
            edge = self.edge
            each_vector(rows, s, lambda at, a, j: T.buffer_store(edge, self.acc[at], [at]))
            with T.serial(0, rows) as a, T.serial(0, tirx.min(p.keys - panel * s.columns, s.columns)) as j:
                score = self.bias(edge[a * s.columns + j], x.b, *self._where(x, row + a), panel * s.columns + j, 1)
                T.buffer_store(edge, score, [a * s.columns + j])
            whole(edge, masked=True, biased=False)

        if not self.causal and p.keys % s.columns == 0:
            whole(self.acc, masked=False, biased=True)
            return
        least: Any = p.keys
        if self.causal:  # of a group's rows, the first query may be any
            least = tirx.min(p.keys, row + 1) if self.plan.group == 1 else 1
        with T.If((panel + 1) * s.columns <= least):
            with T.Then():
                whole(self.acc, masked=False, biased=True)
            with T.Else():
                partly()

    def _scores_in_place(self, x: Rows, rows: Any) -> None:
        """Dot products; the last ones overlap their neighbours, and what does not fill a panel is -inf."""
        p, s, lanes = self.p, self.plan.scores, self.lanes
        columns = s.columns
        if p.keys % columns:
            with T.serial(0, rows) as r, T.serial(0, columns // lanes) as j:
                place = r * self.stride + (s.panels - 1) * columns + j * lanes
                T.buffer_store(self.scores, constant(float("-inf"), lanes), [span(place, lanes)])
        with T.serial(0, s.panels) as panel, T.serial(0, rows) as r:
            first = T.bind(tirx.min(panel * columns, p.keys - columns))
            chains = [span(c * lanes, lanes) for c in range(columns)]
            for at in chains:
                T.buffer_store(self.acc, constant(0.0, lanes), [at])
            with T.serial(0, p.depth // lanes) as d:
                for c, at in enumerate(chains):
                    key = x.k.at(x.b, x.kh, first + c, span(d * lanes, lanes))
                    product = self.q[span(r * p.depth + d * lanes, lanes)] * key
                    T.buffer_store(self.acc, self.acc[at] + product, [at])
            head, query = self._where(x, r)
            for j in range(0, columns, lanes):
                value = fold_lanes([self.acc[at] for at in chains[j : j + lanes]], lambda a, b: a + b)
                if self.bias is not None:
                    value = self.bias(value, x.b, head, query, first + j, lanes)
                if self.causal:
                    value = self._attended(value, first + j, query)
                self._keep([T.bind(value)], r, first + j)

    def _softmax(self, rows: Any, panels: Any) -> None:
        """Exponentials of the rows' scores, in place, and the inverse of their sums."""
        s, lanes = self.plan.scores, self.lanes
        groups_of_rows = tirx.floordiv(rows + (lanes - 1), lanes)

        def folded(group: Any, combine: Callable[[Any, Any], Any]) -> Any:
            return fold_lanes([self.partial[span((group * lanes + i) * lanes, lanes)] for i in range(lanes)], combine)

        with T.serial(0, groups_of_rows) as group:
            highest = folded(group, tirx.max)
            # A row of -inf only: e^(-inf - 0) = 0 everywhere, instead of -inf - -inf.
            nothing = highest == constant(float("-inf"), lanes)
            value = tirx.Select(nothing, constant(0.0, lanes), highest)
            T.buffer_store(self.shift, value, [span(group * lanes, lanes)])
        # Several chains of vectors hide the latency of the sum.
        vectors = s.columns // lanes
        chains = next(n for n in (4, 3, 2, 1) if vectors % n == 0)
        lane = [span(j * lanes, lanes) for j in range(chains)]
        with T.serial(0, rows) as r:
            for at in lane:
                T.buffer_store(self.lane, constant(0.0, lanes), [at])
            shift = T.bind(spread(self.shift[r], lanes))
            with T.serial(0, panels * (vectors // chains)) as group:
                for j, at in enumerate(lane):
                    place = span(r * self.stride + (group * chains + j) * lanes, lanes)
                    value = T.bind(exp_nonpositive(self.scores[place] - shift))
                    T.buffer_store(self.scores, value, [place])
                    T.buffer_store(self.lane, self.lane[at] + value, [at])
            total = self.lane[lane[0]]
            for at in lane[1:]:
                total = total + self.lane[at]
            T.buffer_store(self.partial, total, [span(r * lanes, lanes)])
        with T.serial(0, groups_of_rows) as group:
            total = T.bind(folded(group, lambda a, b: a + b))
            zero, one, empty = (constant(number, lanes) for number in (0.0, 1.0, self.empty))
            inverse = tirx.Select(total == zero, empty, one / total)
            T.buffer_store(self.inverse, inverse, [span(group * lanes, lanes)])

    def _value_tile(self, x: Rows, rows: int, row: Any, start: Any, panel: Any, keys: Any) -> None:
        t, lanes, out = self.plan.values, self.lanes, x.out
        clear(self.acc, rows, t)
        multiply_tile(
            self.acc,
            rows,
            t,
            keys,
            lambda a, k, n: self.scores[span((row - start + a) * self.stride + k, n)],
            lambda k, column: self.v[panel, k, span(column, lanes)],
        )

        def value(at: Any, a: Any) -> Any:
            return self.acc[at] * spread(self.inverse[row - start + a], lanes)

        def place(a: Any, column: Any) -> Any:
            return out.place(x.b, *self._where(x, row + a), panel * t.columns + column)

        def store() -> None:
            each_vector(
                rows,
                t,
                lambda at, a, j: T.buffer_store(out.buffer, value(at, a), [place(a, span(j, lanes))]),
            )

        def store_part(width: int) -> None:
            each_vector(rows, t, lambda at, a, j: T.buffer_store(self.edge, value(at, a), [at]))
            with T.serial(0, rows) as a, T.serial(0, width) as j:
                T.buffer_store(out.buffer, self.edge[a * t.columns + j], [place(a, j)])

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

    def _values_in_place(self, x: Rows, rows: Any) -> None:
        """Chunks of keys, each for all rows; the results rest in `out` between them."""
        p, lanes, out = self.p, self.lanes, x.out
        width = value_columns(self.hw, p.value_depth)
        chunks = -(-p.keys // CHUNK)
        vectors = [span(j, lanes) for j in range(0, width, lanes)]
        with T.serial(0, chunks) as chunk, T.serial(0, rows) as r, T.serial(0, p.value_depth // width) as part:
            first, last = share(p.keys, chunks, chunk)
            head, query = self._where(x, r)
            for at in vectors:
                T.buffer_store(self.acc, constant(0.0, lanes), [at])
            with between(first, last) as key:
                weight = spread(self.scores[r * self.stride + key], lanes)
                for j, at in enumerate(vectors):
                    value = x.v.at(x.b, x.kh, key, span(part * width + j * lanes, lanes))
                    T.buffer_store(self.acc, self.acc[at] + weight * value, [at])
            inverse = spread(self.inverse[r], lanes)
            for j, at in enumerate(vectors):
                place = [out.place(x.b, head, query, span(part * width + j * lanes, lanes))]
                total = self.acc[at] * inverse
                if chunks > 1:
                    before = tirx.Select(tirx.Broadcast(chunk > 0, lanes), out.buffer[place[0]], constant(0.0, lanes))
                    total = total + before
                T.buffer_store(out.buffer, total, place)
