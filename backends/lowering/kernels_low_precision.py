"""Kernels of the operators of passes/dialect_mixed.py and dialect_half.py.

Dot products of bfloat16, products and sums of float16, 16-bit weights widened.

They refuse nothing that `assign_precision` makes for CPUs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_half, dialect_mixed
from ...passes.precision.forms import HALF_RATE
from ...passes.rewrite import shape_of
from ..kernels.bf16_matmul import FloatFinish, bf16_matmul
from ..kernels.conv_plan import problem_of
from ..kernels.dot_conv import choose_dot_conv, dot_conv, pack_conv
from ..kernels.dot_matmul import pack_for
from ..kernels.dot_product import (
    Dot,
    bf16_dot,
    bf16_weights,
    choose_dot_tiling,
    f16_dot,
    f16_weights,
    int8_weights,
    narrow_text,
)
from .kernels_matmul import bind
from .registry import KernelCall, Packed, Refusal, kernel_for

# How kernels see a tensor: bfloat16 as its bits, since TVM rewrites arithmetic and calls on its own bfloat16.
_MEMORY = {torch.float32: "float32", torch.bfloat16: "uint16"}


def memory_dtype(node: fx.Node) -> str:
    """The dtype that a kernel's buffer of this tensor has."""
    return _MEMORY[node.meta["val"].dtype]


def _dot(hw: Hardware, round_input: bool) -> Dot | None:
    return bf16_dot(hw) if round_input else bf16_weights(hw)


@kernel_for(dialect_mixed.linear_bf16)
def linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), w[N, K] in bfloat16."""
    x, weight, bias, residual, activation, args, round_input, _ = bind(node)
    dot = _dot(hw, round_input)
    if dot is None:
        return Refusal(f"{hw.id} has no dot product of bfloat16")
    N, K = shape_of(weight)
    finish = _finish(node, N, bias, residual, activation, args)
    return _matmul(node, hw, dot, finish, (x, weight, bias, residual), (prod(shape_of(node)[:-1]), K, N))


@kernel_for(dialect_mixed.linear_f16)
def linear_f16(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), w[N, K] in float16 and all else in float32."""
    x, weight, bias, residual, activation, args, round_input, narrow = bind(node)
    dot = f16_weights(hw)
    if dot is None or round_input or narrow:
        return Refusal(f"{hw.id} has float16 in memory only" if dot else f"{hw.id} does not convert float16")
    N, K = shape_of(weight)
    finish = _finish(node, N, bias, residual, activation, args)
    return _matmul(node, hw, dot, finish, (x, weight, bias, residual), (prod(shape_of(node)[:-1]), K, N))


@kernel_for(dialect_half.linear_half)
def linear_half(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w^T + bias + residual), products and sums of blocks in float16."""
    x, weight, bias, residual, activation, args, _, _ = bind(node)
    dot = f16_dot(hw, dialect_half.BLOCK)
    if dot is None:
        return Refusal(f"{hw.id} does not multiply halves by element")
    N, K = shape_of(weight)
    finish = _finish(node, N, bias, residual, activation, args)
    return _matmul(node, hw, dot, finish, (x, weight, bias, residual), (prod(shape_of(node)[:-1]), K, N))


@kernel_for(dialect_mixed.linear_w8)
def linear_w8(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act((x . w8^T) * scale + bias + residual), w8[N, K] in int8 and all else in float32."""
    x, weight, scale, bias, residual, activation, args = bind(node)
    dot = int8_weights(hw)
    N, K = shape_of(weight)
    finish = replace(_finish(node, N, bias, residual, activation, args), scale=True)
    tiling = choose_dot_tiling(hw, dot, M := prod(shape_of(node)[:-1]), N, K)
    func = bf16_matmul(M, K, N, hw, finish, dot=dot, tiling=tiling, source="float32", input_shape=shape_of(x))
    packed = Packed(
        weight, f"int8_panels_{dot.group}_{tiling.columns}", partial(_pack, dot=dot, columns=tiling.columns)
    )
    tasks = tiling.panels * tiling.row_chunks
    work = _work(hw, node, (x, weight, scale, bias, residual), 2.0 * M * N * K, tasks, tiling.efficiency, dot)
    operands = (x, packed, *[t for t in (scale, bias, residual) if t is not None])
    return KernelCall(func, operands, "int8-weight matmul", f"{dot.name}, {tiling.reason}", work)


