"""Which operators have kernels of ours on GPUs: products and convolutions, where they are wide enough.

    act(x w^T + bias + residual)     rows of x, the weight turned at compile time so that columns are neighbours
    of few rows                      dots.py
    act(op(a) op(b) + ...)           batched; the batches broadcast
    act(conv(x, w) + ...)            conv_operators.py

Operators of passes/dialect_mixed.py round their operands to 16 bits on matrix units; their weights are 16 bits in
memory, with the elements of a sum as neighbours.

Refused: other dtypes, fewer than 16 columns, fewer than 16 rows where no operand is constant (TVM's rules have
a block a few rows), tensors whose elements 32 bits do not count. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect, dialect_mixed
from ...passes.rewrite import shape_of
from ..kernels.batch_matmul import broadcast_batch
from ..kernels.loops import flat, span
from ..kernels.packing import batch_index
from ..lowering.kernels_matmul import bind
from ..lowering.registry import Kernel, KernelCall, Packed, Refusal
from .conv_operators import Window, convolution
from .dots import MOST_ROWS, dots, plan_dots
from .product import Finish
from .product_call import (
    FEWEST,
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

aten = torch.ops.aten


# Products


def _linear(node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: Extra) -> KernelCall | Refusal:
    """x[..., K] . weight[N, K]^T"""
    if len(shape_of(weight)) != 2 or not shape_of(x):
        return Refusal(f"operands of shapes {shape_of(x)} and {shape_of(weight)}: a vector is not a matrix")
    if weight.op != "get_attr":
        return _matmul(node, hw, x, weight, extra, False, True)
    return _with_weight(node, hw, x, weight, extra, True)


def _with_weight(
    node: fx.Node, hw: Hardware, x: fx.Node, weight: fx.Node, extra: Extra, transposed: bool, dtype: str = "float32"
) -> KernelCall | Refusal:
    out = shape_of(node)
    columns, depth = out[-1], shape_of(x)[-1]
    rows = prod(out[:-1])
    read = (x, *([weight] if dtype == "float32" else []), *extra.operands)
    refusal = refused(node, *read, rounded=dtype) or extra.refusal(out, columns)
    if refusal is None and 0 < rows <= MOST_ROWS and columns >= FEWEST:
        return _few_rows(node, hw, x, weight, extra, (rows, columns, depth), transposed, dtype)
    refusal = refusal or narrow(rows, columns, depth)
    if refusal is not None:
        return refusal
    sizes = (1, rows, columns, depth)
    tile = tile_for(hw, sizes, dtype, (item_bytes(dtype_of(x)), 2.0), weight if transposed else None)
    padded = -(-columns // LANES) * LANES

    def both(buffers: Sequence[Any], number: Any) -> tuple[Operand | Halves, Operand | Weights]:
        x, wide = flat(buffers[0]), lanes(depth)
        weight = buffers[1]
        left: Operand | Halves = Operand(lambda k, r: x[span(r * depth + k, wide)], depth, rows, "depth", wide)
        if str(x.dtype) != "float32":
            left = Halves(as_words(buffers[0]), lambda k, r: (r * depth + k, None), depth, rows)
        right: Operand | Weights
        if isinstance(tile, Tile):
            right = Operand(lambda k, c: weight[k, span(c, LANES)], depth, padded, "width", LANES)
        else:
            right = as_weights(weight, tile.sparse)
        return left, right

    def finish(buffers: Sequence[Any], number: Any) -> Finish:
        return extra.finish(buffers, lambda r, c: r * columns + c, lanes(columns), None)

    if isinstance(tile, Tile):
        turned = Packed(weight, f"columns_{'nk' if transposed else 'kn'}", partial(_pack, transposed=transposed))
        buffers = [*floats(x), ((depth, padded), "float32"), *floats(*extra.operands)]
    else:
        turned = packed_weights(weight, (lambda w: w) if transposed else (lambda w: w.t()), tile, dtype)
        buffers = [*floats(x), packed_shape(columns, depth, tile), *floats(*extra.operands)]
    operands: list[fx.Node | Packed] = [x, turned, *extra.operands]
    stored = dtype_of(node)
    return kernel_call("linear", hw, sizes, tile, dtype, operands, buffers, out, "tiled product", both, finish, stored)


def _few_rows(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    weight: fx.Node,
    extra: Extra,
    extents: tuple[int, int, int],
    transposed: bool,
    dtype: str,
) -> KernelCall | Refusal:
    """A product of less rows than a tile has: weights are read by lines."""
    rows, columns, depth = extents
    plan = plan_dots(hw, columns, dtype)
    if depth == 0 or depth % plan.piece:
        return Refusal(f"a sum of {depth} is no multiple of {plan.piece}")

    def finish(buffers: Sequence[Any]) -> Finish:
        wide = lanes(plan.columns, columns)
        return extra.finish(buffers, lambda r, c: r * columns + c, wide, None)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        lines = (tensor if transposed else tensor.t()).to(getattr(torch, dtype)).contiguous()
        return lines if dtype == "float32" else lines.view(torch.int32)

    packed = ((columns, depth), "float32") if dtype == "float32" else ((columns, depth // 2), "int32")
    buffers = [*floats(x), packed, *floats(*extra.operands)]
    lines = Packed(weight, f"{dtype}_lines_{'nk' if transposed else 'kn'}", pack)
    operands: tuple[fx.Node | Packed, ...] = (x, lines, *extra.operands)
    item = 4.0 if dtype == "float32" else 2.0
    work = Work(
        flops={"float32": 2.0 * rows * columns * depth},
        bytes_read=4.0 * rows * depth + item * columns * depth,
        bytes_written=4.0 * rows * columns,
        launches=1,
        tasks=plan.blocks,
    )
    func = dots(plan, extents, buffers, shape_of(node), finish)
    return KernelCall(func, operands, "few rows", plan.reason, work)


def _pack(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[K, N] with zeros up to a multiple of 4 columns."""
    matrix = (weight.t() if transposed else weight).float()
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()


