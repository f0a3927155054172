"""An identity as a row of a table, and what its rewrite may ask and do at a node.

    Identity("neg(neg(x)) -> x", (aten.neg.default,), _double_negation, "a sign flipped twice")

The rewrite returns the node to read instead, or None where the identity does not apply. It may return any node that
stands before this one, or calls made with `Site.call`; the driver checks dtype, shape and memory, and takes back
what was made where it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import rewrite
from ..rewrite import Operator

aten = torch.ops.aten

Number = bool | int | float

# Constants beyond this are weights: whether all their elements are equal is not worth the look.
_UNIFORM_ELEMENTS = 1 << 22
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FULL: dict[Operator, Callable[[fx.Node], Any]] = {
    aten.full.default: lambda node: node.args[1],
    aten.scalar_tensor.default: lambda node: node.args[0],
    aten.zeros.default: lambda node: 0,
    aten.ones.default: lambda node: 1,
}


@dataclass(frozen=True)
class Site:
    """A node at which an identity is tried."""

    graph: fx.GraphModule
    node: fx.Node

    @property
    def args(self) -> tuple[Any, ...]:
        return self.node.args

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults filled in."""
        return rewrite.arguments(self.node)

    @property
    def dtype(self) -> torch.dtype:
        return rewrite.value_of(self.node).dtype  # type: ignore[union-attr]

    @property
    def shape(self) -> tuple[int, ...]:
        return rewrite.shape_of(self.node)

    @property
    def is_float(self) -> bool:
        """Whether the result is in real floating point."""
        return self.dtype in rewrite.FLOATS

    @property
    def is_integer(self) -> bool:
        """Whether the result is of integers, bool not being one."""
        return self.dtype in _INTEGERS

    def same_dtype(self, *operands: object) -> bool:
        """Whether all are tensors of the result's dtype."""
        return all(dtype_of(x) == self.dtype for x in operands)

    def call(self, target: Operator, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of the node."""
        return rewrite.call(self.graph, target, args, kwargs, before=self.node)

    def uniform(self, operand: object) -> Number | None:
        """The one number that all elements of an operand are: a Python number, `full`, or a stored constant."""
        if isinstance(operand, (bool, int, float)):
            return operand
        if rewrite.calls(operand, *_FULL):
            value = _FULL[operand.target](operand)  # type: ignore[index]
            # As the tensor's dtype holds it: full(..., 1.5, dtype=int64) is 1.
            return _number(torch.tensor(value, dtype=dtype_of(operand))) if isinstance(value, (int, float)) else None
        if rewrite.calls(operand, aten.expand.default):
            return self.uniform(operand.args[0])
        tensor = rewrite.constant(self.graph, operand)
        if tensor is None or not 0 < tensor.numel() <= _UNIFORM_ELEMENTS or tensor.is_complex():
            return None
        first = tensor[(0,) * tensor.dim()]
        last = tensor[(-1,) * tensor.dim()]
        if not bool(first == last) or not bool((tensor == first).all()):
            return None
        signed = tensor.is_floating_point() and not bool((tensor.signbit() == first.signbit()).all())
        return None if signed else _number(first)


@dataclass(frozen=True)
class Identity:
    """One row: the rewrite at calls of `operators`, and why no bit of a result changes."""

    text: str
    operators: tuple[Operator, ...]
    apply: Callable[[Site], fx.Node | None]
    reason: str


def dtype_of(operand: object) -> torch.dtype | None:
    """The dtype of a node with one tensor, else None."""
    value = rewrite.value_of(operand) if isinstance(operand, fx.Node) else None
    return None if value is None else value.dtype


def is_number(value: object, wanted: float) -> bool:
    """Whether a number (bools are none) equals `wanted`, the sign of zero included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != wanted:
        return False
    return wanted != 0 or math.copysign(1.0, value) == math.copysign(1.0, wanted)


def is_power_of_two(value: object, dtype: torch.dtype) -> bool:
    """Whether a number is plus or minus 2**k, and it and its reciprocal are normal numbers of `dtype`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        return False
    info = torch.finfo(dtype)
    return abs(math.frexp(value)[0]) == 0.5 and all(info.tiny <= abs(v) <= info.max for v in (value, 1 / value))


def _number(tensor: torch.Tensor) -> Number:
    value: Number = tensor.item()
    return value
