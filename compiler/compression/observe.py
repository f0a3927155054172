"""What the values of a graph look like on the calibration inputs: two runs in PyTorch, extremes first, then histograms.

Values that moves link (a permute, a cat, max pooling: passes/hoist_quantise.py) are looked at as one, so that they get
one scale, and rounding can happen in front of the move.

One value, again and again, says nothing of a range: not of itself, and not of what is computed from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx

from ...passes.hoist_quantise import moved
from ...passes.rewrite import value_of
from .ranges import BINS, OUTLIER, Seen

ONLY = "calibration saw only the value"
NOT_FINITE = "calibration saw infinities or NaN"


@dataclass
class _Group:
    """Values that share a scale."""

    low: float = math.inf
    high: float = -math.inf
    finite: bool = True
    sum: float = 0.0  # of |x|
    filled: int = 0  # how many are not 0
    counts: Any = field(default_factory=lambda: np.zeros(BINS))

    @property
    def reach(self) -> float:
        """What the histogram covers: all, but for values beyond OUTLIER times the mean of those that are not 0."""
        return min(max(-self.low, self.high, 0.0), OUTLIER * self.sum / max(self.filled, 1))


@dataclass(frozen=True)
class Observed:
    """By node name: what was seen of a value, the mean of each channel (last dim), why nothing is known of others.

    Means of few rows are nearer to 0 than what was seen, as far as they are uncertain (`certain_means`): 0 for one row.
    """

    seen: Mapping[str, Seen]
    means: Mapping[str, torch.Tensor]
    unknown: Mapping[str, str]


def observe(graph: fx.GraphModule, samples: Sequence[Sequence[torch.Tensor]], wanted: Collection[fx.Node]) -> Observed:
    """Run `graph` on every sample and look at the `wanted` values."""
    home = _linked(graph, wanted)
    groups: dict[fx.Node, _Group] = {}

    def extremes(node: fx.Node, value: torch.Tensor) -> None:
        group = groups.setdefault(home[node], _Group())
        if not value.numel():
            return
        low, high = (float(v) for v in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high)):
            group.finite = False
        group.low, group.high = min(group.low, low), max(group.high, high)
        group.sum += float(value.abs().sum(dtype=torch.float64))
        group.filled += int(value.count_nonzero())

    sums: dict[fx.Node, torch.Tensor] = {}
    squares: dict[fx.Node, torch.Tensor] = {}
    rows: dict[fx.Node, int] = {}

    def histogram(node: fx.Node, value: torch.Tensor) -> None:
        group = groups[home[node]]
        if not value.numel() or not group.finite:
            return
        if group.reach > 0.0:
            # Outliers are in the last bin. As shares of the reach: BINS times a large value is beyond float32.
            counted = (value.float().abs() / group.reach).clamp(max=1.0)
            group.counts += torch.histc(counted, BINS, 0.0, 1.0).double().numpy()
        if value.dim():
            lines = value.reshape(-1, value.shape[-1])
            sums[node] = sums.get(node, 0) + lines.double().sum(0)
            squares[node] = squares.get(node, 0) + lines.double().square().sum(0)
            rows[node] = rows.get(node, 0) + lines.shape[0]

    for look in (extremes, histogram):
        runner = Looking(graph, set(wanted), look)
        with torch.no_grad():
            for tensors in samples:
                runner.run(*tensors)
    repeated = _repeated(graph, samples)
    seen, unknown = {}, {}
    for node in wanted:
        group = groups.get(home[node])
        if group is not None and not group.finite:
            unknown[node.name] = f"{NOT_FINITE} in {node.name}"
        elif group is None or group.low > group.high:
            unknown[node.name] = f"calibration saw no element of {node.name}"
        elif group.low == group.high:
            unknown[node.name] = f"{ONLY} {group.low + 0.0:.3g} in {node.name}"  # + 0.0: no "-0"
        elif node in repeated:
            unknown[node.name] = f"{ONLY} {repeated[node]}, all that {node.name} is computed from"
        else:
            seen[node.name] = Seen(group.low, group.high, group.counts, group.reach)
    means = {n.name: certain_means(total, squares[n], rows[n]) for n, total in sums.items() if n.name in seen}
    return Observed(seen, means, unknown)


def certain_means(total: torch.Tensor, squares: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean of each channel, times what is left of its square without the variance of a mean of so many rows.

    A positive-part James-Stein estimate (Efron and Morris, 1973), a channel at a time: what calibration saw by chance
    would else be taken off every bias.
    """
    mean = total / rows
    if rows < 2:
        return torch.zeros_like(mean)
    variance = (squares - rows * mean.square()).clamp_min(0.0) / (rows - 1)
    return mean * (1.0 - variance / rows / mean.square().clamp_min(1e-300)).clamp_min(0.0)


def _repeated(graph: fx.GraphModule, samples: Sequence[Sequence[torch.Tensor]]) -> dict[fx.Node, str]:
    """The values that depend on inputs of one repeated value and on no other inputs: that value, and where."""
    found: dict[fx.Node, str] = {}
    varying: set[fx.Node] = set()
    place = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            given = [tensors[place].flatten() for tensors in samples if tensors[place].numel()]
            place += 1
            if given and all(bool((tensor == given[0][0]).all()) for tensor in given):
                found[node] = f"{given[0][0].item() + 0.0:.3g} in {node.name}"
            else:
                varying.add(node)
        elif not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
        else:
            found.update((node, found[operand]) for operand in node.all_input_nodes[::-1] if operand in found)
    return found


def _linked(graph: fx.GraphModule, wanted: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For every wanted value the one that stands for all it is linked with."""
    links = nx.Graph()
    links.add_nodes_from(wanted)
    for node in graph.graph.nodes:
        for operand in moved(node):
            value = value_of(operand)
            if value is not None and value.dtype == torch.float32:
                links.add_edge(node, operand)
    return {node: min(part, key=lambda n: n.name) for part in nx.connected_components(links) for node in part}


class Looking(fx.Interpreter):
    """Runs a graph and shows the wanted values."""

    def __init__(
        self, graph: fx.GraphModule, wanted: set[fx.Node], look: Callable[[fx.Node, torch.Tensor], None]
    ) -> None:
        super().__init__(graph)
        self.wanted, self.look = wanted, look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.look(n, value)
        return value
