"""The kernel of convolutions that read an NCHW image of few channels and write NHWC.

Refused: other dtypes than float32, weights that are computed, images whose elements a 32-bit index cannot count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

from torch import fx
from tvm import te

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_planar
from ...passes.rewrite import shape_of
from ..choices import pick
from ..kernels.conv2d import conv2d
from ..kernels.conv_plan import pack_weight, problem_of, rank_plans
from .convolution_te import fused_conv2d
from .index_math import sizes
from .kernels_conv import conv_seconds, refuse_image
from .kernels_matmul import bind
from .movement import permute
from .registry import KernelCall, Out, Packed, Refusal, kernel_for, lowers


@kernel_for(dialect_planar.planar_conv2d)
def planar_conv2d(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(conv(x, w) + bias + residual), x [N, C, H, W], the result [N, H, W, C]."""
    x, weight, bias, residual, stride, padding, dilation, activation, args = bind(node)
    tensors = [t for t in (node, x, weight, bias, residual) if t is not None]
    refusal = refuse_image("NHWC", *tensors)
    if refusal is not None:
        return refusal
    if weight.op != "get_attr":
        return Refusal(f"the weight {weight.name} is computed")
    batch, channels, height, width = shape_of(x)
    problem = replace(
        problem_of((batch, height, width, channels), shape_of(weight), stride, padding, dilation, 1),
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        args=tuple(args),
    )
    shape = replace(problem, bias=False, residual=False, activation="none", args=())
    plan = pick(f"convolution {shape}", rank_plans(problem, hw)[:2])
    extra = tuple(t for t in (bias, residual) if t is not None)
    work = Work(
        flops={"float32": problem.flops},
        bytes_read=4.0 * sum(prod(shape_of(t)) for t in (x, weight, *extra)),
        bytes_written=4.0 * prod(problem.output_shape),
        launches=int(plan.tasks > 1),
        tasks=plan.tasks,
        efficiency=max(0.01, plan.efficiency),
    )
    packed = Packed(weight, plan.layout, partial(pack_weight, conv=problem, plan=plan))
    func, seconds = conv2d(problem, plan, planar=True), conv_seconds(hw, problem, work)
    return KernelCall(func, (x, packed, *extra), "planar conv", plan.reason, work, seconds)


@lowers(dialect_planar.planar_conv2d)
def planar_conv2d_te(
    out: Out,
    source: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_args: Sequence[float],
) -> te.Tensor:
    """The permute, then the convolution."""
    shape = sizes(source)
    image = permute(Out(tuple(shape[d] for d in (0, 2, 3, 1)), str(source.dtype)), source, (0, 2, 3, 1))
    rest = (stride, padding, dilation, 1, activation, activation_args, "NHWC")
    return fused_conv2d(out, image, weight, bias, residual, *rest)
