"""Convolutions on GPUs as products whose one operand is gathered from the image (implicit GEMM).

    NHWC    rows are pixels, columns filters: channels are neighbours in the image, filters in the result
    NCHW    rows are filters, columns pixels: pixels are neighbours, where the window is one pixel

The sum goes over taps, then channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import tirx

from ...hwdb import Hardware
from ...passes.rewrite import shape_of
from ..kernels.loops import Shape, constant, flat, span
from ..lowering.registry import KernelCall, Packed, Refusal
from .product import Finish
from .product_call import (
    Extra,
    as_weights,
    as_words,
    dtype_of,
    floats,
    item_bytes,
    kernel_call,
    lanes,
    narrow,
    packed_shape,
    packed_weights,
    refused,
    tile_for,
)
from .stage import Halves, Operand, Weights
from .tile import LANES, Tile

SHORT = 64  # sums of fewer have a thread an element: depthwise convolutions


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its image; `padding` is (top, bottom, left, right)."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def one_pixel(self) -> bool:
        """Whether pixels of image and result are the same ones, for filters of 1 x 1."""
        return (*self.stride, *self.padding) == (1, 1, 0, 0, 0, 0)


@dataclass(frozen=True)
class _Sizes:
    """Of image, filters and result."""

    window: Window
    images: int
    channels: int
    height: int
    width: int
    filters: int
    each: int  # channels of a group
    kh: int
    kw: int
    out_height: int
    out_width: int

    @property
    def pixels(self) -> int:
        return self.out_height * self.out_width

    @property
    def depth(self) -> int:
        return self.each * self.kh * self.kw

    @property
    def of_group(self) -> int:
        """Filters."""
        return self.filters // self.window.groups

    @property
    def pointwise(self) -> bool:
        return (self.kh, self.kw) == (1, 1) and self.window.one_pixel

    def source(self, k: Any, pixel: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Image, row, column and channel in its group that element `k` of the sum of `pixel` reads; and whether it is
        inside the image."""
        window = self.window
        tap, channel = tirx.floordiv(k, self.each), tirx.floormod(k, self.each)
        image, place = tirx.floordiv(pixel, self.pixels), tirx.floormod(pixel, self.pixels)
        y = tirx.floordiv(place, self.out_width) * window.stride[0] - window.padding[0]
        x = tirx.floormod(place, self.out_width) * window.stride[1] - window.padding[2]
        y = y + tirx.floordiv(tap, self.kw) * window.dilation[0]
        x = x + tirx.floormod(tap, self.kw) * window.dilation[1]
        inside = tirx.all(y >= 0, y < self.height, x >= 0, x < self.width) if any(window.padding) else None
        return image, y, x, channel, inside


def convolution(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    extra: Extra,
    window: Window,
    layout: str,
    dtype: str = "float32",
) -> KernelCall | Refusal:
    """The kernel of act(conv(x, weight) + bias + residual), or why there is none."""
    if len(shape_of(x)) != 4:
        return Refusal(f"the image has shape {shape_of(x)}, not that of a batch of images")
    planar = layout == "NCHW"
    order = (0, 1, 2, 3) if planar else (0, 3, 1, 2)
    images, channels, height, width = (shape_of(x)[d] for d in order)
    filters, each, kh, kw = shape_of(weight)
    out_height, out_width = (shape_of(node)[d] for d in order[2:])
    s = _Sizes(window, images, channels, height, width, filters, each, kh, kw, out_height, out_width)
    rows, columns = (s.of_group, s.images * s.pixels) if planar else (s.images * s.pixels, s.of_group)
    read = (x, *([weight] if dtype == "float32" else []), *extra.operands)
    refusal = refused(node, *read, rounded=dtype) or extra.refusal(shape_of(node), s.filters)
    if s.depth < SHORT or s.images * s.pixels == 1:
        # A tile filled in part still reads each pixel of a long sum once.
        refusal = refusal or narrow(rows, columns, s.depth)
    if refusal is not None:
        return refusal
    if planar and dtype_of(x) != "float32":
        return Refusal(f"a planar image of {dtype_of(x)}, whose channels are no neighbours")
    make = _planar if planar else _channels_last
    return make(node, hw, x, weight, extra, s, (window.groups, rows, columns, s.depth), dtype)


