"""Convolution and transposed convolution of any rank, dtype, grouping and layout: what no kernel of ours takes.

    result[n, o, y] = bias[o] + sum over c, k of padded[n, c, y * stride + k * dilation] * weight[o, c, k]

The padding is written out first, so that the innermost loop has no condition. Half-precision sums are kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te

from ...passes import dialect, dialect_mixed
from . import expressions as ex
from .epilogue import activate
from .index_math import Expr, define, guarded, sizes, spread
from .padding import pad_zeros
from .registry import Out, lowers

aten = torch.ops.aten


def _spatial_pad(source: te.Tensor, sides: Sequence[tuple[int, int]], trailing: int = 0) -> te.Tensor:
    """Pad the spatial dims: the last ones, or those before `trailing` others."""
    rest = len(source.shape) - len(sides) - trailing
    return pad_zeros(source, [*[(0, 0)] * rest, *sides, *[(0, 0)] * trailing])


def _sum(shape: Sequence[int], dtype: str, axes: Sequence[Any], term: Callable[..., Expr], name: str) -> te.Tensor:
    out = Out(tuple(shape), dtype)
    if any(int(axis.dom.extent) == 0 for axis in axes):  # a sum of nothing
        return define(out, lambda *i: ex.constant(0, dtype), name)
    return define(out, lambda *i: te.sum(term(*i), axis=list(axes)), name)


def correlate(
    source: te.Tensor,
    weight: te.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    sides: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> te.Tensor:
    """The convolution without bias, [N, O, *spatial] or [O, *spatial], in the accumulator's dtype."""
    count = len(stride)
    out_channels, in_channels, *kernel = sizes(weight)
    each = out_channels // groups
    padded = _spatial_pad(source, sides)
    dtype = ex.compute_dtype(str(source.dtype))
    c = te.reduce_axis((0, in_channels), "c")
    ks = [te.reduce_axis((0, k), f"k{d}") for d, k in enumerate(kernel)]

    def term(*i: Expr) -> Expr:
        *lead, o = i[:-count]
        channel = c if groups == 1 else o // each * in_channels + c
        places = [y * s + k * d for y, s, k, d in zip(i[-count:], stride, ks, dilation, strict=True)]
        return ex.cast(padded(*lead, channel, *places), dtype) * ex.cast(weight(o, c, *ks), dtype)

    return _sum(shape, dtype, [c, *ks], term, "conv")


