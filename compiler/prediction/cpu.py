"""Predicted seconds of an operator on a CPU: by the plan its kernel would choose, without building the kernel.

A machine asked for narrower elements is taken as one with so many more of them in a vector, a cache and a second of
memory: `narrowed`. What has no plan of its own is a roofline over its bytes and arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...backends.kernels import attention_plan
from ...backends.kernels.batch_matmul import batch_seconds, choose_batch_tiling
from ...backends.kernels.block_sparse import sparse_seconds, sparse_tiling
from ...backends.kernels.conv_depthwise_plan import choose_pair
from ...backends.kernels.conv_plan import Conv, problem_of, rank_plans
from ...backends.kernels.gemv import dots_seconds, is_narrow
from ...backends.kernels.layer_norm import CYCLES, ROW_CYCLES, norm_rows
from ...backends.kernels.rows import predicted_seconds as rows_seconds
from ...backends.kernels.sweep import Windows, choose_sweep
from ...backends.kernels.winograd_plan import rank_winograd
from ...backends.lowering.kernels_conv import MAXIMUM_EFFICIENCY, SWEEP_EFFICIENCY, WINOGRAD_GAIN
from ...backends.lowering.kernels_matmul import bind
from ...backends.lowering.kernels_pairs import pair_of
from ...backends.region_kernel import ENTRY_SECONDS
from ...backends.tiling import activation_seconds, predicted_seconds, rank_tilings
from ...hwdb import Hardware
from ...hwdb.cost import Work, overlapped, predict_seconds
from ...passes import dialect, dialect_joined, dialect_pairs, dialect_planar, dialect_sparse
from ...passes.layout.costs import work_seconds
from ...passes.rewrite import arguments, shape_of
from ...passes.zero_blocks import Blocks
from .workload import Operation

ITEM_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8}
_UNHIDDEN = 0.4  # of the shorter of arithmetic and streams, as for weights that stream (tiling)
_LOOPS = 0.3  # of peak: plain loops load two operands for each multiply-add


def narrowed(hw: Hardware, dtype: str) -> Hardware:
    """A machine whose float32 is as fast as `dtype` is on `hw`, and takes as many bytes."""
    items = 32 // ITEM_BITS[dtype]
    narrow, wide = hw.peak_flops(dtype), hw.peak_flops("float32")
    if items == 1 or narrow is None or wide is None:
        return hw
    return replace(
        hw,
        vector_bits=hw.vector_bits * items,
        fma_per_cycle=hw.fma_per_cycle * narrow / wide / items,
        caches=tuple(replace(cache, size_bytes=cache.size_bytes * items) for cache in hw.caches),
        core_gbs=tuple((level, rate * items) for level, rate in hw.core_gbs),
        dram_gbs=None if hw.dram_gbs is None else hw.dram_gbs * items,
    )


def operation_seconds(operation: Operation, hw: Hardware) -> float | None:
    """Seconds of one call of `operation` in float32, or None where the machine's rates are unknown."""
    if hw.clock_mhz is None:
        return None
    node = operation.node
    planned = _PLANNED.get(node.target) if node is not None else None
    seconds = planned(node, hw) if planned is not None and node is not None and _regular(node) else None
    if seconds is None:
        seconds = _roofline(operation, hw)
    elif streamed := streamed_seconds(operation, hw):
        seconds = overlapped(hw, seconds, streamed, _UNHIDDEN)
    return None if seconds is None else seconds + (ENTRY_SECONDS if operation.launches else 0.0)


def streamed_seconds(operation: Operation, hw: Hardware) -> float:
    """Seconds in which images come from memory and go there that do not fit into the last cache beside the weights.

    The plans take them to be near.

    A line is read before it is written.
    """
    if not hw.dram_gbs or _stays(operation.read + operation.written + operation.weights, hw):
        return 0.0
    return 4.0 * (operation.read + 2.0 * operation.written) / (hw.dram_gbs * 1e9)


