"""Matrix product of rows that lie in several buffers: act([x1 | x2 | ...] . w^T + bias + residual).

w packed   as in `matmul`: panels [ceil(N/NR)][K][NR], k running through the parts one after another
tile       MR x NR accumulators stay in registers from part to part:

           part 1, columns s1 : s1 + w1       part 2, columns s2 : s2 + w2
    row r  |..xxxxxxxx....|                   |xxxxxx......|
              k = 0 .. w1 - 1                  k = w1 .. w1 + w2 - 1     one loop a part, the same accumulators

registers: as in `matmul`, MR * V + V + 1; a part costs its loop and the addresses of MR rows
sums       after LONGEST_SUM additions the accumulators are added to a tile in L1 and begin again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import LONGEST_SUM, Tiling
from .loops import Shape, between, kernel_function, share, span, view
from .matmul import Epilogue, Scratch, allocate, clear, each_row_tile, each_vector, multiply_tile, store_tile


@dataclass(frozen=True)
class Part:
    """Columns `start` : `start + width` of a buffer of that shape."""

    shape: Shape
    start: int
    width: int

    @property
    def row(self) -> int:
        """Elements from one row to the next."""
        return self.shape[-1]


def joined_tiling(tiling: Tiling) -> Tiling:
    """The tiling of a product of one buffer, with k in one go and as many chains as `runs` makes."""
    return replace(tiling, depth_blocks=1, sum_blocks=max(1, -(-tiling.depth // LONGEST_SUM)))


def runs(parts: Sequence[Part], longest: int = LONGEST_SUM) -> list[list[tuple[int, int, int, int]]]:
    """The parts as (number, first column, first k, width), in chains of at most `longest` additions each."""
    chains: list[list[tuple[int, int, int, int]]] = [[]]
    left, k = longest, 0
    for number, part in enumerate(parts):
        start, rest = part.start, part.width
        while rest:
            width = min(rest, left)
            chains[-1].append((number, start, k, width))
            start, rest, k, left = start + width, rest - width, k + width, left - width
            if not left:
                chains.append([])
                left = longest
    return [chain for chain in chains if chain]


def joined_matmul(
    parts: Sequence[Part],
    M: int,
    N: int,
    hw: Hardware,
    t: Tiling,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    bias_shape: Shape | None = None,
    output_shape: Shape | None = None,
) -> Any:
    """Return the kernel (part, ..., packed weight[, bias][, residual], out) for a tiling by `joined_tiling`."""
    out_shape = output_shape or (M, N)
    count, chains = len(parts), runs(parts)
    operands: list[Shape] = [*[part.shape for part in parts], (t.panels, t.depth, t.columns)]
    operands += [bias_shape or (N,)] * bias + [out_shape] * residual

    def body(*buffers: Any) -> None:
        sources = [view(b, (prod(p.shape),)) for b, p in zip(buffers[:count], parts, strict=True)]
        weight, rest = buffers[count], buffers[count + 1 :]
        out = view(rest[-1], (M, N))
        epilogue = Epilogue(
            view(rest[0], (N,)) if bias else None,
            view(rest[-2], (M, N)) if residual else None,
            activation,
            tuple(args),
        )

        def tile(scratch: Scratch, rows: int, row: Any, panel: Any) -> None:
            acc, sums = scratch.accumulators, scratch.sums
            for number, chain in enumerate(chains):
                clear(acc, rows, t)
                for place, start, first, width in chain:
                    _add_part(acc, rows, t, sources[place], parts[place].row, row, start, weight, panel, first, width)
                if len(chains) > 1:
                    _add_up(acc, sums, rows, t, number)
            if len(chains) > 1:
                each_vector(rows, t, lambda at, a, j: T.buffer_store(acc, sums[at], [at]))
            store_tile(scratch, rows, t, out, row, panel, epilogue)

        with T.parallel(0, t.tasks) if t.tasks > 1 else T.serial(0, 1) as task:
            scratch = allocate(t, task)
            with between(*share(t.panels * t.row_chunks, t.tasks, task)) as unit:
                panel, chunk = unit % t.panels, unit // t.panels
                each_row_tile(t, chunk, lambda rows, row: tile(scratch, rows, row, panel))

    return kernel_function("joined_matmul", operands, [out_shape], body)


def _add_part(
    acc: Any,
    rows: int,
    t: Tiling,
    source: Any,
    stride: int,
    row: Any,
    start: int,
    weight: Any,
    panel: Any,
    first: int,
    width: int,
) -> None:
    multiply_tile(
        acc,
        rows,
        t,
        width,
        lambda a, k, n: source[span((row + a) * stride + (start + k), n)],
        lambda k, column: weight[panel, first + k, span(column, t.lanes)],
    )


def _add_up(acc: Any, sums: Any, rows: int, t: Tiling, number: int) -> None:
    """Take a chain's sum into the tile of sums, which the first one begins."""
    each_vector(rows, t, lambda at, a, j: T.buffer_store(sums, acc[at] if number == 0 else sums[at] + acc[at], [at]))
