"""Which operators have kernels of ours on GPUs: products and convolutions, where they are wide enough.

    act(x w^T + bias + residual)     rows of x, the weight turned at compile time so that columns are neighbours
    act(op(a) op(b) + ...)           batched; the batches broadcast
    act(conv(x, w) + ...)            NCHW: filters are rows, pixels columns, and the sum goes over taps, then channels

Operators of passes/mixed.py round their operands to 16 bits on tensor cores; their weights stay in float32 in memory.

Refused: other dtypes, fewer than 16 rows or columns (TVM's rules have a block a few rows), tensors whose elements
32 bits do not count. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect, mixed
from ...passes.rewrite import shape_of
from ..kernels.batch_matmul import broadcast_batch
from ..kernels.loops import Shape, span
from ..kernels.packing import batch_index
from ..lowering.kernels_matmul import bind, refuse_dtypes, refuse_large
from ..lowering.registry import Kernel, KernelCall, Packed, Refusal
from .matrix_product import MatrixTile, choose_matrix_tile, matrix_product
from .product import Finish, product
from .stage import Operand
from .tile import LANES, Tile, choose_tile

aten = torch.ops.aten

FEWEST = 16  # rows and columns of a product that a tile pays for

SHORT = 64  # sums of fewer have a thread an element: depthwise convolutions

Parts = Callable[[Sequence[Any], Any, Any], tuple[Operand, Operand, Finish]]


@dataclass(frozen=True)
class _Extra:
    """What follows the product."""

    bias: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    args: Sequence[float] = field(default=())

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return tuple(operand for operand in (self.bias, self.residual) if operand is not None)

    def refusal(self, out: Shape, length: int) -> Refusal | None:
        """Why it is not that of a kernel whose result has shape `out` and whose bias `length` values, or None."""
        if self.bias is not None and (prod(shape_of(self.bias)) != length or shape_of(self.bias)[-1:] != (length,)):
            return Refusal(f"the bias has shape {shape_of(self.bias)}, not ({length},)")
        if self.residual is not None and shape_of(self.residual) != out:
            return Refusal(f"the residual has shape {shape_of(self.residual)}, the result {out}")
        return None

    def finish(self, buffers: Sequence[Any], place: Any, lanes: int, by_row: Any) -> Finish:
        """With the buffers of `operands`; `by_row(row)` is the place in the bias, or None for that of the column."""
        bias = residual = None
        if self.bias is not None:
            line = _flat(buffers[0])

            def bias(row: Any, column: Any, lanes: int) -> Any:
                if by_row is None:
                    return line[span(column, lanes)]
                value = line[by_row(row)]
                return value if lanes == 1 else tirx.Broadcast(value, lanes)

        if self.residual is not None:
            residual = _flat(buffers[-1])
        return Finish(place, lanes, bias, residual, self.activation, tuple(self.args))


def _flat(buffer: Any) -> Any:
    return T.decl_buffer((prod(int(extent) for extent in buffer.shape),), "float32", data=buffer.data)


def _lanes(*extents: int) -> int:
    return LANES if all(extent % LANES == 0 for extent in extents) else 1


def _refused(node: fx.Node, *read: fx.Node) -> Refusal | None:
    return refuse_dtypes(node, *read) or refuse_large(node, *read)


def _narrow(rows: int, columns: int, depth: int) -> Refusal | None:
    if min(rows, columns) < FEWEST or depth == 0:
        return Refusal(f"a product {rows}x{columns}x{depth} is too narrow for a tile")
    return None


def _call(
    name: str,
    hw: Hardware,
    sizes: tuple[int, int, int, int],
    dtype: str,
    operands: Sequence[fx.Node | Packed],
    shapes: Sequence[Shape],
    out: Shape,
    algorithm: str,
    parts: Parts,
) -> KernelCall:
    """The kernel of products of batch, rows, columns and depth `sizes`, on matrix units where `dtype` is narrow."""
    batch, rows, columns, depth = sizes
    tile: Tile | MatrixTile
    if dtype == "float32":
        tile = choose_tile(hw, *sizes)
        func = product(name, tile, batch, rows, columns, shapes, out, parts)
    else:
        tile = choose_matrix_tile(hw, *sizes, dtype)
        func = matrix_product(name, tile, batch, rows, columns, dtype, shapes, out, parts)
        algorithm = f"{dtype} {algorithm}"
    work = Work(
        flops={dtype: 2.0 * batch * rows * columns * depth},
        bytes_read=4.0 * batch * (rows + columns) * depth,
        bytes_written=4.0 * batch * rows * columns,
        launches=1,
        tasks=tile.blocks,
    )
    return KernelCall(func, tuple(operands), algorithm, tile.reason, work)


# Products


def _linear(node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: _Extra) -> KernelCall | Refusal:
    """x[..., K] . weight[N, K]^T"""
    if len(shape_of(weight)) != 2 or not shape_of(x):
        return Refusal(f"operands of shapes {shape_of(x)} and {shape_of(weight)}: a vector is not a matrix")
    if weight.op != "get_attr":
        return _matmul(node, hw, x, weight, extra, False, True)
    return _with_weight(node, hw, x, weight, extra, True)


def _with_weight(
    node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: _Extra, transposed: bool, dtype: str = "float32"
) -> KernelCall | Refusal:
    out = shape_of(node)
    columns, depth = out[-1], shape_of(x)[-1]
    rows = prod(out[:-1])
    read = (x, *([weight] if dtype == "float32" else []), *extra.operands)
    refusal = _refused(node, *read) or extra.refusal(out, columns) or _narrow(rows, columns, depth)
    if refusal is not None:
        return refusal
    padded = -(-columns // LANES) * LANES

    def parts(buffers: Sequence[Any], out: Any, number: Any) -> tuple[Operand, Operand, Finish]:
        x, lanes = _flat(buffers[0]), _lanes(depth)
        weight = buffers[1]
        left = Operand(lambda k, r: x[span(r * depth + k, lanes)], depth, rows, "depth", lanes)
        right = Operand(lambda k, c: weight[k, span(c, LANES)], depth, padded, "width", LANES)
        return left, right, extra.finish(buffers[2:], lambda r, c: r * columns + c, _lanes(columns), None)

    shapes = [shape_of(x), (depth, padded), *map(shape_of, extra.operands)]
    turned = Packed(weight, f"columns_{'nk' if transposed else 'kn'}", partial(_pack, transposed=transposed))
    operands: list[fx.Node | Packed] = [x, turned, *extra.operands]
    return _call("linear", hw, (1, rows, columns, depth), dtype, operands, shapes, out, "tiled product", parts)


def _pack(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[K, N] with zeros up to a multiple of 4 columns."""
    matrix = (weight.t() if transposed else weight).float()
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()


