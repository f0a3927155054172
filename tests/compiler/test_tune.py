"""Decisions between ranked candidates, measurements that overrule them, and files that must not be trusted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import graphwright
from graphwright.backends.choices import Choices, Decision, choosing, noting, pick
from graphwright.backends.lowering.registry import KernelInfo
from graphwright.compiler import plan, tune
from graphwright.compiler.build import Built
from graphwright.compiler.explaining.explain import explain
from graphwright.compiler.report import Report
from graphwright.errors import InputError
from graphwright.hwdb import detect


@dataclass(frozen=True)
class Plan:
    reason: str
    cycles: float


PLANS = [Plan("a", 1.0), Plan("a", 1.5), Plan("b", 2.0), Plan("c", 3.0), Plan("d", 4.0)]


def test_the_first_wins_unless_something_else_is_preferred() -> None:
    assert pick("p", PLANS) == PLANS[0]
    with choosing(Choices({"p": "c", "q": "gone"})) as choices:
        assert pick("p", PLANS).reason == "c"
        assert pick("q", PLANS).reason == "a"
        with noting() as noted:
            assert pick("r", PLANS[:1]).reason == "a"
    assert choices.made[0] == Decision("p", (("a", 1.0), ("b", 2.0), ("c", 3.0)), 2, True)
    assert not choices.made[1].measured
    assert [decision.problem for decision in noted] == ["r"]
    with choosing(Choices(rank=1)):
        assert pick("p", PLANS).reason == "b"
        assert pick("r", PLANS[:1]).reason == "a"


def kernel(problem: str, reason: str, operators: str = "conv") -> KernelInfo:
    return KernelInfo("k", operators, "a", reason, None, decisions=(Decision(problem, ((reason, 1.0),), 0),))


def kept(builds: list[list[KernelInfo]], times: list[list[float]]) -> dict[str, str]:
    return {row.problem: row.kept for row in tune.weighed(builds, times)}


def test_winners_are_the_faster_by_more_than_noise() -> None:
    first = [kernel("p", "a"), kernel("p", "a"), kernel("q", "x"), kernel("r", "m")]
    second = [kernel("p", "b"), kernel("p", "b"), kernel("q", "y"), kernel("other", "n")]
    times = [[10.0, 10.0, 5.0, 5.0], [9.0, 8.0, 4.9, 1.0]]
    # p: clearly faster. q: by 2 %. r: the second build solved another problem there.
    assert kept([first, second], times) == {"p": "b", "q": "x", "r": "m"}
    assert kept([first, second[:3]], [times[0], times[1][:3]]) == {"p": "a", "q": "x", "r": "m"}
    rows = tune.weighed([first, second], times)
    assert rows[0] == tune.Row("p", (("a", 10.0), ("b", 8.5)), "b")


def test_the_last_of_fewer_candidates_than_builds_can_win() -> None:
    builds = [[kernel("p", "a")], [kernel("p", "b")], [kernel("p", "b")]]
    assert kept(builds, [[10.0], [5.0], [5.0]]) == {"p": "b"}
    assert kept(builds, [[10.0], [11.0], [11.0]]) == {"p": "a"}


def test_winners_that_do_not_win_again_are_not_kept() -> None:
    first = [kernel("p", "a"), kernel("q", "x"), kernel("r", "m")]
    winners = [kernel("p", "b"), kernel("q", "y"), kernel("r", "m")]
    rows = [tune.Row(n, ((a, 10.0), (b, 5.0)), b) for n, a, b in (("p", "a", "b"), ("q", "x", "y"))]
    rows.append(tune.Row("r", (("m", 4.0),), "m"))
    kept, before, after = tune.confirmed(rows, [first, winners], [[10.0, 10.0, 4.0], [6.0, 9.9, 4.5]])
    assert [row.kept for row in kept] == ["b", "x", "m"]
    assert (before, after) == (24.0, 20.0)  # with p's alone
    other = [kernel("p", "b"), kernel("q", "y", "conv+relu")]
    kept, before, after = tune.confirmed(rows, [first, other], [[10.0, 10.0, 4.0], [1.0, 1.0]])
    assert [row.kept for row in kept] == ["a", "x", "m"]  # another fusion: not comparable
    assert before == after == 24.0


def test_no_build_is_always_timed_first() -> None:
    """A machine that was idle raises its clock with the work; of two builds the cost model's is first in 2 of 5."""
    for count, most in ((1, 5), (2, 2), (3, 2)):
        orders = [tune.order(count, turn) for turn in range(tune.TURNS)]
        assert all(sorted(found) == list(range(count)) for found in orders)
        assert sum(found[0] == 0 for found in orders) <= most


