"""The order of a region's steps in which the fewest bytes are alive at once.

A step may run when the steps that write its operands have run; any such order computes the same. The one that the graph
came in is kept unless another has a lower peak. Where it does not already reach the bound of its largest step, orders
are searched side by side, step by step, those with the lowest peak so far going on (a beam); of two that have run the
same steps the better one goes on, and none whose peak reaches that of the best complete order. Ahn et al., "Ordering
chaos: memory-aware scheduling of irregularly wired neural networks" (2020) search likewise, without a limit.

The search is linear: a budget of steps tried, shared by all steps, sets the width of the beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .memory import rounded
from .program import Program

_BUDGET = 200_000  # steps tried; about 4 us each
_WIDEST = 64


def order_steps(program: Program) -> tuple[Program, list[int]]:
    """`program` with its steps in the order of the lowest peak, and for each new position the old one."""
    graph = _graph(program)
    given = list(range(len(program.steps)))
    best, peak = given, _peak(graph, given)
    if peak > graph.least:
        for found in _search(graph, peak):
            if (lower := _peak(graph, found)) < peak:
                best, peak = found, lower
    if best is given:
        return program, given
    return replace(program, steps=tuple(program.steps[i] for i in best)), best


@dataclass(frozen=True)
class _Graph:
    """Steps by number. Masks are integers with one bit a step."""

    needs: list[int]  # mask of the steps that must have run
    readers: list[list[int]]  # of what a step writes
    made: list[int]  # bytes of arena that a step's results take
    kept: list[list[tuple[int, int]]]  # what a step is among the last to touch, perhaps: mask of those, bytes freed
    least: int  # no order has a lower peak than the largest step alone


def _graph(program: Program) -> _Graph:
    elsewhere = {*program.inputs, *program.weights}
    outside = elsewhere | {program.root(name) for name in program.outputs}
    writer: dict[str, int] = {}
    touched: dict[str, int] = {}
    count = len(program.steps)
    needs, readers, made = [0] * count, [[] for _ in range(count)], [0] * count  # type: ignore[var-annotated]
    names: list[list[str]] = []
    for number, step in enumerate(program.steps):
        roots = [r for r in dict.fromkeys(program.root(name) for name in step.args) if r not in elsewhere]
        names.append(roots)
        for root in roots:
            if root not in writer:
                writer[root] = number
                made[number] += 0 if root in outside else rounded(program.buffers[root].nbytes)
            else:
                needs[number] |= 1 << writer[root]
                readers[writer[root]].append(number)
            touched[root] = touched.get(root, 0) | 1 << number
    held = {root: rounded(program.buffers[root].nbytes) for root in writer if root not in outside}
    kept = [[(touched[root], held[root]) for root in roots if root in held] for roots in names]
    least = max((sum(held.get(root, 0) for root in roots) for roots in names), default=0)
    return _Graph(needs, [list(dict.fromkeys(r)) for r in readers], made, kept, least)


def _peak(graph: _Graph, order: Sequence[int]) -> int:
    run = alive = peak = 0
    for step in order:
        run |= 1 << step
        alive += graph.made[step]
        peak = max(peak, alive)
        alive -= sum(nbytes for mask, nbytes in graph.kept[step] if mask & run == mask)
    return peak


@dataclass(frozen=True)
class _State:
    """A beginning of an order."""

    peak: int
    alive: int
    run: int
    ready: tuple[int, ...]
    last: int
    before: _State | None

    def order(self) -> list[int]:
        steps, state = [], self
        while state.before is not None:
            steps.append(state.last)
            state = state.before
        return steps[::-1]


def _search(graph: _Graph, limit: int) -> list[list[int]]:
    """Complete orders with a peak below `limit`, if the beam finds any."""
    count = len(graph.needs)
    beam = [_State(0, 0, 0, tuple(i for i in range(count) if not graph.needs[i]), -1, None)]
    tried = 0
    for level in range(count):
        ready = max(len(state.ready) for state in beam)
        width = max(1, min(_WIDEST, (_BUDGET - tried) // ((count - level) * ready)))
        found: dict[int, _State] = {}
        for state in beam[:width]:
            for step in state.ready:
                tried += 1
                new = _ran(graph, state, step, limit)
                if new is not None and ((old := found.get(new.run)) is None or _key(new) < _key(old)):
                    found[new.run] = new
        beam = sorted(found.values(), key=_key)
        if not beam:
            return []
    return [state.order() for state in beam[:1]]


def _ran(graph: _Graph, state: _State, step: int, limit: int) -> _State | None:
    alive = state.alive + graph.made[step]
    peak = max(state.peak, alive)
    if peak >= limit:
        return None
    run = state.run | 1 << step
    for mask, nbytes in graph.kept[step]:
        if mask & run == mask:
            alive -= nbytes
    freed = [s for s in graph.readers[step] if graph.needs[s] & run == graph.needs[s]]
    ready = tuple(s for s in state.ready if s != step) + tuple(freed)
    return _State(peak, alive, run, ready, step, state)


def _key(state: _State) -> tuple[int, int, int]:
    """The lowest peak, then the fewest bytes; of equals, the order that the graph came in."""
    return max(state.peak, 0), state.alive, state.last