def _matmul(
    node: fx.Node, hw: Hardware, a: fx.Node, b: fx.Node, extra: _Extra, transpose_a: bool, transpose_b: bool
) -> KernelCall | Refusal:
    """op(a) . op(b), whose batches broadcast"""
    a_shape, b_shape = shape_of(a), shape_of(b)
    if len(a_shape) < 2 or len(b_shape) < 2:
        return Refusal(f"operands of shapes {a_shape} and {b_shape}: a vector is not a matrix")
    if b.op == "get_attr" and len(b_shape) == 2 and not transpose_a:
        return _with_weight(node, hw, a, b, extra, transpose_b)
    if prod(b_shape[:-2]) == 1 and not transpose_a:
        a_shape, b_shape = (prod(a_shape[:-1]), a_shape[-1]), b_shape[-2:]
    rows, depth = reversed(a_shape[-2:]) if transpose_a else a_shape[-2:]
    columns = shape_of(node)[-1]
    refusal = _refused(node, a, b, *extra.operands) or extra.refusal(shape_of(node), columns)
    refusal = refusal or _narrow(rows, columns, depth)
    if refusal is not None:
        return refusal
    batches = broadcast_batch(a_shape, b_shape)
    batch = prod(batches)
    if not batch:
        return Refusal("the result has no elements")
    a_lanes, b_lanes = _lanes(a_shape[-1]), _lanes(b_shape[-1])

    def parts(buffers: Sequence[Any], out: Any, number: Any) -> tuple[Operand, Operand, Finish]:
        a, b = _flat(buffers[0]), _flat(buffers[1])
        a_first = batch_index(number, batches, a_shape[:-2]) * (rows * depth)
        b_first = batch_index(number, batches, b_shape[:-2]) * (columns * depth)

        def left(k: Any, r: Any) -> Any:
            return a[span(a_first + (k * rows + r if transpose_a else r * depth + k), a_lanes)]

        def right(k: Any, c: Any) -> Any:
            return b[span(b_first + (c * depth + k if transpose_b else k * columns + c), b_lanes)]

        def place(r: Any, c: Any) -> Any:
            return (number * rows + r) * columns + c

        return (
            Operand(left, depth, rows, "width" if transpose_a else "depth", a_lanes),
            Operand(right, depth, columns, "depth" if transpose_b else "width", b_lanes),
            extra.finish(buffers[2:], place, _lanes(columns), None),
        )

    shapes = [shape_of(a), shape_of(b), *map(shape_of, extra.operands)]
    read = (a, b, *extra.operands)
    out = shape_of(node)
    return _call("matmul", hw, (batch, rows, columns, depth), "float32", read, shapes, out, "tiled product", parts)


