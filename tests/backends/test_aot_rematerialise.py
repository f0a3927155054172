"""Values computed again: the same results, fewer bytes at once, the cheapest first; the error names what is alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aot_programs import buffer, graphs, program
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright
from graphwright.backends.aot.memory import plan
from graphwright.backends.aot.program import Program, Step
from graphwright.backends.aot.rematerialise import rematerialise
from graphwright.errors import InputError, MemoryLimit

BIG, SMALL = 10_000, 16


def skip(seconds: str = "") -> Program:
    """Two values made of the input wait while a big one comes and goes."""
    buffers = [
        *(buffer("x", "input", (SMALL,)), buffer("cheap", "temporary", (BIG,)), buffer("dear", "temporary", (BIG,))),
        *(buffer("view", "temporary", (BIG // 4, 4), "cheap"), buffer("big", "temporary", (2 * BIG,))),
        *(buffer("few", "temporary", (SMALL,)), buffer("y", "output", (SMALL,))),
    ]
    steps = [
        *(Step("a", ("x", "cheap")), Step("b", ("x", "dear")), Step("c", ("x", "cheap", "dear", "big"))),
        *(Step("d", ("big", "few")), Step("e", ("few", "view", "dear", "y"))),
    ]
    return program({}, buffers, steps, ["y"])


SECONDS = [1e-6, 1e-3, 1e-6, 1e-6, 1e-6]


def alive(made: Program) -> int:
    return plan(made, {}).lower_bound_bytes


def interpreted(made: Program) -> list[Any]:
    """What the results are, as nested tuples of kernels and operands."""
    stored: dict[str, Any] = {name: name for name in (*made.inputs, *made.weights)}
    for step in made.steps:
        *operands, result = [made.root(name) for name in step.args]
        stored[result] = (step.kernel, *(stored[o] for o in operands))
    return [stored[made.root(name)] for name in made.outputs]


def test_the_cheap_value_is_computed_again() -> None:
    made = skip()
    # In front of step 3 two values idle: with one of them gone, the fullest is step 2, which needs all.
    again = rematerialise(made, alive(made), SECONDS)
    assert again.program is made
    buffers = dict(made.buffers) | {"more": buffer("more", "temporary", (2 * BIG,))}
    steps = (*made.steps[:3], Step("m", ("big", "more")), Step("d", ("more", "few")), made.steps[4])
    made = Program(made.name, {}, buffers, steps, made.inputs, made.outputs, {})
    seconds = [*SECONDS[:3], 1e-6, *SECONDS[3:]]
    again = rematerialise(made, alive(made) - BIG * 4, seconds)
    assert [s.kernel for s in again.program.steps] == ["a", "b", "c", "m", "d", "a", "e"]
    assert again.origin == (0, 1, 2, 3, 4, 0, 5)
    assert again.program.steps[-1].args == ("few", "view_again", "dear", "y")
    assert again.program.buffers["view_again"].alias == "cheap_again"
    assert alive(again.program) == alive(made) - BIG * 4
    assert interpreted(again.program) == interpreted(made)


def test_results_stay() -> None:
    """They lie in the caller's memory, which costs nothing."""
    made = skip()
    made = Program(made.name, {}, made.buffers, made.steps, made.inputs, ("y", "cheap"), {})
    again = rematerialise(made, 1, SECONDS)
    assert all(step.args[-1] != "cheap_again" for step in again.program.steps)


def test_kernels_with_several_results_run_once() -> None:
    buffers = [
        *(buffer("x", "input", (SMALL,)), buffer("a", "temporary", (BIG,)), buffer("b", "temporary", (BIG,))),
        *(buffer("c", "temporary", (BIG,)), buffer("d", "temporary", (BIG,)), buffer("y", "output", (SMALL,))),
    ]
    steps = [
        Step("two", ("x", "a", "b")),
        Step("k", ("x", "c")),
        Step("l", ("c", "d")),
        Step("m", ("d", "a", "b", "y")),
    ]
    made = program({}, buffers, steps, ["y"])
    assert rematerialise(made, 1, [1e-6] * 4).program is made


def test_an_operand_kept_for_it_counts() -> None:
    """Computing t again would keep its operand, as big as itself, in its place."""
    buffers = [
        *(buffer("x", "input", (SMALL,)), buffer("o", "temporary", (BIG,)), buffer("t", "temporary", (BIG,))),
        *(buffer("c", "temporary", (BIG,)), buffer("d", "temporary", (BIG,)), buffer("y", "output", (SMALL,))),
    ]
    steps = [Step("o", ("x", "o")), Step("t", ("o", "t")), Step("c", ("x", "c")), Step("d", ("c", "d"))]
    made = program({}, buffers, [*steps, Step("y", ("d", "t", "y"))], ["y"])
    seconds = [1.0, 1e-9, 1e-6, 1e-6, 1e-6]
    again = rematerialise(made, 2 * BIG * 4 + 64, seconds)
    assert interpreted(again.program) == interpreted(made)
    assert [s.kernel for s in again.program.steps].count("t") == 1 or [s.kernel for s in again.program.steps].count(
        "o"
    ) == 2


@settings(max_examples=60, deadline=None)
@given(graphs(), st.floats(0.1, 1.0))
def test_any_graph_computes_the_same_in_no_more_memory(made: Program, share: float) -> None:
    limit = int(alive(made) * share)
    again = rematerialise(made, limit, [1e-6 * (1 + i % 3) for i in range(len(made.steps))])
    assert interpreted(again.program) == interpreted(made)
    assert alive(again.program) <= alive(made)
    assert [made.steps[i].kernel for i in again.origin] == [s.kernel for s in again.program.steps]


ROW = 64 * 1024 * 4  # bytes of a wide value


class Wide(torch.nn.Module):
    """A wide value waits while a product of two others runs."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.up = torch.nn.Linear(64, 1024), torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 64)
        self.more, self.last = torch.nn.Linear(64, 1024), torch.nn.Linear(1024, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.down(x)
        narrow = self.up(self.mid(wide.tanh()))
        return self.last(self.more(narrow).sin() * wide)


def test_compile_keeps_the_limit_and_the_bits() -> None:
    x = torch.randn(64, 64)
    torch.manual_seed(0)
    model = Wide().eval()
    free = graphwright.compile(model, x, cache=False)
    assert free.report().arena_bytes >= 3 * ROW
    tight = graphwright.compile(model, x, cache=False, memory_limit=int(2.3 * ROW))
    assert tight.report().arena_bytes <= 2.3 * ROW
    assert len(tight.report().kernels) > len(free.report().kernels)
    assert torch.equal(free(x), tight(x))


def test_what_cannot_be_met_is_said() -> None:
    with pytest.raises(MemoryLimit, match=r"memory_limit is 100\.0 KB(.|\n)*[KM]B: float32\[64, 1024\], written by"):
        graphwright.compile(Wide().eval(), torch.randn(64, 64), cache=False, memory_limit="100KB")


@pytest.mark.parametrize("limit", ["much", "12", -5, "0MB", 1.5, True])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(InputError, match="memory_limit"):
        graphwright.compile(Wide().eval(), torch.randn(64, 64), memory_limit=limit)