def _correlate_nhwc(
    source: te.Tensor,
    weight: te.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    sides: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> te.Tensor:
    """The same for [N, H, W, C]; the weight is turned to [kh, kw, C, O], so that neighbours read neighbours."""
    out_channels, in_channels, kh, kw = sizes(weight)
    each = out_channels // groups
    padded = _spatial_pad(source, sides, trailing=1)
    dtype = ex.compute_dtype(str(source.dtype))
    turned = te.compute((kh, kw, in_channels, out_channels), lambda y, x, c, o: weight(o, c, y, x), name="weight")
    c = te.reduce_axis((0, in_channels), "c")
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")

    def term(n: Expr, y: Expr, x: Expr, o: Expr) -> Expr:
        channel = c if groups == 1 else o // each * in_channels + c
        value = padded(n, y * stride[0] + ky * dilation[0], x * stride[1] + kx * dilation[1], channel)
        return ex.cast(value, dtype) * ex.cast(turned(ky, kx, c, o), dtype)

    return _sum(shape, dtype, [ky, kx, c], term, "conv")


def spread_out(
    source: te.Tensor,
    weight: te.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> te.Tensor:
    """The transposed convolution without bias, in the accumulator's dtype; weight [C, O / groups, *kernel].

    Output position t = y + padding = q * stride + r gathers the taps k with k * dilation = r (mod stride). It is
    computed phase by phase, [N, O, *r, *q], in which neighbours in q read neighbouring inputs and the same tap; the
    phases are then interleaved.
    """
    count = len(stride)
    in_channels, each, *kernel = sizes(weight)
    extents = sizes(source)[-count:]
    quotients = [(n - 1 + p) // s + 1 for n, p, s in zip(shape[-count:], padding, stride, strict=True)]
    # Taps per phase: with dilation 1 only every stride-th tap belongs to a phase, else all are looked at.
    direct = [s == 1 or d == 1 for s, d in zip(stride, dilation, strict=True)]
    taps = [-(-k // s) if d == 1 else k for k, s, d in zip(kernel, stride, dilation, strict=True)]
    reach = [(k - 1) * d // s + 1 for k, s, d in zip(kernel, stride, dilation, strict=True)]
    padded = _spatial_pad(
        source, [(before, max(q - n, 0)) for before, q, n in zip(reach, quotients, extents, strict=True)]
    )
    dtype = ex.compute_dtype(str(source.dtype))
    channels = in_channels // groups
    c = te.reduce_axis((0, channels), "c")
    js = [te.reduce_axis((0, j), f"k{d}") for d, j in enumerate(taps)]

    def term(*i: Expr) -> Expr:
        *lead, o = i[: -2 * count]
        channel = c if groups == 1 else o // each * channels + c
        places, ks, conditions = [], [], []
        for d, (r, q) in enumerate(zip(i[-2 * count : -count], i[-count:], strict=True)):
            s, gap, j = stride[d], dilation[d], js[d]
            if gap == 1:
                k, back = r + j * s, j
                if kernel[d] % s:
                    conditions.append(k < kernel[d])
            else:
                # Exact where j * gap = r (mod s). Not (j * gap - r) // s: TVM's tiled product on GPUs errs on it.
                k, back = j, j * gap // s
                if not direct[d]:
                    conditions.append(j * gap % s == r)
            places.append(q - back + reach[d])
            ks.append(k)
        value, tap = ex.cast(padded(*lead, channel, *places), dtype), ex.cast(weight(channel, o % each, *ks), dtype)
        # Not value * 0 where there is no tap: that is NaN for an infinity.
        return guarded(conditions, value * tap, ex.constant(0, dtype))

    lead = tuple(shape[:-count])
    phases = _sum((*lead, *stride, *quotients), dtype, [c, *js], term, "conv_transpose")
    if all(s == 1 for s in stride) and not any(padding):
        return define(Out(tuple(shape), dtype), lambda *i: phases(*i[:-count], *[0] * count, *i[-count:]), "phases")

    def interleaved(*i: Expr) -> Expr:
        ts = [y + p for y, p in zip(i[-count:], padding, strict=True)]
        rests = [t % s for t, s in zip(ts, stride, strict=True)]
        return phases(*i[:-count], *rests, *(t // s for t, s in zip(ts, stride, strict=True)))

    return define(Out(tuple(shape), dtype), interleaved, "interleave")


def _finish(out: Out, sums: te.Tensor, bias: te.Tensor | None, count: int) -> te.Tensor:
    dtype = str(sums.dtype)

    def value(*i: Expr) -> Expr:
        total = sums(*i)
        return total if bias is None else total + ex.cast(bias(i[-count - 1]), dtype)

    return define(out, value, "conv")


def _both(padding: Sequence[int]) -> list[tuple[int, int]]:
    return [(p, p) for p in padding]


def _named_padding(name: str, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """ "valid" or "same": of an odd total the larger half comes after."""
    totals = [d * (k - 1) if name == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _conv(count: int) -> Callable[..., te.Tensor]:
    def conv(
        out: Out,
        source: te.Tensor,
        weight: te.Tensor,
        bias: te.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> te.Tensor:
        stride, dilation = spread(stride, count), spread(dilation, count)
        if isinstance(padding, str):
            sides = _named_padding(padding, sizes(weight)[2:], dilation)
        else:
            sides = _both(spread(padding, count))
        sums = correlate(source, weight, out.shape, stride, sides, dilation, groups)
        return _finish(out, sums, bias, count)

    return conv


def _conv_transpose(count: int) -> Callable[..., te.Tensor]:
    def conv_transpose(
        out: Out,
        source: te.Tensor,
        weight: te.Tensor,
        bias: te.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> te.Tensor:
        stride, padding, dilation = (spread(v, count) for v in (stride, padding, dilation))
        sums = spread_out(source, weight, out.shape, stride, padding, dilation, groups)
        return _finish(out, sums, bias, count)

    return conv_transpose


lowers(aten.conv1d.default, aten.conv1d.padding)(_conv(1))
lowers(aten.conv2d.default, aten.conv2d.padding)(_conv(2))
lowers(aten.conv3d.default, aten.conv3d.padding)(_conv(3))
lowers(aten.conv_transpose1d.default)(_conv_transpose(1))
lowers(aten.conv_transpose2d.input)(_conv_transpose(2))
lowers(aten.conv_transpose3d.input)(_conv_transpose(3))


@lowers(aten.convolution.default, aten._convolution.default)
def convolution(
    out: Out,
    source: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *backend_flags: bool,
) -> te.Tensor:
    """Either of the two, of any rank."""
    count = len(weight.shape) - 2
    if transposed:
        return _conv_transpose(count)(out, source, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(count)(out, source, weight, bias, stride, padding, dilation, groups)


@lowers(dialect.conv2d, dialect_mixed.conv2d_f16, dialect_mixed.conv2d_bf16)
def fused_conv2d(
    out: Out,
    source: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
    round_input: bool = False,
    narrow: bool = False,
) -> te.Tensor:
    """activation(convolution + bias + residual) in NCHW or NHWC, padding (top, bottom, left, right).

    The image is not rounded where no kernel serves convolutions of 16 bits.
    """
    top, bottom, left, right = padding
    form = _correlate_nhwc if layout == "NHWC" else correlate
    sums = form(source, weight, out.shape, stride, [(top, bottom), (left, right)], dilation, groups)
    channel = 3 if layout == "NHWC" else 1
    dtype = str(sums.dtype)

    def value(*i: Expr) -> Expr:
        total = sums(*i)
        for index, operand in (((i[channel],), bias), (i, residual)):
            if operand is not None:
                total = total + ex.cast(operand(*index), dtype)
        return total

    plain = bias is None and residual is None
    return activate(out, sums if plain else define(Out(out.shape, dtype), value, "conv"), activation, activation_args)


@lowers(dialect.conv_transpose2d)
def fused_conv_transpose2d(
    out: Out,
    source: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
) -> te.Tensor:
    """activation(transposed convolution + bias + residual) in NCHW or NHWC."""
    channel, shape = 1, out.shape
    if layout == "NHWC":
        n, h, w, c = sizes(source)
        image = source
        source = te.compute((n, c, h, w), lambda n, c, y, x: image(n, y, x, c), name="turned")
        channel, shape = 3, (shape[0], shape[3], *shape[1:3])
    sums = spread_out(source, weight, shape, stride, padding, dilation, groups)
    dtype = str(sums.dtype)

    def value(*i: Expr) -> Expr:
        total = sums(*i) if channel == 1 else sums(i[0], i[3], i[1], i[2])
        for index, operand in (((i[channel],), bias), (i, residual)):
            if operand is not None:
                total = total + ex.cast(operand(*index), dtype)
        return total

    return activate(out, define(Out(out.shape, dtype), value, "conv"), activation, activation_args)
