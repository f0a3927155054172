"""What can be compiled for a machine, by which kernels, and what a node of the graph promises to return."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ..choices import noting
from ..gpu.operators import GPU_KERNELS
from .operators import KERNELS, LOWERINGS
from .registry import Kernel, KernelCall, Out

aten = torch.ops.aten

# Operators that keep the elements and their order: the result reuses the operand's bytes.
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
}
# Also reshapes, unless they change the dtype.
COPIES = {aten.clone.default, aten._to_copy.default}

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def dtype_name(dtype: torch.dtype) -> str | None:
    """TVM's name of a torch dtype, or None where kernels do not compute in it (complex, quantised, float8)."""
    return _DTYPES.get(dtype)


def out_of(node: fx.Node) -> Out | tuple[Out, ...]:
    """The shapes and dtypes a node promises."""
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return tuple(promised(v) for v in value)
    return promised(value)


def promised(value: torch.Tensor) -> Out:
    """The shape and dtype of a value."""
    name = dtype_name(value.dtype)
    assert name is not None, value.dtype
    return Out(tuple(int(d) for d in value.shape), name)


def why_not(node: fx.Node, hw: Hardware) -> str | None:
    """None where the node can be compiled for `hw`, else the reason it is left to PyTorch."""
    if node.target is operator.getitem:
        return None
    for related in (node, *node.all_input_nodes):
        values = related.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if value is None:
                if related is node and isinstance(values, (tuple, list)):
                    continue
                return f"{related.name} is not a tensor"
            if not isinstance(value, torch.Tensor):
                return f"{related.name} is a {type(value).__name__}, not a tensor"
            if dtype_name(value.dtype) is None or value.layout != torch.strided:
                return f"{related.name} has dtype {value.dtype} and layout {value.layout}"
            if any(not isinstance(d, int) for d in value.shape):
                return f"{related.name} has a shape known only at run time"
    if is_reshape(node):
        return None
    target = node.target
    refused = "no lowering"
    kernel = _kernels(hw).get(target)
    if kernel is not None:
        with noting() as decisions:
            call = kernel(node, hw)
        if isinstance(call, KernelCall):
            weighed = tuple(decision for decision in decisions if decision.reason in call.choice)
            node.meta["kernel_call"] = replace(call, decisions=weighed)
            return None
        refused = call.reason
    if target in LOWERINGS:
        return LOWERINGS[target].can(node)
    return refused


def has_kernels(hw: Hardware) -> bool:
    """Whether the kernels of `KERNELS`, and the fusions that go with their cost model, are for `hw`: not for GPUs."""
    return hw.kind in ("cpu", "board")


def _kernels(hw: Hardware) -> Mapping[Any, Kernel]:
    if has_kernels(hw):
        return KERNELS
    return GPU_KERNELS if hw.kind == "gpu" else {}


def is_reshape(node: fx.Node) -> bool:
    """Whether the node only renames the shape of its operand."""
    if node.target in RESHAPES:
        return isinstance(node.args[0], fx.Node)
    if node.target in COPIES and isinstance(node.args[0], fx.Node):
        return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)
    return False
