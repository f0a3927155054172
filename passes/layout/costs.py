"""Predicted seconds of an operator on images in NCHW and in NHWC, and of a permute between the two.

Convolutions and pools have kernels in NHWC only; in NCHW they run as plain loops, at a fraction of the machine that is
stated here. On GPUs convolutions have kernels in both, but channels are read four at a time. Everything else is bound
by memory, and costs the same in both layouts unless the innermost dim is shorter than a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work, launch_seconds, predict_seconds
from .. import dialect, rewrite

aten = torch.ops.aten

_KERNEL, _LOOPS = 0.75, 0.03  # share of the peak that the kernels in NHWC and the loops in NCHW reach
_GPU_PLANAR = 0.4  # of the kernels for GPUs in NCHW, which read most pixels one by one: an estimate
_POOL_LOOPS = 0.02
_PERMUTE_PASSES = 2.0  # a permute reads or writes short runs: against a copy, an estimate
_FLOPS, _BYTES = 1e11, 2e10  # a second, for a machine whose rates are not known: only ratios matter

_POOLS = frozenset(
    {
        *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default),
        *(dialect.max_pool2d, dialect.avg_pool2d),
    }
)
_CONVOLUTIONS = frozenset({dialect.conv2d, dialect.conv_transpose2d})
# Operators whose innermost dim is vectorised by itself: the others run over all elements as one line.
_ROWS = frozenset(
    {
        *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.softmax.int),
        *(aten.log_softmax.int, aten.cat.default, aten.slice.Tensor, aten.constant_pad_nd.default),
    }
)


def permute_seconds(shape: Sequence[int], element_bytes: int, hw: Hardware) -> float:
    """Seconds of a permute of an image; nothing where the order in memory stays."""
    rows = math.prod(shape[2:])
    if len(shape) < 3 or shape[1] == 1 or rows == 1 or not math.prod(shape):
        return 0.0
    moved = _PERMUTE_PASSES * element_bytes * math.prod(shape)
    return work_seconds(Work(bytes_read=moved, bytes_written=moved), hw)


def node_seconds(node: fx.Node, nhwc: bool, hw: Hardware) -> float:
    """Seconds of a call that reads and writes images in one layout."""
    images = [v for n in (node, *node.all_input_nodes) if (v := rewrite.value_of(n)) is not None]
    read = float(sum(v.nbytes for v in images[1:])) if rewrite.value_of(node) is not None else 0.0
    out = rewrite.value_of(node)
    if out is None:  # several results: the nodes that pick them are counted
        return 0.0
    written, dtype = float(out.nbytes), str(out.dtype).removeprefix("torch.")
    if node.target in _CONVOLUTIONS:
        efficiency = _KERNEL if nhwc else _GPU_PLANAR if hw.kind == "gpu" else _LOOPS
        work = Work({dtype: _multiplied(node)}, read, written, efficiency=efficiency)
    elif node.target in _POOLS:
        source = images[1].numel() if len(images) > 1 else 0
        flops = {} if nhwc or hw.kind == "gpu" else {dtype: float(source)}
        work = Work(flops, read, written, efficiency=_POOL_LOOPS)
    else:
        work = Work({}, read * _idle(node, nhwc, hw), written)
    return work_seconds(work, hw)


def _multiplied(node: fx.Node) -> float:
    """Floating point operations of a convolution: every element of the larger image meets a filter."""
    arguments = rewrite.arguments(node)
    weight = rewrite.shape_of(arguments["weight"])
    image = node if node.target is dialect.conv2d else arguments["input"]
    return 2.0 * math.prod(rewrite.shape_of(image)) * math.prod(weight[1:])


def _idle(node: fx.Node, nhwc: bool, hw: Hardware) -> float:
    """How much longer a row operator takes where its vectors are not filled."""
    if node.target not in _ROWS or not node.all_input_nodes:
        return 1.0
    shape = rewrite.value_of(node.all_input_nodes[0])
    if shape is None or shape.dim() != 4:
        return 1.0
    inner = shape.shape[1 if nhwc else 3]
    lanes = max(1, hw.vector_bits // (8 * shape.element_size()))
    return max(1.0, lanes / max(1, int(inner)))


def work_seconds(work: Work, hw: Hardware) -> float:
    """Predicted seconds; a parallel region is started where that takes less than half of the work's time."""
    known = predict_seconds(hw, replace(work, launches=0))
    if known is not None:
        start = launch_seconds(hw)
        return known + start if known * hw.cores > 2 * start else known * hw.cores
    flops = sum(count / work.efficiency for count in work.flops.values())
    return max(flops / _FLOPS, (work.bytes_read + work.bytes_written) / _BYTES)
