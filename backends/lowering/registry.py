"""The two operator tables: how a node becomes a tensor expression, or a kernel of ours.

`LOWERINGS` holds tensor-expression (TE) definitions: correct for every dtype and shape they admit, fused with
their neighbours (`backends.regions`) and scheduled by `backends.cpu.schedule`. `KERNELS` holds hand-scheduled loop
nests for the operators that carry the time; a kernel may refuse a node (with the reason), and then the TE definition
serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ..choices import Decision


@dataclass(frozen=True)
class Out:
    """One result of a node as the graph promises it: the shape and the TVM dtype name ("float32", "bool", "int64")."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Lowering:
    """A TE definition and the test of whether it applies.

    `compute(out, *args, **kwargs)` receives the node's arguments as torch's schema has them, with te.Tensor in the
    place of tensors, and returns a te.Tensor of exactly out.shape and out.dtype (for an operator with several
    results, `out` is a tuple and so is what it returns). `can(node)` returns None, or why it does not apply.
    """

    compute: Callable[..., Any]
    can: Callable[[fx.Node], str | None]


@dataclass(frozen=True)
class Packed:
    """A constant operand rearranged at compile time: `pack` maps the stored tensor to the one the kernel reads.

    An operand that is computed, not constant, is rearranged at run time (`repack`); `pack` then only moves elements and
    pads with zeros. `layout` names the arrangement; two uses of one constant with equal layouts share the packed copy.
    """

    constant: fx.Node
    layout: str
    pack: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Second:
    """A second kernel of a call: it reads what the first one gave, in float32, and the operands from `first` on."""

    func: Any
    between: tuple[int, ...]  # the shape of that
    first: int
    algorithm: str
    choice: str


@dataclass(frozen=True)
class KernelCall:
    """One call of a hand-scheduled kernel.

    `func` is a tirx.PrimFunc whose parameters are buffers: the operands in order, then the result(s). It writes
    every element of its results, allocates its own scratch, and sets tirx.noalias.
    """

    func: Any
    operands: tuple[fx.Node | Packed, ...]
    algorithm: str  # "packed matmul", "direct conv", ...
    choice: str  # the tile and why, in a few words: "6x16, 192 panels"
    work: Work
    predicted_seconds: float | None = None  # by the kernel's own model, which knows more than the roofline over `work`
    decisions: tuple[Decision, ...] = ()  # what was weighed against what, filled in by the lowering
    second: Second | None = None  # `func` gives what it reads, of the operands in front of its own; GPUs alone

    def has(self, func: Any) -> bool:
        """Whether `func` is one of its kernels."""
        return self.func is func or (self.second is not None and self.second.func is func)


@dataclass(frozen=True)
class KernelInfo:
    """What the report says of one kernel call."""

    name: str
    operators: str
    algorithm: str
    choice: str
    predicted_us: float | None
    step: int = 0  # which of its region's steps; in a built model, which mark of gw_trace begins it
    decisions: tuple[Decision, ...] = ()  # what was weighed against what


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not take a node."""

    reason: str


Kernel = Callable[[fx.Node, Hardware], "KernelCall | Refusal"]

LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {}
KERNELS: dict[torch._ops.OpOverload, Kernel] = {}


def always(node: fx.Node) -> str | None:
    """Admit every node."""
    return None


def lowers(
    *operators: torch._ops.OpOverload, can: Callable[[fx.Node], str | None] = always
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated TE definition for `operators`; an operator has exactly one."""

    def enter(compute: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            assert operator not in LOWERINGS, f"{operator} has two lowerings"
            LOWERINGS[operator] = Lowering(compute, can)
        return compute

    return enter


def kernel_for(*operators: torch._ops.OpOverload) -> Callable[[Kernel], Kernel]:
    """Enter the decorated function as the kernel of `operators`."""

    def enter(kernel: Kernel) -> Kernel:
        for operator in operators:
            assert operator not in KERNELS, f"{operator} has two kernels"
            KERNELS[operator] = kernel
        return kernel

    return enter
