"""Kernels of the operators of 8 bits (passes/dialect_int8.py): exact sums of products of bytes, requantized in place.

Refused: groups that are not depthwise (a group's channels are fewer than a dot product takes), results without
elements, and operands that a 32-bit index cannot count; no pass makes these, and there is no definition in tensor
expressions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_int8, dialect_mixed, dialect_rows
from ...passes.rewrite import arguments, shape_of
from ..kernels.bf16_matmul import FloatFinish
from ..kernels.conv_plan import Conv, problem_of
from ..kernels.dot_conv import DotConvPlan, choose_dot_conv, pack_conv
from ..kernels.dot_depthwise import dot_depthwise
from ..kernels.dot_depthwise_plan import DotDepthwisePlan, choose_dot_depthwise, pack_channels, pack_depthwise
from ..kernels.dot_matmul import pack_for
from ..kernels.dot_product import Dot, choose_dot_tiling, int8_dot
from ..kernels.int4_product import choose_int4, int4_matmul, pack_halves, pack_scales
from ..kernels.int8_product import (
    Requantize,
    Residual,
    has_offsets,
    int8_conv,
    int8_images_conv,
    int8_matmul,
    int8_rows_matmul,
    offsets,
)
from ..kernels.int8_rows import RowFinish
from ..kernels.mmla import FEWEST_ROWS, MmlaPlan, choose_mmla, mmla_conv, mmla_dot, pack_mmla
from .kernels_matmul import refuse_large
from .registry import KernelCall, Packed, Refusal, kernel_for

# Of peak dot products, by stride: most of its time goes into words, and into rounding results. Medians of
# benchmarks/depthwise.py on Zen 4 with AVX-512 VNNI.
DEPTHWISE_EFFICIENCY = {1: 0.32, 2: 0.20}
INT4_EFFICIENCY = 0.3  # of peak dot products: half of the instructions unpack
_NAMES = {torch.float32: "float32", torch.uint8: "uint8", torch.int8: "int8"}


def _dtype(node: fx.Node) -> str:
    return _NAMES[node.meta["val"].dtype]


@kernel_for(dialect_int8.qlinear)
def qlinear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """requantize(act(x . w^T + bias + residual))."""
    given = arguments(node)
    refusal = _refusal(node, given)
    if refusal is not None:
        return refusal
    N, K = shape_of(given["weight"])
    return _matmul(node, given, (prod(shape_of(node)[:-1]), K, N), hw)


@kernel_for(dialect_int8.qconv2d)
def qconv2d(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """requantize(act(conv(x, w) + bias + residual)), NHWC."""
    given = arguments(node)
    refusal = _refusal(node, given)
    if refusal is not None:
        return refusal
    x, weight = given["input"], given["weight"]
    problem = problem_of(
        shape_of(x), shape_of(weight), given["stride"], given["padding"], given["dilation"], given["groups"]
    )
    if problem.groups == problem.channels == problem.filters and problem.groups > 1:
        return _depthwise(node, given, problem, hw)
    if problem.groups != 1:
        return Refusal(f"{problem.groups} groups")
    if problem.pointwise:
        return _matmul(node, given, (prod(problem.output_shape[:3]), problem.channels, problem.filters), hw)
    if (by_matrices := _by_matrices(node, given, problem, hw)) is not None:
        return by_matrices
    dot = int8_dot(hw)
    plan = choose_dot_conv(problem, dot, hw)
    finish = _finish(node, given, problem.filters, dot)
    func = int8_conv(problem, hw, _dtype(x), finish, dot=dot, zero=given["input_zero"], plan=plan)
    layout = f"int8_conv_{dot.group}_{plan.vectors * dot.lanes}"
    packed = Packed(weight, layout, partial(_pack_conv, dot=dot, plan=plan))
    work = _work(node, float(problem.flops), plan.tasks, plan.efficiency)
    choice = f"{dot.name}, {plan.pixels}x{plan.vectors * dot.lanes}, {plan.panels} panels, {plan.tasks} tasks"
    return KernelCall(func, _read(given, packed, dot), "int8 conv", choice, work)


def _depthwise(node: fx.Node, given: dict[str, Any], problem: Conv, hw: Hardware) -> KernelCall | Refusal:
    if any(isinstance(given[name], fx.Node) and given[name].op != "get_attr" for name in ("scale", "bias")):
        return Refusal("its scales or bias are computed")
    plan = choose_dot_depthwise(problem, hw)
    finish = _finish(node, given, problem.filters, plan.dot)
    func = dot_depthwise("int8_depthwise", problem, _dtype(given["input"]), plan, finish, zero=given["input_zero"])
    blocks = "+".join(f"{b.count}x{b.width}" for b in plan.blocks)
    packed = Packed(given["weight"], "int8_depthwise_taps", pack_depthwise)
    x, _, *rest = _read(given, packed, plan.dot)
    constants = []
    for value in rest[: finish.offset + 1 + finish.bias]:
        if isinstance(value, Packed):
            ordered = partial(_ordered, offsets=value.pack, plan=plan)
            constants.append(Packed(packed.constant, f"{value.layout}_{blocks}", ordered))
        else:
            constants.append(Packed(value, f"depthwise_channels_{blocks}", partial(pack_channels, plan=plan)))
    tasks = problem.batch * plan.tasks
    work = _work(node, float(problem.flops), tasks, DEPTHWISE_EFFICIENCY[1 if max(problem.stride) == 1 else 2])
    choice = f"{plan.dot.name}, {plan.rows}x{plan.pixels} pixels, channels {blocks}, {tasks} tasks"
    read = (x, packed, *constants, *rest[len(constants) :])
    return KernelCall(func, read, "int8 depthwise conv", choice, work)


def _ordered(
    weight: torch.Tensor, offsets: Callable[[torch.Tensor], torch.Tensor], plan: DotDepthwisePlan
) -> torch.Tensor:
    return pack_channels(offsets(weight), plan)


@kernel_for(dialect_mixed.linear_w4)
def linear_w4(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(y + bias + residual), y of x in bytes and w4[N, K / 2] in groups that share a scale."""
    given = arguments(node)
    x, weight, scale = given["input"], given["weight"], given["scale"]
    if weight.op != "get_attr" or scale.op != "get_attr":
        return Refusal("the weights are computed")
    (N, half), groups, M = shape_of(weight), shape_of(scale)[1], prod(shape_of(node)[:-1])
    plan = choose_int4(hw, M, 2 * half, N, 2 * half // groups)
    bias, residual = given["bias"], given["residual"]
    finish = FloatFinish(
        *(M, N, bias is not None, None if residual is None else _dtype(residual)),
        *(given["activation"], tuple(given["activation_args"]), "float32"),
        bias_shape=None if bias is None else shape_of(bias),
        output_shape=shape_of(node),
    )
    packed = (
        Packed(weight, f"int4_panels_{plan.columns}", partial(pack_halves, columns=plan.columns)),
        Packed(scale, f"int4_scales_{plan.columns}", partial(pack_scales, columns=plan.columns)),
    )
    work = _work(node, 4.0 * M * N * half, plan.tasks, INT4_EFFICIENCY)
    choice = f"{plan.dot.name}, groups of {plan.group}, {plan.panels} panels, {plan.tasks} tasks"
    extra = [operand for operand in (bias, residual) if operand is not None]
    return KernelCall(int4_matmul(plan, finish, shape_of(x)), (x, *packed, *extra), "int4-weight matmul", choice, work)


@kernel_for(dialect_rows.linear_rows)
def linear_rows(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(x . w8^T * scale + bias + residual), x in bytes with a unit a row that is found at run time."""
    return _by_rows(node, hw, tokens=False)


@kernel_for(dialect_rows.linear_tokens)
def linear_tokens(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """The same by the steps that torchao's models have."""
    return _by_rows(node, hw, tokens=True)


def _by_rows(node: fx.Node, hw: Hardware, tokens: bool) -> KernelCall | Refusal:
    given = arguments(node)
    refusal = _refusal(node, given)
    if refusal is not None:
        return refusal
    (N, K), M, dot = shape_of(given["weight"]), prod(shape_of(node)[:-1]), int8_dot(hw)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    activation = (given["activation"], tuple(given["activation_args"]))
    added = (given["bias"] is not None, given["residual"] is not None)
    signed = has_offsets(0, "int8", dot)
    finish = RowFinish(M, N, *added, *activation, output_shape=shape_of(node), offset=signed)
    shape = shape_of(given["input"])
    func = int8_rows_matmul(M, K, N, hw, finish, dot=dot, tiling=tiling, input_shape=shape, tokens=tokens)
    layout = f"int8_panels_{dot.group}_{tiling.columns}"
    packed = Packed(given["weight"], layout, partial(_pack, dot=dot, columns=tiling.columns))
    work = _work(node, 2.0 * M * N * K, tiling.panels * tiling.row_chunks, tiling.efficiency)
    name = "int8 matmul, rows rounded at run time"
    return KernelCall(func, _read(given, packed, dot), name, f"{dot.name}, {tiling.reason}", work)


@kernel_for(dialect_rows.conv2d_images)
def conv2d_images(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(conv(x, w8) * scale + bias + residual), NHWC, x in bytes with a unit an image that is found at run time."""
    given = arguments(node)
    refusal = _refusal(node, given)
    if refusal is not None:
        return refusal
    sizes = (given["stride"], given["padding"], given["dilation"])
    problem, dot = problem_of(shape_of(given["input"]), shape_of(given["weight"]), *sizes, 1), int8_dot(hw)
    plan = choose_dot_conv(problem, dot, hw)
    pixels = prod(problem.output_shape[1:3])
    activation = (given["activation"], tuple(given["activation_args"]))
    added = (given["bias"] is not None, given["residual"] is not None)
    shape = (problem.batch * pixels, problem.filters)
    signed = has_offsets(0, "int8", dot)
    finish = RowFinish(*shape, *added, *activation, output_shape=shape_of(node), offset=signed, rows_of_unit=pixels)
    func = int8_images_conv(problem, hw, finish, dot=dot, plan=plan)
    layout = f"int8_conv_{dot.group}_{plan.vectors * dot.lanes}"
    packed = Packed(given["weight"], layout, partial(_pack_conv, dot=dot, plan=plan))
    work = _work(node, float(problem.flops), plan.tasks, plan.efficiency)
    name = "int8 conv, images rounded at run time"
    choice = f"{dot.name}, {plan.pixels}x{plan.vectors * dot.lanes}, {plan.panels} panels, {plan.tasks} tasks"
    return KernelCall(func, _read(given, packed, dot), name, choice, work)


def _refusal(node: fx.Node, given: dict[str, Any]) -> Refusal | None:
    tensors = [t for t in (node, *node.all_input_nodes) if t is not None]
    if not prod(shape_of(node)):
        return Refusal("the result has no elements")
    if given["weight"].op != "get_attr":
        return Refusal(f"the weight {given['weight'].name} is computed")
    return refuse_large(*tensors)


def _matmul(node: fx.Node, given: dict[str, Any], extents: tuple[int, int, int], hw: Hardware) -> KernelCall:
    M, K, N = extents
    if (by_matrices := _by_matrices(node, given, Conv(1, 1, M, K, N, (1, 1)), hw)) is not None:
        return by_matrices
    x, dot = given["input"], int8_dot(hw)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    finish = _finish(node, given, N, dot)
    func = int8_matmul(M, K, N, hw, _dtype(x), finish, dot=dot, tiling=tiling, input_shape=shape_of(x))
    layout = f"int8_panels_{dot.group}_{tiling.columns}"
    packed = Packed(given["weight"], layout, partial(_pack, dot=dot, columns=tiling.columns))
    work = _work(node, 2.0 * M * N * K, tiling.panels * tiling.row_chunks, tiling.efficiency)
    return KernelCall(func, _read(given, packed, dot), "int8 matmul", f"{dot.name}, {tiling.reason}", work)


def _by_matrices(node: fx.Node, given: dict[str, Any], problem: Conv, hw: Hardware) -> KernelCall | None:
    """By instructions that multiply small matrices; None where there are none, or too few rows for them."""
    x = given["input"]
    dot = mmla_dot(hw, _dtype(x))
    if dot is None or prod(problem.output_shape[:3]) < FEWEST_ROWS:
        return None
    plan = choose_mmla(problem, hw)
    finish = _finish(node, given, problem.filters, dot)
    func = mmla_conv(problem, _dtype(x), dot, plan, finish, shape_of(x), shape_of(node), given["input_zero"])
    packed = Packed(given["weight"], f"int8_mmla_{plan.columns}", partial(_pack_matrices, plan=plan))
    work = _work(node, float(problem.flops), plan.tasks, plan.efficiency)
    tile = f"{2 * plan.pairs}x{plan.columns}, {plan.panels} {'panel' if plan.panels == 1 else 'panels'}"
    name = "int8 matmul" if problem.pointwise else "int8 conv"
    return KernelCall(func, _read(given, packed, dot), name, f"{dot.name}, {tile}, {plan.tasks} tasks", work)


def _pack_matrices(weight: torch.Tensor, plan: MmlaPlan) -> torch.Tensor:
    return pack_mmla(weight, plan)


def _pack(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    return pack_for(weight.flatten(1), dot, columns)


def _pack_conv(weight: torch.Tensor, dot: Dot, plan: DotConvPlan) -> torch.Tensor:
    return pack_conv(weight, dot, plan)


def _read(given: dict[str, Any], packed: Packed, dot: Dot) -> tuple[fx.Node | Packed, ...]:
    zero, source = _source(given)
    extra = [given[name] for name in ("bias", "residual") if given[name] is not None]
    if not has_offsets(zero, source, dot):
        return (given["input"], packed, given["scale"], *extra)
    constant = partial(_offsets, zero=zero, source=source, dot=dot)
    added = Packed(packed.constant, f"int8_offsets_{source}_{zero}_{dot.left}", constant)
    return (given["input"], packed, added, given["scale"], *extra)


def _source(given: dict[str, Any]) -> tuple[int, str]:
    """The zero point and dtype of the bytes that are multiplied; rows of floats are rounded to int8."""
    source = _dtype(given["input"])
    return given.get("input_zero", 0), "int8" if source == "float32" else source


def _offsets(weight: torch.Tensor, zero: int, source: str, dot: Dot) -> torch.Tensor:
    return offsets(weight, zero, source, dot)


def _finish(node: fx.Node, given: dict[str, Any], columns: int, dot: Dot) -> Requantize:
    residual = given["residual"]
    added = None
    if residual is not None:
        added = Residual(_dtype(residual), given["residual_scale"], given["residual_zero"])
    quantised = given["dtype"] is not None
    return Requantize(
        prod(shape_of(node)[:-1]),
        columns,
        _dtype(node),
        given["out_zero"] if quantised else 0,
        dialect_int8.inverse(given["out_scale"]) if quantised else 1.0,
        given["bias"] is not None,
        added,
        given["activation"],
        tuple(given["activation_args"]),
        shape_of(node),
        has_offsets(*_source(given), dot),
    )


def _work(node: fx.Node, flops: float, tasks: int, efficiency: float) -> Work:
    def nbytes(tensor: fx.Node) -> int:
        return prod(shape_of(tensor)) * int(tensor.meta["val"].element_size())

    return Work(
        flops={"int8": flops},
        bytes_read=float(sum(nbytes(t) for t in node.all_input_nodes)),
        bytes_written=float(nbytes(node)),
        launches=int(tasks > 1),
        tasks=tasks,
        efficiency=max(0.01, efficiency),
    )
