"""Products tiled in shared memory and registers.

    out[r, c] = act(sum over k of left(k, r) right(k, c) + bias + residual)

                    columns of the block
                  +----------------------+     each thread: 8 x 8 (or 4 x 8, 4 x 4) sums in registers, as quadrants
        rows of   |   q  .  .  q  .  .   |     of 4 x 4 that lie apart, so that the threads of a warp read shared
        the block |   .  .  .  .  .  .   |     memory in neighbouring 128-bit words
                  |   q  .  .  q  .  .   |
                  +----------------------+

    fetch tile 0, put it, barrier
    for every two:    twice: fetch the next one into registers; multiply with this one; put the next one; barrier

Registers: thread_rows x thread_columns sums, their operands, and what is fetched: 64 + 16 + 8 at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Protocol

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.epilogue import apply_activation
from ..kernels.loops import Shape, constant, span, typed_kernel
from .rounding import rounded
from .stage import Halves, Operand, Stage, Weights
from .tile import LANES, Tile


class Tiled(Protocol):
    """What a block makes of a result, with how many threads."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def threads(self) -> int: ...


@dataclass(frozen=True)
class Finish:
    """What becomes of a sum. `place(row, column)` is where it lies in the flat result, and in the residual."""

    place: Callable[[Any, Any], Any]
    lanes: int  # neighbouring columns that are neighbours in memory: 4 or 1
    bias: Callable[[Any, Any, int], Any] | None = None  # (row, column, lanes) -> its value
    residual: Any = None  # flat buffer
    activation: str = "none"
    args: tuple[float, ...] = ()


# (buffers of the operands, that of the result, number in the batch) -> how a product is read and finished.
Parts = Callable[[Sequence[Any], Any, Any], "tuple[Operand | Halves, Operand | Weights, Finish]"]


def product(
    name: str,
    tile: Tile,
    batch: int,
    rows: int,
    columns: int,
    operands: Sequence[tuple[Shape, str]],
    out: Shape,
    parts: Parts,
) -> Any:
    """Return the kernel over buffers of the shapes and dtypes `operands`, and `out` in float32.

    `parts(buffers, out, number)` says how product `number` of the batch is read and finished.
    """

    def block(left: Any, right: Any, finish: Finish, out: Any, first: tuple[Any, Any], thread: Any) -> None:
        _block(tile, left, right, finish, out, (rows, columns), first, thread)

    return tiled(name, tile, batch, (rows, columns), operands, (out, "float32"), parts, block)


def tiled(
    name: str,
    tile: Tiled,
    batch: int,
    extents: tuple[int, int],
    operands: Sequence[tuple[Shape, str]],
    out: tuple[Shape, str],
    parts: Parts,
    block: Callable[[Any, Any, Finish, Any, tuple[Any, Any], Any], None],
) -> Any:
    """The kernel that calls `block` for every tile of every product, at the first row and column it has."""

    def body(*buffers: Any) -> None:
        down, across = ceil(extents[0] / tile.rows), ceil(extents[1] / tile.columns)
        with (
            T.launch_thread("blockIdx.x", batch * down * across) as place,
            T.launch_thread("threadIdx.x", tile.threads) as thread,
        ):
            number = tirx.floordiv(place, down * across) if batch > 1 else 0
            first_row = tirx.floormod(place, down) * tile.rows
            first_column = tirx.floormod(tirx.floordiv(place, down), across) * tile.columns
            left, right, finish = parts(buffers[:-1], buffers[-1], number)
            block(left, right, finish, buffers[-1], (first_row, first_column), thread)

    return typed_kernel(name, operands, [out], body)


