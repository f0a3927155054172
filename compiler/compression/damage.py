"""What 8 bits do to each product: its signal to quantisation noise ratio on the operands that it has in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..reference import Keeping

if TYPE_CHECKING:
    from .int8_plan import Int8Plan


def with_damage(graph: fx.GraphModule, plan: Int8Plan, inputs: Sequence[Sequence[torch.Tensor]]) -> Int8Plan:
    """The plan with the SQNR of every product in 8 bits."""
    chosen = [n for n in graph.graph.nodes if n.name in plan.chosen]
    signal, noise = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0.0)
    alone = {n: _alone(graph, n, plan) for n in chosen}
    for tensors in inputs:
        runner = _Comparing(graph, alone)
        with torch.no_grad():
            runner.run(*tensors)
        for node, (strength, error) in runner.found.items():
            signal[node] += strength
            noise[node] += error
    ratios = {n.name: _decibels(signal[n], noise[n]) for n in chosen}
    return replace(plan, choices=tuple(replace(c, sqnr_db=ratios.get(c.node)) for c in plan.choices))


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0.0:
        return math.inf if signal > 0.0 else None  # zeros that stay zeros say nothing
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _alone(graph: fx.GraphModule, node: fx.Node, plan: Int8Plan) -> fx.GraphModule:
    """A graph of the one product in 8 bits; inputs are its computed operands in their order."""
    made, root = fx.Graph(), torch.nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            root.register_buffer(str(operand.target), getattr(graph, str(operand.target)))
            values[operand] = made.get_attr(str(operand.target))
        else:
            values[operand] = made.placeholder(operand.name)
        values[operand].meta["val"] = operand.meta["val"]
    made.output(made.node_copy(node, lambda n: values[n]))
    single = fx.GraphModule(root, made)
    plan.quantise(single, {node.name})
    return single


class _Comparing(Keeping):
    """Runs a graph in float32 and computes every product in 8 bits beside it, on the same operands."""

    def __init__(self, graph: fx.GraphModule, alone: Mapping[fx.Node, fx.GraphModule]) -> None:
        super().__init__(graph)
        self.alone = alone
        self.found: dict[fx.Node, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.alone:
            operands = [self.env[operand] for operand in n.all_input_nodes if operand.op != "get_attr"]
            difference = self.alone[n](*operands).double() - value.double()
            self.found[n] = (float((value.double() ** 2).sum()), float((difference**2).sum()))
        return value
