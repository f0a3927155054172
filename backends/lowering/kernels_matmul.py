"""Kernels of the matrix products: packed where the right operand is constant, else batched.

Refused: other dtypes than float32, operands of rank 0 or 1, empty results, scaled addmm; the TE definition serves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect
from ...passes.rewrite import shape_of
from ..choices import pick
from ..kernels.batch_matmul import batch_matmul, batch_seconds, broadcast_batch, choose_batch_tiling
from ..kernels.gemv import dot_batch, dot_rows, dots_seconds, is_narrow, split, suits_dots
from ..kernels.matmul import matmul, pack_weight
from ..tiling import Tiling, predicted_seconds, rank_tilings
from .registry import KernelCall, Packed, Refusal, kernel_for

aten = torch.ops.aten


def refuse_dtypes(*nodes: fx.Node | None) -> Refusal | None:
    """A refusal naming the first tensor that is not float32."""
    for node in nodes:
        if node is not None and node.meta["val"].dtype != torch.float32:
            return Refusal(f"{node.name} is {node.meta['val'].dtype}, the kernel is float32 only")
    return None


def refuse_large(*tensors: fx.Node) -> Refusal | None:
    """Why a kernel that counts in 32 bits cannot index `tensors`, or None."""
    for tensor in tensors:
        elements = prod(shape_of(tensor))
        if elements >= 2**31:
            return Refusal(f"{tensor.name} has {elements} elements, more than a 32-bit index counts")
    return None


def bind(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments in the order of the operator's schema, defaults filled in."""
    target: Any = node.target
    values = list(node.args)
    for argument in target._schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(values)


@dataclass(frozen=True)
class _Extra:
    """What follows the product."""

    bias: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    args: Sequence[float] = ()

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return tuple(operand for operand in (self.bias, self.residual) if operand is not None)

    def refusal(self, out: tuple[int, ...]) -> Refusal | None:
        """Why the epilogue cannot be had for a result of shape `out`, or None."""
        if self.bias is not None:
            shape = shape_of(self.bias)
            if prod(shape) != out[-1] or shape[-1:] != out[-1:]:
                return Refusal(f"the bias has shape {shape}, not one value a column")
        if self.residual is not None and shape_of(self.residual) != out:
            return Refusal(f"the residual has shape {shape_of(self.residual)}, the result {out}")
        return None


def _pack(weight: torch.Tensor, columns: int, transposed: bool) -> torch.Tensor:
    matrix = weight.reshape(weight.shape[-2:])
    return pack_weight(matrix if transposed else matrix.t(), columns)


