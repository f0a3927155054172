"""The memory plan: nothing alive overlaps, and the arena is as small as what is alive demands."""

from __future__ import annotations

import pytest
from aot_programs import buffer, program
from hypothesis import given
from hypothesis import strategies as st

from graphwright.backends.aot.memory import ALIGNMENT, Lifetime, Place, assign, lower_bound, plan
from graphwright.backends.aot.program import Program, Step


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    sizes = draw(st.lists(st.integers(0, 5000), min_size=0, max_size=40))
    alive = []
    for number, size in enumerate(sizes):
        first = draw(st.integers(0, 20))
        alive.append(Lifetime(str(number), size, first, first + draw(st.integers(0, 8))))
    return alive


@given(lifetimes())
def test_no_two_buffers_alive_at_once_overlap(alive: list[Lifetime]) -> None:
    offsets, peak = assign(alive)
    assert set(offsets) == {life.name for life in alive}
    for life in alive:
        assert offsets[life.name] % ALIGNMENT == 0
        assert offsets[life.name] + life.nbytes <= peak
    for one in alive:
        for other in alive:
            if one is not other and one.meets(other):
                start, end = offsets[one.name], offsets[one.name] + one.nbytes
                assert end <= offsets[other.name] or offsets[other.name] + other.nbytes <= start
    assert lower_bound(alive) <= peak <= sum(life.nbytes + ALIGNMENT for life in alive)


@given(lifetimes())
def test_the_lower_bound_is_what_one_step_holds(alive: list[Lifetime]) -> None:
    fullest = max(
        (sum(-(-life.nbytes // 64) * 64 for life in alive if life.first <= t <= life.last) for t in range(30)),
        default=0,
    )
    assert lower_bound(alive) == fullest


def test_the_plan_does_not_depend_on_chance() -> None:
    alive = [Lifetime(str(i), 64 * (i * 37 % 11 + 1), i % 7, i % 7 + i % 4) for i in range(60)]
    assert assign(alive) == assign(list(alive))


def chain(length: int, skip: int, sizes: list[int]) -> Program:
    """t0 -> t1 -> ...; every `skip`-th step also reads the value `skip` steps back, as a residual network does."""
    buffers = [buffer("x", "input", (1,))]
    buffers += [buffer(f"t{i}", "temporary", (sizes[i % len(sizes)],)) for i in range(length)]
    buffers.append(buffer("y", "output", (1,)))
    names = ["x", *(f"t{i}" for i in range(length)), "y"]
    steps = []
    for i in range(1, len(names)):
        operands = [names[i - 1]]
        if skip and i % skip == 0 and i > skip:
            operands.append(names[i - skip])
        steps.append(Step(f"k{i}", (*operands, names[i])))
    return program({}, buffers, steps, ["y"])


@pytest.mark.parametrize("skip", [0, 2, 3, 5])
@pytest.mark.parametrize(
    "sizes",
    [[1000], [802816, 200704, 802816], [150528, 802816, 200704, 401408, 100352], [393216, 98304, 393216, 98304 * 4]],
)
def test_chains_with_residuals_need_what_is_alive(sizes: list[int], skip: int) -> None:
    made = plan(chain(60, skip, sizes), {})
    assert made.peak_bytes <= 1.1 * made.lower_bound_bytes
    assert made.sum_bytes > 5 * made.peak_bytes


def test_a_network_that_narrows_and_widens() -> None:
    """A U-Net: the outputs of the way down live until they are joined on the way up."""
    depth, steps, buffers = 5, [], [buffer("x", "input", (1,))]
    last = "x"
    for level in range(depth):
        buffers += [buffer(f"{kind}{level}", "temporary", (1 << (20 - level),)) for kind in ("a", "b", "down")]
        steps += [
            Step("k", (last, f"a{level}")),
            Step("k", (f"a{level}", f"b{level}")),
            Step("k", (f"b{level}", f"down{level}")),
        ]
        last = f"down{level}"
    for level in reversed(range(depth)):
        buffers += [buffer(f"{kind}{level}", "temporary", (1 << (20 - level),)) for kind in ("up", "c")]
        steps += [Step("k", (last, f"up{level}")), Step("k", (f"up{level}", f"b{level}", f"c{level}"))]
        last = f"c{level}"
    buffers.append(buffer("y", "output", (1,)))
    steps.append(Step("k", (last, "y")))
    made = plan(program({}, buffers, steps, ["y"]), {})
    assert made.peak_bytes <= 1.1 * made.lower_bound_bytes


def test_places() -> None:
    buffers = [
        buffer("x", "input", (16,)),
        buffer("w", "weight", (16,)),
        buffer("t", "temporary", (16,)),
        buffer("flat", "temporary", (4, 4), "t"),
        buffer("u", "temporary", (16,)),
        buffer("view", "output", (4, 4), "u"),
        buffer("unused", "temporary", (1 << 30,)),
        buffer("lone", "temporary", (4, 4), "unused"),
    ]
    steps = [Step("k", ("x", "w", "t")), Step("k", ("flat", "u"))]
    made = plan(program({}, buffers, steps, ["view", "x", "view", "w"]), {"w": 4096})
    assert made.places == {
        "x": Place("input", 0),
        "w": Place("weight", 4096),
        "t": Place("arena", 0),
        "flat": Place("arena", 0),
        "u": Place("output", 0),
        "view": Place("output", 0),
    }
    assert made.copies == (
        (Place("input", 0), Place("output", 1), 64),
        (Place("output", 0), Place("output", 2), 64),
        (Place("weight", 4096), Place("output", 3), 64),
    )
    assert (made.peak_bytes, made.lower_bound_bytes, made.sum_bytes) == (64, 64, 64)