def _stays(elements: float, hw: Hardware) -> bool:
    """Whether images and weights of so many elements stay in the last cache together."""
    last = max((cache.size_bytes * -(-hw.cores // cache.shared_by_cores) for cache in hw.caches[-1:]), default=0)
    return 4.0 * elements <= last


def _near_bytes(read: float, written: float, weights: float, hw: Hardware) -> tuple[float, float]:
    """The bytes of images that the roofline of an operator has to count.

    Where nothing is hidden, time adds up: those from memory are counted by `streamed_seconds`, once.
    """
    counted = not hw.in_order or _stays(read + written + weights, hw)
    return (4.0 * read, 4.0 * written) if counted else (0.0, 0.0)


def waking_seconds(hw: Hardware) -> float:
    """What the first parallel kernel of a call loses while the other threads wake."""
    return hw.wake_us * 1e-6 * (1 - 1 / hw.cores)


def _regular(node: fx.Node) -> bool:
    """Whether a kernel of ours would take the node: images in NHWC, nothing empty."""
    layout = arguments(node).get("layout")
    planar = node.target is dialect_pairs.conv_depthwise
    return (layout in (None, "NHWC") or planar) and bool(math.prod(shape_of(node)))


def _roofline(operation: Operation, hw: Hardware) -> float | None:
    if hw.peak_flops() is None or hw.dram_gbs is None:
        return None
    flops = operation.product_flops / _LOOPS + operation.element_flops
    read = 4.0 * (operation.read + operation.weights)
    return work_seconds(Work({"float32": flops}, read, 4.0 * operation.written), hw)


def _conv(node: fx.Node, hw: Hardware) -> float | None:
    x, weight, bias, residual, stride, padding, dilation, groups, activation, args, _ = bind(node)
    plain = problem_of(shape_of(x), shape_of(weight), stride, padding, dilation, groups)
    return _conv_seconds(
        replace(plain, bias=bias is not None, residual=residual is not None, activation=activation, args=tuple(args)),
        hw,
        weight.op == "get_attr",
    )


def _planar_conv(node: fx.Node, hw: Hardware) -> float | None:
    x, weight, bias, residual, stride, padding, dilation, activation, args = bind(node)
    batch, channels, height, width = shape_of(x)
    plain = problem_of((batch, height, width, channels), shape_of(weight), stride, padding, dilation, 1)
    return _conv_seconds(
        replace(plain, bias=bias is not None, residual=residual is not None, activation=activation, args=tuple(args)),
        hw,
        False,
    )


def _conv_seconds(conv: Conv, hw: Hardware, constant: bool) -> float | None:
    if conv.groups == conv.channels == conv.filters and conv.groups > 1:
        windows = Windows(conv.batch, conv.rows, conv.columns, conv.channels)
        swept = _sweep(windows, hw, SWEEP_EFFICIENCY, conv.residual)
        return None if swept is None else swept + _activation(conv, hw, hw.cores)
    if conv.pointwise:
        rows, columns, depth = math.prod(conv.output_shape[:3]), conv.filters, conv.channels
        tiling = rank_tilings(hw, rows, columns, depth, packed=True, residual=conv.residual)[0]
        return predicted_seconds(hw, tiling, conv.activation)
    plan: Any = rank_plans(conv, hw)[0]
    fast = rank_winograd(conv, hw) if constant else ()
    if fast and fast[0].cycles < WINOGRAD_GAIN * plan.cycles:
        plan = fast[0]
    out = math.prod(conv.output_shape)
    weights = conv.flops / 2 / math.prod(conv.output_shape[:3])
    read, written = _near_bytes(math.prod(conv.input_shape) + out * int(conv.residual), out, weights, hw)
    weights *= 0.0 if fast and plan is fast[0] else 4.0  # those of Winograd's algorithm are counted by its plan
    seconds = predict_seconds(
        hw,
        Work(
            {"float32": conv.flops},
            bytes_read=read + weights,
            bytes_written=written,
            launches=int(plan.tasks > 1),
            tasks=plan.tasks,
            efficiency=max(0.01, plan.efficiency),
        ),
    )
    return None if seconds is None else seconds + _activation(conv, hw, plan.tasks)


def _activation(conv: Conv, hw: Hardware, tasks: int) -> float:
    return activation_seconds(hw, conv.activation, math.prod(conv.output_shape), tasks)


def _sweep(windows: Windows, hw: Hardware, efficiency: float, residual: bool = False) -> float | None:
    plan = choose_sweep(windows, hw)
    out = math.prod(windows.output_shape)
    tasks = windows.batch * plan.tasks
    read, written = _near_bytes(math.prod(windows.input_shape) + out * int(residual), out, 0.0, hw)
    flops = {"float32": 2.0 * windows.reads}
    return predict_seconds(hw, Work(flops, read, written, int(tasks > 1), tasks, efficiency))


def _pair(node: fx.Node, hw: Hardware) -> float | None:
    x, weight, bias, *first, depth_weight, depth_bias, stride, padding, dilation, activation, args, layout = bind(node)
    second = (stride, padding, dilation, activation, args)
    pair = pair_of(x, weight, bias, first, depth_weight, depth_bias, second, layout == "NCHW")
    return choose_pair(pair, hw).cycles / (hw.clock_mhz or 1.0) * 1e-6


def _pool(node: fx.Node, hw: Hardware) -> float | None:
    from ...backends.lowering.kernels_conv import windows_of

    given = arguments(node)
    x, kernel, stride, padding = given["input"], given["kernel"], given["stride"], given["padding"]
    windows = windows_of(node, x, kernel, stride, padding, given.get("dilation", (1, 1)))
    largest = node.target is dialect.max_pool2d
    return _sweep(windows, hw, MAXIMUM_EFFICIENCY if largest else SWEEP_EFFICIENCY)


def _linear(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    columns, depth = shape_of(given["weight"])
    rows = math.prod(shape_of(node)) // columns
    if is_narrow(hw, columns, depth):
        return dots_seconds(hw, 1, columns, rows, depth)
    tiling = rank_tilings(hw, rows, columns, depth, packed=True, residual=given["residual"] is not None)[0]
    return predicted_seconds(hw, tiling, given["activation"])


def _sparse(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    columns, depth = shape_of(given["weight"])
    width, height, count, longest = given["blocks"]
    blocks = Blocks(width, height, count, longest, -(-columns // width) * (depth // height))
    tiling = sparse_tiling(hw, math.prod(shape_of(node)) // columns, columns, depth, blocks)
    return sparse_seconds(hw, tiling, blocks, given["activation"])


def _matmul(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    a, b, out = shape_of(given["a"]), shape_of(given["b"]), shape_of(node)
    if len(a) < 2 or len(b) < 2:
        return None
    depth = a[-2] if given["transpose_a"] else a[-1]
    if math.prod(b[:-2]) == 1 and given["b"].op == "get_attr" and not given["transpose_a"]:
        rows = math.prod(out[:-1])
        tiling = rank_tilings(hw, rows, out[-1], depth, packed=True, residual=given["residual"] is not None)[0]
        return predicted_seconds(hw, tiling, given["activation"])
    batch = math.prod(out[:-2])
    tiling = choose_batch_tiling(hw, batch, out[-2], out[-1], depth, given["transpose_a"])
    return batch_seconds(hw, tiling, batch, given["transpose_b"])


def _attention(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    q, k, v = (shape_of(given[name]) for name in ("q", "k", "v"))
    if len(q) < 3 or not (len(q) == len(k) == len(v)):
        return None
    plan = attention_plan.plan_attention(
        hw, attention_plan.problem(q, k, v), given["is_causal"], given["mask"] is not None
    )
    return attention_plan.predicted_seconds(hw, plan)


def _strided(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    problem = attention_plan.Problem(*given["extents"])
    plan = attention_plan.plan_attention(
        hw,
        problem,
        given["is_causal"],
        given["mask"] is not None,
        attention_plan.Placement(*given["places"][8:12]).position,
    )
    return attention_plan.predicted_seconds(hw, plan)


def _layer_norm(node: fx.Node, hw: Hardware) -> float | None:
    given = arguments(node)
    return rows_seconds(norm_rows(shape_of(given["input"]), len(given["normalized_shape"]), hw), CYCLES, ROW_CYCLES, hw)


_PLANNED: dict[Any, Callable[[fx.Node, Hardware], float | None]] = {
    dialect.conv2d: _conv,
    dialect_planar.planar_conv2d: _planar_conv,
    dialect_pairs.conv_depthwise: _pair,
    dialect.max_pool2d: _pool,
    dialect.avg_pool2d: _pool,
    dialect.linear: _linear,
    dialect_joined.joined_linear: _linear,
    dialect_sparse.sparse_linear: _sparse,
    dialect.matmul: _matmul,
    dialect.attention: _attention,
    dialect.strided_attention: _strided,
    torch.ops.aten.layer_norm.default: _layer_norm,
    torch.ops.aten.rms_norm.default: _layer_norm,
}
