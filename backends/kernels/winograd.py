"""Winograd convolution F(m x m, 3 x 3), m = 2 or 4, NHWC: up to 4 times fewer multiplications.

    n = m + 2 points; a tile is n x n inputs -> m x m outputs, neighbouring tiles overlap by two inputs
    V[u]    = (B^T d B)[u]               u in n * n places, rows: tiles, columns: input channels
    M[u]    = V[u] . U[u]                n * n matrix products; U = G w G^T packed at compile time
    out     = A^T M A                    + bias + residual, activation

    U packed   [K / NR][n * n][C][NR]
    V          [n * n][tiles of a chunk][C]     a chunk is a few rows of tiles
    M          [n * n][tiles of a chunk][NR]    one panel at a time, in L2

    fused      tasks are chunks: transform, products and result of a chunk on one core; U is read once per chunk
    split      one region transforms all tiles, a second has tasks of chunk x panel: where U is larger than L2

Points 0, +-3/4, +-3/2 and infinity: half the rounding error of the usual 0, +-1, +-2 (measured with C = 64 and 256:
2.1 times the direct sum's, against 4.2). Products of the points are exact in float32.
Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; choice of points as Barabasz et al., Error
Analysis and Improving the Accuracy of Winograd Convolution, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .conv_plan import Conv
from .epilogue import apply_activation, is_heavy
from .loops import between, constant, flat, kernel_function, share, span
from .register_tile import LINE_BYTES, clear, multiply_add, prefetch
from .window import Axis, Run, balanced, runs
from .winograd_plan import PAIRS, WinogradPlan, tile_axis

# Lines of the next U asked for at once: more than the core has misses in flight wait for each other. Between two such
# bursts the accumulators rest in memory.
ASKED_LINES = 22


def transform_input(d: Sequence[Any], m: int) -> list[Any]:
    """B^T d for n values: the polynomial products over the points, by even and odd parts; None stands for zero."""
    pairs, n = PAIRS[m], m + 2
    whole = _even_polynomial(pairs)
    out = [_combine([(c, d[2 * i]) for i, c in enumerate(whole)])]
    for p in pairs:
        rest = _even_polynomial([q for q in pairs if q != p])
        even = _combine([(c, d[2 * i + 2]) for i, c in enumerate(rest)])
        odd = _combine([(c * p, d[2 * i + 1]) for i, c in enumerate(rest)])
        out += [_combine([(1.0, even), (1.0, odd)]), _combine([(1.0, even), (-1.0, odd)])]
    out.append(_combine([(c, d[2 * i + 1]) for i, c in enumerate(whole)]))
    assert len(out) == n
    return out


def transform_output(t: Sequence[Any], m: int) -> list[Any]:
    """A^T t for n values: m outputs."""
    pairs = PAIRS[m]
    sums = [T.bind(t[1 + 2 * i] + t[2 + 2 * i]) for i in range(len(pairs))]
    differences = [T.bind(t[1 + 2 * i] - t[2 + 2 * i]) for i in range(len(pairs))]
    out = []
    for k in range(m):
        terms = [(p**k, (differences if k % 2 else sums)[i]) for i, p in enumerate(pairs)]
        if k == 0:
            terms.append((1.0, t[0]))
        if k == m - 1:
            terms.append((1.0, t[-1]))
        out.append(_combine(terms))
    return out


def _even_polynomial(pairs: Sequence[float]) -> list[float]:
    """The coefficients of x^0, x^2, x^4, ... of the product of (x^2 - p^2)."""
    coefficients = [1.0]
    for p in pairs:
        shifted = [0.0, *coefficients]
        coefficients = [s - p * p * c for s, c in zip(shifted, [*coefficients, 0.0], strict=True)]
    return coefficients


def _combine(terms: Sequence[tuple[float, Any]]) -> Any:
    """The sum of coefficient * value, terms of coefficient +-1 first so that the others are multiply-adds."""
    total: Any = None
    for coefficient, value in sorted((t for t in terms if t[1] is not None), key=lambda t: abs(abs(t[0]) - 1)):
        lanes = value.ty.dtype.lanes if hasattr(value.ty.dtype, "lanes") else 1
        if coefficient == 1.0:
            term = value
        elif coefficient == -1.0:
            total = constant(0.0, lanes) - value if total is None else total - value
            continue
        else:
            term = value * constant(coefficient, lanes)
        total = term if total is None else total + term
    return None if total is None else T.bind(total)


def winograd(conv: Conv, plan: WinogradPlan) -> Any:
    """Return the kernel (x, packed weight[, bias][, residual], out)."""
    nr = plan.vectors * plan.lanes
    operands: list[tuple[int, ...]] = [
        conv.input_shape,
        (conv.filters // nr, plan.n**2, conv.channels, nr),
    ]
    operands += [(conv.filters,)] * conv.bias + [conv.output_shape] * conv.residual

    def body(x: Any, weight: Any, *rest: Any) -> None:
        bias = rest[0] if conv.bias else None
        residual = flat(rest[-2]) if conv.residual else None
        _Nest(conv, plan, flat(x), flat(weight), bias, residual, flat(rest[-1])).emit()

    return kernel_function("winograd", operands, [conv.output_shape], body)


@dataclass(frozen=True)
class _Nest:
    conv: Conv
    plan: WinogradPlan
    x: Any
    weight: Any
    bias: Any | None
    residual: Any | None
    out: Any

    @property
    def tile_rows(self) -> Axis:
        return tile_axis(self.conv.rows, self.plan.m)

    @property
    def tile_columns(self) -> Axis:
        return tile_axis(self.conv.columns, self.plan.m)

    @property
    def chunk_tiles(self) -> int:
        return self.plan.chunk * self.tile_columns.out

    @property
    def products_place(self) -> int:
        return spread_places(self.chunk_tiles * self.plan.vectors * self.plan.lanes)

    def emit(self) -> None:
        if self.plan.split:
            self._split()
        else:
            self._fused()

    def _fused(self) -> None:
        conv, plan = self.conv, self.plan
        place = spread_places(self.chunk_tiles * conv.channels)
        with tasks(self.plan.chunks) as chunk:
            line, scratch = self._scratch()
            v = T.alloc_buffer((plan.n**2 * place,), "float32", scope="global")
            rows = self._rows_of(chunk)
            self._transform_rows(line, rows, 0, conv.channels // plan.lanes, v, place, rows[0])
            with T.serial(0, conv.filters // (plan.vectors * plan.lanes)) as panel:
                self._panel(line, scratch, rows, panel, v, place, 0)

    def _split(self) -> None:
        conv, plan = self.conv, self.plan
        all_rows = conv.batch * self.tile_rows.out
        place = spread_places(self.plan.chunks * self.chunk_tiles * conv.channels)
        v = T.alloc_buffer((plan.n**2 * place,), "float32", scope="global")
        with tasks(all_rows * plan.parts) as task:
            line = T.alloc_buffer((plan.n**2 * plan.lanes,), "float32", scope="local")
            row = T.bind(task // plan.parts)
            first, last = share(conv.channels // plan.lanes, plan.parts, task % plan.parts)
            self._transform_rows(line, (row, row + 1), first, last, v, place, 0)
        panels = conv.filters // (plan.vectors * plan.lanes)
        # Panels inside chunks: cores share out the panels, so that each part of U is read by one core.
        with tasks(self.plan.chunks * panels) as task:
            line, scratch = self._scratch()
            chunk = T.bind(task % self.plan.chunks)
            self._panel(
                line,
                scratch,
                self._rows_of(chunk),
                task // self.plan.chunks,
                v,
                place,
                chunk * self.chunk_tiles,
            )

    def _scratch(self) -> tuple[Any, tuple[Any, Any]]:
        """A line of intermediate values, and the accumulators and products of one panel."""
        plan = self.plan
        nr = plan.vectors * plan.lanes
        line = T.alloc_buffer((plan.n**2 * plan.lanes,), "float32", scope="local")
        acc = T.alloc_buffer((plan.rows * nr,), "float32", scope="local")
        products = T.alloc_buffer((plan.n**2 * self.products_place,), "float32", scope="global")
        return line, (acc, products)

    def _rows_of(self, chunk: Any) -> tuple[Any, Any]:
        first = T.bind(chunk * self.plan.chunk)
        return first, T.bind(tirx.min(first + self.plan.chunk, self.conv.batch * self.tile_rows.out))

    def _each_tile(self, rows: tuple[Any, Any], emit: Callable[[Any, Any, Run, Any], None]) -> None:
        """Call emit(image, tile row, run, tile column) inside loops over the tiles of `rows`."""
        with between(*rows) as row:
            image, tile_row = T.bind(row // self.tile_rows.out), T.bind(row % self.tile_rows.out)
            for run in runs(self.tile_columns, 1):
                if run.count == 1:
                    emit(image, tile_row, run, run.start)
                else:
                    with T.serial(0, run.count) as i:
                        emit(image, tile_row, run, run.start + i)

    def _transform_rows(
        self,
        line: Any,
        rows: tuple[Any, Any],
        first: Any,
        last: Any,
        v: Any,
        place: int,
        origin: Any,
    ) -> None:
        """V of the tiles of `rows` and the vectors of channels [first, last); row `origin` is the first of V."""
        conv, n, lanes, m = self.conv, self.plan.n, self.plan.lanes, self.plan.m
        across = self.tile_columns.out

        def tile(image: Any, tile_row: Any, run: Run, column: Any) -> None:
            in_row = T.bind(image * conv.height + self.tile_rows.first(tile_row))
            corner = T.bind((in_row * conv.width + self.tile_columns.first(column)) * conv.channels)
            row = image * self.tile_rows.out + tile_row
            target = T.bind(((row - origin) * across + column) * conv.channels)
            first_row, existing = self.tile_rows.dynamic_taps(tile_row)
            with between(first, last) as vector:
                with T.serial(0, n) as r:
                    exists = _all_true(self.tile_rows, r, first_row, existing)

                    def horizontal() -> None:
                        read = corner + r * (conv.width * conv.channels) + vector * lanes
                        d = [
                            T.bind(self.x[span(read + j * conv.channels, lanes)]) if low < high else None
                            for j, (low, high) in enumerate(run.valid)
                        ]
                        for j, value in enumerate(transform_input(d, m)):
                            zero = constant(0.0, lanes)
                            T.buffer_store(line, zero if value is None else value, [span((r * n + j) * lanes, lanes)])

                    if exists is None:
                        horizontal()
                    else:
                        with T.If(exists):
                            with T.Then():
                                horizontal()
                            with T.Else():
                                for j in range(n):
                                    T.buffer_store(line, constant(0.0, lanes), [span((r * n + j) * lanes, lanes)])
                with T.serial(0, n) as j:
                    d = [T.bind(line[span((i * n + j) * lanes, lanes)]) for i in range(n)]
                    for i, value in enumerate(transform_input(d, m)):
                        T.buffer_store(v, value, [span((i * n + j) * place + target + vector * lanes, lanes)])

        self._each_tile(rows, tile)

    def _panel(
        self,
        line: Any,
        scratch: tuple[Any, Any],
        rows: tuple[Any, Any],
        panel: Any,
        v: Any,
        place: int,
        first_tile: Any,
    ) -> None:
        """All outputs of the tile rows `rows` in the channels of `panel`."""
        conv, plan = self.conv, self.plan
        acc, products = scratch
        lanes, vectors, tiles = plan.lanes, plan.vectors, self.chunk_tiles
        nr = vectors * lanes
        with T.serial(0, plan.n**2) as u:
            left = T.bind(u * place + first_tile * conv.channels)
            right = T.bind((panel * plan.n**2 + u) * (conv.channels * nr))
            done = before = 0
            sizes = balanced(tiles, plan.rows)
            for size in sorted(set(sizes), reverse=True):
                count = sizes.count(size)
                with T.serial(0, count) as i:
                    row = T.bind(done + i * size)
                    clear(acc, size, vectors, lanes)
                    base = T.bind(left + row * conv.channels)
                    self._multiply(acc, size, v, base, right, before + i, len(sizes))
                    target = T.bind(u * self.products_place + row * nr)
                    for a in range(size * vectors):
                        T.buffer_store(products, acc[span(a * lanes, lanes)], [span(target + a * lanes, lanes)])
                done += count * size
                before += count
        self._results(line, products, rows, panel)

    def _multiply(self, acc: Any, size: int, v: Any, left: Any, right: Any, tile: Any, of: int) -> None:
        """The product of register tile `tile` of `of` at one place; meanwhile each asks for its share of the next U."""
        conv, lanes, vectors = self.conv, self.plan.lanes, self.plan.vectors
        nr = vectors * lanes
        lines = -(-conv.channels * nr // (of * (LINE_BYTES // 4)))
        blocks = -(-lines // ASKED_LINES) if self.plan.asks else 1
        blocks = next(b for b in range(blocks, conv.channels + 1) if conv.channels % b == 0)
        steps = conv.channels // blocks
        share = -(-conv.channels * nr // (of * blocks))
        with T.serial(0, blocks) as block:
            if self.plan.asks:
                prefetch(self.weight, right + conv.channels * nr + (tile * blocks + block) * share, share)
            multiply_add(
                acc,
                range(size),
                vectors,
                lanes,
                steps,
                lambda p, k, n: v[span(left + p * conv.channels + k, n)],
                lambda k, j: self.weight[span(right + k * nr + j * lanes, lanes)],
                block * steps,
                self.plan.by_element,
            )

    def _results(self, line: Any, products: Any, rows: tuple[Any, Any], panel: Any) -> None:
        """out = A^T M A and the epilogue, for one panel."""
        conv, n, m, lanes = self.conv, self.plan.n, self.plan.m, self.plan.lanes
        nr = self.plan.vectors * lanes
        height, width = conv.rows.out, conv.columns.out
        across, heavy = self.tile_columns.out, is_heavy(conv.activation)
        origin = rows[0]
        # Tiles that reach beyond the right edge have fewer columns.
        inside = width // m
        with between(*rows) as row:
            image, tile_row = T.bind(row // self.tile_rows.out), T.bind(row % self.tile_rows.out)

            def tile(column: Any, columns: int) -> None:
                source = T.bind(((row - origin) * across + column) * nr)
                target = T.bind(((image * height + tile_row * m) * width + column * m) * conv.filters + panel * nr)
                with T.serial(0, self.plan.vectors) as vector:
                    with T.serial(0, n) as j:
                        t = [
                            T.bind(products[span((i * n + j) * self.products_place + source + vector * lanes, lanes)])
                            for i in range(n)
                        ]
                        for i, value in enumerate(transform_output(t, m)):
                            T.buffer_store(line, value, [span((i * n + j) * lanes, lanes)])
                    with T.serial(0, m if height % m == 0 else tirx.min(m, height - tile_row * m)) as i:
                        t = [T.bind(line[span((i * n + j) * lanes, lanes)]) for j in range(n)]
                        values = transform_output(t, m)[:columns]
                        at = T.bind(target + i * (width * conv.filters) + vector * lanes)
                        for j, value in enumerate(values):
                            written = span(at + j * conv.filters, lanes)
                            value = self._finish(value, written, panel * nr + vector * lanes)
                            T.buffer_store(self.out, value, [written])
                        if heavy:
                            with T.serial(0, columns) as j:
                                written = span(at + j * conv.filters, lanes)
                                stored = T.bind(self.out[written])
                                T.buffer_store(
                                    self.out, apply_activation(stored, conv.activation, conv.args), [written]
                                )

            if inside:
                with T.serial(0, inside) as column:
                    tile(column, m)
            if width % m:
                tile(inside, width % m)

    def _finish(self, value: Any, written: Any, channel: Any) -> Any:
        if self.bias is not None:
            value = value + self.bias[span(channel, self.plan.lanes)]
        if self.residual is not None:
            value = value + self.residual[written]
        if is_heavy(self.conv.activation):
            return value
        return apply_activation(T.bind(value), self.conv.activation, self.conv.args)


def tasks(count: int) -> Any:
    """The loop over `count` pieces of work, parallel where there is more than one."""
    return T.parallel(0, count) if count > 1 else T.serial(0, 1)


def spread_places(elements: int) -> int:
    """`elements` rounded up to an odd number of cache lines: the n * n places then fall on different sets of L1."""
    return 16 * (-(-elements // 16) | 1)


def _all_true(axis: Axis, tap: Any, first: Any, count: Any) -> Any | None:
    """Whether input `tap` of a window exists; None where all do."""
    if isinstance(first, int) and isinstance(count, int):
        return None
    return tirx.all(tap >= first, tap < first + count)
