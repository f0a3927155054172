"""Kernels of convolution and pooling in NHWC: pointwise, direct, Winograd, depthwise.

Refused: NCHW (the layout pass decides where NHWC pays), other dtypes than float32, computed weights of so few pixels
that rearranging them would cost more than the sums, images whose elements a 32-bit index cannot count. The TE
definition serves those.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work, predict_seconds
from ...passes import dialect
from ...passes.rewrite import shape_of
from ..choices import pick
from ..kernels.conv2d import conv2d
from ..kernels.conv_plan import Conv, Plan, pack_weight, problem_of, rank_plans
from ..kernels.conv_staged import conv2d_staged, staged, wants_staging
from ..kernels.depthwise import depthwise
from ..kernels.depthwise import pack_weight as pack_depthwise
from ..kernels.matmul import matmul
from ..kernels.matmul import pack_weight as pack_panels
from ..kernels.pool2d import avg_pool2d, max_pool2d
from ..kernels.sweep import SweepPlan, Windows, choose_sweep
from ..kernels.window import Axis
from ..kernels.winograd import winograd
from ..kernels.winograd_plan import WinogradPlan, rank_winograd
from ..kernels.winograd_plan import pack_weight as pack_winograd
from ..tiling import activation_seconds, predicted_seconds, rank_tilings
from .kernels_matmul import bind, refuse_dtypes, refuse_large
from .registry import KernelCall, Packed, Refusal, kernel_for

FEWEST_PIXELS = 8  # that share a rearranged weight: an element costs about as much as some multiply-adds
WINOGRAD_GAIN = 0.8  # its weights are up to 4 times as large: taken for a predicted gain beyond a fifth
SWEEP_EFFICIENCY = 0.6  # of peak multiply-adds, measured on MobileNetV2's depthwise layers while in cache
# A tap of a NaN-keeping maximum is two compares, two blends and an or: 2.4 cycles, measured, for what counts as one
# multiply-add of which peak has two a cycle.
MAXIMUM_EFFICIENCY = 0.5 / 2.4


@kernel_for(dialect.conv2d)
def conv(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(conv(x, w) + bias + residual)."""
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout = bind(node)
    tensors = [t for t in (node, x, weight, bias, residual) if t is not None]
    refusal = refuse_image(layout, *tensors)
    if refusal is not None:
        return refusal
    computed = weight.op != "get_attr"
    if computed and prod(shape_of(node)[:3]) < FEWEST_PIXELS:
        return Refusal(f"the weight {weight.name} is computed, and rearranging it would cost more than the sums")
    if bias is not None and shape_of(bias) != shape_of(node)[3:]:
        return Refusal(f"the bias has shape {shape_of(bias)}, not one value a channel")
    if residual is not None and shape_of(residual) != shape_of(node):
        return Refusal(f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}")
    problem = replace(
        problem_of(shape_of(x), shape_of(weight), stride, padding, dilation, groups),
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        args=tuple(args),
    )
    extra = tuple(t for t in (bias, residual) if t is not None)
    if groups == problem.channels == problem.filters and groups > 1:
        return _depthwise(problem, x, weight, extra, hw)
    if problem.pointwise:
        return _pointwise(problem, x, weight, extra, hw)
    func, plan = _spatial(problem, hw, computed)
    if isinstance(plan, WinogradPlan):
        algorithm, pack = "winograd conv", partial(pack_winograd, plan=plan)
    else:
        algorithm = "stem conv" if problem.channels < plan.lanes and groups == 1 else "direct conv"
        algorithm = "staged conv" if wants_staging(problem) else algorithm
        pack = partial(pack_weight, conv=problem, plan=plan)
    work = _conv_work(problem, (x, weight, *extra), plan.tasks, plan.efficiency)
    read: tuple[fx.Node | Packed, ...] = (x, Packed(weight, plan.layout, pack), *extra)
    return KernelCall(func, read, algorithm, plan.reason, work, conv_seconds(hw, problem, work))


def _spatial(problem: Conv, hw: Hardware, computed: bool) -> tuple[Any, Plan | WinogradPlan]:
    """The kernel of a convolution whose taps overlap, and its plan; Winograd transforms constant weights only."""
    direct = rank_plans(staged(problem) if wants_staging(problem) else problem, hw)
    fast = () if computed else rank_winograd(problem, hw)
    ranked: tuple[Plan | WinogradPlan, ...]
    if fast and fast[0].cycles < WINOGRAD_GAIN * direct[0].cycles:
        ranked = (*fast[:2], direct[0])
    else:
        ranked = (*direct[:2], *fast[:1])
    shape = replace(problem, bias=False, residual=False, activation="none", args=())
    plan = pick(f"convolution {shape}{' of computed weights' if computed else ''}", ranked)
    return _nest(problem, plan), plan


@lru_cache(maxsize=256)
def _nest(problem: Conv, plan: Plan | WinogradPlan) -> Any:
    """The function of a convolution: layers of a network repeat."""
    if isinstance(plan, WinogradPlan):
        return winograd(problem, plan)
    return conv2d_staged(problem, plan) if wants_staging(problem) else conv2d(problem, plan)


def _conv_work(problem: Conv, read: tuple[fx.Node, ...], tasks: int, efficiency: float) -> Work:
    return Work(
        flops={"float32": problem.flops},
        bytes_read=4.0 * sum(prod(shape_of(t)) for t in read),
        bytes_written=4.0 * prod(problem.output_shape),
        launches=int(tasks > 1),
        tasks=tasks,
        efficiency=max(0.01, efficiency),
    )


