"""The same thing is computed once; what is only nearly the same is not merged."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.merge_duplicates import merge_duplicates

aten = torch.ops.aten


def test_equal_calls_are_one():
    def before(x):
        return torch.cat([x.sin(), x.cos()]) + torch.cat([x.sin(), x.cos()])

    def after(x):
        y = torch.cat([x.sin(), x.cos()])
        return y + y

    assert_rewrite(before, after, [torch.randn(3)], merge_duplicates, 3)


def test_results_of_one_split_are_one():
    def before(x):
        return torch.split(x, 2)[0] + torch.split(x, 2)[0]

    assert_rewrite(before, None, [torch.randn(4)], merge_duplicates, 2)


class Constants(torch.nn.Module):
    def __init__(self, *tensors):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"c{i}", tensor)

    def forward(self, x):
        for tensor in self.buffers():
            x = x * tensor
        return x


def test_equal_constants_are_one():
    graph = trace(Constants(torch.ones(300), torch.ones(300)), [torch.randn(300)])
    assert merge_duplicates(graph, HW) == 1
    assert [n.op for n in graph.graph.nodes].count("get_attr") == 1


def test_views_of_one_storage_are_one_only_where_they_are_equal():
    base = torch.arange(8.0)
    graph = trace(Constants(base[:4], base[4:], base[:4]), [torch.randn(4)])
    assert merge_duplicates(graph, HW) == 1


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(300), -torch.zeros(300)),
        (torch.ones(300), torch.ones(300, dtype=torch.float64)),
        (torch.ones(300, 1), torch.ones(300)),
        (torch.arange(300.0), torch.arange(300.0).index_fill(0, torch.tensor(77), 0.5)),  # not among the sample
    ],
)
def test_unequal_constants_stay(pair):
    assert merge_duplicates(trace(Constants(*pair), [torch.randn(300, 300)]), HW) == 0


def test_equal_constants_with_nans_are_one():
    tensors = [torch.tensor([torch.nan, 1.0]) for _ in range(2)]
    assert merge_duplicates(trace(Constants(*tensors), [torch.randn(2)]), HW) == 1


def test_random_numbers_are_drawn_twice():
    assert_kept_random(lambda x: torch.rand(3) + torch.rand(3) + x)
    assert_kept_random(lambda x: aten.dropout(x, 0.5, True) + aten.dropout(x, 0.5, True))


def assert_kept_random(model):
    graph = trace_core(model, [torch.randn(3)])
    merge_duplicates(graph, HW)
    random = [n for n in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert len(random) == 2


@pytest.mark.parametrize(
    "model",
    [
        lambda x: aten.mul(x, 1) + aten.mul(x, 1.0),
        lambda x: aten.add(x, 0.0) * aten.add(x, -0.0),
        lambda x: aten.add(x, x) + aten.add(x, x, alpha=2),
        lambda x: aten.sum(x, [0]) + aten.sum(x, [1]),
        lambda x: aten.full([2], 1) * aten.full([2], 1.0) * x[0],
        lambda x: aten.full([2], True) * aten.full([2], 1) * x[0],
    ],
)
def test_arguments_that_are_not_alike(model):
    graph = trace_core(model, [torch.randn(2, 2)])
    before = copy_graph(graph)
    assert merge_duplicates(graph, HW) == 0
    assert_same_numbers(before, graph, [torch.randn(2, 2)])


def test_two_returned_values_stay_two(caplog):
    """The caller may change one of them."""
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(lambda x: (x.sin(), x.sin()), [torch.randn(2)], merge_duplicates)
    assert "the graph returns both" in caplog.text


def test_views_of_two_values_stay_views_of_two():
    assert_kept(lambda x: (x.sin().view(2, 3), x.sin().view(3, 2)), [torch.randn(6)], merge_duplicates)


def test_views_of_one_value_are_merged():
    assert_rewrite(
        lambda x: x.view(2, 3).sin() + x.view(2, 3).cos(),
        lambda x: (y := x.reshape(2, 3)).sin() + y.cos(),
        [torch.randn(6)],
        merge_duplicates,
    )


@pytest.mark.parametrize(
    "function",
    [
        *(torch.add, torch.mul, torch.eq, torch.ne),
        *(aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.logical_and, aten.logical_or, aten.logical_xor),
        *(torch.maximum, torch.minimum),
    ],
)
def test_operands_in_either_order(function):
    def model(x, y):
        return function(x, y) * 1, function(y, x) * 2

    graph = trace_core(model, [torch.tensor([3, -1, 0]), torch.tensor([5, -1, 2])])
    assert merge_duplicates(graph, HW) == 1


@pytest.mark.parametrize(
    "function",
    [torch.sub, torch.div, torch.lt, torch.maximum, torch.minimum, lambda a, b: torch.add(a, b, alpha=2)],
)
def test_operands_whose_order_matters(function):
    x = torch.tensor([0.0, -0.0, 1.0])
    graph = trace_core(lambda x, y: (function(x, y) * 1, function(y, x) * 2), [x, x.flip(0)])
    assert merge_duplicates(graph, HW) == 0


def test_defaults_may_be_spelt_out():
    graph = trace_core(
        lambda x: aten.sum.dim_IntList(x, [0]) + aten.sum.dim_IntList(x, [0], False), [torch.randn(2, 3)]
    )
    assert merge_duplicates(graph, HW) == 1


UNARY = [torch.sin, torch.cos, torch.neg, lambda x: x + 1, lambda x: x + 1.0]
BINARY = [torch.add, torch.mul, lambda a, b: torch.cat([a, b])[:3], lambda a, b: torch.add(a, b, alpha=2)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_any_graph_keeps_its_bits(steps):
    def model(x):
        values = [x]
        for kind, a, b in steps:
            a, b = values[a % len(values)], values[b % len(values)]
            values.append(UNARY[kind](a) if kind < len(UNARY) else BINARY[kind - len(UNARY)](a, b))
        return sum(values)

    x = torch.tensor([0.5, -0.0, -3.0])
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    merge_duplicates(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    calls = [(n.target, str(n.args), str(n.kwargs)) for n in graph.graph.nodes if n.op == "call_function"]
    assert len(set(calls)) == len(calls)
    assert merge_duplicates(graph, HW) == 0
