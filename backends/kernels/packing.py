"""Rearranging computed operands into panels at run time, transposed in registers where needed.

A panel is [K][NR]: NR neighbouring columns, contiguous in k, zeros past the last column.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .loops import Shape, constant, span


def batch_index(index: Any, batch: Shape, operand: Shape) -> Any:
    """Which matrix of an operand with batch shape `operand` (broadcast to `batch`) belongs to flat batch `index`."""
    operand = (1,) * (len(batch) - len(operand)) + operand
    if operand == batch:
        return index
    if prod(operand) == 1:
        return 0
    position, inner, stride = 0, 1, 1
    for size, own in zip(reversed(batch), reversed(operand), strict=True):
        if own != 1:
            position = position + tirx.floormod(tirx.floordiv(index, inner), size) * stride
        inner, stride = inner * size, stride * own
    return position


def pack_panel(
    store: Callable[[Any, Any, Any], None],
    source: Callable[[Any, Any], Any],
    depth: int,
    first: Any,
    columns: int,
    width: int,
    lanes: int,
) -> None:
    """Fill a panel [depth, width] from source(k, column) for the columns from `first` on, `columns` in all.

    store(value, k, column in the panel) writes it. Columns are passed as vectors: the source is contiguous there.
    """

    def whole() -> None:
        with T.serial(0, depth) as k:
            for j in range(0, width, lanes):
                store(source(k, span(first + j, lanes)), k, span(j, lanes))

    def partly() -> None:
        tail = columns % width
        with T.serial(0, depth) as k:
            for j in range(tail // lanes * lanes, width, lanes):
                store(constant(0.0, lanes), k, span(j, lanes))
            for j in range(0, tail // lanes * lanes, lanes):
                store(source(k, span(first + j, lanes)), k, span(j, lanes))
            for j in range(tail // lanes * lanes, tail):
                store(source(k, first + j), k, j)

    _whole_or_partly(first, columns, width, whole, partly)


def pack_panel_transposed(
    store: Callable[[Any, Any, Any], None],
    source: Callable[[Any, Any], Any],
    depth: int,
    first: Any,
    columns: int,
    width: int,
    lanes: int,
) -> None:
    """As `pack_panel` from source(column, k), contiguous along k, by lanes x lanes transposes."""

    def groups(count: int) -> None:
        if depth >= lanes:
            with T.serial(0, depth // lanes) as block, T.serial(0, count) as group:
                k, j = block * lanes, group * lanes
                rows = [T.bind(source(first + j + i, span(k, lanes))) for i in range(lanes)]
                for i, row in enumerate(transpose_vectors(rows)):
                    store(row, k + i, span(j, lanes))
        rest = depth % lanes
        if rest:
            with T.serial(0, rest) as i, T.serial(0, count * lanes) as j:
                k = depth - rest + i
                store(source(first + j, k), k, j)

    def partly() -> None:
        tail = columns % width
        vectors, loose = divmod(tail, lanes)
        if vectors:
            groups(vectors)
        with T.serial(0, depth) as k:
            for j in range(vectors * lanes, width, lanes):
                store(constant(0.0, lanes), k, span(j, lanes))
            for j in range(tail - loose, tail):
                store(source(first + j, k), k, j)

    _whole_or_partly(first, columns, width, lambda: groups(width // lanes), partly)


def _whole_or_partly(
    first: Any, columns: int, width: int, whole: Callable[[], None], partly: Callable[[], None]
) -> None:
    if columns % width == 0:
        whole()
    elif columns < width:
        partly()
    else:
        with T.If(first + width <= columns):
            with T.Then():
                whole()
            with T.Else():
                partly()


def transpose_vectors(rows: list[Any]) -> list[Any]:
    """The transpose of a square of vectors (their number is their length, a power of two), by two-input shuffles.

    Stage d exchanges the off-diagonal d x d blocks of every 2d x 2d block.
    """
    n = len(rows)
    rows = list(rows)
    distance = n // 2
    while distance:
        for i in range(n):
            if i & distance:
                continue
            low = [lane if not lane & distance else n + lane - distance for lane in range(n)]
            high = [lane + distance if not lane & distance else n + lane for lane in range(n)]
            pair = [rows[i], rows[i + distance]]
            rows[i] = T.bind(_shuffle(pair, low))
            rows[i + distance] = T.bind(_shuffle(pair, high))
        distance //= 2
    return rows


def fold_lanes(rows: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """The vector whose lane i is all lanes of rows[i] combined; there are as many rows as lanes.

    The stages of `transpose_vectors`, each followed by combining the pair: half the shuffles of a transpose.
    """
    n = len(rows)
    rows = [T.bind(row) for row in rows]
    distance = n // 2
    while distance:
        low = [lane if not lane & distance else n + lane - distance for lane in range(n)]
        high = [lane + distance if not lane & distance else n + lane for lane in range(n)]
        rows = [
            T.bind(combine(_shuffle([rows[i], rows[i + distance]], low), _shuffle([rows[i], rows[i + distance]], high)))
            for i in range(distance)
        ]
        distance //= 2
    return rows[0]


def _shuffle(vectors: list[Any], lanes: list[int]) -> Any:
    return tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])