def conv_seconds(hw: Hardware, problem: Conv, work: Work) -> float | None:
    """Predicted seconds of a convolution that is `work`, its activation included, or None where rates are unknown."""
    seconds = predict_seconds(hw, work)
    if seconds is None:
        return None
    return seconds + activation_seconds(hw, problem.activation, prod(problem.output_shape), work.tasks or 1)


def _pointwise(problem: Conv, x: fx.Node, weight: fx.Node, extra: tuple[fx.Node, ...], hw: Hardware) -> KernelCall:
    """A 1x1 convolution of stride 1 is the matrix product of all pixels with the filters."""
    M, K, N = prod(problem.output_shape[:3]), problem.channels, problem.filters
    tiling = pick(f"product {M}x{N}x{K}", rank_tilings(hw, M, N, K, packed=True, residual=problem.residual))
    func = matmul(
        M,
        K,
        N,
        hw,
        bias=problem.bias,
        residual=problem.residual,
        activation=problem.activation,
        args=problem.args,
        tiling=tiling,
        input_shape=problem.input_shape,
        output_shape=problem.output_shape,
    )
    packed = Packed(weight, f"matmul_nk_panels_{tiling.columns}", partial(_pack_pointwise, columns=tiling.columns))
    work = Work(
        flops={"float32": problem.flops},
        bytes_read=4.0 * (M * K + K * N + sum(prod(shape_of(t)) for t in extra)),
        bytes_written=4.0 * M * N,
        launches=int(tiling.tasks > 1),
        tasks=tiling.panels * tiling.row_chunks,
        efficiency=max(0.01, tiling.efficiency),
    )
    seconds = predicted_seconds(hw, tiling, problem.activation)
    return KernelCall(func, (x, packed, *extra), "pointwise conv", tiling.reason, work, seconds)


def _pack_pointwise(weight: torch.Tensor, columns: int) -> torch.Tensor:
    return pack_panels(weight.flatten(1), columns)


def _depthwise(problem: Conv, x: fx.Node, weight: fx.Node, extra: tuple[fx.Node, ...], hw: Hardware) -> KernelCall:
    windows = Windows(problem.batch, problem.rows, problem.columns, problem.channels)
    plan = choose_sweep(windows, hw)
    func = depthwise(
        windows,
        plan,
        bias=problem.bias,
        residual=problem.residual,
        activation=problem.activation,
        args=problem.args,
    )
    read: tuple[fx.Node | Packed, ...] = (x, Packed(weight, "depthwise_taps", pack_depthwise), *extra)
    work = _sweep_work(windows, plan, hw, len(extra))
    return KernelCall(func, read, "depthwise conv", plan.reason, work, conv_seconds(hw, problem, work))


@kernel_for(dialect.max_pool2d)
def max_pool(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """The maximum over each window."""
    x, kernel, stride, padding, dilation, _, layout = bind(node)
    refusal = refuse_image(layout, node, x)
    if refusal is not None:
        return refusal
    windows = windows_of(node, x, kernel, stride, padding, dilation)
    plan = choose_sweep(windows, hw)
    work = replace(_sweep_work(windows, plan, hw), efficiency=MAXIMUM_EFFICIENCY)
    return KernelCall(max_pool2d(windows, plan), (x,), "max pooling", plan.reason, work)


@kernel_for(dialect.avg_pool2d)
def avg_pool(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """The mean over each window."""
    x, kernel, stride, padding, _, count_include_pad, divisor, layout = bind(node)
    refusal = refuse_image(layout, node, x)
    if refusal is not None:
        return refusal
    windows = windows_of(node, x, kernel, stride, padding, (1, 1))
    plan = choose_sweep(windows, hw)
    func = avg_pool2d(
        windows,
        plan,
        count_include_pad=count_include_pad,
        padding_after=(padding[1], padding[3]),
        divisor=divisor,
    )
    return KernelCall(func, (x,), "average pooling", plan.reason, _sweep_work(windows, plan, hw))


def windows_of(node: fx.Node, x: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Windows:
    batch, height, width, channels = shape_of(x)
    _, rows, columns, _ = shape_of(node)
    return Windows(
        batch,
        Axis(height, rows, kernel[0], stride[0], padding[0], dilation[0]),
        Axis(width, columns, kernel[1], stride[1], padding[2], dilation[1]),
        channels,
    )


def _sweep_work(windows: Windows, plan: SweepPlan, hw: Hardware, extra: int = 0) -> Work:
    out = prod(windows.output_shape)
    return Work(
        flops={"float32": 2.0 * windows.reads},
        bytes_read=4.0 * (prod(windows.input_shape) + (out if extra > 1 else 0)),
        bytes_written=4.0 * out,
        launches=int(windows.batch * plan.tasks > 1),
        tasks=windows.batch * plan.tasks,
        efficiency=SWEEP_EFFICIENCY,
    )


def refuse_image(layout: str, *tensors: fx.Node) -> Refusal | None:
    """Why the NHWC kernels cannot take an operator on `tensors`, or None."""
    if layout != "NHWC":
        return Refusal(f"the layout is {layout}")
    for tensor in tensors:
        if not prod(shape_of(tensor)):
            return Refusal(f"{tensor.name} has no elements")
    return refuse_large(*tensors) or refuse_dtypes(*tensors)
