"""What reducing one operator does to the outputs, for every operator at once.

Reducing operator i changes its result by d_i, and the outputs by J_i d_i to first order, with J_i the derivative of the
outputs by that result. For v of random signs, E (v . J_i d_i)^2 = |J_i d_i|^2 (Hutchinson, 1990), and v . J_i d_i is
(J_i^T v) . d_i: one backward pass gives J_i^T v for all operators. So

    error_i^2 = mean over probes v of ((J_i^T v) . d_i)^2        outputs divided by their norms, their errors added up

costs one forward pass, every reduced operator computed alone on the operands it had, and `PROBES` backward passes:
linear in the operators, where reducing one after the other is quadratic. Eight probes know an error to about a
quarter; what is assigned by it is measured as a whole afterwards (precision.py), which sets its scale.

Where the graph has no derivative (an operator of another package), groups of neighbours are reduced together, at most
`GROUPS` of them, and every member takes an equal share of its group's squared error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import compare
from .pipeline import copy_graph
from .reference import relative_l2, run_eager

if TYPE_CHECKING:
    from ..passes.assign_precision import Choice

log = logging.getLogger(__name__)

PROBES = 8
GROUPS = 32

Errors = dict[tuple[str, str], float]
Reduce = Callable[[fx.GraphModule, Sequence["Choice"]], object]  # rewrites the chosen operators in place


def sensitivities(
    graph: fx.GraphModule,
    candidates: Sequence[Choice],
    samples: Sequence[tuple[Sequence[torch.Tensor], compare.Reference]],
    reduce: Reduce | None = None,
) -> tuple[Errors, str]:
    """The relative L2 error at the outputs that every candidate alone causes, and how it was found.

    Mean squares over `samples`: pairs of inputs and what they should give. `reduce(graph, choices)` rewrites what is
    chosen, by default as assign_precision does.
    """
    from ..passes.assign_precision import assign_precision

    reduce = assign_precision if reduce is None else reduce
    squares: Errors = {}
    method = f"first-order propagation, {PROBES} probes"
    for inputs, expected in samples:
        try:
            found = _propagated(graph, candidates, inputs, expected, reduce)
        except (RuntimeError, NotImplementedError) as error:
            log.info("sensitivities are measured in groups: %s", error)
            found = _grouped(graph, candidates, inputs, expected, reduce)
            method = f"at most {GROUPS} groups of neighbours reduced together"
        for key, error_squared in found.items():
            squares[key] = squares.get(key, 0.0) + error_squared / len(samples)
    return {key: math.sqrt(value) for key, value in squares.items()}, method


def _propagated(
    graph: fx.GraphModule,
    candidates: Sequence[Choice],
    inputs: Sequence[torch.Tensor],
    expected: compare.Reference,
    reduce: Reduce,
) -> Errors:
    run = _Recording(graph, {choice.node for choice in candidates})
    with torch.enable_grad():
        outputs = run.run(*inputs)
    differences = _differences(graph, candidates, run, reduce)
    targets = [(y, exact) for y, exact in zip(outputs, expected.exact, strict=True) if y.requires_grad and y.numel()]
    squares = {key: 0.0 if bool(d.isfinite().all()) else math.inf for key, d in differences.items()}
    if not targets:
        return squares
    names = list(dict.fromkeys(choice.node for choice in candidates))
    generator = torch.Generator().manual_seed(0)
    for probe in range(PROBES):
        signs = [torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1 for y, _ in targets]
        scaled = [sign / _norm(exact) for sign, (_, exact) in zip(signs, targets, strict=True)]
        gradients = torch.autograd.grad(
            [y for y, _ in targets],
            [run.kept[name] for name in names],
            scaled,
            retain_graph=probe < PROBES - 1,
            allow_unused=True,
        )
        by_name = dict(zip(names, gradients, strict=True))
        for key, difference in differences.items():
            gradient = by_name[key[0]]
            if gradient is not None and math.isfinite(squares[key]):
                change = float((gradient.double() * difference.double()).sum())
                squares[key] += change * change / PROBES if math.isfinite(change) else math.inf
    return squares


def _differences(
    graph: fx.GraphModule, candidates: Sequence[Choice], run: _Recording, reduce: Reduce
) -> dict[Any, torch.Tensor]:
    """What each candidate alone changes in its own result, on the operands it had."""
    found: dict[Any, torch.Tensor] = {}
    with torch.no_grad():
        for choice in candidates:
            single, operands = _alone(graph, run.nodes[choice.node], run)
            before = single(*operands)
            reduce(single, [choice])
            found[choice.node, choice.form] = (single(*operands) - before).detach()
    return found


def _alone(graph: fx.GraphModule, node: fx.Node, run: _Recording) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A graph of that one node, whose computed operands are its inputs; constants stay constants."""
    made, root = fx.Graph(), torch.nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    operands = []
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            name = str(operand.target)
            root.register_buffer(name, getattr(graph, name))
            values[operand] = made.get_attr(name)
        else:
            values[operand] = made.placeholder(operand.name)
            operands.append(run.operands[operand].detach())
        values[operand].meta["val"] = operand.meta["val"]
    copied = made.node_copy(node, lambda n: values[n])
    made.output(copied)
    assert copied.name == node.name, (copied.name, node.name)
    return fx.GraphModule(root, made), operands


class _Recording(fx.Interpreter):
    """Runs a graph under autograd; the results of the nodes `wanted` are leaves of what follows.

    `kept` holds those results, `operands` what they read. Fused operators run as their bodies, which have derivatives.
    """

    def __init__(self, graph: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(graph)
        self.nodes = {n.name: n for n in graph.graph.nodes if n.name in wanted}
        self.wanted_operands = {o for n in self.nodes.values() for o in n.all_input_nodes if o.op != "get_attr"}
        self.kept: dict[str, torch.Tensor] = {}
        self.operands: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            self.kept[n.name] = value
        if n in self.wanted_operands:
            self.operands[n] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        from ..passes.dialect import BODIES

        return super().call_function(BODIES.get(target, target), args, kwargs)


def _grouped(
    graph: fx.GraphModule,
    candidates: Sequence[Choice],
    inputs: Sequence[torch.Tensor],
    expected: compare.Reference,
    reduce: Reduce,
) -> Errors:
    squares: Errors = {}
    for form in dict.fromkeys(choice.form for choice in candidates):
        members = [choice for choice in candidates if choice.form == form]
        size = -(-len(members) // GROUPS)
        for first in range(0, len(members), size):
            group = members[first : first + size]
            together = copy_graph(graph)
            reduce(together, group)
            error = error_of(run_eager(together, inputs), expected)
            squares |= {(choice.node, choice.form): error**2 / len(group) for choice in group}
    return squares


def error_of(results: Sequence[torch.Tensor], expected: compare.Reference) -> float:
    """The largest relative L2 error of the floating point outputs against float64."""
    errors = [
        relative_l2(result, exact)
        for result, exact in zip(results, expected.exact, strict=True)
        if result.is_floating_point() and result.numel()
    ]
    return max(errors, default=0.0)


def _norm(exact: torch.Tensor) -> float:
    finite = exact[exact.isfinite()]
    return max(float(torch.linalg.vector_norm(finite)), 1e-300) if finite.numel() else 1.0