# Convolutions


def _conv(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    extra: _Extra,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str = "float32",
) -> KernelCall | Refusal:
    """The convolution of NCHW images as a product; `padding` is (top, bottom, left, right)."""
    if len(shape_of(x)) != 4:
        return Refusal(f"the image has shape {shape_of(x)}, not [N, C, H, W]")
    images, channels, height, width = shape_of(x)
    filters, each, kh, kw = shape_of(weight)
    _, _, out_height, out_width = out = shape_of(node)
    rows, depth, pixels = filters // groups, each * kh * kw, out_height * out_width
    columns = images * pixels
    read = (x, *([weight] if dtype == "float32" else []), *extra.operands)
    refusal = _refused(node, *read) or extra.refusal(out, filters)
    if depth < SHORT or columns == 1:  # a tile filled in part still reads each pixel of a long sum once
        refusal = refusal or _narrow(rows, columns, depth)
    if refusal is not None:
        return refusal
    padded = -(-rows // LANES) * LANES
    pointwise = (kh, kw, *stride, *padding) == (1, 1, 1, 1, 0, 0, 0, 0)
    lanes = _lanes(pixels)

    def parts(buffers: Sequence[Any], out: Any, number: Any) -> tuple[Operand, Operand, Finish]:
        image, packed = _flat(buffers[0]), buffers[1]

        def neighbours(k: Any, column: Any) -> Any:
            start = (tirx.floordiv(column, pixels) * channels + number * each + k) * pixels
            return image[span(start + tirx.floormod(column, pixels), lanes)]

        def pixel(k: Any, column: Any) -> Any:
            tap, channel = tirx.floordiv(k, each), tirx.floormod(k, each)
            place = tirx.floormod(column, pixels)
            y = tirx.floordiv(place, out_width) * stride[0] + tirx.floordiv(tap, kw) * dilation[0] - padding[0]
            z = tirx.floormod(place, out_width) * stride[1] + tirx.floormod(tap, kw) * dilation[1] - padding[2]
            start = (tirx.floordiv(column, pixels) * channels + number * each + channel) * height
            value = image[(start + y) * width + z]
            if not any(padding):
                return value
            inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
            return tirx.if_then_else(inside, value, tirx.const(0.0, "float32"))

        def place(row: Any, column: Any) -> Any:
            plane = tirx.floordiv(column, pixels) * filters + number * rows + row
            return plane * pixels + tirx.floormod(column, pixels)

        left = Operand(lambda k, r: packed[number, k, span(r, LANES)], depth, padded, "width", LANES)
        element, count = (neighbours, lanes) if pointwise else (pixel, 1)
        right = Operand(element, depth, columns, "width", count)
        return left, right, extra.finish(buffers[2:], place, lanes, lambda row: number * rows + row)

    shapes = [shape_of(x), (groups, depth, padded), *map(shape_of, extra.operands)]
    turned = Packed(weight, f"taps_{groups}", partial(_pack_filters, groups=groups))
    algorithm = "tiled pointwise conv" if pointwise else "tiled conv"
    operands: list[fx.Node | Packed] = [x, turned, *extra.operands]
    return _call("conv2d", hw, (groups, rows, columns, depth), dtype, operands, shapes, out, algorithm, parts)


def _pack_filters(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups, taps * channels, filters of a group], with zeros up to a multiple of 4 filters."""
    filters, each, kh, kw = weight.shape
    turned = weight.float().reshape(groups, filters // groups, each, kh * kw).permute(0, 3, 2, 1)
    lines = turned.reshape(groups, kh * kw * each, filters // groups)
    return torch.nn.functional.pad(lines, (0, -lines.shape[-1] % LANES)).contiguous()


# The table


def _aten_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias = bind(node)
    return _linear(node, hw, x, weight, _Extra(bias))


def _dialect_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias, residual, activation, args = bind(node)
    return _linear(node, hw, x, weight, _Extra(bias, residual, activation, args))


def _dialect_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    a, b, bias, residual, transpose_a, transpose_b, activation, args = bind(node)
    return _matmul(node, hw, a, b, _Extra(bias, residual, activation, args), transpose_a, transpose_b)


def _aten_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    a, b = bind(node)[:2]
    return _matmul(node, hw, a, b, _Extra(), False, False)


def _addmm(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    added, a, b, beta, alpha = bind(node)[:5]
    if (beta, alpha) != (1, 1):
        return Refusal(f"addmm is scaled: beta={beta}, alpha={alpha}")
    whole = shape_of(added) == shape_of(node) and shape_of(node)[0] != 1
    return _matmul(node, hw, a, b, _Extra(residual=added) if whole else _Extra(added), False, False)


def _dialect_conv(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout = bind(node)
    if layout != "NCHW":
        return Refusal(f"the image is {layout}, the kernel is for NCHW")
    extra = _Extra(bias, residual, activation, args)
    return _conv(node, hw, x, weight, extra, stride, padding, dilation, groups)


def _rounding_linear(node: fx.Node, hw: Hardware, dtype: str) -> KernelCall | Refusal:
    x, weight, bias, residual, activation, args, round_input, narrow = bind(node)
    if not round_input or narrow:
        return Refusal("matrix units multiply rounded operands, and results are float32")
    return _with_weight(node, hw, x, weight, _Extra(bias, residual, activation, args), True, dtype)


def _rounding_conv(node: fx.Node, hw: Hardware, dtype: str) -> KernelCall | Refusal:
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout, *rounded = bind(node)
    if rounded != [True, False] or layout != "NCHW":
        return Refusal(f"layout {layout}, input and result {'narrow' if rounded[1] else 'wide'}")
    extra = _Extra(bias, residual, activation, args)
    return _conv(node, hw, x, weight, extra, stride, padding, dilation, groups, dtype)


PRODUCTS: dict[torch._ops.OpOverload, Kernel] = {
    aten.linear.default: _aten_linear,
    dialect.linear: _dialect_linear,
    dialect.matmul: _dialect_matmul,
    aten.mm.default: _aten_matmul,
    aten.bmm.default: _aten_matmul,
    aten.matmul.default: _aten_matmul,
    aten.addmm.default: _addmm,
    dialect.conv2d: _dialect_conv,
    mixed.linear_f16: partial(_rounding_linear, dtype="float16"),
    mixed.linear_bf16: partial(_rounding_linear, dtype="bfloat16"),
    mixed.conv2d_f16: partial(_rounding_conv, dtype="float16"),
    mixed.conv2d_bf16: partial(_rounding_conv, dtype="bfloat16"),
}
