"""Less memory for more work: cheap values are computed again in front of a later reader instead of being kept.

    t1 = k(t0); ... the fullest step ...; y = f(t1)    ->    t1 = k(t0); ...; t2 = k(t0); y = f(t2)

As long as more than `limit` bytes are alive at the fullest step, one of the values that lie idle there goes: that
which frees the most bytes for a predicted second. Its kernel runs again on the same operands, so the bits are the same.
An operand that would have to be kept for it counts against it.

Refused for results of the region, for kernels with several results, and where the bytes above the limit, summed over
all steps, would not become fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .memory import rounded
from .program import Buffer, Program, Step

_MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Again:
    """A program in which steps are repeated: for each step, the number it had in the one it came from."""

    program: Program
    origin: tuple[int, ...]


def rematerialise(program: Program, limit: int, seconds: Sequence[float]) -> Again:
    """Bring `program` to at most `limit` bytes alive at once, or as near as possible.

    `seconds` are what each step takes. Every buffer is written by the first step that names it, and by no other.
    """
    state = Again(program, tuple(range(len(program.steps))))
    for _ in range(_MOST_ROUNDS):
        lives = _lives(state.program)
        load = _load(lives, len(state.program.steps))
        excess = sum(max(0, nbytes - limit) for nbytes in load)
        if not excess:
            break
        better = _round(state, lives, load, limit, excess, seconds)
        if better is None:
            break
        state = better
    return state


@dataclass
class _Life:
    """A buffer of the arena: its bytes, the step that writes it, and those that name it, in order."""

    nbytes: int
    uses: list[int]

    @property
    def first(self) -> int:
        return self.uses[0]

    @property
    def last(self) -> int:
        return self.uses[-1]


def _lives(program: Program) -> dict[str, _Life]:
    outside = {*program.inputs, *program.weights, *(program.root(name) for name in program.outputs)}
    lives: dict[str, _Life] = {}
    for number, step in enumerate(program.steps):
        for root in dict.fromkeys(program.root(name) for name in step.args):
            if root not in outside:
                lives.setdefault(root, _Life(rounded(program.buffers[root].nbytes), [])).uses.append(number)
    return lives


def _load(lives: dict[str, _Life], steps: int) -> list[int]:
    """The bytes alive at every step."""
    change = [0] * (steps + 1)
    for life in lives.values():
        change[life.first] += life.nbytes
        change[life.last + 1] -= life.nbytes
    load, alive = [], 0
    for delta in change[:-1]:
        alive += delta
        load.append(alive)
    return load


def _round(
    state: Again, lives: dict[str, _Life], load: list[int], limit: int, excess: int, seconds: Sequence[float]
) -> Again | None:
    """The state with one value computed again, the best of those that lie idle at the fullest step."""
    program = state.program
    fullest = max(range(len(load)), key=load.__getitem__)
    candidates = []
    for root, life in lives.items():
        if not life.first < fullest < life.last or fullest in life.uses:
            continue
        reader = next(use for use in life.uses if use > fullest)
        saved = life.nbytes - _kept_longer(program, lives, life.first, root, fullest, reader)
        if saved > 0 and not _refusal(program, lives, life.first, root):
            candidates.append((saved / max(seconds[state.origin[life.first]], 1e-9), root, life.first, reader))
    for _, root, writer, reader in sorted(candidates, reverse=True)[:8]:
        new = _again(state, root, writer, reader)
        after = _load(_lives(new.program), len(new.program.steps))
        if sum(max(0, nbytes - limit) for nbytes in after) < excess:
            return new
    return None


def _refusal(program: Program, lives: dict[str, _Life], writer: int, root: str) -> str:
    step = program.steps[writer]
    if step.kernel is None:
        return "a copy"
    results = {program.root(name) for name in step.args if _written_by(program, lives, name, writer)}
    if results != {root}:
        return "the kernel has several results"
    return ""


def _written_by(program: Program, lives: dict[str, _Life], name: str, step: int) -> bool:
    root = program.root(name)
    if root in lives:
        return lives[root].first == step
    # A result of the region: written by the first step that names it.
    given = root in program.inputs or root in program.weights
    return not given and not any(root == program.root(a) for s in program.steps[:step] for a in s.args)


def _kept_longer(program: Program, lives: dict[str, _Life], writer: int, root: str, fullest: int, reader: int) -> int:
    """Bytes of the operands that would stay alive over the fullest step for the sake of the second run."""
    operands = {program.root(name) for name in program.steps[writer].args} - {root}
    return sum(life.nbytes for o in operands if (life := lives.get(o)) is not None and life.last < fullest)


def _again(state: Again, root: str, writer: int, reader: int) -> Again:
    """Run step `writer` again in front of step `reader`; it and those behind it read the second value."""
    program = state.program
    buffers = dict(program.buffers)
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        if program.root(name) != root:
            return name
        if name not in names:
            fresh = f"{name}_again"
            while fresh in buffers:
                fresh += "_"
            old = program.buffers[name]
            alias = None if old.alias is None else renamed(old.alias)
            buffers[fresh] = Buffer(fresh, old.shape, old.dtype, "temporary", alias)
            names[name] = fresh
        return names[name]

    def rename(step: Step) -> Step:
        return replace(step, args=tuple(renamed(name) for name in step.args))

    steps, origin = list(program.steps), list(state.origin)
    behind = [rename(step) for step in steps[reader:]]
    steps[reader:] = [rename(steps[writer]), *behind]
    origin.insert(reader, origin[writer])
    return Again(replace(program, steps=tuple(steps), buffers=buffers), tuple(origin))
