"""The gate as an expression, and the kernels of products that leave out the rows it empties (kernels/gated_rows.py)."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from torch import fx
from tvm import te, tirx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_gating
from ...passes.rewrite import shape_of
from ..kernels import gated_rows
from ..kernels.matmul import pack_weight
from ..tiling import predicted_seconds, rank_tilings
from . import expressions as ex
from .kernels_matmul import bind
from .reduction import max_of
from .registry import KernelCall, Out, Packed, Refusal, kernel_for, lowers


@lowers(dialect_gating.gate)
def gate(out: Out, x: te.Tensor, threshold: float, by_row: bool, share: float) -> te.Tensor:
    """x where it, or its row, is not below the threshold."""
    size = ex.pointwise(out, lambda v: tirx.abs(v), x)
    if by_row and out.shape[-1]:
        size = max_of(size, (len(out.shape) - 1,), out.dtype)

    limit, nothing = (ex.constant(number, ex.compute_dtype(out.dtype)) for number in (threshold, 0.0))

    def kept(value: Any, size: Any) -> Any:
        return tirx.Select(size < limit, nothing, value)

    return ex.pointwise(out, kept, x, size)


@kernel_for(dialect_gating.row_places)
def row_places(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Where each row goes."""
    strength, threshold = bind(node)
    (rows,) = shape_of(strength)
    work = Work({}, bytes_read=4.0 * rows, bytes_written=4.0 * rows, launches=0)
    return KernelCall(gated_rows.places_of(rows, threshold), (strength,), "row places", f"{rows} rows", work)


@kernel_for(dialect_gating.pack_rows)
def pack_rows(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """The rows that are left, to the front."""
    x, places = bind(node)
    rows, width = shape_of(places)[0] - 1, shape_of(node)[1]
    func = gated_rows.pack(rows, width, hw.cores, shape_of(x))
    return KernelCall(func, (x, places), "rows packed", f"{rows} rows", _moved(rows, width, hw))


@kernel_for(dialect_gating.unpack_rows)
def unpack_rows(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Every row from where it was computed."""
    y, places = bind(node)
    rows, width = shape_of(node)
    func = gated_rows.unpack(rows, width, hw.cores)
    return KernelCall(func, (y, places), "rows unpacked", f"{rows} rows", _moved(rows, width, hw))


def _moved(rows: int, width: int, hw: Hardware) -> Work:
    tasks = gated_rows.tasks_of(rows, hw.cores)
    moved = 4.0 * rows * width
    return Work({}, bytes_read=moved, bytes_written=moved, launches=int(tasks > 1), tasks=tasks)


@kernel_for(dialect_gating.packed_linear)
def packed_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias) of the rows that are left."""
    x, weight, bias, activation, args, places, share = bind(node)
    rows, (columns, depth) = shape_of(x)[0], shape_of(weight)
    tiling = rank_tilings(hw, rows, columns, depth, packed=True)[0]
    func = gated_rows.packed_matmul(tiling, bias=bias is not None, activation=activation, args=args)
    layout = f"matmul_nk_panels_{tiling.columns}"
    packed = Packed(weight, layout, partial(pack_weight, columns=tiling.columns))
    extra = (bias,) if bias is not None else ()
    left = min(1.0, 1.0 - share + 1.0 / rows)
    read = 4.0 * (left * rows * depth + columns * depth + sum(prod(shape_of(t)) for t in extra))
    work = Work(
        flops={"float32": 2.0 * rows * columns * depth * left},
        bytes_read=read,
        bytes_written=4.0 * left * rows * columns,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels,
        efficiency=max(0.01, tiling.efficiency),
    )
    whole = predicted_seconds(hw, tiling, activation)
    seconds = None if whole is None else whole * left
    choice = f"{share:.0%} of {rows - 1} rows expected to be left out; {tiling.reason}"
    return KernelCall(func, (x, packed, *extra, places), "matmul of rows that are left", choice, work, seconds)
