"""Where every buffer of a region lies: in the caller's tensors, in the weights, or at an offset of one arena.

A buffer is alive from the first step that names it to the last. Two buffers alive at one step may not overlap; so the
arena can never be smaller than the most bytes alive at any step (the lower bound). Offsets are chosen greedily, one
buffer after another into the tightest gap that fits among those already placed and alive with it; the smallest arena
of several orders wins: by time, by size, by size times time, by the fullest step (Pisarchyk and Lee, "Efficient memory
management for deep neural net inference", 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

from .program import Program

ALIGNMENT = 64
_FOREVER = 1 << 62


@dataclass(frozen=True)
class Place:
    """Where a buffer starts: at position `index` of the caller's table, or `index` bytes into the arena or weights."""

    kind: Literal["input", "output", "arena", "weight"]
    index: int


@dataclass(frozen=True)
class Plan:
    """The places of a region's buffers (aliases included), and what is copied to outputs after the last step."""

    places: dict[str, Place]
    copies: tuple[tuple[Place, Place, int], ...]  # from, to, bytes
    peak_bytes: int  # the arena's size
    lower_bound_bytes: int  # the most bytes alive at one step
    sum_bytes: int  # what the arena would need without reuse


@dataclass(frozen=True)
class Lifetime:
    """A piece of arena: its bytes and the first and last step at which it is alive, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether there is a step at which both are alive."""
        return self.first <= other.last and other.first <= self.last


def plan(program: Program, weight_offsets: Mapping[str, int]) -> Plan:
    """Place every buffer of `program`; `weight_offsets` maps tensor names to bytes into the weights."""
    places = {name: Place("input", position) for position, name in enumerate(program.inputs)}
    places |= {name: Place("weight", weight_offsets[tensor]) for name, tensor in program.weights.items()}
    copies = []
    for position, name in enumerate(program.outputs):
        root = program.root(name)
        place = Place("output", position)
        if root in places:  # an input, a weight, or an output for the second time
            copies.append((places[root], place, program.buffers[name].nbytes))
        else:  # computed in the caller's own tensor
            places[root] = place
    alive = lifetimes(program, {*places})
    offsets, peak = assign(alive)
    places |= {name: Place("arena", offset) for name, offset in offsets.items()}
    for name in program.buffers:
        root = program.root(name)
        if root in places:  # a buffer that no step names has no place
            places[name] = places[root]
    total = sum(rounded(life.nbytes) for life in alive)
    return Plan(places, tuple(copies), peak, lower_bound(alive), total)


def lifetimes(program: Program, elsewhere: set[str]) -> list[Lifetime]:
    """The lifetimes of the buffers that own storage, except those in `elsewhere`; in order of first use."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, step in enumerate(program.steps):
        for name in step.args:
            root = program.root(name)
            if root not in elsewhere:
                first.setdefault(root, number)
                last[root] = number
    return [Lifetime(name, program.buffers[name].nbytes, first[name], last[name]) for name in first]


def lower_bound(alive: Sequence[Lifetime]) -> int:
    """The most bytes (in multiples of 64) alive at one step."""
    change: dict[int, int] = {}
    for life in alive:
        change[life.first] = change.get(life.first, 0) + rounded(life.nbytes)
        change[life.last + 1] = change.get(life.last + 1, 0) - rounded(life.nbytes)
    most = now = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


def assign(alive: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets (multiples of 64) such that no two lifetimes that meet overlap, and the arena's size."""
    bound = lower_bound(alive)
    best: tuple[dict[str, int], int] | None = None
    attempts = [partial(_by_time, alive, bound)]
    attempts += [partial(_by_order, alive, key) for key in _orders(alive)]
    for attempt in attempts:
        offsets = attempt()
        peak = max((offsets[life.name] + rounded(life.nbytes) for life in alive), default=0)
        if best is None or peak < best[1]:
            best = offsets, peak
        if peak <= bound * 1.01:  # the rest is not worth the seconds in a graph of thousands of steps
            break
    assert best is not None
    return best


def _orders(alive: Sequence[Lifetime]) -> list[Callable[[Lifetime], tuple[float, ...]]]:
    load: dict[int, int] = {}
    for life in alive:
        for step in range(life.first, life.last + 1):
            load[step] = load.get(step, 0) + rounded(life.nbytes)
    fullest = {life.name: max(load[step] for step in range(life.first, life.last + 1)) for life in alive}
    return [
        lambda life: (-life.nbytes, life.first),
        lambda life: (-fullest[life.name], -life.nbytes, life.first),
        lambda life: (-life.nbytes * (life.last - life.first + 1), life.first),
        lambda life: (life.first - life.last, -life.nbytes, life.first),
    ]


def _by_order(alive: Sequence[Lifetime], key: Callable[[Lifetime], tuple[float, ...]]) -> dict[str, int]:
    """Place buffers in the order of `key`, each in the tightest gap between those it meets."""
    offsets: dict[str, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # first and last step, start and end in the arena
    for life in sorted(alive, key=key):
        size = rounded(life.nbytes)
        taken = sorted(
            (start, stop) for first, last, start, stop in placed if first <= life.last and life.first <= last
        )
        chosen, slack, end = None, 0, 0
        for start, stop in taken:
            gap = start - end
            if gap >= size and (chosen is None or gap - size < slack):
                chosen, slack = end, gap - size
            end = max(end, stop)
        offsets[life.name] = start = end if chosen is None else chosen
        placed.append((life.first, life.last, start, start + size))
    return offsets


def _by_time(alive: Sequence[Lifetime], capacity: int) -> dict[str, int]:
    """Place buffers as they come alive, beyond `capacity` only where no gap below it fits.

    In a gap, the buffer goes beside the neighbour that lives longer (an end of the arena lives for ever), so that the
    rest of the gap grows when the other one dies.
    """
    offsets: dict[str, int] = {}
    placed: list[Lifetime] = []
    for life in sorted(alive, key=lambda life: (life.first, -life.nbytes, -life.last)):
        placed = [other for other in placed if other.last >= life.first]
        size = rounded(life.nbytes)
        ends = [(0, 0, _FOREVER)]
        ends += sorted((offsets[o.name], offsets[o.name] + rounded(o.nbytes), o.last) for o in placed)
        ends.append((max(capacity, ends[-1][1]), 0, _FOREVER))
        chosen, slack = ends[-2][1], None
        for (_, start, below), (stop, _, above) in pairwise(ends):
            spare = stop - start - size
            if spare >= 0 and (slack is None or spare < slack):
                chosen, slack = (start if below >= above else stop - size), spare
        offsets[life.name] = chosen
        placed.append(life)
    return offsets


def rounded(nbytes: int) -> int:
    """Bytes that a buffer takes in the arena."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
