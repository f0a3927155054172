"""Compare what was compiled with PyTorch in float64, and find the pass or the kernel to blame for a difference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from ..errors import NumericMismatch
from ..hwdb import Hardware
from . import pipeline
from .reference import Float64, max_absolute, relative_l2, run_eager, run_float64
from .report import ErrorRow

log = logging.getLogger(__name__)

# float32 rounds at 6e-8; another order of summation moves a deep network by a few times eager's own error.
FACTOR_OF_EAGER = 8.0
FLOOR = {torch.float32: 4e-6, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A comparison or an argmax may turn over where two values tie within rounding.
FLIPS = 1e-3


# Machine code as a function from tensor inputs to tensor outputs.
Runner: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


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
    return any(
        isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags
        for n in graph.graph.nodes
    )


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


def blame(
    graph: fx.GraphModule,
    hw: Hardware,
    passes: Sequence[pipeline.Pass],
    inputs: Sequence[torch.Tensor],
    tolerance: float | None,
    build: Callable[[fx.GraphModule], Runner],
) -> NumericMismatch:
    """Find out what made the numbers wrong: the first pass whose graph differs, else the first compiled node."""
    expected = reference(graph, inputs)
    states = [("capture", pipeline.copy_graph(graph))]
    guilty: list[tuple[str, fx.GraphModule, fx.GraphModule]] = []

    def check(name: str, current: fx.GraphModule) -> None:
        if guilty:
            return
        current.recompile()
        if compare(run_eager(current, inputs), expected, tolerance) is not None:
            guilty.append((name, states[-1][1], pipeline.copy_graph(current)))
        states.append((name, pipeline.copy_graph(current)))

    rewritten, _ = pipeline.run(graph, hw, passes, check)
    if guilty:
        name, before, after = guilty[0]
        node = _first_changed(before, after, inputs)
        return NumericMismatch(
            f"pass {name} changed the numbers, first at node {node.format_node() if node else 'of the output'}"
            f"{_where(node)}\nThis is a bug of graphwright: report it, and leave the pass out meanwhile."
        )
    node = _first_wrong(rewritten, inputs, tolerance, build)
    found = node.format_node() if node is not None else "no single operator: they differ only together"
    return NumericMismatch(
        f"the machine code differs from PyTorch although every pass kept the numbers; first at {found}{_where(node)}\n"
        "This is a bug of graphwright: report it with the operator and its shapes."
    )


def _first_changed(before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.Node | None:
    """The first node of `after` whose value no node of `before` had, in float64, when all its operands' values were there."""
    old, new = Float64(before, keep=True), Float64(after, keep=True)
    with torch.no_grad():
        old.run(*inputs)
        new.run(*inputs)
    known = {n.name: v for n, v in old.values.items()}
    suspects = []
    for node, value in new.values.items():
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        previous = known.get(node.name)
        if isinstance(previous, torch.Tensor):
            if previous.shape == value.shape and relative_l2(value, previous) > 1e-9:
                suspects.append(node)
        elif not _seen(value, known.values()):
            suspects.append(node)
        if suspects:
            return suspects[0]
    return None


def _seen(value: torch.Tensor, values: Any) -> bool:
    return any(
        isinstance(v, torch.Tensor)
        and v.numel() == value.numel()
        and v.dtype == value.dtype
        and abs(float(v.double().sum() - value.double().sum())) <= 1e-9 * (1.0 + float(v.double().abs().sum()))
        for v in values
    )


def _first_wrong(
    graph: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    tolerance: float | None,
    build: Callable[[fx.GraphModule], Runner],
) -> fx.Node | None:
    """Compile with every intermediate value as an output, and compare them in order."""
    probe = pipeline.copy_graph(graph)
    nodes = [n for n in probe.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    output = next(n for n in probe.graph.nodes if n.op == "output")
    output.args = (tuple(nodes),)
    probe.recompile()
    expected = reference(probe, inputs)
    for i, (result, node) in enumerate(zip(build(probe)(inputs), nodes, strict=True)):
        single = Reference([expected.exact[i]], [expected.eager[i]])
        if compare([result], single, tolerance) is not None:
            return node
    return None


def _allowed(own: float, dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max(FACTOR_OF_EAGER * own, FLOOR.get(dtype, 4e-6))


def _negligible(result: torch.Tensor, eager: torch.Tensor) -> bool:
    """Whether all that differs is smaller than the smallest normal number of the dtype."""
    if not torch.equal(result.isfinite(), eager.isfinite()) or not result.is_floating_point():
        return False
    return max_absolute(result, eager) <= torch.finfo(eager.dtype).tiny


def _where(node: fx.Node | None) -> str:
    trace = node.meta.get("stack_trace") if node is not None else None
    return f"\nwhere the model says:\n{trace}" if trace else ""
