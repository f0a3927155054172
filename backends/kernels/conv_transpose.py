"""Transposed 2-D convolution, NHWC, as ordinary convolutions: one for each phase of the outputs.

    out[y] = sum of x[i] w[k]   over i * stride + k * dilation = y + padding

Outputs y = q * stride + r of one phase r meet the taps k with k * dilation = r + padding (mod stride) only. In q that
is a convolution of stride 1 over x itself; nothing is spread out with zeros, and no product is scattered.

    stride 2, kernel 4, padding 1           x   . 0 1 2 3 .      phase 0: taps 3, 1 on x[q - 1], x[q]
                                            y    01234567        phase 1: taps 2, 0 on x[q], x[q + 1]

Each phase is the nest of `conv2d` (its tile and register budget are there), which writes every stride-th pixel of
every stride-th row; its taps are a packed weight of their own. With one filter a channel it is the nest of `depthwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...hwdb import Hardware
from .conv2d import emit_conv2d, packed_elements
from .conv_plan import Conv, Plan, choose_plan, pack_weight
from .depthwise import emit_depthwise
from .depthwise import pack_weight as pack_depthwise
from .loops import kernel_function
from .sweep import SweepPlan, Windows, choose_sweep
from .window import Placement


@dataclass(frozen=True)
class Transposed:
    """The problem: sizes of the NHWC operands and what follows the sum."""

    batch: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  # rows and columns cut off at either end
    output_padding: tuple[int, int] = (0, 0)  # and added again at the far end
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    args: tuple[float, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        return self.batch, self.height, self.width, self.channels

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, OH, OW, K]."""
        rows, columns = (
            (size - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (self.kernel[i] - 1)
            + self.output_padding[i]
            + 1
            for i, size in enumerate((self.height, self.width))
        )
        return self.batch, rows, columns, self.filters


@dataclass(frozen=True)
class AxisPhase:
    """One phase along one axis: outputs start, start + stride, ..., and the taps they meet, by ascending input."""

    start: int
    count: int
    taps: tuple[int, ...]
    before: int
    after: int
    dilation: int


@dataclass(frozen=True)
class Phase:
    """An ordinary convolution that computes one phase of both axes."""

    conv: Conv
    plan: Plan | SweepPlan
    place: Placement
    taps: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def layout(self) -> str:
        """A name of the packed taps' arrangement."""
        rows, columns = ("_".join(map(str, t)) for t in self.taps)
        panels = "depthwise" if isinstance(self.plan, SweepPlan) else self.plan.layout
        return f"transposed_{rows}_by_{columns}_{panels}"

    @property
    def windows(self) -> Windows:
        """The problem where each channel is by itself."""
        return Windows(self.conv.batch, self.conv.rows, self.conv.columns, self.conv.channels)

    @property
    def weights(self) -> int:
        """Floats of the packed taps."""
        if isinstance(self.plan, SweepPlan):
            return self.conv.kernel[0] * self.conv.kernel[1] * self.conv.channels
        return packed_elements(self.conv, self.plan)

    @property
    def tasks(self) -> int:
        """Pieces of work that may run at once."""
        return self.conv.batch * self.plan.tasks if isinstance(self.plan, SweepPlan) else self.plan.tasks


def axis_phases(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[AxisPhase]:
    """The phases of one axis that have outputs."""
    found = []
    for start in range(min(stride, out)):
        taps = [k for k in reversed(range(kernel)) if (start + padding - k * dilation) % stride == 0]
        count = -(-(out - start) // stride)
        # A phase without taps is a window of one tap beyond the input: it reads nothing.
        before = (taps[0] * dilation - start - padding) // stride if taps else -size
        step = (taps[0] - taps[1]) * dilation // stride if len(taps) > 1 else 1
        reach = step * (max(1, len(taps)) - 1) + 1
        found.append(AxisPhase(start, count, tuple(taps), before, count - 1 + reach - size - before, step))
    return found


def choose_phases(problem: Transposed, hw: Hardware) -> tuple[Phase, ...]:
    """The convolutions that make up `problem`, each with its plan."""
    _, rows, columns, _ = problem.output_shape
    axes = [
        axis_phases(size, out, *(v[i] for v in (problem.kernel, problem.stride, problem.padding, problem.dilation)))
        for i, (size, out) in enumerate(((problem.height, rows), (problem.width, columns)))
    ]
    found = []
    for down, across in product(*axes):
        conv = Conv(
            *problem.input_shape,
            problem.filters,
            (max(1, len(down.taps)), max(1, len(across.taps))),
            padding=(down.before, down.after, across.before, across.after),
            dilation=(down.dilation, across.dilation),
            groups=problem.groups,
            bias=problem.bias,
            residual=problem.residual,
            activation=problem.activation,
            args=problem.args,
        )
        place = Placement(rows, columns, (down.start, across.start), problem.stride)
        found.append(Phase(conv, _plan(conv, hw), place, (down.taps, across.taps)))
    return tuple(found)


def _plan(conv: Conv, hw: Hardware) -> Plan | SweepPlan:
    if conv.groups == conv.channels == conv.filters and conv.groups > 1:
        return choose_sweep(Windows(conv.batch, conv.rows, conv.columns, conv.channels), hw)
    return choose_plan(conv, hw)


def conv_transpose2d(problem: Transposed, phases: Sequence[Phase]) -> Any:
    """Return the kernel (x, the packed taps of each phase...[, bias][, residual], out)."""
    operands: list[tuple[int, ...]] = [problem.input_shape]
    operands += [(p.weights,) for p in phases]
    operands += [(problem.filters,)] * problem.bias + [problem.output_shape] * problem.residual

    def body(x: Any, *rest: Any) -> None:
        weights, extra, out = rest[: len(phases)], rest[len(phases) : -1], rest[-1]
        bias = extra[0] if problem.bias else None
        residual = extra[-1] if problem.residual else None
        for phase, weight in zip(phases, weights, strict=True):
            if isinstance(phase.plan, SweepPlan):
                buffers = (x, weight, bias, residual, out)
                emit_depthwise(phase.windows, phase.plan, buffers, problem.activation, problem.args, phase.place)
            else:
                emit_conv2d(phase.conv, phase.plan, x, weight, bias, residual, out, phase.place)

    return kernel_function("conv_transpose2d", operands, [problem.output_shape], body)


def pack_phase(weight: torch.Tensor, phase: Phase) -> torch.Tensor:
    """The taps of `phase` out of weight[C, K / groups, KH, KW], packed as its convolution reads them."""
    conv = phase.conv
    w = weight.reshape(conv.groups, conv.group_channels, conv.group_filters, *weight.shape[2:])
    w = w.transpose(1, 2).reshape(conv.filters, conv.group_channels, *weight.shape[2:])
    rows, columns = phase.taps
    taps = w[:, :, list(rows)][..., list(columns)] if rows and columns else w.new_zeros((*w.shape[:2], *conv.kernel))
    return pack_depthwise(taps).flatten() if isinstance(phase.plan, SweepPlan) else pack_weight(taps, conv, phase.plan)