def _product(
    node: fx.Node,
    hw: Hardware,
    a: fx.Node,
    b: fx.Node,
    extra: _Extra,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> KernelCall | Refusal:
    """op(a) . op(b), by the packed kernel where b is one constant matrix."""
    refusal = refuse_dtypes(node, a, b, *extra.operands) or extra.refusal(shape_of(node))
    if refusal is not None:
        return refusal
    if not prod(shape_of(node)):
        return Refusal("the result has no elements")
    b_shape = shape_of(b)
    if len(b_shape) < 2 or not shape_of(a):
        return Refusal(f"operands of shapes {shape_of(a)} and {b_shape}: a vector is not a matrix")
    if prod(b_shape[:-2]) == 1 and not transpose_a and shape_of(node)[:-1] == shape_of(a)[:-1]:
        if b.op == "get_attr" and is_narrow(hw, shape_of(node)[-1], shape_of(a)[-1]):
            return _narrow(node, hw, a, b, extra, transpose_b)
        if b.op == "get_attr":
            return _packed(node, hw, a, b, extra, transpose_b)
        K = shape_of(a)[-1]
        return _batched(node, hw, a, b, (prod(shape_of(a)[:-1]), K), b_shape[-2:], extra, False, transpose_b)
    if len(shape_of(a)) < 2:
        return Refusal(f"operands of shapes {shape_of(a)} and {b_shape}: a vector is not a matrix")
    return _batched(node, hw, a, b, shape_of(a), b_shape, extra, transpose_a, transpose_b)


def _narrow(node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: _Extra, transposed: bool) -> KernelCall:
    """The product with a constant of fewer columns than half a vector has lanes."""
    out = shape_of(node)
    N, K = shape_of(weight)[-2:] if transposed else reversed(shape_of(weight)[-2:])
    M = prod(out[:-1])
    func = dot_rows(
        M,
        K,
        N,
        hw,
        bias=extra.bias is not None,
        residual=extra.residual is not None,
        activation=extra.activation,
        args=extra.args,
        input_shape=shape_of(x),
        bias_shape=shape_of(extra.bias) if extra.bias is not None else None,
        output_shape=out,
    )
    tasks = split(hw, M, N, K)
    packed = Packed(weight, f"rows_of_{'nk' if transposed else 'kn'}", partial(_rows, transposed=transposed))
    work = Work(
        flops={"float32": 2.0 * M * N * K},
        bytes_read=4.0 * (M * K + N * K + sum(prod(shape_of(operand)) for operand in extra.operands)),
        bytes_written=4.0 * M * N,
        launches=int(tasks > 1),
        tasks=tasks,
        efficiency=0.3,  # two loads for each multiply-add
    )
    seconds = dots_seconds(hw, 1, N, M, K)
    return KernelCall(func, (x, packed, *extra.operands), "dot products", f"{N} a row, {tasks} tasks", work, seconds)


def _rows(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    matrix = weight.reshape(weight.shape[-2:])
    return (matrix if transposed else matrix.t()).contiguous()


def _packed(node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: _Extra, transposed: bool) -> KernelCall:
    out = shape_of(node)
    N, K = shape_of(weight)[-2:] if transposed else reversed(shape_of(weight)[-2:])
    M = prod(out[:-1])
    tiling = pick(f"product {M}x{N}x{K}", rank_tilings(hw, M, N, K, packed=True, residual=extra.residual is not None))
    func = matmul(
        M,
        K,
        N,
        hw,
        bias=extra.bias is not None,
        residual=extra.residual is not None,
        activation=extra.activation,
        args=extra.args,
        tiling=tiling,
        input_shape=shape_of(x),
        bias_shape=shape_of(extra.bias) if extra.bias is not None else None,
        output_shape=out,
    )
    layout = f"matmul_{'nk' if transposed else 'kn'}_panels_{tiling.columns}"
    packed = Packed(weight, layout, partial(_pack, columns=tiling.columns, transposed=transposed))
    work = _work(M, N, K, 1, tiling, M * K + N * K, extra)
    seconds = predicted_seconds(hw, tiling, extra.activation)
    return KernelCall(func, (x, packed, *extra.operands), "packed matmul", tiling.reason, work, seconds)


def _batched(
    node: fx.Node,
    hw: Hardware,
    a: fx.Node,
    b: fx.Node,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    extra: _Extra,
    transpose_a: bool,
    transpose_b: bool,
) -> KernelCall:
    out = shape_of(node)
    M, K = reversed(a_shape[-2:]) if transpose_a else a_shape[-2:]
    N = out[-1]
    shape = broadcast_batch(a_shape, b_shape)
    batch = prod(shape)
    tiling = choose_batch_tiling(hw, batch, M, N, K, transpose_a)
    work = _work(M, N, K, batch, tiling, prod(a_shape) + prod(b_shape), extra)
    operands = (a, b, *extra.operands)
    rest: dict[str, Any] = {
        "bias_shape": shape_of(extra.bias) if extra.bias is not None else None,
        "residual": extra.residual is not None,
        "activation": extra.activation,
        "args": extra.args,
        "buffer_shapes": (shape_of(a), shape_of(b), out),
    }
    if transpose_b and not transpose_a and suits_dots(hw, M, N, K):
        func = dot_batch(shape, a_shape[:-2], b_shape[:-2], M, K, N, hw, **rest)
        reason = f"{M} rows x {batch}, {split(hw, batch * M, N, K)} tasks"
        return KernelCall(func, operands, "dot products", reason, work, dots_seconds(hw, batch, M, N, K))
    func = batch_matmul(a_shape, b_shape, hw, transpose_a=transpose_a, transpose_b=transpose_b, tiling=tiling, **rest)
    seconds = batch_seconds(hw, tiling, batch, transpose_b)
    return KernelCall(func, operands, "batched matmul", tiling.reason, work, seconds)


def _work(M: int, N: int, K: int, batch: int, tiling: Tiling, elements_read: int, extra: _Extra) -> Work:
    return Work(
        flops={"float32": 2.0 * M * N * K * batch},
        bytes_read=4.0 * (elements_read + sum(prod(shape_of(operand)) for operand in extra.operands)),
        bytes_written=4.0 * M * N * batch,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels * tiling.row_chunks * max(1, batch),
        efficiency=max(0.01, tiling.efficiency),
    )


@kernel_for(dialect.linear)
def linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), w[N, K]."""
    x, weight, bias, residual, activation, args = bind(node)
    return _product(node, hw, x, weight, _Extra(bias, residual, activation, args), transpose_b=True)


@kernel_for(aten.linear.default)
def aten_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """x . w^T + bias."""
    x, weight, bias = bind(node)
    return _product(node, hw, x, weight, _Extra(bias), transpose_b=True)


@kernel_for(dialect.matmul)
def dialect_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(op(a) . op(b) + bias + residual)."""
    a, b, bias, residual, transpose_a, transpose_b, activation, args = bind(node)
    return _product(node, hw, a, b, _Extra(bias, residual, activation, args), transpose_a, transpose_b)


@kernel_for(aten.mm.default, aten.bmm.default, aten.matmul.default)
def aten_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """a . b"""
    a, b = bind(node)[:2]
    return _product(node, hw, a, b, _Extra())


@kernel_for(aten.addmm.default)
def addmm(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """added + a . b, where `added` is one row or a whole matrix."""
    added, a, b, beta, alpha = bind(node)[:5]
    if (beta, alpha) != (1, 1):
        return Refusal(f"addmm is scaled: beta={beta}, alpha={alpha}")
    whole = shape_of(added) == shape_of(node) and shape_of(node)[0] != 1
    return _product(node, hw, a, b, _Extra(residual=added) if whole else _Extra(added))
