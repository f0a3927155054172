"""What tests/guards.py takes for a guard, and what a module is without one."""

from __future__ import annotations

from typing import Any

import guards
import pytest

SOURCE = """
def refused(a, b, rest):
    if a is None or not (b and b > 1):
        return "a reason to refuse"
    if (last := max(rest)) > 9:
        return f"{last} is too much"
    if any(r < 0 or r == 7 for r in rest):
        return "a negative number or a seven"
    return "a sum of twelve" if a + b == 12 else ""


def match(a, rest):
    if not a:
        return None
    return a > 2 and [r for r in rest if r != a]


def found(a):
    if a == 1 and a is not True:
        return "one", a
    keep(a, "it is not one")
    return None
"""


@pytest.fixture
def found(tmp_path, monkeypatch):
    (tmp_path / "example.py").write_text(SOURCE)
    monkeypatch.setattr(guards, "PASSES", tmp_path)
    return {(g.kind, g.text): g for g in guards.guards_of("example")}


def without(guard: guards.Guard) -> dict[str, Any]:
    names: dict[str, Any] = {"keep": lambda *args: None}
    exec(compile(guards.mutated(guard), "example.py", "exec"), names)
    return names


def test_every_condition_that_refuses_alone_is_one(found):
    assert [text for kind, text in found if kind == "guard"] == [
        "a is None",
        "b",
        "b > 1",
        "(last := max(rest)) > 9",
        "r < 0",
        "r == 7",
        "a + b == 12",
        "a == 1",
        "a is not True",
    ]
    assert [text for kind, text in found if kind == "match"] == [
        "not a",
        "a > 2",
        "[r for r in rest if r != a]",
        "r != a",
    ]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("a is None", (None, 2, [1])),
        ("b", (5, 0, [1])),
        ("b > 1", (5, 1, [1])),
        ("(last := max(rest)) > 9", (5, 2, [10])),
        ("r < 0", (5, 2, [-1])),
        ("r == 7", (5, 2, [7])),
        ("a + b == 12", (10, 2, [1])),
    ],
)
def test_without_it_the_others_refuse_as_before(found, text, arguments):
    names = without(found["guard", text])
    every = [(None, 2, [1]), (5, 0, [1]), (5, 1, [1]), (5, 2, [10]), (5, 2, [-1]), (5, 2, [7]), (10, 2, [1])]
    for given in every:
        if given != arguments:
            assert names["refused"](*given)
    if text not in ("a is None", "b"):  # those have another behind them: None + 2, 0 > 1
        assert not names["refused"](*arguments)


def test_a_reason_at_the_end_is_not_given(found):
    assert without(found["guard", "a == 1"])["found"](5) == ("one", 5)
    assert without(found["match", "r != a"])["match"](3, [3, 4]) == [3, 4]


def test_what_is_watched_says_the_same(found):
    seen = []
    numbers = {guard: number for number, guard in enumerate(found.values())}
    names: dict[str, Any] = {"note": lambda number, value: [seen.append((number, bool(value))), value][1]}
    exec(compile(guards.watched("example", numbers, "note"), "example.py", "exec"), names)
    assert names["refused"](5, 2, [10]) == "10 is too much"
    assert (numbers[found["guard", "(last := max(rest)) > 9"]], True) in seen
    assert (numbers[found["guard", "a is None"]], False) in seen
