"""The simplest program that still fails: fewer results, fewer lines, inputs in the place of what leads to a line.

Hypothesis shrinks the choices that a program was drawn by, which is right for any test but slow where a run takes a
tenth of a second. This works on the lines themselves and needs a run or two a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .program import Program

_NAME = re.compile(r"\b[vx]\d+\b")


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program no single step of which makes simpler without `fails` becoming false; `fails(program)` is true."""
    found = True
    while found:
        found = False
        for simpler in _simpler(program):
            if fails(simpler):
                program, found = simpler, True
                break
    return program


def _simpler(program: Program) -> Iterator[Program]:
    """Programs one step simpler, those that save most first."""
    names = [_assigned(line) for line in program.lines]
    for made in names:  # one value alone, the earliest first
        for name in made:
            if program.results != (name,):
                candidate = _without_dead(replace(program, results=(name,)))
                if len(candidate.lines) < len(program.lines):
                    yield candidate
    for i in range(len(program.results)):
        if len(program.results) > 1:
            yield _without_dead(replace(program, results=(*program.results[:i], *program.results[i + 1 :])))
    values = _values(program)
    if values is not None:
        for i in reversed(range(len(program.lines))):
            if names[i] and (cut := _cut(program, i, names[i], values)) is not None:
                yield cut
    for i, line in enumerate(program.lines):
        if not _assigned(line):
            yield replace(program, lines=(*program.lines[:i], *program.lines[i + 1 :]))
    if (cleaned := _without_dead(program)) != program:
        yield cleaned
    # It may be what nobody reads that matters: line by line.
    for i, made in enumerate(names):
        rest = (*program.lines[:i], *program.lines[i + 1 :])
        text = "\n".join((*rest, *program.results))
        if made and not any(re.search(rf"\b{name}\b", text) for name in made):
            yield replace(program, lines=rest)
        elif made and values is not None and (cut := _cut(program, i, made, values, keep=True)) is not None:
            yield cut


def _cut(
    program: Program, index: int, made: list[str], values: dict[str, torch.Tensor], keep: bool = False
) -> Program | None:
    """The program with fresh inputs in the place of what line `index` computes; `keep`: with all other lines."""
    lines, inputs = list(program.lines), list(program.inputs)
    text = "\n".join((*lines[index + 1 :], *program.results))
    renamed: dict[str, str] = {}
    for name in made:
        if re.search(rf"\b{name}\b", text):
            renamed[name] = f"x{len(inputs)}"
            inputs.append(f"tensor({tuple(values[name].shape)}, {values[name].dtype}, {len(inputs)})")
    rest = [_NAME.sub(lambda m: renamed.get(m[0], m[0]), line) for line in lines[index + 1 :]]
    results = tuple(renamed.get(r, r) for r in program.results)
    before = Program(tuple(inputs), program.weights, (*lines[:index], *rest), results)
    candidate = before if keep else _without_dead(before)
    # An input instead of one line is no gain, unless it makes lines before it superfluous.
    simpler = (len(candidate.lines), len(candidate.inputs)) < (len(program.lines), len(program.inputs))
    return candidate if simpler else None


def _without_dead(program: Program) -> Program:
    """The program without lines, weights and inputs that nothing reads; inputs are numbered anew."""
    needed, lines = set(program.results), []
    for line in reversed(program.lines):
        made = _assigned(line)
        if not made or needed & set(made):
            lines.append(line)
            needed |= set(_NAME.findall(line))
    text = "\n".join(lines)
    weights = tuple((n, e) for n, e in program.weights if re.search(rf"self\.{n}\b", text))
    kept = [i for i in range(len(program.inputs)) if f"x{i}" in needed] or [0]
    renamed = {f"x{old}": f"x{new}" for new, old in enumerate(kept)}
    inputs = tuple(program.inputs[i] for i in kept)
    final = tuple(_NAME.sub(lambda m: renamed.get(m[0], m[0]), line) for line in reversed(lines))
    return Program(inputs, weights, final, tuple(renamed.get(r, r) for r in program.results))


def _assigned(line: str) -> list[str]:
    """The names a line gives a value for the first time; none for a line that changes something in place."""
    match = re.match(r"((?:v\d+)(?:, v\d+)*) = ", line)
    return match[1].split(", ") if match else []


def _values(program: Program) -> dict[str, torch.Tensor] | None:
    """What every line computes."""
    names = [name for line in program.lines for name in _assigned(line)]
    if not names:
        return None
    try:
        with torch.no_grad():
            results = replace(program, results=tuple(names)).module()(*program.arguments())
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    return dict(zip(names, results, strict=True))
