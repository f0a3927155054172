"""Are these the numbers PyTorch would give? The error against float64, and how much of it rounding explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .reference import max_absolute, relative_l2, run_eager, run_float64
from .report import ErrorRow

# float32 rounds at 6e-8; another order of summation moves a deep network by a few times eager's own error.
FACTOR_OF_EAGER = 8.0
FLOOR = {torch.float32: 4e-6, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A comparison or an argmax may turn over where two values tie within rounding.
FLIPS = 1e-3


@dataclass(frozen=True)
class Reference:
    """Outputs of the captured graph in float64 and in plain PyTorch, for one set of inputs."""

    exact: list[torch.Tensor]
    eager: list[torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """An output that is further from float64 than rounding explains."""

    output: int
    error: float
    allowed: float


def reference(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Reference:
    """Run the captured graph in float64 and in its own dtypes."""
    return Reference(run_float64(graph, inputs), run_eager(graph, inputs))


def is_random(graph: fx.GraphModule) -> bool:
    """Whether two runs of the graph differ by design (dropout in training, random tensors)."""
    return any(_draws(node) for node in graph.graph.nodes)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Operators that draw only where their dropout probability (dropout_p, p) is not 0.
    names = [a.name for a in node.target._schema.arguments]
    for name in ("dropout_p", "p"):
        if name in names:
            position = names.index(name)
            default = node.target._schema.arguments[position].default_value
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
            return bool(given != 0.0)
    return True


def compare(results: Sequence[torch.Tensor], expected: Reference, tolerance: float | None) -> Difference | None:
    """The first output whose error is more than rounding explains, or None.

    The error of a floating point output is relative L2 against float64; `tolerance` replaces the default bound of
    a few times eager's own error. Integers must be equal, but for ties that rounding may turn over.
    """
    for i, (result, exact, eager) in enumerate(zip(results, expected.exact, expected.eager, strict=True)):
        if result.dtype != eager.dtype or result.shape != eager.shape:
            return Difference(i, math.inf, 0.0)
        if not result.numel():
            continue
        if not (result.is_floating_point() or result.is_complex()):
            wrong = float((result != eager).sum()) / result.numel()
            allowed = max(FLIPS, float((exact != eager).sum()) / result.numel())
            if wrong > allowed:
                return Difference(i, wrong, allowed)
            continue
        own = relative_l2(eager, exact)
        allowed = _allowed(own, result.dtype, tolerance)
        error = relative_l2(result, exact)
        # Where PyTorch itself overflows, or divides zero by zero, the compiled model has to do just that.
        if not math.isfinite(own):
            error, allowed = relative_l2(result, eager), _allowed(0.0, result.dtype, tolerance)
        if not error <= allowed and not _negligible(result, eager):
            return Difference(i, error, allowed)
    return None


def errors(names: Sequence[str], results: Sequence[torch.Tensor], expected: Reference) -> tuple[ErrorRow, ...]:
    """The error of every floating point output against float64, beside eager's own."""
    rows = []
    for name, result, exact, eager in zip(names, results, expected.exact, expected.eager, strict=True):
        if result.is_floating_point():
            rows.append(
                ErrorRow(
                    name,
                    relative_l2(result, exact),
                    max_absolute(result, exact),
                    relative_l2(eager, exact),
                    max_absolute(eager, exact),
                )
            )
    return tuple(rows)


def _allowed(own: float, dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max(FACTOR_OF_EAGER * own, FLOOR.get(dtype, 4e-6))


def _negligible(result: torch.Tensor, eager: torch.Tensor) -> bool:
    """Whether all that differs is smaller than the smallest normal number of the dtype."""
    if not torch.equal(result.isfinite(), eager.isfinite()) or not result.is_floating_point():
        return False
    return max_absolute(result, eager) <= torch.finfo(eager.dtype).tiny