def _block(
    tile: Tile,
    left: Operand,
    right: Operand,
    finish: Finish,
    out: Any,
    extents: tuple[int, int],
    first: tuple[Any, Any],
    thread: Any,
) -> None:
    tr, tc = tirx.floordiv(thread, tile.across), tirx.floormod(thread, tile.across)
    a = Stage(left, tile.depth, tile.rows, tile.threads, thread)
    b = Stage(right, tile.depth, tile.columns, tile.threads, thread)
    count = tile.thread_rows * tile.thread_columns
    sums = T.alloc_buffer((count,), "float32", scope="local")
    x = T.alloc_buffer((tile.thread_rows,), "float32", scope="local")
    y = T.alloc_buffer((tile.thread_columns,), "float32", scope="local")
    for i in range(0, count, LANES):
        T.buffer_store(sums, constant(0.0, LANES), [span(i, LANES)])

    def fetch(step: Any, slot: int) -> None:
        a.fetch(step, first[0], slot)
        b.fetch(step, first[1], slot)

    def put(slot: int) -> None:
        a.put(slot)
        b.put(slot)
        T.evaluate(T.tvm_storage_sync("shared"))

    def multiply(slot: int) -> None:
        with T.serial(0, tile.depth) as k:
            for stage, held, mine in ((a, x, tr), (b, y, tc)):
                size = int(held.shape[0])
                apart = stage.width // (size // LANES)
                for q in range(size // LANES):
                    T.buffer_store(held, stage.tile(slot, k, mine * LANES + q * apart), [span(q * LANES, LANES)])
            for i in range(tile.thread_rows):
                for j in range(tile.thread_columns):
                    at = i * tile.thread_columns + j
                    T.buffer_store(sums, sums[at] + x[i] * y[j], [at])

    fetch(0, 0)
    put(0)
    with T.serial(0, ceil(left.depth / (2 * tile.depth))) as pair:
        for slot in (0, 1):
            fetch(pair * 2 + slot + 1, 1 - slot)
            multiply(slot)
            put(1 - slot)
    _store(tile, sums, finish, out, extents, first, (tr, tc))


def _store(
    tile: Tile,
    sums: Any,
    finish: Finish,
    out: Any,
    extents: tuple[int, int],
    first: tuple[Any, Any],
    mine: tuple[Any, Any],
) -> None:
    """Write the sums of a thread, row by row, nothing past the ends."""
    flat = flat_result(out)
    held = room(flat)
    rows_apart = tile.rows // (tile.thread_rows // LANES)
    columns_apart = tile.columns // (tile.thread_columns // LANES)
    for i in range(tile.thread_rows):
        row = first[0] + mine[0] * LANES + (i // LANES * rows_apart + i % LANES)
        for j in range(0, tile.thread_columns, finish.lanes):
            column = first[1] + mine[1] * LANES + (j // LANES * columns_apart + j % LANES)
            at = i * tile.thread_columns + j
            conditions = [row < extents[0]] if extents[0] % tile.rows else []
            conditions += [column < extents[1]] if extents[1] % tile.columns else []
            if conditions:
                with T.If(tirx.all(*conditions)), T.Then():
                    finish_vector(finish, sums, at, held, flat, row, column)
            else:
                finish_vector(finish, sums, at, held, flat, row, column)


def finish_vector(finish: Finish, sums: Any, at: int, held: Any, out: Any, row: Any, column: Any) -> None:
    """Store the `finish.lanes` sums from `at`, which become those of `row` from `column`; `held` is `room` of `out`.

    Vectors are copied only, never added or cast: TVM's CUDA generator (0.27) names what it loads for that by the text
    of the load, and finds the name again where the memory has changed since.
    """
    lanes = finish.lanes
    place = span(finish.place(row, column), lanes)
    added = [] if finish.bias is None else [finish.bias(row, column, lanes)]
    added += [] if finish.residual is None else [finish.residual[place]]
    for values in added:
        T.buffer_store(held.wide, values, [span(0, lanes)])
        for i in range(lanes):
            T.buffer_store(sums, sums[at + i] + held.wide[i], [at + i])
    if finish.activation != "none":
        for i in range(lanes):
            T.buffer_store(sums, apply_activation(T.bind(sums[at + i]), finish.activation, finish.args), [at + i])
    store_vector(sums, at, held, out, place, lanes)


@dataclass(frozen=True)
class Room:
    """Registers for 4 values on their way to a result, in float32 and, where that is another, in its dtype."""

    wide: Any
    rounded: Any = None


def room(out: Any) -> Room:
    """Declare it for a result."""
    wide = T.alloc_buffer((LANES,), "float32", scope="local")
    dtype = str(out.dtype)
    return Room(wide, None if dtype == "float32" else T.alloc_buffer((LANES,), dtype, scope="local"))


def store_vector(values: Any, at: int, held: Room, out: Any, place: Any, lanes: int) -> None:
    """Store `lanes` values from `at`, rounded where the result is; one by one, as `finish_vector` says."""
    if held.rounded is None:
        T.buffer_store(out, values[span(at, lanes)], [place])
        return
    for i in range(lanes):
        T.buffer_store(held.rounded, rounded(values[at + i], str(out.dtype)), [i])
    T.buffer_store(out, held.rounded[span(0, lanes)], [place])


def flat_result(buffer: Any, dtype: str | None = None) -> Any:
    """The dense `buffer` as one dimension; `dtype` is another name of its elements."""
    size = prod(int(extent) for extent in buffer.shape)
    return T.decl_buffer((size,), dtype or buffer.dtype, data=buffer.data)
