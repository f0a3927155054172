"""Depthwise 2-D convolution, NHWC, one filter per channel: out = act(conv(x, w) + bias + residual).

w packed   [KH * KW][C]
tile       MR neighbouring pixels x one vector of channels: MR accumulators, KW vectors of w for the row of taps at
           hand, and one vector of x that serves every window it belongs to

    x columns   0   1   2   3   4   5         pixel p reads column p * stride + kw * dilation
    pixel 0     w0  w1  w2
    pixel 1         w0  w1  w2
    pixel 2             w0  w1  w2
registers: MR + KW + 1 <= vector registers (a longer row of taps takes w from L1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm.tirx.script import builder as T

from .epilogue import apply_activation, is_heavy
from .loops import constant, flat, kernel_function, span
from .sweep import SweepPlan, Tile, Windows, each_tap, sweep
from .window import Placement, pieces


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Rearrange weight[C, 1, KH, KW] into [KH * KW, C]."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


@dataclass(frozen=True)
class Sum:
    """What is summed for one vector of channels, and what follows."""

    weight: Any  # flat
    first: Any  # index of tap (0, 0)
    tap: int  # distance between taps
    columns: int  # taps in a row
    bias: Any | None  # by the tile's channel
    residual: Any | None  # flat, lies like the output
    activation: str
    args: tuple[float, ...]


def emit_tile(acc: Any, tile: Tile, x: Any, sum_: Sum, out: Any, width: int | None = None) -> None:
    """Sum and store one register tile; of each vector the first `width` lanes exist."""
    pixels, lanes = tile.run.pixels, tile.lanes
    at = [span(p * lanes, lanes) for p in range(pixels)]
    for p in range(pixels):
        T.buffer_store(acc, constant(0.0, lanes), [at[p]])

    def tap(p: int, read: Any, kh: Any, kw: Any) -> None:
        w = sum_.weight[span(sum_.first + (kh * sum_.columns + kw) * sum_.tap, lanes)]
        T.buffer_store(acc, acc[at[p]] + x[span(read, lanes)] * w, [at[p]])

    each_tap(tile, tap)
    heavy = is_heavy(sum_.activation)
    for offset, part in pieces(lanes if width is None else width, lanes):
        for p in range(pixels):
            written = span(tile.out + p * tile.out_pixel + offset, part)
            value = acc[span(p * lanes + offset, part)]
            if sum_.bias is not None:
                value = value + sum_.bias[span(tile.channel + offset, part)]
            if sum_.residual is not None:
                value = value + sum_.residual[written]
            if not heavy:
                value = apply_activation(T.bind(value), sum_.activation, sum_.args)
            T.buffer_store(out, value, [written])
        if heavy:
            with T.serial(0, pixels) as p:
                written = span(tile.out + p * tile.out_pixel + offset, part)
                T.buffer_store(out, apply_activation(T.bind(out[written]), sum_.activation, sum_.args), [written])


def depthwise(
    windows: Windows,
    plan: SweepPlan,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: tuple[float, ...] = (),
) -> Any:
    """Return the kernel (x, packed weight[, bias][, residual], out)."""
    channels, taps = windows.channels, windows.rows.kernel * windows.columns.kernel
    operands: list[tuple[int, ...]] = [windows.input_shape, (taps, channels)]
    operands += [(channels,)] * bias + [windows.output_shape] * residual

    def body(x: Any, weight: Any, *rest: Any) -> None:
        given, added = rest[0] if bias else None, rest[-2] if residual else None
        emit_depthwise(windows, plan, (x, weight, given, added, rest[-1]), activation, args)

    return kernel_function("depthwise", operands, [windows.output_shape], body)


def emit_depthwise(
    windows: Windows,
    plan: SweepPlan,
    buffers: tuple[Any, Any, Any | None, Any | None, Any],
    activation: str,
    args: tuple[float, ...],
    place: Placement | None = None,
) -> None:
    """Emit the nest over x, packed weight, bias, residual and out; `place` puts the outputs into a larger image."""
    x, weight, bias, residual, out = buffers
    x, weight, out = flat(x), flat(weight), flat(out)
    added = None if residual is None else flat(residual)

    def emit(acc: Any, tile: Tile) -> None:
        sum_ = Sum(weight, tile.channel, windows.channels, windows.columns.kernel, bias, added, activation, args)
        emit_tile(acc, tile, x, sum_, out)

    sweep(windows, plan, emit, place)
