"""Batched matrix product of computed operands: act(op(a) . op(b) + bias + residual), op an optional transpose.

    unit       (batch, row chunk, panel); an equal share of the units for each core
    per unit   the panel of b is packed into scratch [K][NR] (transposed in registers where b is [N, K]) and the row
               tiles of the chunk multiply with it, exactly as in `matmul`; a is read in place, transposed or not

Where few rows would use the packed panel (two row tiles or fewer) full panels of b[K, N] are read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling, choose_tiling, predicted_seconds
from .loops import Shape, between, kernel_function, share, span, view
from .matmul import Epilogue, allocate, multiply_chunk
from .packing import batch_index, pack_panel, pack_panel_transposed

COPIED_CYCLES = 2.0  # of a vector of b on its way into a panel, measured on Zen 4
TRANSPOSED_CYCLES = 4.0


def broadcast_batch(a: Shape, b: Shape) -> Shape:
    """The batch shape of torch.matmul for operands of shapes `a` and `b`, of rank 2 or more."""
    left, right = a[:-2], b[:-2]
    rank = max(len(left), len(right))
    left, right = (1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))


def batch_seconds(hw: Hardware, tiling: Tiling, batch: int, transpose_b: bool) -> float | None:
    """Predicted seconds: the products, and packing every panel of b once for each chunk of rows."""
    seconds = predicted_seconds(hw, tiling)
    if seconds is None or hw.clock_mhz is None:
        return None
    vectors = batch * tiling.row_chunks * tiling.depth * -(-tiling.total_columns // tiling.lanes)
    each = 0.0
    if transpose_b or tiling.row_tiles > 2:
        each = TRANSPOSED_CYCLES if transpose_b else COPIED_CYCLES
    return seconds + vectors * each / tiling.tasks / (hw.clock_mhz * 1e6)


def choose_batch_tiling(hw: Hardware, batch: int, M: int, N: int, K: int, transpose_a: bool = False) -> Tiling:
    """The tiling of `batch` products; a transposed a is contiguous along rows, so its rows never alias."""
    tiling = choose_tiling(hw, M, N, K, repeats=max(1, batch), row_stride_bytes=4 if transpose_a else None)
    return replace(tiling, by_element=False) if transpose_a else tiling


def batch_matmul(
    a_shape: Shape,
    b_shape: Shape,
    hw: Hardware,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias_shape: Shape | None = None,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    buffer_shapes: tuple[Shape, Shape, Shape] | None = None,
    tiling: Tiling | None = None,
) -> Any:
    """Return the kernel (a, b[, bias][, residual], out); the batch dimensions broadcast as in torch.matmul.

    a is [..., M, K], or [..., K, M] when transposed; b is [..., K, N], or [..., N, K]; the bias has N elements.
    `buffer_shapes` are the shapes that a, b and out are declared with, if others (of as many elements).
    """
    M, K = reversed(a_shape[-2:]) if transpose_a else a_shape[-2:]
    N = b_shape[-2] if transpose_b else b_shape[-1]
    batch = broadcast_batch(a_shape, b_shape)
    count = prod(batch)
    a_buffer, b_buffer, out_shape = buffer_shapes or (a_shape, b_shape, (*batch, M, N))
    t = tiling or choose_batch_tiling(hw, count, M, N, K, transpose_a)
    in_place = not transpose_b and t.row_tiles <= 2
    operands: list[Shape] = [a_buffer, b_buffer]
    operands += ([bias_shape] if bias_shape is not None else []) + [out_shape] * residual

    def body(a: Any, b: Any, *rest: Any) -> None:
        a = view(a, (prod(a_shape[:-2]), *a_shape[-2:]))
        b = view(b, (prod(b_shape[:-2]), *b_shape[-2:]))
        out = view(rest[-1], (count * M, N))
        epilogue = Epilogue(
            view(rest[0], (N,)) if bias_shape is not None else None,
            view(rest[-2], (count * M, N)) if residual else None,
            activation,
            tuple(args),
        )
        units = count * t.row_chunks * t.panels
        with T.parallel(0, t.tasks) if t.tasks > 1 else T.serial(0, 1) as task:
            scratch = allocate(t, task)
            needs_panel = not in_place or N % t.columns
            packed: Any = T.alloc_buffer((K, t.columns), "float32", scope="global") if needs_panel and K else None
            with between(*share(units, t.tasks, task)) as unit:
                panel = tirx.floormod(unit, t.panels)
                chunk = tirx.floormod(tirx.floordiv(unit, t.panels), t.row_chunks) if t.row_chunks > 1 else 0
                index = tirx.floordiv(unit, t.panels * t.row_chunks)
                ia, ib = batch_index(index, batch, a_shape[:-2]), batch_index(index, batch, b_shape[:-2])

                def left(row: Any, k: Any, n: int) -> Any:
                    return a[ia, k, row] if transpose_a else a[ia, row, span(k, n)]

                def multiply(from_panel: bool) -> None:
                    multiply_chunk(
                        scratch,
                        t,
                        chunk,
                        panel,
                        left,
                        (lambda k, column: packed[k, span(column, t.lanes)])
                        if from_panel
                        else (lambda k, column: b[ib, k, span(panel * t.columns + column, t.lanes)]),
                        out,
                        epilogue,
                        row_offset=index * M,
                    )

                def pack_and_multiply() -> None:
                    if packed is not None:
                        pack = pack_panel_transposed if transpose_b else pack_panel
                        pack(
                            lambda value, k, j: T.buffer_store(packed, value, [k, j]),
                            lambda row, column: b[ib, row, column],
                            K,
                            panel * t.columns,
                            N,
                            t.columns,
                            t.lanes,
                        )
                    multiply(from_panel=True)

                if not in_place or t.columns > N:
                    pack_and_multiply()
                elif N % t.columns == 0:
                    multiply(from_panel=False)
                else:
                    with T.If(panel < N // t.columns):
                        with T.Then():
                            multiply(from_panel=False)
                        with T.Else():
                            pack_and_multiply()

    return kernel_function("batch_matmul", operands, [out_shape], body)
