"""Matrix product of narrow operands with packed weights: out = finish(x[M, K] . w[N, K]^T), sums in 32 bits.

    w packed   [ceil(N / NR)][ceil(K / group)][NR][group]      dot_product.py has the groups; the last panel has no more
               vectors than its columns need, and its tile neither
    tile       MR rows x NR = V * lanes columns

                   NR = V vectors
               +---------+---------+
        row 0  |  acc 0  |  acc 1  |   a step takes `group` neighbours in k: V vectors of weight words, and
        row 1  |  acc 2  |  acc 3  |   for each row one word of x in every lane
         ...   |   ...   |   ...   |
               +---------+---------+
    registers  MR * V + V + 1 + spare <= vector registers; AVX-512: 14 x 32 is 14 * 2 + 2 + 1 = 31 of 32

The split over cores, the two sizes of row tiles and the order of panels are those of the float32 product (matmul.py).
A single row is the same nest: the weights stream once, each core its own panels. Rows of floats that are rounded to
bytes are staged with a unit each, which the finish finds behind its other operands (int8_rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ..tiling import Tiling
from .dot_product import Dot, importing
from .dot_tile import (
    Finish,
    Tile,
    accumulate,
    allocate,
    begin,
    multiply,
    needs_staging,
    stage,
    step,
    store_panel,
    store_tile,
)
from .int8_rows import round_row
from .loops import Shape, between, share, span, typed_kernel, view
from .matmul import each_row_tile

STAGING_SHARE = 16384  # elements to convert before a second core is worth its start


@dataclass(frozen=True)
class Product:
    """Extents of the product, the left operand's dtype in memory, and the buffers' own shapes."""

    M: int
    K: int
    N: int
    source: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    by_rows: bool = False  # `source` is float32, and each row is rounded to bytes by its largest value
    tokens: bool = False  # such rows by the steps of `linear_tokens`


def pack_words(weight: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Rearrange weight[N, K] (16 or 8 bits) to [ceil(N / columns), ceil(K / group), columns * group], zero filled."""
    n, k = weight.shape
    panels, steps = -(-n // columns), -(-k // group)
    padded = weight.new_zeros((panels * columns, steps * group))
    padded[:n, :k] = weight
    return padded.view(panels, columns, steps, group).transpose(1, 2).contiguous().view(panels, steps, columns * group)


def pack_for(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    """`pack_words` in the dtype that the dot product loads; flat where the last panel is narrower."""
    last = last_columns(len(weight), dot, columns)
    if last == columns:
        packed = pack_words(weight, dot.group, columns)
    else:
        whole = len(weight) // columns * columns
        parts = [pack_words(part, dot.group, n) for part, n in ((weight[:whole], columns), (weight[whole:], last))]
        packed = torch.cat([part.reshape(-1) for part in parts])
    return packed.view(torch.int32) if dot.weight == "int32" else packed


def last_columns(filters: int, dot: Dot, columns: int) -> int:
    """Columns of the last panel as it is stored: whole vectors."""
    return -(-(filters - (filters - 1) // columns * columns) // dot.lanes) * dot.lanes


def weight_shape(product: Product, dot: Dot, tiling: Tiling) -> Shape:
    """The shape of the packed weights."""
    steps, last = -(-product.K // dot.group), last_columns(product.N, dot, tiling.columns)
    if last == tiling.columns:
        return tiling.panels, steps, tiling.columns * dot.weights_per_lane
    return (steps * ((tiling.panels - 1) * tiling.columns + last) * dot.weights_per_lane,)


def dot_matmul(name: str, product: Product, dot: Dot, tiling: Tiling, finish: Finish, *texts: str) -> Any:
    """Return the kernel (x, packed weights, the finish's operands..., out); `texts` are imported for `finish`."""
    p = product
    x_shape, out_shape = p.input_shape or (p.M, p.K), p.output_shape or (p.M, p.N)
    operands = [(x_shape, p.source), (weight_shape(p, dot, tiling), dot.weight), *finish.operands]

    def body(x: Any, weight: Any, *rest: Any) -> None:
        with importing(dot.helpers, *texts):
            _Nest(p, dot, tiling, finish, view(x, (p.M, p.K)), weight, rest[:-1], view(rest[-1], (p.M, p.N))).emit()

    return typed_kernel(name, operands, [(out_shape, finish.result)], body)


@dataclass(frozen=True)
class _Nest:
    product: Product
    dot: Dot
    tiling: Tiling
    finish: Finish
    x: Any
    weight: Any
    read: Sequence[Any]
    out: Any

    def emit(self) -> None:
        if not self.product.by_rows:
            self._tiles(self._words())
            return
        units = T.alloc_buffer((self.product.M,), "float32", scope="global")
        replace(self, read=(*self.read, units))._tiles(self._staged(units))

    def _tiles(self, words: Any) -> None:
        p, dot, t = self.product, self.dot, self.tiling
        with T.parallel(0, t.tasks) if t.tasks > 1 else T.serial(0, 1) as task:
            acc, spill = allocate(Tile(t.rows, t.columns // dot.lanes), dot, p.N, self.finish)
            with between(*share(t.panels * t.row_chunks, t.tasks, task)) as unit:
                panel = unit if t.row_chunks == 1 else tirx.floormod(unit, t.panels)
                chunk = 0 if t.row_chunks == 1 else tirx.floordiv(unit, t.panels)
                each_row_tile(t, chunk, lambda rows, row: self._tile(acc, spill, words, rows, row, panel))

    def _words(self) -> Any:
        """The left operand as [M, words], or as floats."""
        p, dot = self.product, self.dot
        if not dot.by_word:
            return self.x
        if not needs_staging(p.source, dot, p.K):
            return T.decl_buffer((p.M, -(-p.K // dot.group)), dot.word, data=self.x.data)
        return self._staged()

    def _staged(self, units: Any = None) -> Any:
        """The left operand copied as [M, words]; rounded row by row where there are `units` to note."""
        p, dot = self.product, self.dot
        staged = T.alloc_buffer((p.M, -(-p.K // dot.group)), dot.word, scope="global")
        tasks = min(self.tiling.tasks, p.M, max(1, p.M * p.K // STAGING_SHARE))
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task, between(*share(p.M, tasks, task)) as row:

            def load(k: Any, lanes: int) -> Any:
                return self.x[row, span(k, lanes)]

            def store(value: Any, word: Any, lanes: int) -> None:
                T.buffer_store(staged, value, [row, span(word, lanes)])

            if units is None:
                stage(load, store, p.K, p.source, dot)
            else:
                T.buffer_store(units, round_row(load, store, p.K, dot, p.tokens), [row])
        return staged

    def _tile(self, acc: Any, spill: Any, words: Any, rows: int, row: Any, panel: Any) -> None:
        t, dot = self.tiling, self.dot
        whole, last = Tile(rows, t.columns // dot.lanes), last_columns(self.product.N, dot, t.columns) // dot.lanes
        if last == whole.vectors:
            self._sums(acc, spill, words, whole, row, panel)
        elif t.panels == 1:
            self._sums(acc, spill, words, Tile(rows, last), row, panel)
        else:
            with T.If(panel < t.panels - 1):
                with T.Then():
                    self._sums(acc, spill, words, whole, row, panel, t.columns)
                with T.Else():
                    first = (t.panels - 1) * t.columns
                    self._sums(acc, spill, words, Tile(rows, last), row, panel, self.product.N - first)

    def _sums(
        self, acc: Any, spill: Any, words: Any, tile: Tile, row: Any, panel: Any, width: int | None = None
    ) -> None:
        """A tile of `width` columns that exist; None: as many as the panel has."""
        p, dot, t = self.product, self.dot, self.tiling
        wide = dot.lanes * dot.weights_per_lane
        flat = len(weight_shape(p, dot, t)) == 1
        panel_size = -(-p.K // dot.group) * t.columns * dot.weights_per_lane
        begin(acc, spill, tile, dot)

        def right(k: Any, v: int) -> Any:
            if flat:
                return self.weight[span(panel * panel_size + (k * tile.vectors + v) * wide, wide)]
            return self.weight[panel, k, span(v * wide, wide)]

        def left(r: int, k: Any, n: int) -> Any:
            return words[row + r, span(k, n)]

        if dot.by_word:
            accumulate(acc, spill, tile, dot, -(-p.K // dot.group), left, right, t.by_element)
        else:
            whole, odd = divmod(p.K, dot.group)
            if whole:
                multiply(acc, tile, dot, whole, left, right, t.by_element)
            if odd:
                step(acc, tile, dot, lambda r: [words[row + r, p.K - 1]], lambda v: right(whole, v))

        def store(column: Any, width: int) -> None:
            store_tile(acc, spill, tile, dot, row, column, width, self.finish, self.read, self.out)

        if width is None:
            store_panel(t.total_columns, t.columns, panel, store)
        else:
            store(panel * t.columns, width)
