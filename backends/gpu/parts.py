"""A product whose blocks add up parts of the sum, where units would have no block; a second kernel adds the parts.

    parts[n, r, c] = sum over part n of left(k, r) right(k, c)          a product of `parts` times as many blocks
    out[r, c]      = act(sum over n of parts[n, r, c] + bias + ...)     a thread 4 (1) neighbours of a row

The order of additions is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import Shape, constant, span, typed_kernel
from .matrix_tile import MatrixTile
from .product import Finish, Parts, finish_vector, flat_result, room
from .stage import Halves, Operand, Weights
from .tile import LANES

_THREADS = 128


def in_parts(
    read: Callable[[Sequence[Any], Any], tuple[Operand | Halves, Operand | Weights]],
    tile: MatrixTile,
    rows: int,
    columns: int,
) -> Parts:
    """How part `number` of a product is read, and where its sums lie."""

    def parts(buffers: Sequence[Any], out: Any, number: Any) -> tuple[Operand | Halves, Operand | Weights, Finish]:
        left, right = read(buffers, 0)
        start = number * tile.part(left.depth)
        lanes = LANES if columns % LANES == 0 else 1
        finish = Finish(lambda r, c: (number * rows + r) * columns + c, lanes)
        return replace(left, start=start), replace(right, start=start), finish

    return parts


def add_parts(
    count: int,
    rows: int,
    columns: int,
    operands: Sequence[tuple[Shape, str]],
    out: tuple[Shape, str],
    finish: Callable[[Sequence[Any], Any], Finish],
    kept: str,
) -> Any:
    """The second kernel, over the parts and the buffers of `operands`, which `finish` takes.

    `kept` is the dtype of the result, or BITS (rounding.py) for bfloat16.
    """

    def body(*buffers: Any) -> None:
        result = finish(buffers[1:-1], 0)
        lanes, parts, flat = result.lanes, flat_result(buffers[0]), flat_result(buffers[-1], kept)
        pieces = rows * columns // lanes
        with (
            T.launch_thread("blockIdx.x", ceil(pieces / _THREADS)) as block,
            T.launch_thread("threadIdx.x", _THREADS) as thread,
        ):
            sums = T.alloc_buffer((lanes,), "float32", scope="local")
            loaded = T.alloc_buffer((count * lanes,), "float32", scope="local")
            held = room(flat)
            piece = block * _THREADS + thread

            def add() -> None:
                for n in range(count):
                    value = parts[span(n * (rows * columns) + piece * lanes, lanes)]
                    T.buffer_store(loaded, value, [span(n * lanes, lanes)])
                for i in range(lanes):
                    total = constant(0.0)
                    for n in range(count):
                        total = total + loaded[n * lanes + i]
                    T.buffer_store(sums, total, [i])
                across = columns // lanes
                row, column = tirx.floordiv(piece, across), tirx.floormod(piece, across) * lanes
                finish_vector(result, sums, 0, held, flat, row, column)

            if pieces % _THREADS:
                with T.If(piece < pieces), T.Then():
                    add()
            else:
                add()

    return typed_kernel("add_parts", [((count, rows, columns), "float32"), *operands], [out], body)
