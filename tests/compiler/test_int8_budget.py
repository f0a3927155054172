"""Which products go back to float32: what errs the most for its time, and what breaks the fewest chains of bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from graphwright.compiler import pipeline
from graphwright.compiler.build import default_passes
from graphwright.compiler.capture import capture, export
from graphwright.compiler.compression.int8_budget import budget_problem, over_budget
from graphwright.hwdb import lookup
from graphwright.passes.assign_precision import Choice
from graphwright.passes.precision.cut import Problem
from graphwright.passes.precision.int8_forms import DYNAMIC, Int8Form, is_product

HW = lookup("znver4")


def chain(count: int) -> fx.GraphModule:
    """As many convolutions, each of which reads the one before it alone."""
    convs = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(count)]
    graph = capture(export(nn.Sequential(*convs).eval(), (torch.zeros(1, 16, 32, 32),))).graph
    return pipeline.run(graph, HW, default_passes(HW))[0]


def problem(graph: fx.GraphModule, errors: list[float], gains: list[float], form: str = "int8") -> Problem:
    names = [n.name for n in graph.graph.nodes if is_product(n)]
    choices = [Choice(name, "graphwright.conv2d", "int8", "", form=form) for name in names]
    forms = {n: Int8Form(True, "", 1e-5 + gain, 1e-5, form) for n, gain in zip(names, gains, strict=True)}
    return budget_problem(graph, HW, choices, forms, {}, dict(zip(names, errors, strict=True)))


def places(graph: fx.GraphModule, dropped: set[str]) -> list[int]:
    return [i for i, n in enumerate(n for n in graph.graph.nodes if is_product(n)) if n.name in dropped]


@pytest.fixture(scope="module")
def five() -> fx.GraphModule:
    return chain(5)


def test_an_end_of_a_chain_goes_back_rather_than_its_middle(five: fx.GraphModule) -> None:
    gains = [3e-6, 3e-6, 2.9e-6, 3e-6, 3e-6]  # the middle gains least for its error
    assert places(five, over_budget(problem(five, [1e-2] * 5, gains), 2.1e-2)) in ([0], [4])
    # Products that exchange float32 in any case are ranked alone.
    assert places(five, over_budget(problem(five, [1e-2] * 5, gains, DYNAMIC), 2.1e-2)) == [2]


def test_what_errs_most_goes_back_wherever_it_stands(five: fx.GraphModule) -> None:
    assert places(five, over_budget(problem(five, [1e-3, 1e-3, 1e-1, 1e-3, 1e-3], [3e-5] * 5), 1e-2)) == [2]


def test_what_is_between_two_that_go_back_follows_where_it_gains_less_than_two_roundings(five: fx.GraphModule) -> None:
    assert places(five, over_budget(problem(five, [0, 1, 0, 1, 0], [3e-5, 3e-5, 1e-8, 3e-5, 3e-5]), 0.5)) == [1, 2, 3]


def test_nothing_is_left_by_no_budget_but_what_does_not_err(five: fx.GraphModule) -> None:
    assert places(five, over_budget(problem(five, [1e-9] * 4 + [math.inf], [3e-5] * 5), 0.0)) == [0, 1, 2, 3, 4]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=5),
    st.lists(st.floats(1e-8, 1e-4), min_size=5, max_size=5),
    st.floats(0, 2.0),
)
def test_the_budget_is_kept(five: fx.GraphModule, errors: list[float], gains: list[float], budget: float) -> None:
    dropped = places(five, over_budget(problem(five, errors, gains), budget))
    left = [e for i, e in enumerate(errors) if i not in dropped]
    assert math.sqrt(sum(e * e for e in left)) <= budget * (1 + 1e-9)