def _channels_last(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    extra: Extra,
    s: _Sizes,
    sizes: tuple[int, int, int, int],
    dtype: str,
) -> KernelCall:
    groups, rows, columns, depth = sizes
    tile = tile_for(hw, sizes, dtype, (item_bytes(dtype_of(x)), 2.0), weight)
    padded = -(-columns // LANES) * LANES

    def both(buffers: Sequence[Any], number: Any) -> tuple[Operand | Halves, Operand | Weights]:
        image, packed, wide = flat(buffers[0]), buffers[1], lanes(s.each)

        def at(k: Any, row: Any) -> tuple[Any, Any]:
            if s.pointwise:
                return row * s.channels + number * s.each + k, None
            number_of_image, y, z, channel, inside = s.source(k, row)
            start = ((number_of_image * s.height + y) * s.width + z) * s.channels + number * s.each + channel
            return start, inside

        def read(k: Any, row: Any) -> Any:
            start, inside = at(k, row)
            value = image[span(start, wide)]
            return value if inside is None else tirx.if_then_else(inside, value, constant(0.0, wide))

        left: Operand | Halves = Operand(read, depth, rows, "depth", wide)
        if str(image.dtype) != "float32":
            left = Halves(as_words(buffers[0]), at, depth, rows)
        right: Operand | Weights
        if isinstance(tile, Tile):
            right = Operand(lambda k, c: packed[number, k, span(c, LANES)], depth, padded, "width", LANES)
        else:
            right = as_weights(packed, tile.sparse)

        return left, right

    def finish(buffers: Sequence[Any], number: Any) -> Finish:
        def place(row: Any, column: Any) -> Any:
            return row * s.filters + number * columns + column

        return extra.finish(buffers, place, lanes(columns), None, number * columns)

    shape: tuple[Shape, str]
    if isinstance(tile, Tile):
        turned = Packed(weight, f"taps_{groups}", partial(_pack_filters, groups=groups))
        shape = ((groups, depth, padded), "float32")
    else:
        turned = packed_weights(weight, _taps_first, tile, dtype)
        shape = packed_shape(columns, depth, tile)
    buffers = [*floats(x), shape, *floats(*extra.operands)]
    operands: list[fx.Node | Packed] = [x, turned, *extra.operands]
    algorithm = "tiled pointwise conv" if s.pointwise else "tiled conv"
    made = (operands, buffers, shape_of(node), algorithm, both, finish, dtype_of(node))
    return kernel_call("conv2d", hw, sizes, tile, dtype, *made)


def _planar(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    extra: Extra,
    s: _Sizes,
    sizes: tuple[int, int, int, int],
    dtype: str,
) -> KernelCall:
    groups, rows, columns, depth = sizes
    padded = -(-rows // LANES) * LANES
    wide = lanes(s.pixels)

    def both(buffers: Sequence[Any], number: Any) -> tuple[Operand, Operand]:
        image, packed = flat(buffers[0]), buffers[1]

        def neighbours(k: Any, column: Any) -> Any:
            start = (tirx.floordiv(column, s.pixels) * s.channels + number * s.each + k) * s.pixels
            return image[span(start + tirx.floormod(column, s.pixels), wide)]

        def pixel(k: Any, column: Any) -> Any:
            number_of_image, y, z, channel, inside = s.source(k, column)
            start = (number_of_image * s.channels + number * s.each + channel) * s.height
            value = image[(start + y) * s.width + z]
            return value if inside is None else tirx.if_then_else(inside, value, constant(0.0))

        left = Operand(lambda k, r: packed[number, k, span(r, LANES)], depth, padded, "width", LANES)
        element, count = (neighbours, wide) if s.pointwise else (pixel, 1)
        right = Operand(element, depth, columns, "width", count)
        return left, right

    def finish(buffers: Sequence[Any], number: Any) -> Finish:
        def place(row: Any, column: Any) -> Any:
            plane = tirx.floordiv(column, s.pixels) * s.filters + number * rows + row
            return plane * s.pixels + tirx.floormod(column, s.pixels)

        return extra.finish(buffers, place, wide, lambda row: number * rows + row)

    turned = Packed(weight, f"taps_{groups}", partial(_pack_filters, groups=groups))
    buffers = [*floats(x), ((groups, depth, padded), "float32"), *floats(*extra.operands)]
    operands: list[fx.Node | Packed] = [x, turned, *extra.operands]
    algorithm = "tiled pointwise conv" if s.pointwise else "tiled conv"
    tile = tile_for(hw, sizes, dtype, (4.0, 4.0), weight, planar=True)
    made = (operands, buffers, shape_of(node), algorithm, both, finish, dtype_of(node))
    return kernel_call("conv2d", hw, sizes, tile, dtype, *made)


def _taps_first(weight: torch.Tensor) -> torch.Tensor:
    """[filters, taps * channels]"""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pack_filters(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups, taps * channels, filters of a group], with zeros up to a multiple of 4 filters."""
    lines = _taps_first(weight.float())
    lines = lines.reshape(groups, -1, lines.shape[1]).transpose(1, 2)
    return torch.nn.functional.pad(lines, (0, -lines.shape[-1] % LANES)).contiguous()
