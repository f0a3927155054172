"""The precision of every operator of a graph at the least predicted cost under an error budget.

    seconds(f) = sum over operators of s_i(f_i) + sum over values of c_v * |formats of its readers but its producer's|
    error(f)^2 = sum over operators of e_i(f_i)^2                                   each rounds independently of others

f gives every operator a precision, s_i(f_i) are its seconds there, and e_i(f_i) is the error at the outputs that it
alone causes. A precision stores its results in a format; a value is cast once for every further format its readers
want, which costs c_v whichever the two formats are. Wanted: the least seconds with error(f) <= budget.

The budget is relaxed to a price (Lagrange multiplier): minimise seconds(f) + price * error(f)^2, and bisect the price.
At one price the least of all f is a minimum cut. An expansion lets every operator keep its precision or take precision
a, of format F:

    source -- cost of keeping f_i --> i -- cost of a --> sink                     operators on the source's side take a
    reader -- infinite --> (any moved) -- c_v --> producer                        pays where F is read and not produced
    producer -- c_v --> (any stays) -- infinite --> readers of its old format     pays where that is read, not made
    source -- c_v --> (any stays) -- infinite --> readers of another format       pays while one of them stays

    two precisions    one expansion from "all have the first" reaches every f: exact (Ford and Fulkerson, 1956)
    more              expansions in turn until none helps (Boykov, Veksler and Zabih, 2001): within 2 * (formats - 1) of
                      the least. They prove 2 for pairs; here a value with several readers may pay formats - 1 casts.

What the price cannot reach, because it buys equal operators all at once, `within` fills up one operator at a time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import networkx

_STEPS = 40  # bisections of the price
_TIE = 1e-4  # of the largest seconds, for a relative error of 1: decides between equally fast precisions
_RESOLUTION = 1 << 44  # capacities are integers, because a flow of floats may not terminate

Labels = dict[Hashable, str]


@dataclass(frozen=True)
class Cost:
    """Seconds of an operator in one precision, and the error at the outputs that this alone causes."""

    seconds: float
    error: float = 0.0


@dataclass(frozen=True)
class Value:
    """What one operator computes, the operators that read it, and the seconds of casting it."""

    producer: Hashable
    readers: tuple[Hashable, ...]
    seconds: float


@dataclass
class Problem:
    """Operators with their costs by precision (absent: impossible), the first precision being possible everywhere."""

    stored: Mapping[str, str]  # precision -> format of its results, the first precision first
    nodes: dict[Hashable, Mapping[str, Cost]] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The precision every operator can have."""
        return next(iter(self.stored))

    def seconds(self, labels: Mapping[Hashable, str]) -> float:
        """Predicted seconds, casts included."""
        total = math.fsum(costs[labels[node]].seconds for node, costs in self.nodes.items())
        return total + math.fsum(self.casts(value, labels) * value.seconds for value in self.values)

    def error(self, labels: Mapping[Hashable, str]) -> float:
        """Predicted error at the outputs."""
        return math.sqrt(math.fsum(costs[labels[node]].error ** 2 for node, costs in self.nodes.items()))

    def casts(self, value: Value, labels: Mapping[Hashable, str]) -> int:
        """How often `value` is cast."""
        formats = {self.stored[labels[reader]] for reader in value.readers}
        return len(formats - {self.stored[labels[value.producer]]})