@pytest.mark.parametrize(("together", "expected"), [(7.0, "b"), (13.0, "a")])
def test_winners_that_are_slower_together_are_not_kept(
    together: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each build is timed 12 us, but for the second candidates (9) and the winners."""
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    wanted: list[dict[str, str]] = []

    def built(*_: object, choices: Choices, **__: object) -> Built:
        wanted.append(dict(choices.preferred))
        candidate = choices.preferred.get("p", "ab"[min(choices.rank, 1)])
        return Built(plan.Plan((), 0, (), 0, {}), graph, (), kernels=(kernel("p", candidate),))

    def measure(builds: Sequence[tune.Candidate], end: float) -> list[list[float]]:
        times = {"0": 12.0, "1": 9.0, "2": 9.0, "winners": together}
        return [[times[place.name]] for place, _ in builds]

    monkeypatch.setattr(tune, "build", built)
    graph = fx.symbolic_trace(nn.Identity())
    monkeypatch.setattr(tune.pipeline, "run", lambda graph, hw, passes: (graph, ()))
    found = tune.tune(graph, detect(), 100.0, measure)
    assert wanted == [{}, {}, {}, {"p": "b"}]
    assert found.preferred == tune.stored(detect()) == {"p": expected}
    assert (found.before_us, found.after_us) == (12.0, min(together, 12.0))
    assert f"{12:.1f} us before, {min(together, 12.0):.1f} us now" in found.text()
    assert ("1 that won did not win again" in found.text()) == (expected == "a")


def test_a_measurement_without_time_for_others_forgets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    tune._store(detect(), {"p": "b", "q": "y"})

    def built(*_: object, choices: Choices, **__: object) -> Built:
        time.sleep(0.002)
        return Built(plan.Plan((), 0, (), 0, {}), graph, (), kernels=(kernel("p", "a"),))

    monkeypatch.setattr(tune, "build", built)
    graph = fx.symbolic_trace(nn.Identity())
    monkeypatch.setattr(tune.pipeline, "run", lambda graph, hw, passes: (graph, ()))
    found = tune.tune(graph, detect(), 0.001, lambda builds, end: [[12.0] for _ in builds])
    assert found.builds == 1
    assert found.preferred == tune.stored(detect()) == {"p": "b", "q": "y"}


@pytest.mark.parametrize(
    ("given", "seconds"), [("30s", 30), ("2m", 120), ("1.5s", 1.5), (7, 7), ("8", 8), (None, None)]
)
def test_budgets(given: str | float | None, seconds: float | None) -> None:
    assert tune.budget(given) == seconds


@pytest.mark.parametrize("given", ["fast", "0s", "-3s", True, "3h", ""])
def test_budgets_that_are_none(given: str) -> None:
    with pytest.raises(InputError, match="30s"):
        tune.budget(given)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": ["b"]}', "\udcff", "[" * 200_000])
def test_a_file_of_another_form_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    path = tune._path(detect())
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert tune.stored(detect()) == {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_what_was_measured_is_used_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    model, x = Net().eval(), torch.randn(1, 16, 30, 30)
    plain = graphwright.compile(model, x)
    assert tune.stored(detect()) == {}
    tuned = graphwright.compile(model, x, tune="300s")
    found = tune.stored(detect())
    weighed = {d.problem: d for k in tuned.report().kernels for d in k.decisions}
    assert set(found) == {d.problem for k in plain.report().kernels for d in k.decisions} >= set(weighed)
    assert all(decision.reason == found[problem] and decision.measured for problem, decision in weighed.items())
    torch.testing.assert_close(tuned(x), plain(x), rtol=1e-4, atol=1e-5)  # another order of the same sums
    assert graphwright.compile(model, x).report().cached
    # Measured the other way round, the other candidate is used: the cache knows them apart.
    problem, decision = next((p, d) for p, d in weighed.items() if len(d.candidates) > 1)
    other = next(reason for reason, _ in decision.candidates if reason != decision.reason)
    tune._path(detect()).write_text(json.dumps({**found, problem: other}))
    again = graphwright.compile(model, x)
    assert not again.report().cached
    assert any(d.problem == problem and d.reason == other for k in again.report().kernels for d in k.decisions)
    assert Report.from_dict(json.loads(json.dumps(again.report().to_dict()))) == again.report()
    text = explain(model, x)
    assert f"{problem}: measured the fastest here" in text
    assert "of the one taken" in text


def test_tuning_needs_this_machine() -> None:
    with pytest.raises(InputError, match="measures the model on this machine"):
        graphwright.compile(Net().eval(), torch.randn(1, 16, 30, 30), target="raspberry-pi-4b", tune="1s")
