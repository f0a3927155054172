"""Partition: parts are convex, run in order, and whatever is mixed gives the graph's own numbers."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import graphwright
from graphwright.backends.lowering.graph import LoweringError
from graphwright.compiler.partition import partition
from graphwright.compiler.plan import OperatorCall, RegionCall, decode, from_json, make_plan, resolve, to_json

aten = torch.ops.aten


def chain(edges: list[tuple[int, int]]) -> fx.GraphModule:
    """A graph whose node i adds the two earlier values edges[i] names (0 and 1 are the inputs)."""
    graph = fx.Graph()
    nodes = [graph.placeholder("a"), graph.placeholder("b")]
    for left, right in edges:
        nodes.append(graph.call_function(aten.add.Tensor, (nodes[left], nodes[right])))
    graph.output((nodes[-1],))
    for node in nodes:
        node.meta["val"] = torch.zeros(2)
    return fx.GraphModule(torch.nn.Module(), graph)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[fx.GraphModule, set[str]]:
    count = draw(st.integers(1, 12))
    edges = [(draw(st.integers(0, i + 1)), draw(st.integers(0, i + 1))) for i in range(count)]
    graph = chain(edges)
    calls = [n.name for n in graph.graph.nodes if n.op == "call_function"]
    return graph, set(draw(st.lists(st.sampled_from(calls), unique=True)))


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_every_node_once_and_inputs_before_use(case: tuple[fx.GraphModule, set[str]]) -> None:
    graph, refused = case
    parts = partition(graph, lambda n: "refused" if n.name in refused else None)
    assert {n.name for n in parts.reasons} == refused
    known = {n for n in graph.graph.nodes if n.op == "placeholder"}
    for part in parts.parts:
        assert set(part.inputs) <= known
        assert all((n.name not in refused) == part.compiled for n in part.nodes)
        known |= set(part.nodes)
    assert sum(len(p.nodes) for p in parts.parts) == sum(n.op == "call_function" for n in graph.graph.nodes)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_a_plan_read_back_from_json_runs_like_the_graph(case: tuple[fx.GraphModule, set[str]]) -> None:
    graph, refused = case
    parts = partition(graph, lambda n: "refused" if n.name in refused else None).parts
    plan, _ = make_plan(graph, parts)
    plan = from_json(to_json(plan))
    compiled = iter([p for p in parts if p.compiled])
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    slots: list[object] = [None] * plan.slots
    slots[:2] = [a, b]
    for call in plan.calls:
        if isinstance(call, OperatorCall):
            slots[call.output] = resolve(call.operator)(*decode(call.args, slots), **decode(call.kwargs, slots))
            continue
        assert isinstance(call, RegionCall)
        part = next(compiled)
        values = dict(zip(part.inputs, (slots[i] for i in call.inputs), strict=True))
        for node in part.nodes:
            values[node] = node.target(*[values[x] for x in node.args])
        for node, slot in zip(part.outputs, call.outputs, strict=True):
            slots[slot] = values[node]
    expected = fx.Interpreter(graph).run(a, b)
    assert torch.equal(slots[plan.outputs[0]], expected[0])  # type: ignore[arg-type]


def test_results_of_a_multi_output_operator_stay_with_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    split = graph.call_function(aten.split_with_sizes.default, (x, [1, 1]))
    first = graph.call_function(operator.getitem, (split, 0))
    graph.output((graph.call_function(aten.neg.default, (first,)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    parts = partition(module, lambda n: "no" if n.target is aten.split_with_sizes.default else None).parts
    assert [p.compiled for p in parts] == [True, False, True][3 - len(parts) :]
    assert {n.name for n in parts[-2].nodes} == {split.name, first.name}


def test_lowering_that_fails_for_a_constant_leaves_the_model_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant is no operator that PyTorch could take over: to try again without it would be to try for ever."""

    def fail(region: Any, graph: fx.GraphModule, hw: Any) -> Any:
        node = next(n for n in graph.graph.nodes if n.op == "get_attr")
        raise LoweringError(node, KeyError(node.name)) from KeyError(node.name)

    monkeypatch.setattr("graphwright.backends.lowering.graph.lower", fail)
    net, x = torch.nn.Linear(3, 3).eval(), torch.randn(2, 3)
    compiled = graphwright.compile(net, (x,), cache=False)
    torch.testing.assert_close(compiled(x), net(x).detach())
    assert {row.reason[:44] for row in compiled.report().eager} == {"code generation failed: lowering fails again"}


def test_an_operator_that_writes_to_its_arguments_is_reported_by_its_own_name() -> None:
    @torch.library.custom_op("graphwright_tests::add_one", mutates_args=("x",))
    def add_one(x: torch.Tensor) -> None:
        x.add_(1)

    def model(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        add_one(y)
        return y + 1

    (row,) = graphwright.compile(model, torch.randn(4), cache=False).report().eager
    assert (row.operator, row.reason) == ("graphwright_tests.add_one.default", "no lowering")
