"""Which products of 8 bits go back to float32 for an error budget: those whose errors cost the most for the time.

    float32 -> bytes -> bytes -> float32         a product between two others of 8 bits saves a rounding of its input;
            ^ rounded         ^ widened          one that goes back alone breaks the chain, and adds both

Seconds are those of int8_forms.py. A value that several products read, or one computes, is rounded once for all that
read it in 8 bits, by a kernel of its own unless a product in 8 bits makes it; the others' roundings are in their own
seconds. The least predicted seconds within the budget are a minimum cut (precision_cut.py), or found by taking one
product back after the other, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from math import prod

from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work, predict_seconds
from ...passes.assign_precision import Choice
from ...passes.hoist_quantise import moved
from ...passes.precision.cut import Cost, Labels, Problem, Value, within
from ...passes.precision.int8_forms import ENTRY_SECONDS, Int8Form
from ...passes.rewrite import arguments, shape_of

_WIDE, _BYTES = "float32", "int8"
_ELSEWHERE = "elsewhere"


def source_of(value: fx.Node) -> fx.Node:
    """What computes a value, behind moves of one operand."""
    while len(operands := moved(value)) == 1:
        value = operands[0]
    return value


def shared_inputs(products: Collection[fx.Node]) -> set[fx.Node]:
    """The inputs whose rounding costs nothing: several products read them, or one computes them."""
    among, readers = set(products), dict[fx.Node, int]()
    for node in products:
        value = arguments(node)["input"]
        readers[value] = readers.get(value, 0) + 1
    return {value for value, count in readers.items() if count > 1 or source_of(value) in among}


def budget_problem(
    graph: fx.GraphModule,
    hw: Hardware,
    choices: Collection[Choice],
    forms: Mapping[str, Int8Form],
    tables: Mapping[str, float],
    errors: Mapping[str, float],
) -> Problem:
    """The products of `choices` by their seconds in both forms and the errors of 8 bits, and the values between them.

    `tables`: what the bytes of an embedding count for, in seconds. Nodes are names.
    """
    problem = Problem({_WIDE: _WIDE, _BYTES: _BYTES, "narrow weights": _WIDE})
    problem.nodes[_ELSEWHERE] = {_WIDE: Cost(0.0)}
    nodes = {n.name: n for n in graph.graph.nodes}
    rounding = []  # products that read bytes
    for choice in choices:
        form, name = forms.get(choice.node), choice.node
        wide, narrow = (tables[name], 0.0) if form is None else (form.float32_seconds, form.seconds)
        label = _BYTES if choice.form == "int8" else "narrow weights"
        problem.nodes[name] = {_WIDE: Cost(wide), label: Cost(narrow, errors[name])}
        if label == _BYTES:
            rounding.append(nodes[name])
    for value in sorted(shared_inputs(rounding), key=lambda v: v.name):
        made = source_of(value).name
        readers = tuple(n.name for n in rounding if arguments(n)["input"] is value)
        others = [user for user in value.users if user.name not in readers and not moved(user)]
        elements = float(prod(shape_of(value)))
        seconds = ENTRY_SECONDS + (predict_seconds(hw, Work({}, 4.0 * elements, elements, launches=0)) or 0.0)
        producer = made if made in problem.nodes else _ELSEWHERE
        # Sums and norms read float32 in any case; a convolution takes its residual in bytes.
        outside = (_ELSEWHERE,) if any(user.name not in problem.nodes for user in others) else ()
        problem.values.append(Value(producer, (*readers, *outside), seconds))
    return problem


def over_budget(problem: Problem, budget: float) -> set[str]:
    """The products that go back to float32, so that the errors of the others together are at most `budget`."""
    labels = min(within(problem, budget), _one_by_one(problem, budget), key=problem.seconds)
    return {str(node) for node, label in labels.items() if label == _WIDE and len(problem.nodes[node]) > 1}


def _one_by_one(problem: Problem, budget: float) -> Labels:
    """From all in 8 bits, the most squared error for a second lost first: a price would take equals all at once."""
    labels = {n: next((label for label in costs if label != _WIDE), _WIDE) for n, costs in problem.nodes.items()}
    around: dict[Hashable, list[Value]] = {node: [] for node in problem.nodes}
    for value in problem.values:
        for node in {value.producer, *value.readers}:
            around[node].append(value)

    def price(node: Hashable) -> float:
        costs, back = problem.nodes[node], {**labels, node: _WIDE}
        lost = costs[_WIDE].seconds - costs[labels[node]].seconds
        lost += sum(v.seconds * (problem.casts(v, back) - problem.casts(v, labels)) for v in around[node])
        return costs[labels[node]].error ** 2 / max(lost, 1e-12)

    prices = {node: price(node) for node, label in labels.items() if label != _WIDE}
    while prices and problem.error(labels) > budget:
        node = max(prices, key=lambda n: prices[n])
        labels[node] = _WIDE
        del prices[node]
        near = {n for v in around[node] for n in (v.producer, *v.readers)}
        prices |= {n: price(n) for n in near if n in prices}
    return labels
