"""Kernels of two convolutions in one.

Refused: constants that are computed, and what `kernels_conv` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect_pairs
from ...passes.rewrite import shape_of
from ..kernels.conv_depthwise import conv_depthwise
from ..kernels.conv_depthwise_plan import Pair, choose_pair, pack_bias, pack_product, pack_taps
from ..kernels.conv_plan import Conv, problem_of
from .kernels_conv import refuse_image
from .kernels_matmul import bind
from .registry import KernelCall, Packed, Refusal, kernel_for


@kernel_for(dialect_pairs.conv_depthwise)
def conv_then_depthwise(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Both convolutions panel by panel: act2(depthwise(act1(conv(x, w1) + bias1), w2) + bias2)."""
    x, weight, bias, *first, depth_weight, depth_bias, stride, padding, dilation, activation, args, layout = bind(node)
    for constant in (weight, bias, depth_weight, depth_bias):
        if constant is not None and constant.op != "get_attr":
            return Refusal(f"the constant {constant.name} is computed")
    planar = layout == "NCHW"
    refusal = refuse_image("NHWC", node, x, weight, depth_weight)
    if refusal is not None:
        return refusal
    pair = pair_of(
        x, weight, bias, first, depth_weight, depth_bias, (stride, padding, dilation, activation, args), planar
    )
    plan = choose_pair(pair, hw)
    columns = plan.columns
    operands: list[fx.Node | Packed] = [x]
    for constant, layout_name, pack in (
        (weight, "conv_panels", pack_product),
        (bias, "padded_bias", pack_bias),
        (depth_weight, "depthwise_panels", pack_taps),
        (depth_bias, "padded_bias", pack_bias),
    ):
        if constant is not None:
            operands.append(Packed(constant, f"{layout_name}_{columns}", partial(pack, columns=columns)))
    out = prod(shape_of(node))
    work = Work(
        flops={"float32": pair.flops},
        bytes_read=4.0 * (prod(shape_of(x)) + prod(shape_of(weight)) + prod(shape_of(depth_weight))),
        bytes_written=4.0 * out,
        launches=int(pair.first.batch * plan.tasks > 1),
        tasks=pair.first.batch * plan.tasks,
        efficiency=max(0.01, plan.efficiency),
    )
    seconds = plan.cycles / (hw.clock_mhz * 1e6) if hw.clock_mhz else None
    func = conv_depthwise(pair, plan)
    return KernelCall(func, tuple(operands), "conv and depthwise", plan.reason, work, predicted_seconds=seconds)


def pair_of(
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    first: list[Any],
    depth_weight: fx.Node,
    depth_bias: fx.Node | None,
    second: tuple[Any, ...],
    planar: bool,
) -> Pair:
    """The two problems, of sizes that fit each other."""
    image = shape_of(x) if not planar else [shape_of(x)[d] for d in (0, 2, 3, 1)]

    def problem(
        image: Sequence[int], weight: fx.Node, bias: fx.Node | None, options: Sequence[Any], groups: int
    ) -> Conv:
        stride, padding, dilation, activation, args = options
        plain = problem_of(image, shape_of(weight), stride, padding, dilation, groups)
        return replace(plain, bias=bias is not None, activation=activation, args=tuple(args))

    one = problem(image, weight, bias, first, 1)
    two = problem(one.output_shape, depth_weight, depth_bias, second, one.filters)
    return Pair(one, two, planar)
