"""Matrix product with a constant operand packed at compile time: act(x[M, K] . w[N, K]^T + bias + residual).

    w packed   [ceil(N/NR)][K][NR]        one panel = NR columns, contiguous in k, zero padded past N
    tile       MR rows x NR columns       MR * V accumulators (V = NR / lanes), V vectors of w, one broadcast

                   NR = V vectors
               +---------+---------+
        row 0  |  acc 0  |  acc 1  |   for k: load V vectors of the panel,
        row 1  |  acc 2  |  acc 3  |          broadcast x[row, k] and multiply-add, row by row
         ...   |   ...   |   ...   |
               +---------+---------+
    registers: MR * V + V + 1 <= vector registers; MR more where x is read by vectors of k (register_tile.py)

    tasks      units = row chunks x panels, an equal share for each core: of the panels where there is one chunk, of the
               rows where there are many. Within a unit the panel stays in L2 and the row tiles (two sizes that
               differ by one, so none is nearly empty) walk down the chunk
    sums       k in blocks of equal depth, at most LONGEST_SUM: no chain of roundings is longer, and the blocks' sums
               are added up in a tile that stays in L1

A few rows (M < MR) are the same nest with a wider tile: w streams once, contiguously, each core its own panels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling, choose_tiling
from .epilogue import apply_activation, is_heavy
from .loops import Shape, between, constant, kernel_function, share, span, spread, view
from .register_tile import Left, multiply_add

HIDDEN = 256  # floats: TVM leaves smaller scratch to LLVM, which would hold it in registers the tile needs


def pack_weight(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Rearrange weight[N, K] into panels [ceil(N/columns), K, columns], zeros past N."""
    n, k = weight.shape
    panels = -(-n // columns)
    padded = weight.new_zeros((panels * columns, k))
    padded[:n] = weight
    return padded.view(panels, columns, k).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Epilogue:
    """What happens to a finished sum before it is stored, given its row and its first column."""

    bias: Any | None = None  # buffer [N]
    residual: Any | None = None  # buffer [M, N]
    activation: str = "none"
    args: tuple[float, ...] = ()

    @property
    def heavy(self) -> bool:
        """Whether the activation is left to a second loop over the stored tile, then still in L1."""
        return is_heavy(self.activation)

    def add(self, value: Any, row: Any, column: Any, lanes: int) -> Any:
        """`value` with bias and residual added."""
        if self.bias is not None:
            value = value + self.bias[span(column, lanes)]
        if self.residual is not None:
            value = value + self.residual[row, span(column, lanes)]
        return value

    def activate(self, value: Any) -> Any:
        """The activation of `value`, which is named first: the activation may repeat it."""
        if self.activation == "none":
            return value
        return apply_activation(T.bind(value), self.activation, self.args)


@dataclass(frozen=True)
class Scratch:
    """Storage of one task; what the tiling does not need is None."""

    accumulators: Any  # one block that all tile variants share
    edge: Any  # a tile on its way past the last column
    partial: Any  # where sums over a part of k rest, for the rows of one chunk
    sums: Any  # where the sums of one tile over blocks of k are added up
    blocks: Any  # the number of those blocks, which LLVM does not know


def each_vector(rows: int, tiling: Tiling, emit: Callable[[Any, Any, Any], None]) -> None:
    """Call emit(place among the accumulators, row, column) for every vector of a tile, in unrolled loops."""
    with T.unroll(0, rows) as a, T.unroll(0, tiling.columns // tiling.lanes) as b:
        j = b * tiling.lanes
        emit(span(a * tiling.columns + j, tiling.lanes), a, j)


def multiply_tile(
    acc: Any,
    rows: int,
    tiling: Tiling,
    depth: Any,
    left: Left,
    right: Callable[[Any, int], Any],
) -> None:
    """Add left(row, k, 1) (scalars) times right(k, column) (vectors), for k in range(depth), to `acc`."""
    lanes = tiling.lanes
    if tiling.by_element:
        vectors = tiling.columns // lanes
        multiply_add(acc, range(rows), vectors, lanes, depth, left, lambda k, v: right(k, v * lanes), by_element=True)
        return
    with T.serial(0, depth) as k:
        each_vector(
            rows,
            tiling,
            lambda at, a, j: T.buffer_store(acc, acc[at] + spread(left(a, k, 1), lanes) * right(k, j), [at]),
        )


def sum_tile(
    scratch: Scratch,
    rows: int,
    tiling: Tiling,
    begin: Any,
    end: Any,
    left: Left,
    right: Callable[[Any, int], Any],
) -> None:
    """Let the accumulators be the sum of left(row, k, 1) times right(k, column) for k in range(begin, end)."""
    acc, sums = scratch.accumulators, scratch.sums

    def add(start: Any, stop: Any) -> None:
        clear(acc, rows, tiling)
        multiply_tile(
            acc,
            rows,
            tiling,
            stop - start,
            lambda a, k, n: left(a, start + k, n),
            lambda k, column: right(start + k, column),
        )

    if not tiling.depth:
        clear(acc, rows, tiling)
        return
    if sums is None:
        add(begin, end)
        return
    clear(sums, rows, tiling)
    with T.serial(0, scratch.blocks) as block:
        start, stop = share(end - begin, tiling.sum_blocks, block)
        add(begin + start, begin + stop)
        each_vector(rows, tiling, lambda at, a, j: T.buffer_store(sums, sums[at] + acc[at], [at]))
    each_vector(rows, tiling, lambda at, a, j: T.buffer_store(acc, sums[at], [at]))


def clear(acc: Any, rows: int, tiling: Tiling) -> None:
    """Zero the accumulators of one tile."""
    each_vector(rows, tiling, lambda at, a, j: T.buffer_store(acc, constant(0.0, tiling.lanes), [at]))


def store_tile(
    scratch: Scratch,
    rows: int,
    tiling: Tiling,
    out: Any,
    row: Any,
    panel: Any,
    epilogue: Epilogue,
) -> None:
    """Write the finished tile to out[row : row + rows, panel * NR : ...], never past the last column."""
    full, tail = divmod(tiling.total_columns, tiling.columns)
    if not tail:
        _store_full(scratch.accumulators, rows, tiling, out, row, panel, epilogue)
        return
    if not full:
        _store_edge(scratch, rows, tiling, out, row, 0, tail, epilogue)
        return
    with T.If(panel < full):
        with T.Then():
            _store_full(scratch.accumulators, rows, tiling, out, row, panel, epilogue)
        with T.Else():
            _store_edge(scratch, rows, tiling, out, row, full * tiling.columns, tail, epilogue)


def _store_full(acc: Any, rows: int, tiling: Tiling, out: Any, row: Any, panel: Any, epilogue: Epilogue) -> None:
    lanes, first = tiling.lanes, panel * tiling.columns

    def write(at: Any, a: Any, j: Any) -> None:
        value = epilogue.add(acc[at], row + a, first + j, lanes)
        if not epilogue.heavy:
            value = epilogue.activate(value)
        T.buffer_store(out, value, [row + a, span(first + j, lanes)])

    each_vector(rows, tiling, write)
    if epilogue.heavy:
        with T.serial(0, rows) as a, T.serial(0, tiling.columns // lanes) as b:
            place = [row + a, span(first + b * lanes, lanes)]
            T.buffer_store(out, epilogue.activate(out[tuple(place)]), place)


def _store_edge(
    scratch: Scratch,
    rows: int,
    tiling: Tiling,
    out: Any,
    row: Any,
    column: int,
    width: int,
    epilogue: Epilogue,
) -> None:
    """The last panel: through a scratch tile, then element by element up to the last column."""
    acc, edge = scratch.accumulators, scratch.edge
    each_vector(rows, tiling, lambda at, a, j: T.buffer_store(edge, acc[at], [at]))
    with T.serial(0, rows) as a, T.serial(0, width) as j:
        value = epilogue.add(edge[a * tiling.columns + j], row + a, column + j, 1)
        T.buffer_store(out, epilogue.activate(value), [row + a, column + j])


def each_row_tile(tiling: Tiling, chunk: Any, emit: Callable[[int, Any], None]) -> None:
    """Call emit(size, first row) inside the loops over the row tiles of `chunk`: the larger tiles first."""
    tiles = tiling.row_tiles
    small, larger = divmod(tiling.total_rows, tiles)
    first, last = share(tiles, tiling.row_chunks, chunk)
    if larger:
        with between(tirx.min(first, larger), tirx.min(last, larger)) as t:
            emit(small + 1, t * (small + 1))
    if tiles > larger:
        with between(tirx.max(first, larger), tirx.max(last, larger)) as t:
            emit(small, t * small + larger)


def first_row(tiling: Tiling, chunk: Any) -> Any:
    """The first row of `chunk`."""
    small, larger = divmod(tiling.total_rows, tiling.row_tiles)
    first, _ = share(tiling.row_tiles, tiling.row_chunks, chunk)
    return first * small + tirx.min(first, larger)


def chunk_rows(tiling: Tiling) -> int:
    """Most rows a chunk can have."""
    return -(-tiling.row_tiles // tiling.row_chunks) * tiling.rows


def allocate(tiling: Tiling, task: Any) -> Scratch:
    """Declare a task's accumulators (LLVM keeps them in registers) and, where needed, edge and partial sums."""
    size = tiling.rows * tiling.columns
    acc = T.alloc_buffer((size,), "float32", scope="local")
    edge = T.alloc_buffer((size,), "float32", scope="local") if tiling.total_columns % tiling.columns else None
    partial = None
    if tiling.depth_blocks > 1:
        partial = T.alloc_buffer((chunk_rows(tiling), tiling.columns), "float32", scope="global")
    sums = T.alloc_buffer((max(size, HIDDEN),), "float32", scope="global") if tiling.sum_blocks > 1 else None
    # A known number of up to six blocks would be unrolled, and then some of the copies spill accumulators. No task has
    # a number so large that this bit is set.
    blocks = tiling.sum_blocks + tirx.bitwise_and(task, tirx.const(1 << 20, "int32"))
    return Scratch(acc, edge, partial, sums, blocks)


def multiply_chunk(
    scratch: Scratch,
    tiling: Tiling,
    chunk: Any,
    panel: Any,
    left: Left,
    right: Callable[[Any, int], Any],
    out: Any,
    epilogue: Epilogue,
    row_offset: Any = 0,
    end: Any = None,
) -> None:
    """All row tiles of one unit: left(row, k, n) are n neighbours, right(k, column in the panel) vectors.

    Row 0 of the product is row `row_offset` of `out` and of the residual. Tiles that begin at row `end` or behind are
    left out.
    """
    t, acc, partial = tiling, scratch.accumulators, scratch.partial

    def tile(rows: int, row: Any, block: Any) -> None:
        begin, end = share(t.depth, t.depth_blocks, block)
        sum_tile(scratch, rows, t, begin, end, lambda a, k, n: left(row + a, k, n), right)
        if t.depth_blocks == 1:
            store_tile(scratch, rows, t, out, row_offset + row, panel, epilogue)
            return
        offset = row - first_row(t, chunk)

        def vector(at: Any, a: Any, j: Any) -> None:
            T.buffer_store(acc, acc[at] + partial[offset + a, span(j, t.lanes)], [at])

        with T.If(block > 0), T.Then():
            each_vector(rows, t, vector)
        with T.If(block == t.depth_blocks - 1):
            with T.Then():
                store_tile(scratch, rows, t, out, row_offset + row, panel, epilogue)
            with T.Else():
                each_vector(
                    rows,
                    t,
                    lambda at, a, j: T.buffer_store(partial, acc[at], [offset + a, span(j, t.lanes)]),
                )

    def wanted(rows: int, row: Any, block: Any) -> None:
        if end is None:
            tile(rows, row, block)
            return
        with T.If(row < end), T.Then():
            tile(rows, row, block)

    if t.depth_blocks == 1:
        each_row_tile(t, chunk, lambda rows, row: wanted(rows, row, 0))
    else:
        with T.serial(0, t.depth_blocks) as block:
            each_row_tile(t, chunk, lambda rows, row: wanted(rows, row, block))


def matmul(
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    tiling: Tiling | None = None,
    input_shape: Shape | None = None,
    bias_shape: Shape | None = None,
    output_shape: Shape | None = None,
) -> Any:
    """Return the kernel (x, packed weight[, bias][, residual], out) of out = act(x . w^T + bias + residual).

    input_shape, bias_shape and output_shape are the buffers' own shapes, of M * K, N and M * N elements.
    """
    t = tiling or choose_tiling(hw, M, N, K, packed=True, residual=residual)
    x_shape, out_shape = input_shape or (M, K), output_shape or (M, N)
    operands: list[Shape] = [x_shape, (t.panels, K, t.columns)]
    operands += [bias_shape or (N,)] * bias + [out_shape] * residual

    def body(x: Any, weight: Any, *rest: Any) -> None:
        x, out = view(x, (M, K)), view(rest[-1], (M, N))
        epilogue = Epilogue(
            view(rest[0], (N,)) if bias else None,
            view(rest[-2], (M, N)) if residual else None,
            activation,
            tuple(args),
        )
        with T.parallel(0, t.tasks) if t.tasks > 1 else T.serial(0, 1) as task:
            scratch = allocate(t, task)
            with between(*share(t.panels * t.row_chunks, t.tasks, task)) as unit:
                panel = unit if t.row_chunks == 1 else tirx.floormod(unit, t.panels)
                chunk = 0 if t.row_chunks == 1 else tirx.floordiv(unit, t.panels)
                multiply_chunk(
                    scratch,
                    t,
                    chunk,
                    panel,
                    lambda row, k, n: x[row, span(k, n)],
                    lambda k, column: weight[panel, k, span(column, t.lanes)],
                    out,
                    epilogue,
                )

    return kernel_function("matmul", operands, [out_shape], body)
