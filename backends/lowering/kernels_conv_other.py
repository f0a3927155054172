"""Kernels of transposed convolution in NHWC.

Refused: NCHW, other dtypes than float32, computed weights of so few pixels that rearranging them would cost more than
the sums, images whose elements a 32-bit index cannot count, and strides with so many phases that a loop nest for each
would be more code than work. The TE definition serves those.
"""

from __future__ import annotations

from functools import lru_cache, partial
from math import prod
from typing import Any

from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect
from ...passes.rewrite import shape_of
from ..kernels.conv_transpose import Phase, Transposed, choose_phases, conv_transpose2d, pack_phase
from ..kernels.sweep import SweepPlan
from .kernels_conv import FEWEST_PIXELS, SWEEP_EFFICIENCY, refuse_image
from .kernels_matmul import bind
from .registry import KernelCall, Packed, Refusal, kernel_for

MOST_PHASES = 16


@kernel_for(dialect.conv_transpose2d)
def conv_transpose(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """act(conv_transpose(x, w) + bias + residual)."""
    x, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, args, layout = bind(node)
    tensors = [t for t in (node, x, weight, bias, residual) if t is not None]
    refusal = refuse_image(layout, *tensors)
    if refusal is not None:
        return refusal
    if weight.op != "get_attr" and prod(shape_of(x)[:3]) < FEWEST_PIXELS:
        return Refusal(f"the weight {weight.name} is computed, and rearranging it would cost more than the sums")
    if prod(stride) > MOST_PHASES:
        return Refusal(f"a stride of {list(stride)} has {prod(stride)} phases, a loop nest each")
    if residual is not None and shape_of(residual) != shape_of(node):
        return Refusal(f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}")
    batch, height, width, channels = shape_of(x)
    _, each, *kernel = shape_of(weight)
    problem = Transposed(
        batch,
        height,
        width,
        channels,
        each * groups,
        (kernel[0], kernel[1]),
        tuple(stride),
        tuple(padding),
        tuple(output_padding),
        tuple(dilation),
        groups,
        bias is not None,
        residual is not None,
        activation,
        tuple(args),
    )
    func, phases = _transposed(problem, hw)
    packed = [Packed(weight, phase.layout, partial(pack_phase, phase=phase)) for phase in phases]
    extra = [t for t in (bias, residual) if t is not None]
    return KernelCall(
        func,
        (x, *packed, *extra),
        "transposed conv",
        f"{len(phases)} phases, the largest: {max(phases, key=lambda p: p.conv.flops).plan.reason}",
        _work(problem, phases, [x, weight, *extra]),
    )


@lru_cache(maxsize=256)
def _transposed(problem: Transposed, hw: Hardware) -> tuple[Any, tuple[Phase, ...]]:
    phases = choose_phases(problem, hw)
    return conv_transpose2d(problem, phases), phases


def _work(problem: Transposed, phases: tuple[Phase, ...], read: list[fx.Node]) -> Work:
    flops = sum(p.conv.flops for p in phases)
    cycles = sum(p.conv.flops / max(0.01, _efficiency(p)) for p in phases)
    return Work(
        flops={"float32": flops},
        bytes_read=4.0 * sum(prod(shape_of(t)) for t in read),
        bytes_written=4.0 * prod(problem.output_shape),
        launches=sum(p.tasks > 1 for p in phases),
        tasks=max(p.tasks for p in phases),
        efficiency=max(0.01, flops / max(1.0, cycles)),
    )


def _efficiency(phase: Phase) -> float:
    return SWEEP_EFFICIENCY if isinstance(phase.plan, SweepPlan) else phase.plan.efficiency
