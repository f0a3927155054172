"""Runs one node through the kernel that the table offers for it: `run_kernel(hw, op, x, Constant(w), None, ...)`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import fx

from graphwright.backends.lowering import kernels_attention, kernels_matmul  # noqa: F401  (they fill KERNELS)
from graphwright.backends.lowering.registry import KERNELS, KernelCall, Packed, Refusal
from graphwright.hwdb import Hardware

UNIT = 2.0**-24  # float32's unit roundoff
GUARD = 64  # floats before and after the result, which must stay as they are
CANARY = 12345.0


@dataclass(frozen=True)
class Constant:
    """An argument that the graph holds as a constant (get_attr)."""

    tensor: torch.Tensor


def place(op: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, dict[fx.Node, torch.Tensor], torch.Tensor]:
    """The node that calls `op`, the tensors of its inputs, and eager's result."""
    graph, given = fx.Graph(), dict[fx.Node, torch.Tensor]()

    def node_of(value: Any) -> Any:
        if isinstance(value, list):
            return [node_of(v) for v in value]
        if not isinstance(value, torch.Tensor | Constant):
            return value
        constant = isinstance(value, Constant)
        tensor = value.tensor if constant else value
        name = f"t{len(given)}"
        node = (graph.get_attr if constant else graph.placeholder)(name)
        node.meta["val"] = tensor.to("meta")
        given[node] = tensor.contiguous()
        return node

    nodes = [node_of(a) for a in args]
    node = graph.call_function(op, tuple(nodes), kwargs)
    result = op(*[a.tensor if isinstance(a, Constant) else a for a in args], **kwargs)
    node.meta["val"] = result.to("meta")
    return node, given, result


def kernel_of(hw: Hardware, op: Any, *args: Any, **kwargs: Any) -> KernelCall | Refusal:
    """What the table answers for this call of `op`."""
    node, _, _ = place(op, *args, **kwargs)
    return KERNELS[op](node, hw)


def refusal(hw: Hardware, op: Any, *args: Any, **kwargs: Any) -> str:
    """Why the table refuses this call of `op`."""
    answer = kernel_of(hw, op, *args, **kwargs)
    assert isinstance(answer, Refusal), answer
    return answer.reason


def run_kernel(hw: Hardware, op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compile and run; asserts that nothing beside the result was written."""
    node, given, expected = place(op, *args, **kwargs)
    call = KERNELS[op](node, hw)
    assert isinstance(call, KernelCall), call
    assert call.choice
    assert call.work.bytes_written == 4.0 * expected.numel()
    main = compile_kernel(call.func, hw)["main"]
    operands = [o.pack(given[o.constant]) if isinstance(o, Packed) else given[o] for o in call.operands]
    memory = _aligned(torch.full((expected.numel() + 2 * GUARD,), CANARY))
    main(*map(_to_tvm, operands), _to_tvm(memory[GUARD:-GUARD].view(expected.shape)))
    assert torch.all(memory[:GUARD] == CANARY), "written before the result"
    assert torch.all(memory[-GUARD:] == CANARY), "written after the result"
    return memory[GUARD:-GUARD].view(expected.shape).clone()


def compile_kernel(func: Any, hw: Hardware) -> Any:
    """Machine code of a PrimFunc."""
    return tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=_target(hw))


@functools.cache
def _target(hw: Hardware) -> Any:
    return tvm.target.Target(hw.tvm_target())


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    while tensor.data_ptr() % 64:
        tensor = tensor.clone()
    return tensor


def _to_tvm(tensor: torch.Tensor) -> Any:
    # TVM wants C-order strides even of a tensor without elements; torch's are at least 1.
    if not tensor.numel():
        return tvm.runtime.empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return tvm.runtime.from_dlpack(_aligned(tensor.contiguous()))


@dataclass(frozen=True)
class InnerLoop:
    """An innermost loop of machine code that multiplies and adds."""

    multiply_adds: int
    stack: int  # vector instructions that touch the stack: spills
    text: str


def inner_loops(func: Any, hw: Hardware) -> list[InnerLoop]:
    """The innermost loops with multiply-adds in the code compiled for `hw`, in order."""
    lines = compile_kernel(func, hw).mod.inspect_source("asm").splitlines()
    starts: dict[str, int] = {}
    loops = []
    for i, line in enumerate(lines):
        label = re.match(r"(\.L\w+):", line)
        if label:
            starts[label.group(1)] = i
        jump = re.match(r"\t(?:j\w+|b\.?\w+|cbn?z\s+\w+,|tbn?z\s+\w+, \S+,)\s+(\.L\w+)", line)
        if not jump or jump.group(1) not in starts:
            continue
        body = lines[starts[jump.group(1)] : i + 1]
        if any(re.match(r"\.LBB\w+:", inner) for inner in body[1:]):
            continue
        count = sum("vfmadd" in inner or "\tfmla" in inner for inner in body)
        spills = sum(
            (bool(re.search(r"[xyz]mm\d+", inner)) and "(%rsp" in inner) or bool(re.search(r"\t\w+\tq\d+.*\[sp", inner))
            for inner in body
        )
        if count:
            loops.append(InnerLoop(count, spills, "\n".join(body)))
    return loops
