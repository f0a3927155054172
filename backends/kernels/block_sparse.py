"""Matrix product with constant weights of which whole blocks are zero: act(x[M, K] . w[N, K]^T + bias + residual).

A block is NR columns of the result (rows of w) times D values of k. Those that are not zero are kept:

    values   [blocks][D][NR]   panel by panel (a panel: NR columns), in a panel in order of k
    index    starts[panels + 1], where a panel's blocks begin; bounds[tasks + 1], the panels of each task;
             places[blocks], the first k of a block

                      NR = V vectors
                  +---------+---------+
    x row 0  ->   |  acc 0  |  acc 1  |    for each block of the panel: k = its place
    x row 1  ->   |  acc 2  |  acc 3  |        for d in range(D): load V vectors of the block,
         ...      |   ...   |   ...   |            broadcast x[row, k + d] and multiply-add, row by row
                  +---------+---------+
    registers: MR * V + V + 1 <= vector registers, as in `matmul`; with NR = 16, AVX-512 has V = 1, AVX2 V = 2, NEON 4

    tasks      each core its rows where there are many (an equal share, whatever the pattern); else its panels, cut
               where the blocks before are nearest to its share
    order      chunks of row tiles whose x stays in L1, for each all panels of the task, whose weights come from L2 in
               order: skipping from block to block, x is what no prefetcher foresees
    sums       after LONGEST_SUM additions the accumulators are added to a tile in L1 and begin again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...passes.zero_blocks import BLOCK_CYCLES, Blocks, filled, panels_of
from ..tiling import LONGEST_SUM, Tiling, choose_tiling, predicted_seconds
from .loops import Shape, between, share, span, spread, typed_kernel, view
from .matmul import Epilogue, Scratch, allocate, clear, each_row_tile, each_vector, store_tile

UNROLL = 4  # values of k in one pass of the innermost loop


def group(blocks: Blocks) -> int:
    """Blocks whose sums make one chain of additions."""
    return max(1, LONGEST_SUM // blocks.depth)


def pack_values(weight: torch.Tensor, columns: int, depth: int) -> torch.Tensor:
    """The blocks of weight[N, K] that are not zero, as [blocks, depth, columns]; one of zeros where there are none."""
    panels = panels_of(weight, columns)
    blocks = panels.view(len(panels), columns, -1, depth).permute(0, 2, 3, 1)  # panel, block, depth, column
    kept = blocks[filled(weight, columns, depth)]
    return kept.contiguous() if len(kept) else weight.new_zeros((1, depth, columns))


def pack_index(weight: torch.Tensor, columns: int, depth: int, tasks: int) -> torch.Tensor:
    """starts, bounds and places of the blocks of weight[N, K], one behind the other, as int32."""
    there = filled(weight, columns, depth)
    starts = torch.zeros(len(there) + 1, dtype=torch.int64)
    starts[1:] = there.sum(1).cumsum(0)
    shares = torch.arange(tasks + 1) * int(starts[-1]) / tasks
    bounds = (starts[None] - shares[:, None]).abs().argmin(1)
    bounds[0], bounds[-1] = 0, len(there)
    places = there.nonzero()[:, 1] * depth
    if not len(places):
        places = torch.zeros(1, dtype=torch.int64)
    return torch.cat([starts, bounds, places]).to(torch.int32)


def sparse_tiling(hw: Hardware, M: int, N: int, K: int, blocks: Blocks) -> Tiling:
    """The tiling of a product as deep as a panel is in the mean, in chunks of rows that stay in L1."""
    panels = -(-N // blocks.columns)
    depth = max(1, round(blocks.count * blocks.depth / panels))
    t = choose_tiling(hw, M, N, depth, row_stride_bytes=4 * K, fixed_columns=blocks.columns)
    l1 = hw.cache(1)
    fitting = max(1, (l1.size_bytes if l1 else 32 * 1024) // (4 * K * t.rows))
    chunks = -(-t.row_tiles // fitting)
    if t.row_tiles >= 2 * t.tasks:
        chunks = min(-(-chunks // t.tasks), t.row_tiles // t.tasks) * t.tasks
    return replace(t, row_chunks=chunks, depth_blocks=1, sum_blocks=2 if _chained(blocks) else 1)


def sparse_seconds(hw: Hardware, t: Tiling, blocks: Blocks, activation: str = "none") -> float | None:
    """Seconds the product and its activation take on `hw`, or None where the clock is unknown."""
    places = BLOCK_CYCLES * blocks.count * t.row_tiles / t.tasks
    return predicted_seconds(hw, replace(t, cycles=t.cycles + places), activation)


def _chained(blocks: Blocks) -> bool:
    return blocks.longest > group(blocks)


def by_rows(t: Tiling) -> bool:
    """Whether each task takes rows, and all panels."""
    return t.tasks > 1 and t.row_chunks % t.tasks == 0


def block_sparse(
    M: int,
    K: int,
    N: int,
    blocks: Blocks,
    t: Tiling,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    input_shape: Shape | None = None,
    output_shape: Shape | None = None,
) -> Any:
    """Return the kernel (x, values, index[, bias][, residual], out) for a tiling by `sparse_tiling`."""
    x_shape, out_shape = input_shape or (M, K), output_shape or (M, N)
    count = max(1, blocks.count)
    table = t.panels + 1 + t.tasks + 1
    operands: list[tuple[Shape, str]] = [
        (x_shape, "float32"),
        ((count, blocks.depth, blocks.columns), "float32"),
        ((table + count,), "int32"),
    ]
    operands += [((N,), "float32")] * bias + [(out_shape, "float32")] * residual

    def body(x: Any, values: Any, index: Any, *rest: Any) -> None:
        x, out = view(x, (M, K)), view(rest[-1], (M, N))
        epilogue = Epilogue(
            rest[0] if bias else None, view(rest[-2], (M, N)) if residual else None, activation, tuple(args)
        )

        def tile(scratch: Scratch, rows: int, row: Any, panel: Any) -> None:
            acc, sums = scratch.accumulators, scratch.sums
            first, last = T.bind(index[panel]), T.bind(index[panel + 1])
            if sums is None:
                clear(acc, rows, t)
                _add_blocks(acc, rows, t, blocks, x, row, values, index, table, first, last)
            else:
                clear(sums, rows, t)
                with T.serial(0, tirx.floordiv(last - first + (group(blocks) - 1), group(blocks))) as chain:
                    begin = first + chain * group(blocks)
                    clear(acc, rows, t)
                    end = tirx.min(begin + group(blocks), last)
                    _add_blocks(acc, rows, t, blocks, x, row, values, index, table, begin, end)
                    each_vector(rows, t, lambda at, a, j: T.buffer_store(sums, sums[at] + acc[at], [at]))
                each_vector(rows, t, lambda at, a, j: T.buffer_store(acc, sums[at], [at]))
            store_tile(scratch, rows, t, out, row, panel, epilogue)

        with T.parallel(0, t.tasks) if t.tasks > 1 else T.serial(0, 1) as task:
            scratch = allocate(t, task)
            if by_rows(t):
                chunks, panels = share(t.row_chunks, t.tasks, task), (0, t.panels)
            else:
                bounds = (T.bind(index[t.panels + 1 + task + end]) for end in (0, 1))
                chunks, panels = (0, t.row_chunks), tuple(bounds)
            with between(*chunks) as chunk, between(*panels) as panel:
                each_row_tile(t, chunk, lambda rows, row: tile(scratch, rows, row, panel))

    return typed_kernel("block_sparse", operands, [(out_shape, "float32")], body)


def _add_blocks(
    acc: Any,
    rows: int,
    t: Tiling,
    blocks: Blocks,
    x: Any,
    row: Any,
    values: Any,
    index: Any,
    table: int,
    first: Any,
    last: Any,
) -> None:
    """Add the products of the blocks first .. last - 1 to the accumulators."""
    unroll = UNROLL if blocks.depth % UNROLL == 0 else 1
    with between(first, last) as block:
        k = T.bind(index[table + block])
        with T.serial(0, blocks.depth // unroll) as outer, T.unroll(0, unroll) as inner:
            d = outer * unroll + inner
            each_vector(
                rows,
                t,
                lambda at, a, j: T.buffer_store(
                    acc,
                    acc[at] + spread(x[row + a, k + d], t.lanes) * values[block, d, span(j, t.lanes)],
                    [at],
                ),
            )
