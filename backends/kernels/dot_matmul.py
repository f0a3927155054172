"""Matrix product of narrow operands with packed weights: out = finish(x[M, K] . w[N, K]^T), sums in 32 bits.

    w packed   [ceil(N / NR)][ceil(K / group)][NR][group]      dot_product.py has the groups
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


def pack_words(weight: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Rearrange weight[N, K] (16 or 8 bits) to [ceil(N / columns), ceil(K / group), columns * group], zero filled."""
    n, k = weight.shape
    panels, steps = -(-n // columns), -(-k // group)
    padded = weight.new_zeros((panels * columns, steps * group))
    padded[:n, :k] = weight
    return padded.view(panels, columns, steps, group).transpose(1, 2).contiguous().view(panels, steps, columns * group)


def pack_for(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    """`pack_words` in the dtype that the dot product loads."""
    packed = pack_words(weight, dot.group, columns)
    return packed.view(torch.int32) if dot.weight == "int32" else packed


def weight_shape(product: Product, dot: Dot, tiling: Tiling) -> Shape:
    """The shape of the packed weights."""
    return tiling.panels, -(-product.K // dot.group), tiling.columns * dot.weights_per_lane


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
                T.buffer_store(units, round_row(load, store, p.K, dot), [row])
        return staged

    def _tile(self, acc: Any, spill: Any, words: Any, rows: int, row: Any, panel: Any) -> None:
        p, dot, t = self.product, self.dot, self.tiling
        tile = Tile(rows, t.columns // dot.lanes)
        begin(acc, spill, tile, dot)

        def right(k: Any, v: int) -> Any:
            wide = dot.lanes * dot.weights_per_lane
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
        self._store(acc, spill, tile, row, panel)

    def _store(self, acc: Any, spill: Any, tile: Tile, row: Any, panel: Any) -> None:
        t = self.tiling

        def store(column: Any, width: int) -> None:
            store_tile(acc, spill, tile, self.dot, row, column, width, self.finish, self.read, self.out)

        store_panel(t.total_columns, t.columns, panel, store)
