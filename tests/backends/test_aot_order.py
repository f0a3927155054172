"""The order of steps: a valid one, never with a higher peak, and the best one where the graph is small."""

from __future__ import annotations

import time
from itertools import permutations

import pytest
from aot_programs import buffer, graph, graphs, program
from hypothesis import given, settings

from graphwright.backends.aot.memory import plan
from graphwright.backends.aot.order import order_steps
from graphwright.backends.aot.program import Program, Step


def peak(made: Program) -> int:
    return plan(made, {"w": 0}).lower_bound_bytes


def valid(made: Program) -> bool:
    known: set[str] = {"x"}
    for step in made.steps:
        if not set(step.args[:-1]) <= known:
            return False
        known.add(step.args[-1])
    return True


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_the_best_order_of_a_small_graph(made: Program) -> None:
    ordered, order = order_steps(made)
    assert [made.steps[i] for i in order] == list(ordered.steps)
    assert valid(ordered)
    least = peak(made)
    for steps in permutations(made.steps):
        candidate = Program(made.name, {}, made.buffers, steps, made.inputs, made.outputs, {})
        if valid(candidate):
            least = min(least, peak(candidate))
    assert peak(ordered) == least


def branches(count: int) -> Program:
    """Branches that widen and narrow, level by level, as a model with lists of layers writes them."""
    sizes, reads = [], []
    for level, size in enumerate((4096, 4096, 64)):
        for i in range(count):
            sizes.append(size)
            reads.append([] if level == 0 else [(level - 1) * count + i])
    sizes.append(64)
    reads.append(list(range(2 * count, 3 * count)))
    return graph(sizes, reads, [len(sizes) - 1])


def test_branches_are_run_one_after_another() -> None:
    made = branches(12)
    ordered, order = order_steps(made)
    assert peak(made) >= 12 * 4096 * 4
    assert peak(ordered) <= 2 * 4096 * 4 + 13 * 64 * 4
    assert order_steps(ordered) == (ordered, list(range(len(order))))


def test_an_order_that_gains_nothing_is_kept() -> None:
    made = graph([64, 64, 64, 64], [[], [0], [], [1, 2]], [3])
    assert order_steps(made) == (made, [0, 1, 2, 3])


def test_aliases_and_weights_are_seen_through() -> None:
    buffers = [
        *(buffer("x", "input", (8,)), buffer("w", "weight", (8,)), buffer("a", "temporary", (4096,))),
        *(buffer("flat", "temporary", (64, 64), "a"), buffer("small", "temporary", (16,))),
        *(buffer("b", "temporary", (4096,)), buffer("other", "temporary", (16,)), buffer("y", "output", (16,))),
    ]
    steps = [
        *(Step("k", ("x", "w", "a")), Step("k", ("x", "w", "b")), Step("k", ("b", "other"))),
        *(Step("k", ("flat", "small")), Step("k", ("small", "other", "y"))),
    ]
    made = program({}, buffers, steps, ["y"])
    ordered, _ = order_steps(made)
    assert peak(made) == 2 * 4096 * 4 + 64
    assert peak(ordered) == 4096 * 4 + 128
    first = [s.args[-1] for s in ordered.steps]
    assert first.index("a") < first.index("small") < first.index("y")


@pytest.mark.parametrize("width", [1, 4])
def test_it_is_linear(width: int) -> None:
    count = 8000
    reads = [[i - 1 - i % width] if i >= width else [] for i in range(count)]
    reads.append([count - 1])
    sizes = [64 * (1 + i % 7) for i in range(count)] + [64]
    unread = sorted(set(range(count + 1)) - {j for r in reads for j in r})
    made = graph(sizes, reads, unread)
    started = time.process_time()
    ordered, _ = order_steps(made)
    assert time.process_time() - started < 20  # measured: 2 s
    assert peak(ordered) <= peak(made)
