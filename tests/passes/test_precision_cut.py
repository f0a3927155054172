"""The precision of every operator: minimum cuts against every assignment there is, and budgets that are kept."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.passes.precision.cut import Cost, Problem, Value, cheapest, within

TWO = {"float32": "float32", "bfloat16": "bfloat16"}
MORE = {**TWO, "float16": "float16", "weights": "float32"}


@st.composite
def problems(draw: st.DrawFn, stored: dict[str, str]) -> Problem:
    count = draw(st.integers(1, 6))
    seconds = st.integers(0, 20)
    problem = Problem(stored)
    for node in range(count):
        costs = {"float32": Cost(float(draw(seconds)))}
        for label in list(stored)[1:]:
            if draw(st.booleans()):
                costs[label] = Cost(float(draw(seconds)), draw(st.sampled_from([0.0, 1e-3, 3e-3, 0.1, 1.0])))
        problem.nodes[node] = costs
    for node in range(count - 1):
        readers = draw(st.lists(st.integers(node + 1, count - 1), max_size=4))
        if readers:
            problem.values.append(Value(node, tuple(readers), float(draw(st.integers(0, 8)))))
    return problem


def cost(problem: Problem, labels: dict[object, str], price: float) -> float:
    return problem.seconds(labels) + price * problem.error(labels) ** 2


def every(problem: Problem) -> list[dict[object, str]]:
    nodes = list(problem.nodes)
    return [dict(zip(nodes, chosen, strict=True)) for chosen in itertools.product(*problem.nodes.values())]


# Between equally fast assignments a ten-thousandth of the largest operator (20 s) decides: six operators.
HAIR = 6 * 20 * 1e-4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(TWO), st.sampled_from([0.0, 1.0, 1e4, 1e6]))
def test_two_precisions_are_optimal(problem: Problem, price: float) -> None:
    found = cost(problem, cheapest(problem, price), price)
    assert found <= min(cost(problem, labels, price) for labels in every(problem)) * (1 + 1e-9) + HAIR


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(MORE), st.sampled_from([0.0, 1.0, 1e4, 1e6]))
def test_more_precisions_are_within_the_bound(problem: Problem, price: float) -> None:
    found = cost(problem, cheapest(problem, price), price)
    formats = len(set(MORE.values()))
    assert found <= 2 * (formats - 1) * min(cost(problem, labels, price) for labels in every(problem)) + HAIR


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(MORE), st.sampled_from([0.0, 1e-3, 5e-3, 0.2, 10.0]))
def test_a_budget_is_kept_and_nothing_is_slower_than_the_first(problem: Problem, budget: float) -> None:
    labels = within(problem, budget)
    assert problem.error(labels) <= budget * (1 + 1e-12)
    first = dict.fromkeys(problem.nodes, "float32")
    assert problem.seconds(labels) <= problem.seconds(first) + HAIR
    possible = [f for f in every(problem) if problem.error(f) <= budget]
    if budget >= 10.0:
        assert problem.seconds(labels) <= 4 * min(problem.seconds(f) for f in possible) + HAIR


def test_equal_operators_fill_the_budget_one_by_one() -> None:
    """A price buys all ten or none of them: the square root of six errors fits, of seven not."""
    problem = Problem(TWO, {i: {"float32": Cost(2.0), "bfloat16": Cost(1.0, 1e-2)} for i in range(10)})
    labels = within(problem, 1e-2 * math.sqrt(6.5))
    assert sum(label == "bfloat16" for label in labels.values()) == 6


def test_a_cast_is_paid_once_for_all_readers() -> None:
    """Three readers gain 2 each by bfloat16 and the value's cast costs 5: worth it together, for one alone not."""
    gain = {"float32": Cost(3.0), "bfloat16": Cost(1.0)}
    problem = Problem(TWO, {"norm": {"float32": Cost(1.0)}, **dict.fromkeys("qkv", gain)})
    problem.values.append(Value("norm", ("q", "k", "v"), 5.0))
    assert [cheapest(problem, 0.0)[n] for n in "qkv"] == ["bfloat16"] * 3
    problem.values[0] = Value("norm", ("q",), 5.0)
    assert cheapest(problem, 0.0)["q"] == "float32"


def test_among_equally_fast_ones_the_more_exact_is_taken() -> None:
    costs = {"float32": Cost(4.0), "bfloat16": Cost(2.0, 3e-3), "weights": Cost(2.0, 4e-4)}
    assert cheapest(Problem(MORE, {"a": costs}), 0.0) == {"a": "weights"}


def test_an_operator_that_ruins_everything_stays() -> None:
    problem = Problem(TWO, {"a": {"float32": Cost(4.0), "bfloat16": Cost(1.0, math.inf)}})
    assert within(problem, 1e9) == {"a": "float32"}


@pytest.mark.parametrize(("count", "casts"), [(10_000, 0.0), (2_000, 0.9)])
def test_long_chains_take_seconds(count: int, casts: float) -> None:
    """Products one behind the other: decided without a cut where casts are cheap, and by cuts elsewhere."""
    problem = Problem(TWO)
    for i in range(count):
        problem.nodes[i] = {"float32": Cost(2.0), "bfloat16": Cost(1.0 + (i % 7) / 10, 1e-3 * (1 + i % 13))}
    problem.values = [Value(i, (i + 1,), casts) for i in range(count - 1)]
    started = time.process_time()
    labels = within(problem, 0.05) if not casts else cheapest(problem, 0.0)
    assert time.process_time() - started < 30.0  # linear: about 3 s; a quadratic step would take minutes
    assert problem.error(labels) <= 0.05 or casts