def _matmul(
    node: fx.Node, hw: Hardware, a: fx.Node, b: fx.Node, extra: Extra, transpose_a: bool, transpose_b: bool
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
    refusal = refused(node, a, b, *extra.operands) or extra.refusal(shape_of(node), columns)
    refusal = refusal or narrow(rows, columns, depth)
    if refusal is not None:
        return refusal
    batches = broadcast_batch(a_shape, b_shape)
    batch = prod(batches)
    if not batch:
        return Refusal("the result has no elements")
    a_lanes, b_lanes = lanes(a_shape[-1]), lanes(b_shape[-1])

    def both(buffers: Sequence[Any], number: Any) -> tuple[Operand, Operand]:
        a, b = flat(buffers[0]), flat(buffers[1])
        a_first = batch_index(number, batches, a_shape[:-2]) * (rows * depth)
        b_first = batch_index(number, batches, b_shape[:-2]) * (columns * depth)

        def left(k: Any, r: Any) -> Any:
            return a[span(a_first + (k * rows + r if transpose_a else r * depth + k), a_lanes)]

        def right(k: Any, c: Any) -> Any:
            return b[span(b_first + (c * depth + k if transpose_b else k * columns + c), b_lanes)]

        return (
            Operand(left, depth, rows, "width" if transpose_a else "depth", a_lanes),
            Operand(right, depth, columns, "depth" if transpose_b else "width", b_lanes),
        )

    def finish(buffers: Sequence[Any], number: Any) -> Finish:
        return extra.finish(buffers, lambda r, c: (number * rows + r) * columns + c, lanes(columns), None)

    read = (a, b, *extra.operands)
    sizes = (batch, rows, columns, depth)
    tile = tile_for(hw, sizes, "float32")
    out = shape_of(node)
    return kernel_call("matmul", hw, sizes, tile, "float32", read, floats(*read), out, "tiled product", both, finish)


# The table


def _aten_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias = bind(node)
    return _linear(node, hw, x, weight, Extra(bias))


def _dialect_linear(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias, residual, activation, args = bind(node)
    return _linear(node, hw, x, weight, Extra(bias, residual, activation, args))


def _dialect_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    a, b, bias, residual, transpose_a, transpose_b, activation, args = bind(node)
    return _matmul(node, hw, a, b, Extra(bias, residual, activation, args), transpose_a, transpose_b)


def _aten_matmul(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    a, b = bind(node)[:2]
    return _matmul(node, hw, a, b, Extra(), False, False)


def _addmm(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    added, a, b, beta, alpha = bind(node)[:5]
    if (beta, alpha) != (1, 1):
        return Refusal(f"addmm is scaled: beta={beta}, alpha={alpha}")
    whole = shape_of(added) == shape_of(node) and shape_of(node)[0] != 1
    return _matmul(node, hw, a, b, Extra(residual=added) if whole else Extra(added), False, False)


def _dialect_conv(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout = bind(node)
    extra = Extra(bias, residual, activation, args)
    return convolution(node, hw, x, weight, extra, Window(stride, padding, dilation, groups), layout)


def _rounding_linear(node: fx.Node, hw: Hardware, dtype: str) -> KernelCall | Refusal:
    x, weight, bias, residual, activation, args, round_input, narrowed = bind(node)
    few = prod(shape_of(node)[:-1]) <= MOST_ROWS
    if round_input == few or (narrowed and few):
        return Refusal("matrix units multiply rounded operands, few rows are not rounded, nor are their results")
    return _with_weight(node, hw, x, weight, Extra(bias, residual, activation, args), True, dtype)


def _rounding_conv(node: fx.Node, hw: Hardware, dtype: str) -> KernelCall | Refusal:
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, layout, *rounded = bind(node)
    if not rounded[0]:
        return Refusal("matrix units multiply rounded operands")
    extra = Extra(bias, residual, activation, args)
    return convolution(node, hw, x, weight, extra, Window(stride, padding, dilation, groups), layout, dtype)


PRODUCTS: dict[torch._ops.OpOverload, Kernel] = {
    aten.linear.default: _aten_linear,
    dialect.linear: _dialect_linear,
    dialect.matmul: _dialect_matmul,
    aten.mm.default: _aten_matmul,
    aten.bmm.default: _aten_matmul,
    aten.matmul.default: _aten_matmul,
    aten.addmm.default: _addmm,
    dialect.conv2d: _dialect_conv,
    dialect_mixed.linear_f16: partial(_rounding_linear, dtype="float16"),
    dialect_mixed.linear_bf16: partial(_rounding_linear, dtype="bfloat16"),
    dialect_mixed.conv2d_f16: partial(_rounding_conv, dtype="float16"),
    dialect_mixed.conv2d_bf16: partial(_rounding_conv, dtype="bfloat16"),
}
