"""The layout of every value of a graph at the least predicted cost, found as a minimum cut.

    source -- seconds in NCHW --> node -- seconds in NHWC --> sink          nodes on the source's side are in NHWC
    producer -- seconds of a permute --> (to NCHW) -- infinite --> readers
    readers -- infinite --> (to NHWC) -- seconds of a permute --> producer

A cut pays for every node in the layout of its side, and for one permute of a value however many readers it has in the
other layout: two auxiliary nodes a value say "some reader". It is the least of all assignments (max-flow min-cut, Ford
and Fulkerson, 1956), whose number is 2^nodes. Ties go to NHWC.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field

import networkx

_UNIT = 1e-13  # seconds; capacities are integers of it, because a flow of floats may not terminate


@dataclass(frozen=True)
class Value:
    """What one node computes, the nodes that read it, and the seconds of permuting it to the other layout."""

    producer: Hashable
    readers: tuple[Hashable, ...]
    seconds: float


@dataclass
class Problem:
    """Nodes with their seconds in (NCHW, NHWC), infinite where a layout is impossible, and the values between them."""

    nodes: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    together: list[tuple[Hashable, Hashable]] = field(default_factory=list)  # pairs that must have one layout

    def seconds(self, nhwc: Set[Hashable]) -> float:
        """Predicted seconds with the nodes of `nhwc` in NHWC and the others in NCHW."""
        total = sum(self.nodes[node][node in nhwc] for node in self.nodes)
        for value in self.values:
            if any((reader in nhwc) != (value.producer in nhwc) for reader in value.readers):
                total += value.seconds
        if any((a in nhwc) != (b in nhwc) for a, b in self.together):
            return math.inf
        return total


@dataclass(frozen=True)
class Assignment:
    """The layouts chosen, and the predicted seconds against those of one layout wherever it is possible."""

    nhwc: tuple[str, ...]
    nchw: tuple[str, ...]
    seconds: float
    all_nchw_seconds: float
    all_nhwc_seconds: float

    def text(self) -> str:
        """The assignment for reading."""
        times = (self.seconds, self.all_nchw_seconds, self.all_nhwc_seconds)
        chosen, nchw, nhwc = (f"{t * 1e6:.1f} us" for t in times)
        return "\n".join(
            [
                f"layouts: predicted {chosen} as chosen, {nchw} all in NCHW, {nhwc} all in NHWC",
                f"  NHWC: {', '.join(self.nhwc) or 'none'}",
                f"  NCHW: {', '.join(self.nchw) or 'none'}",
            ]
        )


def minimum_cut(problem: Problem) -> frozenset[Hashable]:
    """The nodes to have in NHWC."""
    flow = networkx.DiGraph()
    source, sink = ("layout", "NHWC"), ("layout", "NCHW")
    flow.add_nodes_from((source, sink))
    for node, (nchw, nhwc) in problem.nodes.items():
        _edge(flow, source, node, nchw)
        _edge(flow, node, sink, nhwc)
    for number, value in enumerate(problem.values):
        to_nchw, to_nhwc = ("to NCHW", number), ("to NHWC", number)
        _edge(flow, value.producer, to_nchw, value.seconds)
        _edge(flow, to_nhwc, value.producer, value.seconds)
        for reader in value.readers:
            _edge(flow, to_nchw, reader, math.inf)
            _edge(flow, reader, to_nhwc, math.inf)
    for a, b in problem.together:
        _edge(flow, a, b, math.inf)
        _edge(flow, b, a, math.inf)
    _, (nhwc_side, _) = networkx.minimum_cut(flow, source, sink)
    return frozenset(problem.nodes.keys() & nhwc_side)


def _edge(flow: networkx.DiGraph, start: Hashable, end: Hashable, seconds: float) -> None:
    if math.isinf(seconds):  # networkx takes an edge without a capacity as infinite
        flow.add_edge(start, end)
    elif seconds > 0:
        flow.add_edge(start, end, capacity=round(seconds / _UNIT))


def assignment(problem: Problem, nhwc: Set[Hashable], shown: Sequence[Hashable]) -> Assignment:
    """The chosen layouts of the nodes `shown`, and what the alternatives would have cost."""
    possible = {node for node, (_, seconds) in problem.nodes.items() if not math.isinf(seconds)}
    needed = {node for node, (seconds, _) in problem.nodes.items() if math.isinf(seconds)}
    return Assignment(
        tuple(str(node) for node in shown if node in nhwc),
        tuple(str(node) for node in shown if node not in nhwc),
        problem.seconds(nhwc),
        problem.seconds(needed),
        problem.seconds(possible),
    )
