"""Kernels of softmax and of normalisation over rows: the normalised dims are the last ones, float32.

Refused: other dtypes, softmax over an inner dim, tensors without elements. The TE definition serves those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes.rewrite import shape_of
from ..kernels.layer_norm import CYCLES, ROW_CYCLES, group_norm, group_rows, layer_norm, norm_rows
from ..kernels.rows import Rows, predicted_seconds
from ..kernels.softmax import CYCLES as SOFTMAX_CYCLES
from ..kernels.softmax import ROW_CYCLES as SOFTMAX_ROW_CYCLES
from ..kernels.softmax import softmax, softmax_rows
from .kernels_matmul import bind, refuse_dtypes
from .registry import KernelCall, Refusal, kernel_for

aten = torch.ops.aten

# Float operations an element, all passes together.
_SOFTMAX_FLOPS, _NORM_FLOPS = 24, 8


def _work(rows: Rows, flops: int) -> Work:
    elements = rows.count * rows.length
    return Work(
        {"float32": float(elements * flops)},
        bytes_read=4.0 * elements,
        bytes_written=4.0 * elements,
        launches=int(rows.tasks > 1),
        tasks=rows.tasks,
        efficiency=0.3,
    )


def _softmax(node: fx.Node, hw: Hardware, log: bool) -> KernelCall | Refusal:
    x, dim, _ = bind(node)
    refusal = refuse_dtypes(node, x)
    if refusal is not None:
        return refusal
    shape = shape_of(x)
    if not shape or not math.prod(shape):
        return Refusal(f"a tensor of shape {shape} has no rows")
    inner = math.prod(shape[dim % len(shape) + 1 :])
    if inner != 1:
        return Refusal(f"dim {dim} of {shape} is not the last")
    cut = (*shape[: dim % len(shape)], shape[dim])
    rows = softmax_rows(cut, hw)
    func = softmax(shape, hw, log, rows)
    return KernelCall(
        func,
        (x,),
        "log_softmax rows" if log else "softmax rows",
        rows.reason,
        _work(rows, _SOFTMAX_FLOPS),
        predicted_seconds=predicted_seconds(rows, SOFTMAX_CYCLES, SOFTMAX_ROW_CYCLES, hw),
    )


@kernel_for(aten.softmax.int, aten._softmax.default)
def softmax_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Softmax over the last dim."""
    return _softmax(node, hw, log=False)


@kernel_for(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Logarithm of softmax over the last dim."""
    return _softmax(node, hw, log=True)


def _float32(node: fx.Node, *operands: fx.Node | None) -> Refusal | None:
    refusal = refuse_dtypes(*operands)
    values = node.meta["val"]
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if refusal is None and (value is None or value.dtype != torch.float32):
            refusal = Refusal(f"{node.name} does not give float32")
    return refusal


def _layer_norm(
    node: fx.Node,
    hw: Hardware,
    x: fx.Node,
    normalized: Sequence[int],
    weight: fx.Node | None,
    bias: fx.Node | None,
    eps: float,
    centred: bool = True,
) -> KernelCall | Refusal:
    refusal = _float32(node, x, weight, bias)
    if refusal is not None:
        return refusal
    shape, dims = shape_of(x), len(normalized)
    if not dims or not math.prod(shape):
        return Refusal(f"a tensor of shape {shape} normalised over {dims} dims has no rows")
    func = layer_norm(
        shape,
        dims,
        hw,
        eps,
        weight is not None,
        bias is not None,
        centred,
        statistics=isinstance(node.meta["val"], (tuple, list)),
    )
    rows = norm_rows(shape, dims, hw)
    operands = tuple(o for o in (x, weight, bias) if o is not None)
    name = "layer_norm rows" if centred else "rms_norm rows"
    return KernelCall(
        func,
        operands,
        name,
        rows.reason,
        _work(rows, _NORM_FLOPS),
        predicted_seconds=predicted_seconds(rows, CYCLES, ROW_CYCLES, hw),
    )


@kernel_for(aten.layer_norm.default)
def layer_norm_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Normalise over the last dims, with gain and offset."""
    x, normalized, weight, bias, eps, _ = bind(node)
    return _layer_norm(node, hw, x, normalized, weight, bias, eps)


@kernel_for(aten.native_layer_norm.default)
def native_layer_norm_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """As layer_norm, with the rows' mean and 1 / sqrt(variance + eps)."""
    x, normalized, weight, bias, eps = bind(node)
    return _layer_norm(node, hw, x, normalized, weight, bias, eps)


@kernel_for(aten.rms_norm.default)
def rms_norm_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Divide by the root of the mean square over the last dims."""
    x, normalized, weight, eps = bind(node)
    return _layer_norm(
        node, hw, x, normalized, weight, None, torch.finfo(torch.float32).eps if eps is None else eps, centred=False
    )


def _group_norm(
    node: fx.Node, hw: Hardware, x: fx.Node, groups: int, weight: Any, bias: Any, eps: float
) -> KernelCall | Refusal:
    refusal = _float32(node, x, weight, bias)
    if refusal is not None:
        return refusal
    shape = shape_of(x)
    if not math.prod(shape):
        return Refusal(f"a tensor of shape {shape} has no rows")
    statistics = isinstance(node.meta["val"], (tuple, list))
    func = group_norm(shape, groups, hw, eps, weight is not None, bias is not None, statistics)
    rows = group_rows(shape, groups, hw)
    operands = tuple(o for o in (x, weight, bias) if o is not None)
    return KernelCall(
        func,
        operands,
        "group_norm rows",
        rows.reason,
        _work(rows, _NORM_FLOPS),
        predicted_seconds=predicted_seconds(rows, CYCLES, ROW_CYCLES, hw),
    )


@kernel_for(aten.group_norm.default)
def group_norm_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Normalise groups of channels."""
    x, groups, weight, bias, eps, _ = bind(node)
    return _group_norm(node, hw, x, groups, weight, bias, eps)


@kernel_for(aten.native_group_norm.default)
def native_group_norm_kernel(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """As group_norm, with the groups' mean and 1 / sqrt(variance + eps)."""
    x, weight, bias, _, _, _, groups, eps = bind(node)
    return _group_norm(node, hw, x, groups, weight, bias, eps)
