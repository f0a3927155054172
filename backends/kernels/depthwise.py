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

from typing import Any

import torch
from tvm.tirx.script import builder as T

from .epilogue import apply_activation, is_heavy
from .loops import constant, flat, kernel_function, span
from .sweep import SweepPlan, Tile, Windows, each_tap, sweep


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Rearrange weight[C, 1, KH, KW] into [KH * KW, C]."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


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
        x, weight, out = flat(x), flat(weight), flat(rest[-1])
        added = flat(rest[-2]) if residual else None
        heavy = is_heavy(activation)

        def emit(acc: Any, tile: Tile) -> None:
            pixels, lanes = tile.run.pixels, tile.lanes
            at = [span(p * lanes, lanes) for p in range(pixels)]
            for p in range(pixels):
                T.buffer_store(acc, constant(0.0, lanes), [at[p]])

            def tap(p: int, read: Any, kh: Any, kw: Any) -> None:
                w = weight[span((kh * windows.columns.kernel + kw) * channels + tile.channel, lanes)]
                T.buffer_store(acc, acc[at[p]] + x[span(read, lanes)] * w, [at[p]])

            each_tap(tile, tap)
            for p in range(pixels):
                written = span(tile.out + p * channels, lanes)
                value = acc[at[p]]
                if bias:
                    value = value + rest[0][span(tile.channel, lanes)]
                if added is not None:
                    value = value + added[written]
                if not heavy:
                    value = apply_activation(T.bind(value), activation, args)
                T.buffer_store(out, value, [written])
            if heavy:
                with T.serial(0, pixels) as p:
                    written = span(tile.out + p * channels, lanes)
                    T.buffer_store(out, apply_activation(T.bind(out[written]), activation, args), [written])

        sweep(windows, plan, emit)

    return kernel_function("depthwise", operands, [windows.output_shape], body)