def within(problem: Problem, budget: float) -> Labels:
    """The fastest assignment found whose predicted error is at most `budget` (0 leaves what costs no error)."""
    fastest = cheapest(problem, 0.0)
    if problem.error(fastest) <= budget:
        return fastest
    largest = max(c.error for costs in problem.nodes.values() for c in costs.values() if math.isfinite(c.error))
    whole = math.fsum(max(c.seconds for c in costs.values()) for costs in problem.nodes.values())
    low, high = 0.0, max(whole, 1e-12) / max(largest, 1e-30) ** 2
    best: Labels = dict.fromkeys(problem.nodes, problem.first)
    for _ in range(_STEPS):
        labels = cheapest(problem, high)
        if problem.error(labels) <= budget:
            best = labels
            break
        low, high = high, high * 64.0
    for _ in range(_STEPS):
        price = math.sqrt(low * high) if low else high / 64.0
        if high <= low * 1.01 or price < 1e-300:
            break
        labels = cheapest(problem, price)
        if problem.error(labels) <= budget:
            best, high = labels, price
        else:
            low = price
    return _filled(problem, best, budget)


def cheapest(problem: Problem, price: float) -> Labels:
    """The assignment of least seconds + price * error^2; among equally fast ones, that with less error."""
    rest = _Priced(problem, price)
    labels = {node: rest.decided.get(node, problem.first) for node in problem.nodes}
    if len(rest.decided) == len(problem.nodes):
        return labels
    others = list(problem.stored)[1:]
    total = rest.total(labels)
    improved = True
    while improved:
        improved = False
        for label in others:
            moved = _expand(rest, labels, label)
            cost = rest.total(moved)
            if cost < total * (1 - 1e-12):
                labels, total, improved = moved, cost, len(others) > 1
    return labels


class _Priced:
    """A problem at one price: the cost of every operator and precision, and what needs no cut.

    An operator whose best precision is cheaper than any other by more than all casts around it has that one.
    """

    def __init__(self, problem: Problem, price: float) -> None:
        self.problem = problem
        largest = max((c.seconds for costs in problem.nodes.values() for c in costs.values()), default=0.0)
        hair = _TIE * largest
        self.costs = {
            node: {label: _priced(cost, price + hair) for label, cost in costs.items()}
            for node, costs in problem.nodes.items()
        }
        around: dict[Hashable, float] = dict.fromkeys(problem.nodes, 0.0)
        values = [value for value in problem.values if _may_be_cast(problem, value)]
        for value in values:
            for node in {value.producer, *value.readers}:
                around[node] += value.seconds
        self.decided: Labels = {}
        for node, costs in self.costs.items():
            ranked = sorted(costs, key=lambda label: costs[label])
            if len(ranked) == 1 or costs[ranked[0]] + around[node] < costs[ranked[1]]:
                self.decided[node] = ranked[0]
        open_nodes = self.costs.keys() - self.decided.keys()
        self.values = [v for v in values if v.producer in open_nodes or not open_nodes.isdisjoint(v.readers)]

    def total(self, labels: Mapping[Hashable, str]) -> float:
        """What is minimised, but for values between decided operators."""
        own = math.fsum(costs[labels[node]] for node, costs in self.costs.items())
        return own + math.fsum(self.problem.casts(value, labels) * value.seconds for value in self.values)

    def can_take(self, node: Hashable, label: str) -> bool:
        """Whether an expansion may give `label` to `node`."""
        return node not in self.decided and math.isfinite(self.costs[node].get(label, math.inf))


def _may_be_cast(problem: Problem, value: Value) -> bool:
    around = {value.producer, *value.readers}
    return len({problem.stored[label] for node in around for label in problem.nodes[node]}) > 1


def _priced(cost: Cost, price: float) -> float:
    return cost.seconds + (price * cost.error**2 if cost.error else 0.0)


