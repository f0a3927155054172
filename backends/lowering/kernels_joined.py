"""Kernels of products whose rows lie in several tensors.

Refused: other dtypes than float32, weights that are computed, empty results. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import fx
from tvm import te

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_joined
from ...passes.rewrite import shape_of
from ..choices import pick
from ..kernels.joined_matmul import Part, joined_matmul, joined_tiling
from ..kernels.matmul import pack_weight
from ..tiling import predicted_seconds, rank_tilings
from .index_math import define, replace, sizes
from .kernels_matmul import bind, refuse_dtypes
from .matmul_te import fused_linear
from .movement import cat
from .registry import KernelCall, Out, Packed, Refusal, kernel_for, lowers

PART_CYCLES = 12.0  # of a part of one row tile: its loop and its rows' addresses, an estimate


def _pack(weight: torch.Tensor, columns: int) -> torch.Tensor:
    return pack_weight(weight, columns)


@kernel_for(dialect_joined.joined_linear)
def joined_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act([parts] . w^T + bias + residual), w[N, K]."""
    tensors, starts, widths, weight, bias, residual, activation, args = bind(node)
    extra = tuple(t for t in (bias, residual) if t is not None)
    refusal = refuse_dtypes(node, *tensors, weight, *extra)
    if refusal is not None:
        return refusal
    out = shape_of(node)
    if weight.op != "get_attr" or not prod(out) or not sum(widths):
        return Refusal("the weight is computed, or there is nothing to multiply")
    if bias is not None and shape_of(bias) != out[-1:]:
        return Refusal(f"the bias has shape {shape_of(bias)}, not one value a column")
    M, N, K = prod(out[:-1]), out[-1], sum(widths)
    ranked = rank_tilings(hw, M, N, K, packed=True, residual=residual is not None)
    tiling = joined_tiling(pick(f"product {M}x{N}x{K}", ranked))
    parts = [Part(shape_of(t), s, w) for t, s, w in zip(tensors, starts, widths, strict=True)]
    func = joined_matmul(
        parts,
        M,
        N,
        hw,
        tiling,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        args=args,
        output_shape=out,
    )
    packed = Packed(weight, f"matmul_nk_panels_{tiling.columns}", partial(_pack, columns=tiling.columns))
    work = Work(
        flops={"float32": 2.0 * M * N * K},
        bytes_read=4.0 * (M * K + N * K + sum(prod(shape_of(t)) for t in extra)),
        bytes_written=4.0 * M * N,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels * tiling.row_chunks,
        efficiency=max(0.01, tiling.efficiency),
    )
    seconds = predicted_seconds(hw, tiling, activation)
    if seconds is not None and hw.clock_mhz is not None:
        tiles = tiling.row_tiles * tiling.panels / max(1, min(tiling.tasks, hw.cores))
        seconds += (len(parts) - 1) * tiles * PART_CYCLES / (hw.clock_mhz * 1e6)
    reason = f"{tiling.reason}, {len(parts)} parts"
    return KernelCall(func, (*tensors, packed, *extra), "joined matmul", reason, work, seconds)


@lowers(dialect_joined.joined_linear)
def joined_linear_te(
    out: Out,
    parts: Sequence[te.Tensor],
    starts: Sequence[int],
    widths: Sequence[int],
    weight: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> te.Tensor:
    """The pieces side by side, then the product."""
    whole = joined_rows_te(Out((*out.shape[:-1], sum(widths)), str(parts[0].dtype)), parts, starts, widths)
    return fused_linear(out, whole, weight, bias, residual, activation, activation_args)


@lowers(dialect_joined.joined_rows)
def joined_rows_te(out: Out, parts: Sequence[te.Tensor], starts: Sequence[int], widths: Sequence[int]) -> te.Tensor:
    """The pieces side by side."""
    last = len(out.shape) - 1

    def piece(x: te.Tensor, start: int, width: int) -> te.Tensor:
        cut = Out((*sizes(x)[:-1], width), str(x.dtype))
        return define(cut, lambda *i: x(*replace(i, last, i[last] + start)), "piece")

    pieces = [piece(*part) for part in zip(parts, starts, widths, strict=True)]
    joined: te.Tensor = cat(out, pieces, last)
    return joined