@kernel_for(dialect_mixed.conv2d_bf16, dialect_half.conv2d_half)
def conv(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(conv(x, w) + bias + residual), w in bfloat16 or float16, NHWC."""
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout, round_input, _ = bind(node)
    half = node.target is dialect_half.conv2d_half
    dot = f16_dot(hw, dialect_half.BLOCK) if half else _dot(hw, round_input)
    if dot is None or not dot.by_word:
        return Refusal(f"{hw.id} has no {'products of halves by element' if half else 'dot product of bfloat16'}")
    if groups != 1 or layout != "NHWC":
        return Refusal(f"{groups} groups, layout {layout}")
    problem = problem_of(shape_of(x), shape_of(weight), stride, padding, dilation)
    finish = _finish(node, problem.filters, bias, residual, activation, args)
    operands = (x, weight, bias, residual)
    if problem.pointwise:
        sizes = (prod(problem.output_shape[:3]), problem.channels, problem.filters)
        return _matmul(node, hw, dot, finish, operands, sizes)
    plan = choose_dot_conv(problem, dot, hw)
    kind = "f16" if half else "bf16"
    func = dot_conv(f"{kind}_conv", problem, memory_dtype(x), dot, plan, finish, narrow_text(hw))
    layout_name = f"{kind}_conv_{dot.group}_{plan.vectors * dot.lanes}"
    packed = Packed(weight, layout_name, partial(_pack_conv, dot=dot, plan=plan))
    work = _work(hw, node, operands, float(problem.flops), plan.tasks, plan.efficiency, dot)
    choice = f"{dot.name}, {plan.pixels}x{plan.vectors * dot.lanes}, {plan.panels} panels, {plan.tasks} tasks"
    return KernelCall(func, _read(x, packed, bias, residual), f"{kind} conv", choice, work)


def _pack_conv(weight: torch.Tensor, dot: Dot, plan: object) -> torch.Tensor:
    return pack_conv(weight, dot, plan)  # type: ignore[arg-type]


def _matmul(
    node: fx.Node,
    hw: Hardware,
    dot: Dot,
    finish: FloatFinish,
    operands: tuple[fx.Node | None, ...],
    extents: tuple[int, int, int],
) -> KernelCall:
    x, weight, bias, residual = operands
    assert x is not None
    assert weight is not None
    M, K, N = extents
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    func = bf16_matmul(M, K, N, hw, finish, dot=dot, tiling=tiling, source=memory_dtype(x), input_shape=shape_of(x))
    kind = "f16" if dot.weight == "float16" else "bf16"
    packed = Packed(
        weight, f"{kind}_panels_{dot.group}_{tiling.columns}", partial(_pack, dot=dot, columns=tiling.columns)
    )
    tasks = tiling.panels * tiling.row_chunks
    work = _work(hw, node, operands, 2.0 * M * N * K, tasks, tiling.efficiency, dot)
    name = f"{kind} matmul" if dot.by_word else f"{kind}-weight matmul"
    return KernelCall(func, _read(x, packed, bias, residual), name, f"{dot.name}, {tiling.reason}", work)


def _pack(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    return pack_for(weight.flatten(1), dot, columns)


def _read(x: fx.Node, packed: Packed, *extra: fx.Node | None) -> tuple[fx.Node | Packed, ...]:
    return (x, packed, *[e for e in extra if e is not None])


def _finish(
    node: fx.Node, columns: int, bias: fx.Node | None, residual: fx.Node | None, activation: str, args: object
) -> FloatFinish:
    out = shape_of(node)
    return FloatFinish(
        prod(out[:-1]),
        columns,
        bias is not None,
        memory_dtype(residual) if residual is not None else None,
        activation,
        tuple(args),  # type: ignore[arg-type]
        memory_dtype(node),
        shape_of(bias) if bias is not None else None,
        out,
    )


def _work(
    hw: Hardware,
    node: fx.Node,
    operands: tuple[fx.Node | None, ...],
    flops: float,
    tasks: int,
    efficiency: float,
    dot: Dot,
) -> Work:
    def nbytes(tensor: fx.Node) -> int:
        return prod(shape_of(tensor)) * int(tensor.meta["val"].element_size())

    # One vector dot product does twice the multiply-adds of float32, whatever tiles the machine has besides.
    rate = HALF_RATE if dot.block else 2.0 if dot.by_word else 1.0
    return Work(
        flops={"float32": flops / rate},
        bytes_read=float(sum(nbytes(t) for t in operands if t is not None)),
        bytes_written=float(nbytes(node)),
        launches=int(tasks > 1),
        tasks=tasks,
        efficiency=max(0.01, efficiency),
    )
