"""Runs one NHWC convolution or pooling node through its kernel and compares it with float64 PyTorch.

conv(batch=1, size=(9, 7), channels=5, filters=6, kernel=(3, 3), padding=(1, 0, 2, 1), activation="relu")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import tvm
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.backends.lowering import kernels_conv  # noqa: F401  (fills KERNELS)
from graphwright.backends.lowering.registry import KERNELS, KernelCall, Packed, Refusal
from graphwright.hwdb import Hardware, detect
from graphwright.passes import dialect

UNIT = 2.0**-24  # float32's unit roundoff


@functools.cache
def target(hw: Hardware) -> tvm.target.Target:
    """TVM's target for `hw`."""
    return tvm.target.Target(hw.tvm_target())


def plain(hw: Hardware, **changes: Any) -> Hardware:
    """`hw` with other facts."""
    return dataclasses.replace(hw, **changes)


class Case:
    """One node with its operands: float32 tensors, the weight and bias as constants."""

    def __init__(self, op: Any, tensors: Sequence[torch.Tensor | None], options: Sequence[Any]) -> None:
        self.op, self.tensors, self.options = op, list(tensors), tuple(options)
        root, graph = torch.nn.Module(), fx.Graph()
        mode = FakeTensorMode()
        self.given: dict[fx.Node, torch.Tensor] = {}
        nodes: list[fx.Node | None] = []
        for i, tensor in enumerate(self.tensors):
            if tensor is None:
                nodes.append(None)
                continue
            constant = i in (1, 2)
            if constant:
                root.register_buffer(f"t{i}", tensor)
            node = graph.get_attr(f"t{i}") if constant else graph.placeholder(f"t{i}")
            node.meta["val"] = mode.from_tensor(tensor)
            self.given[node] = tensor
            nodes.append(node)
        self.node = graph.call_function(op, (*nodes, *self.options))
        with mode:
            self.node.meta["val"] = op(*[n and n.meta["val"] for n in nodes], *self.options)

    def lower(self, hw: Hardware) -> KernelCall | Refusal:
        """The kernel's answer."""
        return KERNELS[self.op](self.node, hw)

    def run(self, hw: Hardware) -> torch.Tensor:
        """Compile and run the kernel; every element of the result starts as a canary."""
        call = self.lower(hw)
        assert isinstance(call, KernelCall), call
        assert call.work.flops["float32"] >= 0
        assert call.choice
        operands = [o.pack(self.given[o.constant]) if isinstance(o, Packed) else self.given[o] for o in call.operands]
        out = torch.full(tuple(self.node.meta["val"].shape), 12345.0)
        main = compile_kernel(call, hw)["main"]
        main(*[tvm.runtime.from_dlpack(_aligned(t)) for t in operands], view := tvm.runtime.from_dlpack(out))
        return torch.from_numpy(view.numpy())

    def reference(self) -> torch.Tensor:
        """Eager's result in float64."""
        return self.op(*[t if t is None else t.double() for t in self.tensors], *self.options)


def compile_kernel(call: KernelCall, hw: Hardware) -> Any:
    """Machine code of the kernel."""
    return tvm.compile(tvm.IRModule({"main": call.func.with_attr("global_symbol", "main")}), target=target(hw))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def conv_case(
    batch: int,
    size: tuple[int, int],
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    layout: str = "NHWC",
    seed: int = 0,
) -> Case:
    """A convolution with random operands."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *size, channels, generator=random)
    weight = torch.randn(filters, channels // groups, *kernel, generator=random)
    b = torch.randn(filters, generator=random) if bias else None
    options = (stride, padding, dilation, groups, activation, list(args), layout)
    out = [
        (size[i] + sum(padding[2 * i : 2 * i + 2]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    added = torch.randn(batch, *out, filters, generator=random) if residual else None
    return Case(dialect.conv2d, (x, weight, b, added), options)


def check_conv(hw: Hardware | None = None, **problem: Any) -> None:
    """Assert that the kernel's error is within what float32 sums of that length can have."""
    case = conv_case(**problem)
    got, wanted = case.run(hw or detect()).double(), case.reference()
    # Any order of summation errs by at most n * unit * sum |x||w| (Higham, Accuracy and Stability, section 4.2), and no
    # activation is steeper than 1.13 (gelu); float32 activations add a few units of their own.
    x, weight, bias, added = (t if t is None else t.double().abs() for t in case.tensors)
    plain_options = (*case.options[:4], "none", [], "NHWC")
    magnitude = dialect.conv2d(x, weight, bias, added, *plain_options)
    terms = weight[0].numel() + 3
    allowed = 1.2 * terms * UNIT * magnitude + 1e-6 * wanted.abs() + 1e-6
    worst = ((got - wanted).abs() / allowed).max().item()
    assert worst <= 1.0, f"{problem}: error is {worst:.2f} of the bound"
