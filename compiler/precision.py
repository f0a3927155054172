"""Reduced precision in a compilation: which there are, assigning them, and going back where the error is too large.

check_precision("bf16")
choices, runs = reduce(graph, hw, Precision("bf16"))       # rewrites the graph
keep = too_sensitive(graph, hw, precision, inputs, ...)    # nodes to leave in float32, most sensitive first
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import GraphwrightError, suggest
from ..hwdb import Hardware
from . import compare
from .pipeline import PassRun, copy_graph
from .reference import relative_l2, run_eager

if TYPE_CHECKING:
    from ..passes.assign_precision import Choice

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16")
NOT_BUILT = ("fp16", "int8", "auto")
MARGIN = 0.8  # of the tolerance that predicted errors may fill: they are added as if independent


@dataclass(frozen=True)
class Precision:
    """What was asked for, and the nodes that stay float32 nevertheless."""

    name: str = "fp32"
    keep: frozenset[str] = frozenset()

    def allowed(self, tolerance: float | None) -> float | None:
        """The relative error verification allows: the caller's, else what the precision explains."""
        return compare.REDUCED.get(self.name) if tolerance is None else tolerance

    def keeping(self, nodes: Sequence[str]) -> Precision:
        """The same, with more nodes in float32."""
        return replace(self, keep=self.keep | set(nodes))


FP32 = Precision()


def check_precision(name: Any) -> None:
    """Raise GraphwrightError for a precision that there is not, saying what there is."""
    there = " and ".join(repr(p) for p in PRECISIONS)
    if name in NOT_BUILT:
        raise GraphwrightError(f"precision {name!r} is not built yet; there are {there}")
    if name not in PRECISIONS:
        near = suggest(str(name), (*PRECISIONS, *NOT_BUILT))
        raise GraphwrightError(f"there is no precision {name!r}{near}; there are {there}")


def reduce(graph: fx.GraphModule, hw: Hardware, precision: Precision) -> tuple[tuple[Choice, ...], tuple[PassRun, ...]]:
    """Give every operator of the rewritten `graph` its precision, in place: the decisions, and the pass that ran."""
    if precision.name == "fp32":
        return (), ()
    from ..passes.assign_precision import assign_precision, choose_precisions

    started = time.perf_counter()
    choices = choose_precisions(graph, hw, precision.name, precision.keep)
    count = assign_precision(graph, choices)
    return choices, (PassRun("assign_precision", count, time.perf_counter() - started),)


def too_sensitive(
    graph: fx.GraphModule,
    hw: Hardware,
    precision: Precision,
    inputs: Sequence[torch.Tensor],
    expected: compare.Reference,
    tolerance: float,
) -> list[str]:
    """The reduced operators of the rewritten float32 `graph` that have to go back to float32, most sensitive first.

    Each is reduced alone, in PyTorch, to see what it does to the outputs; the most damaging go back until the others'
    errors, added as if independent, are within `tolerance`. Where that names none, half of them go.
    """
    from ..passes.assign_precision import assign_precision, choose_precisions

    choices = [c for c in choose_precisions(graph, hw, precision.name, precision.keep) if c.dtype == "bfloat16"]
    damage: dict[str, float] = {}
    for choice in choices:
        alone = copy_graph(graph)
        assign_precision(alone, (choice,))
        damage[choice.node] = _error(run_eager(alone, inputs), expected)
    ranked = sorted(damage, key=lambda node: -damage[node])
    rest = math.fsum(error * error for error in damage.values())
    for count, node in enumerate(ranked):
        if math.isfinite(rest) and rest <= (MARGIN * tolerance) ** 2:
            return ranked[: count or -(-len(ranked) // 2)]
        rest -= damage[node] ** 2 if math.isfinite(damage[node]) else 0.0
        if not math.isfinite(rest):
            rest = math.fsum(damage[n] ** 2 for n in ranked[count + 1 :])
    return ranked


def _error(results: Sequence[torch.Tensor], expected: compare.Reference) -> float:
    errors = [
        relative_l2(result, exact)
        for result, exact in zip(results, expected.exact, strict=True)
        if result.is_floating_point() and result.numel()
    ]
    return max(errors, default=0.0)
