"""One block of rows of attention: scores, their softmax, and values; attention.py has the drawing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .attention_operands import Bias, Heads, Rows
from .attention_plan import CHUNK, Plan, Problem, value_columns
from .loops import between, constant, share, span, spread
from .matmul import clear, each_row_tile, each_vector, first_row, multiply_tile
from .packing import fold_lanes, pack_panel, pack_panel_transposed
from .vector_math import exp_nonpositive


class Block:
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
        self._operands(size)
        self.scores = T.alloc_buffer((self.rows * self.stride,), "float32", scope="global")
        self.partial = T.alloc_buffer((padded * lanes,), "float32", scope="global")  # a row's maxima, then its sums
        self.shift = T.alloc_buffer((padded,), "float32", scope="global")
        self.inverse = T.alloc_buffer((padded,), "float32", scope="global")
        self.lane = T.alloc_buffer((4 * lanes,), "float32", scope="local")
        self.edge = T.alloc_buffer((size,), "float32", scope="local")

    @staticmethod
    def helpers(hw: Hardware) -> tuple[str, ...]:
        """Texts of LLVM's language that the block's statements call."""
        return ()

    def _operands(self, size: int) -> None:
        """Declare `size` accumulators and what q, k and v are multiplied from."""
        p, s, v = self.p, self.plan.scores, self.plan.values
        self.acc = T.alloc_buffer((size,), "float32", scope="local")
        if not self.plan.in_place:
            self.k = T.alloc_buffer((s.panels, p.depth, s.columns), "float32", scope="global")
            self.v = T.alloc_buffer((v.panels, p.keys, v.columns), "float32", scope="global")
        self.q = T.alloc_buffer((self.rows * p.depth,), "float32", scope="global")

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

    def _multiply_scores(self, rows: int, row: Any, panel: Any) -> None:
        """Products of `rows` rows from the block's `row` on with a panel of keys, in the accumulators."""
        s, depth = self.plan.scores, self.p.depth
        clear(self.acc, rows, s)
        multiply_tile(
            self.acc,
            rows,
            s,
            depth,
            lambda a, d, n: self.q[span((row + a) * depth + d, n)],
            lambda d, column: self.k[panel, d, span(column, self.lanes)],
        )

    def _products(self, at: Any, column: Any, lanes: int) -> Any:
        """The float32 values of accumulators, whose keys are `column` and its neighbours."""
        return self.acc[at]

    def _score(self, value: Any, x: Rows, r: Any, where: tuple[Any, Any], key: Any, lanes: int, biased: bool) -> Any:
        """The score of a product of the block's row `r`, with its mask where it is `biased`."""
        return self.bias(value, x.b, *where, key, lanes) if biased and self.bias is not None else value

    def _score_tile(self, x: Rows, rows: int, row: Any, start: Any, panel: Any) -> None:
        s, p, lanes = self.plan.scores, self.p, self.lanes
        first = panel * s.columns
        self._multiply_scores(rows, row - start, panel)

        def products(biased: bool) -> Callable[[Any, int, tuple[Any, Any]], Any]:
            def score(a: Any, j: int, where: tuple[Any, Any]) -> Any:
                value = self._products(span(a * s.columns + j, lanes), first + j, lanes)
                return self._score(value, x, row - start + a, where, first + j, lanes, biased)

            return score

        def whole(score: Callable[[Any, int, tuple[Any, Any]], Any], masked: bool) -> None:
            with T.unroll(0, rows) as a:
                where = self._where(x, row + a)
                values = []
                for j in range(0, s.columns, lanes):
                    value = score(a, j, where)
                    values.append(T.bind(self._attended(value, first + j, where[1]) if masked else value))
                self._keep(values, row - start + a, first)

        def partly() -> None:
            """Where the panel ends past the last key, the mask is read one by one."""
            if self.bias is None:
                whole(products(False), masked=True)
                return
            edge = self.edge
            each_vector(rows, s, lambda at, a, j: T.buffer_store(edge, self._products(at, first + j, lanes), [at]))
            with T.serial(0, rows) as a, T.serial(0, tirx.min(p.keys - first, s.columns)) as j:
                place, where = a * s.columns + j, self._where(x, row + a)
                T.buffer_store(edge, self._score(edge[place], x, row - start + a, where, first + j, 1, True), [place])
            whole(lambda a, j, where: edge[span(a * s.columns + j, lanes)], masked=True)

        if not self.causal and p.keys % s.columns == 0:
            whole(products(True), masked=False)
            return
        least: Any = p.keys
        if self.causal:  # of a group's rows, the first query may be any
            least = tirx.min(p.keys, row + 1) if self.plan.group == 1 else 1
        with T.If((panel + 1) * s.columns <= least):
            with T.Then():
                whole(products(True), masked=False)
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

    def _weigh(self, at: Any, shift: Any, word: Any) -> Any:
        """Turn the scores `at` into weights, where four narrow ones are a `word`, and return them as floats."""
        value = T.bind(exp_nonpositive(self.scores[at] - shift))
        T.buffer_store(self.scores, value, [at])
        return value

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
                    word = r * (self.stride // 4) + (group * chains + j) * (lanes // 4)
                    value = T.bind(self._weigh(place, shift, word))
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

    def _multiply_values(self, rows: int, row: Any, panel: Any, keys: Any) -> None:
        """Sums over `keys` of a panel of v, weighed by the block's rows from `row` on, in the accumulators."""
        t = self.plan.values
        clear(self.acc, rows, t)
        multiply_tile(
            self.acc,
            rows,
            t,
            keys,
            lambda a, k, n: self.scores[span((row + a) * self.stride + k, n)],
            lambda k, column: self.v[panel, k, span(column, self.lanes)],
        )

    def _result(self, at: Any, r: Any, column: Any) -> Any:
        """Accumulators of the block's row `r` as results, channels from `column` on."""
        return self.acc[at] * spread(self.inverse[r], self.lanes)

    def _value_tile(self, x: Rows, rows: int, row: Any, start: Any, panel: Any, keys: Any) -> None:
        t, lanes, out = self.plan.values, self.lanes, x.out
        self._multiply_values(rows, row - start, panel, keys)

        def value(at: Any, a: Any, j: Any) -> Any:
            return self._result(at, row - start + a, panel * t.columns + j)

        def place(a: Any, column: Any) -> Any:
            return out.place(x.b, *self._where(x, row + a), panel * t.columns + column)

        def store() -> None:
            each_vector(
                rows,
                t,
                lambda at, a, j: T.buffer_store(out.buffer, value(at, a, j), [place(a, span(j, lanes))]),
            )

        def store_part(width: int) -> None:
            each_vector(rows, t, lambda at, a, j: T.buffer_store(self.edge, value(at, a, j), [at]))
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
