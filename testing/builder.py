"""Writes a program line by line, running each line as it is written, so that every value's type is known.

A line that PyTorch refuses, whose result is too large, too far from 1 or not finite, is taken back: families may try.
Discontinuous operators are drawn only where no element lies near the step (`Builder.far`), so that rounding, which
passes may change, does not change what a comparison or an argmax gives.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from .program import Program, tensor

T = TypeVar("T")

MOST_ELEMENTS = 4096
LARGEST = 1e3  # of the magnitudes of drawn values: float16 ends at 65504
# Nothing discontinuous is done with a value closer to its step than this share of its largest element.
MARGIN = {torch.float16: 0.1, torch.bfloat16: 0.2}
_MARGIN = 1e-3


class Refused(Exception):
    """A line cannot be written; what was written before stays."""


@dataclass(frozen=True)
class Value:
    """A name of the program, and the tensor it stands for."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        """The number of its dims."""
        return self.tensor.dim()

    @property
    def is_float(self) -> bool:
        """Whether it holds floating point numbers."""
        return self.tensor.is_floating_point()

    @property
    def is_bool(self) -> bool:
        """Whether it holds booleans."""
        return self.tensor.dtype == torch.bool


class Builder:
    """A program under construction. All choices are Hypothesis' own, the simplest first."""

    def __init__(self, draw: Callable[[Any], Any], special: bool = False) -> None:
        self._draw = draw
        self._largest = None if special else LARGEST
        self.values: list[Value] = []
        self.lines: list[str] = []
        self._inputs: list[str] = []
        self._weights: list[str] = []
        self._self = types.SimpleNamespace()
        self._names: dict[str, Any] = {"torch": torch, "F": F, "math": math, "self": self._self}

    def choose(self, options: Sequence[T]) -> T:
        """One of several, the first where it does not matter."""
        if not options:
            raise Refused
        index: int = self._draw(st.integers(0, len(options) - 1)) if len(options) > 1 else 0
        return options[index]

    def integer(self, low: int, high: int) -> int:
        """A number from low to high."""
        number: int = self._draw(st.integers(low, high))
        return number

    def flag(self) -> bool:
        """Yes or no, no where it does not matter."""
        return bool(self._draw(st.booleans()))

    def order(self, count: int) -> list[int]:
        """An order of `count` things, as they are where it does not matter."""
        return list(self._draw(st.permutations(range(count)))) if count > 1 else list(range(count))

    def input(self, expression: str) -> Value:
        """A further input of the model."""
        self._inputs.append(expression)
        value = Value(f"x{len(self._inputs) - 1}", self._made(expression))
        self._names[value.name] = value.tensor
        self.values.append(value)
        return value

    def weight(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, after: str = "", **options: Any) -> str:
        """A constant of the model; `after` is put behind the expression, as in " * 0.5"."""
        extra = "".join(f", {k}={v}" for k, v in options.items())
        text = f"tensor({tuple(shape)}, {dtype}, {self.integer(0, 99)}{extra}){after}"
        name = f"w{len(self._weights)}"
        self._weights.append(text)
        setattr(self._self, name, self._made(text))
        return f"self.{name}"

    def scaled_weight(self, shape: Sequence[int], dtype: torch.dtype, terms: int) -> str:
        """A constant whose sum of products over `terms` terms is about as large as what it is multiplied by."""
        return self.weight(shape, dtype, f" / {max(1, round(math.sqrt(terms)))}")

    def emit(self, expression: str) -> Value:
        """Write `name = expression`; raises Refused where that cannot be."""
        (value,) = self.emit_several(expression, 1)
        return value

    def emit_several(self, expression: str, count: int) -> list[Value]:
        """Write `name, ..., name = expression`."""
        result = self._evaluated(expression)
        results = [result] if count == 1 else list(result)
        if len(results) != count or not all(self._acceptable(r) for r in results):
            raise Refused
        found = []
        for tensor_ in results:
            name = f"v{sum(v.name.startswith('v') for v in self.values)}"
            self._names[name] = tensor_
            found.append(Value(name, tensor_))
            self.values.append(found[-1])
        self.lines.append(f"{', '.join(v.name for v in found)} = {expression}")
        return found

    def change(self, value: Value, statement: str) -> None:
        """Write a statement that changes `value` in place."""
        if any(_shares(value.tensor, self._names[f"x{i}"]) for i in range(len(self._inputs))):
            raise Refused  # a compiled model does not change its inputs
        if any(_shares(value.tensor, getattr(self._self, f"w{i}")) for i in range(len(self._weights))):
            raise Refused
        before = value.tensor.clone()
        self._evaluated(statement)
        if not self._acceptable(value.tensor):
            value.tensor.copy_(before)
            raise Refused
        self.lines.append(statement)

    def far(self, value: Value, step: float = 0.0, *, period: float | None = None) -> Value:
        """The value, where none of its elements lies near `step` (or a multiple of `period` beside it)."""
        x = value.tensor.double() - step
        if period is not None:
            x = torch.remainder(x + period / 2, period) - period / 2
        self._demand(value, x.abs())
        return value

    def distinct(self, value: Value, dim: int | None) -> Value:
        """The value, where no two elements along `dim` lie near each other."""
        x = value.tensor.double().reshape(-1) if dim is None else value.tensor.double().movedim(dim, -1)
        self._demand(value, x.sort(-1).values.diff(dim=-1))
        return value

    def _demand(self, value: Value, distances: torch.Tensor) -> None:
        if not value.is_float or not distances.numel():
            return
        scale = max(1.0, float(value.tensor.double().abs().max()))
        if not float(distances.min()) > MARGIN.get(value.tensor.dtype, _MARGIN) * scale:
            raise Refused

    def program(self, results: Sequence[Value]) -> Program:
        """What was written."""
        text = "\n".join(self.lines)
        named = [(f"w{i}", expression) for i, expression in enumerate(self._weights)]
        read = tuple((name, expression) for name, expression in named if re.search(rf"self\.{name}\b", text))
        return Program(tuple(self._inputs), read, tuple(self.lines), tuple(v.name for v in results))

    def _acceptable(self, value: object) -> bool:
        if not isinstance(value, torch.Tensor) or value.numel() > MOST_ELEMENTS or value.dim() > 6:
            return False
        if not value.numel() or not value.is_floating_point():
            return not value.is_complex()
        return self._largest is None or bool((value.abs() <= self._largest).all())

    def _made(self, expression: str) -> torch.Tensor:
        made: torch.Tensor = eval(expression, {"torch": torch, "tensor": tensor})
        return made

    def _evaluated(self, text: str) -> Any:
        try:
            with torch.no_grad():
                if " = " in text:
                    exec(text, self._names)
                    return None
                return eval(text, self._names)
        except (RuntimeError, IndexError, ValueError, NotImplementedError, TypeError) as error:
            raise Refused from error


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def dims_text(dims: Sequence[int]) -> str:
    """A list of numbers as the program writes it."""
    return f"[{', '.join(str(d) for d in dims)}]"
