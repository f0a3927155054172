"""Reduced precision in a compilation: which there are, deciding within a tolerance, and going back where it is missed.

check_precision("bf16")
choices, runs, notes = reduce(graph, hw, Precision("auto", 1e-2, samples))       # rewrites the graph

The fastest assignment is tried first, in PyTorch on the samples. Where its error is more than the tolerance leaves, the
error that every operator causes alone is found (sensitivity.py), and the budget of the assignment (passes/
precision_cut.py) is set so that what is measured as a whole, against float64, comes out right.
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

from ..errors import InputError, suggest
from ..hwdb import Hardware
from . import compare
from .compression.int8_method import DEFAULT, Method
from .numbers_given import is_number
from .pipeline import PassRun, copy_graph
from .reference import run_eager
from .sensitivity import error_of, sensitivities

if TYPE_CHECKING:
    from ..passes.assign_precision import Choice, Plan

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "auto", "adaptive")
GPU_PRECISIONS = ("fp32", "bf16", "fp16")
MARGIN = 0.9  # of the tolerance that PyTorch may use up: machine code adds in another order
TRIES = 5  # budgets tried
LOOKED_AT = 4  # samples whose sensitivities are averaged; all are measured

Sample = tuple[Sequence[torch.Tensor], compare.Reference]


@dataclass(frozen=True)
class Precision:
    """What was asked for. `samples`: inputs and their float64 results, to decide by; empty where there are none.

    `strictness`, at most 1: the part of the tolerance to aim for, where machine code erred by more than PyTorch.
    `observed` and `method`: the inputs that ranges of int8 are found by, and how.
    """

    name: str = "fp32"
    tolerance: float | None = None
    samples: tuple[Sample, ...] = ()
    strictness: float = 1.0
    observed: tuple[Sequence[torch.Tensor], ...] = ()
    method: Method = DEFAULT

    @property
    def allowed(self) -> float | None:
        """The relative error verification allows: the caller's, else what the precision explains."""
        return compare.REDUCED.get(self.name) if self.tolerance is None else self.tolerance

    def stricter(self, error: float, allowed: float) -> Precision:
        """The same, aiming for less error after machine code erred by `error`."""
        share = 0.9 * allowed / error if math.isfinite(error) else 0.0
        strictness = self.strictness * min(0.9, share)
        return replace(self, strictness=strictness if strictness > 0.1 else 0.0)


FP32 = Precision()


def check_precision(name: Any) -> None:
    """Raise InputError for a precision that there is not, saying what there is."""
    there = f"{', '.join(repr(p) for p in PRECISIONS[:-1])} and {PRECISIONS[-1]!r}"
    if name not in PRECISIONS:
        near = suggest(str(name), PRECISIONS)
        raise InputError(f"there is no precision {name!r}{near}; there are {there}")


def reduce(
    graph: fx.GraphModule, hw: Hardware, precision: Precision
) -> tuple[tuple[Choice, ...], tuple[PassRun, ...], tuple[str, ...]]:
    """Give every operator of the rewritten `graph` its precision, in place: decisions, the pass that ran, and notes.

    Not int8, which takes passes of its own: rewriting.py.
    """
    if precision.name == "fp32":
        return (), (), ()
    from ..passes.assign_precision import assign_precision

    started = time.perf_counter()
    plan, notes = decide(graph, hw, precision)
    count = assign_precision(graph, plan.choices)
    return plan.choices, (PassRun("assign_precision", count, time.perf_counter() - started),), notes


