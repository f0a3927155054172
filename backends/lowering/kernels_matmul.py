"""Kernels of the matrix products: packed matmul where the right operand is a constant, batched where it is computed.

Refused: other dtypes than float32, operands of rank 0 or 1, scaled addmm. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ..kernels.matmul import matmul, pack_weight
from ..tiling import choose_tiling
from .registry import KernelCall, Packed, Refusal, kernel_for

aten = torch.ops.aten
dialect = torch.ops.graphwright


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The static shape of a node's value."""
    return tuple(int(n) for n in node.meta["val"].shape)


def refuse_dtypes(*nodes: fx.Node | None) -> Refusal | None:
    """A refusal naming the first tensor that is not float32."""
    for node in nodes:
        if node is not None and node.meta["val"].dtype != torch.float32:
            return Refusal(f"{node.name} is {node.meta['val'].dtype}, the kernel is float32 only")
    return None


def _transposed(weight: torch.Tensor, columns: int) -> torch.Tensor:
    return pack_weight(weight.t(), columns)


def _packed_matmul(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    *,
    weight_is_kn: bool,
    bias: fx.Node | None = None,
    residual: fx.Node | None = None,
    activation: str = "none",
    args: Sequence[float] = (),
) -> KernelCall | Refusal:
    refusal = refuse_dtypes(node, x, weight, bias, residual)
    if refusal is not None:
        return refusal
    out = shape_of(node)
    N, K = reversed(shape_of(weight)) if weight_is_kn else shape_of(weight)
    M = prod(out[:-1])
    if bias is not None and prod(shape_of(bias)) != N:
        return Refusal(f"the bias has shape {shape_of(bias)}, not one value a column")
    if residual is not None and shape_of(residual) != out:
        return Refusal(f"the residual has shape {shape_of(residual)}, the result {out}")
    tiling = choose_tiling(hw, M, N, K)
    func = matmul(
        M,
        K,
        N,
        hw,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        args=args,
        tiling=tiling,
        input_shape=shape_of(x),
        bias_shape=shape_of(bias) if bias is not None else None,
        output_shape=out,
    )
    order = "kn" if weight_is_kn else "nk"
    packed = Packed(
        weight,
        f"matmul_{order}_panels_{tiling.columns}",
        partial(_transposed if weight_is_kn else pack_weight, columns=tiling.columns),
    )
    extra = [operand for operand in (bias, residual) if operand is not None]
    work = Work(
        flops={"float32": 2.0 * M * N * K},
        bytes_read=4.0 * (M * K + N * K + sum(prod(shape_of(operand)) for operand in extra)),
        bytes_written=4.0 * M * N,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels * tiling.row_chunks,
        efficiency=tiling.efficiency,
    )
    return KernelCall(func, (x, packed, *extra), "packed matmul", tiling.reason, work)


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr"


@kernel_for(dialect.linear.default)
def linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), w[N, K]."""
    x, weight, bias, residual, activation, args = bind(node)
    return _linear(node, hw, x, weight, bias, residual, activation, args)


@kernel_for(aten.linear.default)
def aten_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """x . w^T + bias."""
    x, weight, bias = bind(node)
    return _linear(node, hw, x, weight, bias, None, "none", ())


def _linear(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    residual: fx.Node | None,
    activation: str,
    args: Sequence[float],
) -> KernelCall | Refusal:
    if len(shape_of(weight)) != 2:
        return Refusal(f"the weight has {len(shape_of(weight))} dimensions, not 2")
    if not _is_constant(weight):
        return Refusal(f"the weight {weight.name} is not a constant")
    return _packed_matmul(
        node,
        hw,
        x,
        weight,
        weight_is_kn=False,
        bias=bias,
        residual=residual,
        activation=activation,
        args=args,
    )


def bind(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments in the order of the operator's schema, defaults filled in."""
    target: Any = node.target
    values = list(node.args)
    for argument in target._schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(values)
