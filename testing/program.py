"""A model as the text of a Python program: what is drawn, run, shrunk and printed is one and the same.

x0 = tensor((2, 3), torch.float32, 7)
class Model(torch.nn.Module): ...  def forward(self, x0): v0 = torch.relu(x0); return v0
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LOWEST, _HIGHEST = -4, 5  # of integers


def tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    order: Sequence[int] | None = None,
    gap: int = 1,
    below: int | None = None,
    special: bool = False,
) -> torch.Tensor:
    """Random numbers, the same ones for the same arguments: normal, or integers from -4 to 4, or booleans.

    order: the dims from outermost to innermost in memory. gap: elements lie that far apart. below: integers from 0 to
    below - 1. special: every fourth element or so is a zero of either sign, an infinity or a NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        values = torch.randn(list(shape), generator=generator, dtype=torch.float64).to(dtype)
        if special:
            odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
            picked = torch.randint(0, 20, list(shape), generator=generator)
            values = torch.where(picked < len(odd), odd[picked.clamp(max=len(odd) - 1)], values)
    elif dtype == torch.bool:
        values = torch.randint(0, 2, list(shape), generator=generator).to(torch.bool)
    else:
        low, high = (_LOWEST, _HIGHEST) if below is None else (0, max(1, below))
        values = torch.randint(low, high, list(shape), generator=generator).to(dtype)
    return _laid_out(values, order or range(values.dim()), gap)


def _laid_out(values: torch.Tensor, order: Sequence[int], gap: int) -> torch.Tensor:
    """The values with their dims in this order in memory, and gaps between them."""
    strides, reach = [0] * values.dim(), gap
    for dim in reversed(order):
        strides[dim] = reach
        reach *= max(1, values.shape[dim])
    result = values.new_zeros(max(1, reach)).as_strided(values.shape, strides)
    return result.copy_(values)


@dataclass(frozen=True)
class Program:
    """A model and its inputs. `repr` is a program that can be run."""

    inputs: tuple[str, ...]  # expressions; input i is called xi
    weights: tuple[tuple[str, str], ...]  # names of buffers, and expressions
    lines: tuple[str, ...]  # statements of the forward
    results: tuple[str, ...]  # names

    @property
    def source(self) -> str:
        """The program's text: it defines `Model`, `model` and `inputs`."""
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        buffers = [f'        self.register_buffer("{name}", {value})' for name, value in self.weights]
        return "\n".join(
            [
                "import math",
                "import torch",
                "import torch.nn.functional as F",
                "from graphwright.testing import tensor",
                "",
                "class Model(torch.nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *buffers,
                "",
                f"    def forward(self, {names}):",
                *(f"        {line}" for line in self.lines),
                f"        return ({', '.join(self.results)},)",
                "",
                "model = Model().eval()",
                f"inputs = ({', '.join(self.inputs)},)",
            ]
        )

    @property
    def digest(self) -> str:
        """A short name of this very program."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def module(self) -> torch.nn.Module:
        """The model."""
        model = self._run["model"]
        assert isinstance(model, torch.nn.Module)
        return model

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The inputs."""
        return tuple(self._run["inputs"])

    @functools.cached_property
    def _run(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(self.source, "<program>", "exec"), names)
        return names

    def __repr__(self) -> str:
        return f"\n\n{self.source}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would write down the fields
