"""Where a cost model ranks several candidates, the first wins, unless a measurement on this machine said otherwise.

    with choosing(Choices(preferred)) as choices:      # around a lowering
        plan = pick("winograd 64x56x56 ...", plans)    # in a chooser: candidates, best first
    choices.made                                       # every decision, for `explain` and `tune`

Candidates are told apart by their `reason`, the text that also names them in a report. A preferred candidate that is
not among the best few any more is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

SHORTLIST = 3  # candidates of a decision that are shown, and measured by tune=


class Candidate(Protocol):
    """A plan: what it is, and the cycles predicted for the busiest core."""

    @property
    def reason(self) -> str:
        """The plan in a few words."""

    @property
    def cycles(self) -> float:
        """Predicted, of the busiest core."""


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True)
class Decision:
    """A problem, its best candidates as (reason, predicted cycles), and which was taken."""

    problem: str
    candidates: tuple[tuple[str, float], ...]
    chosen: int
    measured: bool = False  # whether a measurement decided

    @property
    def reason(self) -> str:
        """The candidate taken."""
        return self.candidates[self.chosen][0]


@dataclass
class Choices:
    """How decisions fall, and those that fell: the preferred candidate of a problem, else the one of `rank`."""

    preferred: Mapping[str, str] = field(default_factory=dict)  # problem -> reason
    rank: int = 0
    made: list[Decision] = field(default_factory=list)

    def pick(self, problem: str, candidates: Sequence[C]) -> C:
        """Decide for one of `candidates`, which are ranked."""
        best = list({candidate.reason: candidate for candidate in reversed(candidates)}.values())[::-1][:SHORTLIST]
        names = [candidate.reason for candidate in best]
        wanted = self.preferred.get(problem)
        measured = wanted in names
        chosen = names.index(wanted) if wanted is not None and measured else min(self.rank, len(best) - 1)
        costs = tuple((candidate.reason, candidate.cycles) for candidate in best)
        self.made.append(Decision(problem, costs, chosen, measured))
        return best[chosen]


_current: ContextVar[Choices | None] = ContextVar("graphwright_choices", default=None)


def pick(problem: str, candidates: Sequence[C]) -> C:
    """One of `candidates`, which stand best first: the first, where nobody is `choosing`."""
    choices = _current.get()
    return candidates[0] if choices is None else choices.pick(problem, candidates)


@contextmanager
def choosing(choices: Choices) -> Iterator[Choices]:
    """Let `choices` decide every `pick` meanwhile."""
    token = _current.set(choices)
    try:
        yield choices
    finally:
        _current.reset(token)


@contextmanager
def noting() -> Iterator[list[Decision]]:
    """The decisions made meanwhile."""
    choices = _current.get()
    before = len(choices.made) if choices is not None else 0
    found: list[Decision] = []
    yield found
    if choices is not None:
        found += choices.made[before:]
