"""The minimum cut against every assignment of small graphs, and the costs it is made of."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, trace_core

from graphwright.passes import dialect
from graphwright.passes.assign_layout import assign_layout
from graphwright.passes.layout.costs import node_seconds, permute_seconds
from graphwright.passes.layout.cut import Problem, Value, assignment, minimum_cut

SECONDS = st.sampled_from([0.0, 1e-6, 2e-6, 5e-6, 1.7e-5])


@st.composite
def problems(draw):
    """Nodes in a random order of reading, some of them fixed, some pairs bound together."""
    count = draw(st.integers(1, 7))
    problem = Problem()
    for node in range(count):
        nchw, nhwc = draw(SECONDS), draw(SECONDS)
        fixed = draw(st.sampled_from([None, None, None, "NCHW", "NHWC"]))
        problem.nodes[node] = (nchw, math.inf) if fixed == "NCHW" else (math.inf, nhwc) if fixed else (nchw, nhwc)
    for node in range(count - 1):
        readers = draw(st.sets(st.integers(node + 1, count - 1)))
        if readers:
            problem.values.append(Value(node, tuple(readers), draw(SECONDS)))
    free = [n for n, seconds in problem.nodes.items() if math.inf not in seconds]
    if len(free) > 1 and draw(st.booleans()):
        problem.together.append((free[0], free[-1]))
    return problem


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_assignment_costs_less_than_the_cut(problem):
    nodes = list(problem.nodes)
    every = itertools.chain.from_iterable(itertools.combinations(nodes, k) for k in range(len(nodes) + 1))
    least = min(problem.seconds(frozenset(chosen)) for chosen in every)
    assert problem.seconds(minimum_cut(problem)) == pytest.approx(least, abs=1e-12)  # capacities are whole 1e-13


def test_one_permute_serves_all_readers_in_the_other_layout():
    problem = Problem({"x": (0.0, math.inf), "a": (3.0, 1.0), "b": (3.0, 1.0)}, [Value("x", ("a", "b"), 3.0)])
    problem.nodes = {k: (a * 1e-6, b * 1e-6) for k, (a, b) in problem.nodes.items()}
    problem.values = [Value("x", ("a", "b"), 3e-6)]
    assert minimum_cut(problem) == {"a", "b"}
    problem.values = [Value("x", ("a",), 3e-6), Value("x", ("b",), 3e-6)]
    assert minimum_cut(problem) == set()


def test_an_equal_price_goes_to_nhwc():
    problem = Problem({"c": (math.inf, 0.0), "relu": (1e-6, 1e-6), "y": (0.0, math.inf)})
    problem.values = [Value("c", ("relu",), 1e-6), Value("relu", ("y",), 1e-6)]
    assert minimum_cut(problem) == {"c", "relu"}
    found = assignment(problem, minimum_cut(problem), ["c", "relu"])
    assert (found.nhwc, found.nchw) == (("c", "relu"), ())
    assert found.seconds == found.all_nhwc_seconds == pytest.approx(2e-6)
    assert "predicted 2.0 us as chosen" in found.text()


def test_a_permute_that_moves_nothing_costs_nothing():
    assert permute_seconds((8, 64, 1, 1), 4, HW) == permute_seconds((8, 1, 7, 7), 4, HW) == 0.0
    assert permute_seconds((1, 64, 56, 56), 4, HW) > permute_seconds((1, 64, 28, 28), 4, HW) > 0.0


def conv(x, w):
    return torch.ops.graphwright.conv2d(x, w, None, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], "NCHW")


def test_a_convolution_is_dearer_in_nchw_and_a_sum_is_not():
    graph = trace_core(lambda x, w: conv(x, w) + 1.0, [torch.randn(1, 32, 28, 28), torch.randn(32, 32, 1, 1)])
    product, total = (n for n in graph.graph.nodes if n.op == "call_function")
    assert node_seconds(product, False, HW) > 5 * node_seconds(product, True, HW)
    assert node_seconds(total, False, HW) == node_seconds(total, True, HW) > 0


def test_where_permutes_cost_more_than_they_save_nothing_is_permuted():
    inputs = [torch.randn(1, 2, 256, 256), torch.randn(2, 2, 1, 1)]
    graph = trace_core(lambda x, w: torch.sin(conv(torch.cos(x), w)), inputs)
    assert assign_layout(graph, HW) == 0
    assert dialect.permute not in {n.target for n in graph.graph.nodes}
    found = graph.meta["layout"]
    assert not found.nhwc
    assert len(found.nchw) == 3
    assert found.seconds == found.all_nchw_seconds < found.all_nhwc_seconds


def test_what_is_chosen_costs_no_more_than_one_layout_for_all():
    def model(x, w):
        return torch.nn.functional.group_norm(conv(x, w), 2), conv(x, w).mean((2, 3))

    graph = trace_core(model, [torch.randn(1, 32, 56, 56), torch.randn(32, 32, 1, 1)])
    assert assign_layout(graph, HW) > 0
    found = graph.meta["layout"]
    assert found.seconds <= min(found.all_nchw_seconds, found.all_nhwc_seconds)
    assert len(found.nhwc) == 3  # both convolutions, and the mean