def decide(graph: fx.GraphModule, hw: Hardware, precision: Precision) -> tuple[Plan, tuple[str, ...]]:
    """The plan for a rewritten graph in float32, and what to say of it. Raises InputError for a hopeless tolerance."""
    from ..passes.assign_precision import plan_precisions

    name = "auto" if precision.name == "adaptive" else precision.name
    if not precision.strictness:
        return plan_precisions(graph, hw, name, {}, 0.0), ("everything stays float32: machine code erred by too much",)
    plan = plan_precisions(graph, hw, name)
    if not plan.reduced:
        return plan, (f"nothing gains by {precision.name} on {hw.id}: everything stays float32",)
    if not precision.samples:
        if name == "auto":  # nothing is lowered on a guess
            plan = plan_precisions(graph, hw, name, {}, 0.0)
            return plan, ("everything stays float32: without example inputs no error can be measured",)
        return plan, (_gain(plan), "errors were not measured")
    allowed = precision.allowed
    assert allowed is not None
    check_tolerance(precision.samples, precision.tolerance)
    wanted = MARGIN * allowed * precision.strictness
    measured = _measured(graph, plan.choices, precision.samples)
    if measured <= wanted:
        return plan, (_gain(plan), _kept(measured, allowed, precision.samples))
    started = time.perf_counter()
    errors, method = sensitivities(graph, plan.candidates, precision.samples[:LOOKED_AT])
    found = f"errors of {len(errors)} forms by {method}, in {time.perf_counter() - started:.1f} s"
    plan, measured = _within(graph, hw, name, precision.samples, errors, wanted)
    if not plan.reduced:
        return plan, (found, f"everything stays float32: nothing that gains is within {allowed:.1e}")
    predicted = f"predicted {plan.error:.1e} (independent errors, to first order)"
    return plan, (_gain(plan), found, f"{_kept(measured, allowed, precision.samples)}; {predicted}")


def _within(
    graph: fx.GraphModule,
    hw: Hardware,
    name: str,
    samples: Sequence[Sample],
    errors: dict[tuple[str, str], float],
    wanted: float,
) -> tuple[Plan, float]:
    """The fastest plan found whose measured error is at most `wanted`, and that error.

    Predictions have the wrong scale where errors correlate: the budget is scaled by measured over predicted.
    """
    from ..passes.assign_precision import plan_precisions

    budget = wanted
    best, best_measured = plan_precisions(graph, hw, name, errors, 0.0), 0.0
    for _ in range(TRIES):
        plan = plan_precisions(graph, hw, name, errors, budget)
        if not plan.reduced:
            break
        measured = _measured(graph, plan.choices, samples)
        log.info("budget %.1e: predicted %.1e, measured %.1e, wanted %.1e", budget, plan.error, measured, wanted)
        if measured <= wanted:
            if plan.seconds < best.seconds:
                best, best_measured = plan, measured
            if measured > 0.7 * wanted:
                break
            budget *= min(4.0, 0.95 * wanted / max(measured, 1e-30))
        else:
            budget *= max(0.05, 0.9 * wanted / measured) if math.isfinite(measured) else 0.05
    return best, best_measured


def _measured(graph: fx.GraphModule, choices: Sequence[Choice], samples: Sequence[Sample]) -> float:
    """The largest error against float64 of the graph with these precisions, in PyTorch."""
    from ..passes.assign_precision import assign_precision

    reduced = copy_graph(graph)
    assign_precision(reduced, choices)
    return max(error_of(run_eager(reduced, inputs), expected) for inputs, expected in samples)


def check_error_bound(tolerance: Any) -> None:
    """Raise InputError for a tolerance that is no relative error."""
    if tolerance is None:
        return
    if not is_number(tolerance) or not 0 < tolerance <= 1:
        raise InputError(f"tolerance is a relative error and must be positive and at most 1, got {tolerance!r}")


def check_tolerance(samples: Sequence[Sample], tolerance: float | None) -> None:
    """Raise InputError for a tolerance that float32 itself does not keep."""
    if tolerance is None:
        return
    own = max((error_of(expected.eager, expected) for _, expected in samples), default=0.0)
    if math.isfinite(own) and tolerance < own:
        raise InputError(
            f"tolerance={tolerance:.1e} is less than PyTorch's own float32 error for these inputs, {own:.1e}: "
            f"no precision keeps it; ask for at least {compare.FACTOR_OF_EAGER * own:.0e}, or use a float64 model"
        )


def _gain(plan: Plan) -> str:
    share = plan.seconds / plan.float32_seconds if plan.float32_seconds else 1.0
    return f"{plan.reduced} operators reduced; the products are predicted to take {share:.2f} of their float32 time"


def _kept(measured: float, allowed: float, samples: Sequence[Sample]) -> str:
    inputs = "the example inputs" if len(samples) == 1 else f"{len(samples)} sets of inputs"
    return f"error against float64 {measured:.1e} in PyTorch on {inputs}, {allowed:.1e} allowed"
