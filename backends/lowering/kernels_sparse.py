"""The kernel of products whose weights have blocks of zeros.

Refused: other dtypes than float32, weights that are computed, empty results, tensors that a 32-bit index cannot count.
The TE definition, which multiplies the zeros too, serves those.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes.dialect_sparse import sparse_linear
from ...passes.rewrite import shape_of
from ...passes.zero_blocks import Blocks
from ..kernels.block_sparse import block_sparse, pack_index, pack_values, sparse_seconds, sparse_tiling
from .kernels_matmul import bind, refuse_dtypes, refuse_large
from .matmul_te import fused_linear
from .registry import KernelCall, Out, Packed, Refusal, kernel_for, lowers


@kernel_for(sparse_linear)
def block_sparse_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), w[N, K] with blocks of zeros."""
    x, weight, bias, residual, activation, args, (columns, depth, count, longest) = bind(node)
    extra = tuple(t for t in (bias, residual) if t is not None)
    refusal = refuse_dtypes(node, x, weight, *extra) or refuse_large(node, x)
    if refusal is not None:
        return refusal
    out = shape_of(node)
    if weight.op != "get_attr" or not prod(out):
        return Refusal("the weight is computed, or the result has no elements")
    (N, K), M = shape_of(weight), prod(out[:-1])
    blocks = Blocks(columns, depth, count, longest, -(-N // columns) * (K // depth))
    tiling = sparse_tiling(hw, M, N, K, blocks)
    func = block_sparse(
        M,
        K,
        N,
        blocks,
        tiling,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        args=args,
        input_shape=shape_of(x),
        output_shape=out,
    )
    shape = f"{columns}x{depth}"
    values = Packed(weight, f"blocks_{shape}", partial(_values, columns=columns, depth=depth))
    index = partial(_index, columns=columns, depth=depth, tasks=tiling.tasks)
    places = Packed(weight, f"places_{shape}_{tiling.tasks}", index)
    kept = count * depth * columns
    work = Work(
        flops={"float32": 2.0 * M * kept},
        bytes_read=4.0 * (M * K + kept + count + sum(prod(shape_of(t)) for t in extra)),
        bytes_written=4.0 * M * N,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels * tiling.row_chunks,
        efficiency=max(0.01, tiling.efficiency),
    )
    reason = f"{blocks.text()}; {tiling.reason}"
    seconds = sparse_seconds(hw, tiling, blocks, activation)
    return KernelCall(func, (x, values, places, *extra), "block-sparse matmul", reason, work, seconds)


def _values(weight: torch.Tensor, columns: int, depth: int) -> torch.Tensor:
    return pack_values(weight, columns, depth)


def _index(weight: torch.Tensor, columns: int, depth: int, tasks: int) -> torch.Tensor:
    return pack_index(weight, columns, depth, tasks)


@lowers(sparse_linear)
def sparse_linear_te(out: Out, *arguments: object) -> object:
    """The dense product."""
    return fused_linear(out, *arguments[:-1])