def _expand(priced: _Priced, labels: Labels, label: str) -> Labels:
    """The best assignment in which every operator keeps its precision or takes `label`."""
    free = {n for n in priced.costs if priced.can_take(n, label) and labels[n] != label}
    if not free:
        return labels
    source, sink = ("precision", "takes"), ("precision", "keeps")
    edges: list[tuple[Hashable, Hashable, float]] = []
    for node in free:
        edges.append((source, node, priced.costs[node][labels[node]]))
        edges.append((node, sink, priced.costs[node][label]))
    for number, value in enumerate(priced.values):
        edges += _casts(priced.problem, value, number, labels, label, free, source, sink)
    flow = networkx.DiGraph()
    flow.add_nodes_from((source, sink))
    unit = max(c for _, _, c in edges if math.isfinite(c)) / _RESOLUTION or 1.0
    for start, end, cost in edges:
        if math.isinf(cost):  # networkx takes an edge without a capacity as infinite
            flow.add_edge(start, end)
        elif flow.has_edge(start, end):
            flow[start][end]["capacity"] += round(cost / unit)
        else:
            flow.add_edge(start, end, capacity=round(cost / unit))
    _, (taking, _) = networkx.minimum_cut(flow, source, sink)
    return {node: label if node in free and node in taking else old for node, old in labels.items()}


def _casts(
    problem: Problem,
    value: Value,
    number: int,
    labels: Labels,
    label: str,
    free: set[Hashable],
    source: Hashable,
    sink: Hashable,
) -> Iterator[tuple[Hashable, Hashable, float]]:
    """The edges that pay for casts of one value. An operator outside `free` is on the side of those that keep."""
    target = problem.stored[label]
    made = problem.stored[labels[value.producer]]
    producer = value.producer if value.producer in free else sink
    by_format: dict[str, list[Hashable]] = {}
    for reader in dict.fromkeys(value.readers):
        by_format.setdefault(problem.stored[labels[reader]], []).append(reader)
    for name, readers in by_format.items():
        if name == target:
            continue
        stays = any(reader not in free for reader in readers)
        if name != made:
            start: Hashable = source
        elif producer is sink:
            continue  # keeps making what these read
        else:
            start = producer
        if stays:
            if start is not source:
                yield start, sink, value.seconds
            continue
        some: Hashable = ("stays", number, name)
        yield start, some, value.seconds
        for reader in readers:
            yield some, reader, math.inf
    if made == target:
        return
    if target in by_format:
        if producer is not sink:
            yield source, producer, value.seconds
        return
    moving = [reader for readers in by_format.values() for reader in readers if reader in free]
    if moving:
        some = ("moved", number)
        yield some, producer, value.seconds
        for reader in moving:
            yield reader, some, math.inf


def _filled(problem: Problem, labels: Labels, budget: float) -> Labels:
    """`labels` after every single change that is faster and stays within the budget, the cheapest in error first."""
    touching: dict[Hashable, list[Value]] = {}
    for value in problem.values:
        for node in {value.producer, *value.readers}:
            touching.setdefault(node, []).append(value)
    labels = dict(labels)
    spent = problem.error(labels) ** 2

    def change(node: Hashable, label: str) -> tuple[float, float]:
        """Seconds and squared error that the change adds."""
        old, new = problem.nodes[node][labels[node]], problem.nodes[node][label]
        seconds = new.seconds - old.seconds
        changed = _Changed(labels, node, label)
        for value in touching.get(node, ()):
            seconds += value.seconds * (problem.casts(value, changed) - problem.casts(value, labels))
        return seconds, new.error**2 - old.error**2

    candidates = [(n, label) for n, costs in problem.nodes.items() for label in costs if label != labels[n]]
    rated = [(change(node, label), node, label) for node, label in candidates]
    faster = [(added / -seconds, i) for i, ((seconds, added), _, _) in enumerate(rated) if seconds < 0]
    for _, i in sorted(faster):
        _, node, label = rated[i]
        seconds, added = change(node, label)
        if seconds < 0 and spent + added <= budget**2:
            labels[node] = label
            spent += added
    return labels


class _Changed(Mapping[Hashable, str]):
    """A labelling with one operator changed, without a copy."""

    def __init__(self, labels: Mapping[Hashable, str], node: Hashable, label: str) -> None:
        self.labels, self.node, self.label = labels, node, label

    def __getitem__(self, node: Hashable) -> str:
        return self.label if node == self.node else self.labels[node]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)
