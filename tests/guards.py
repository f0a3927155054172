"""The guards of passes, and a module's syntax tree without one: what tests/mutate_guards.py takes away.

A guard is a condition on which a pass says why it refuses (`keep(...)`, or a reason that is returned) and leaves; a
match is one on which it leaves without a word: an `if`, an operand of an `and` that a function returns, a filter of a
comprehension. Where several conditions can each refuse alone, as operands of an `or`, each is one.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

PASSES = Path(__file__).resolve().parent.parent / "passes"
SAYING = {"keep", "_refuse"}
_LEAVING = (ast.Return, ast.Continue, ast.Break, ast.Raise)


@dataclass(frozen=True)
class Guard:
    """One condition that can be taken away."""

    module: str  # dotted, below passes/
    line: int
    text: str
    kind: str  # "guard" or "match"
    place: int  # of the condition, in the order of ast.walk
    instead: bool  # what the condition is without the guard

    @property
    def name(self) -> str:
        """Where it stands, for people."""
        return f"passes/{source(self.module).relative_to(PASSES)}:{self.line}: {self.text}"


def source(module: str) -> Path:
    """The file of a module of passes."""
    return PASSES.joinpath(*module.split(".")).with_suffix(".py")


def guards_of(module: str) -> list[Guard]:
    """The guards and matches of a module, in the order of its lines."""
    tree = _tree(module)
    places = {node: place for place, node in enumerate(ast.walk(tree))}
    found: dict[ast.expr, tuple[str, bool]] = {}
    for condition, kind, instead in _conditions(tree):
        for part, value in _parts(condition, instead):
            found.setdefault(part, (kind, value))
    guards = [Guard(module, p.lineno, ast.unparse(p), kind, places[p], value) for p, (kind, value) in found.items()]
    return sorted(guards, key=lambda g: (g.line, g.place))


def _tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text())


def mutated(guard: Guard) -> ast.Module:
    """The module's syntax tree without the guard."""
    tree = _tree(guard.module)
    for place, node in enumerate(ast.walk(tree)):
        if place == guard.place:
            assert isinstance(node, ast.expr)
            return ast.fix_missing_locations(_Replace(node, guard.instead).visit(tree))
    raise AssertionError(guard)


def watched(module: str, guards: Mapping[Guard, int], function: str) -> ast.Module:
    """The module's syntax tree, where `function` is given each guard's number and what its condition says."""
    tree = _tree(module)
    nodes = list(ast.walk(tree))
    numbers = {nodes[guard.place]: number for guard, number in guards.items() if guard.module == module}
    return ast.fix_missing_locations(_Watch(numbers, function).visit(tree))


class _Replace(ast.NodeTransformer):
    """Let one expression be a truth value; it stays for the names it reads, and runs for those it gives."""

    def __init__(self, old: ast.expr, value: bool) -> None:
        self.old = old
        self.new: ast.expr = ast.BoolOp(ast.Or() if value else ast.And(), [ast.Constant(value), old])
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(old)):
            self.new = ast.Subscript(ast.Tuple([old, ast.Constant(value)], ast.Load()), ast.Constant(1), ast.Load())
        ast.copy_location(self.new, old)

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


class _Watch(ast.NodeTransformer):
    def __init__(self, numbers: Mapping[ast.AST, int], function: str) -> None:
        self.numbers, self.function = numbers, function

    def visit(self, node: ast.AST) -> Any:
        inner = self.generic_visit(node)
        if node not in self.numbers:
            return inner
        arguments: list[Any] = [ast.Constant(self.numbers[node]), inner]
        return ast.copy_location(ast.Call(ast.Name(self.function, ast.Load()), arguments, []), node)


def _conditions(tree: ast.Module) -> Iterator[tuple[ast.expr, str, bool]]:
    """Every condition on which something is left alone, whether it says so, and the value that lets everything pass."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and _leaves(node):
            if _says(node.body):
                yield node.test, "guard", False
            elif _is_silent(node):
                yield node.test, "match", False
        if isinstance(node, ast.IfExp) and _is_reason(node.body) != _is_reason(node.orelse) and not _is_text(node):
            yield node.test, "guard", not _is_reason(node.body)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.And):
            yield node.value, "match", True
        if isinstance(node, ast.comprehension):
            yield from ((test, "match", True) for test in node.ifs)
        for field in ("body", "orelse"):
            yield from _falling_through(getattr(node, field, None))


def _falling_through(body: object) -> Iterator[tuple[ast.expr, str, bool]]:
    """What has to hold, in statements that leave, for a reason at their end not to be given."""
    if not isinstance(body, list):
        return
    for at, statement in enumerate(body):
        value = statement.value if isinstance(statement, (ast.Expr, ast.Return)) else None
        if not _is_reason(value):
            continue
        said = isinstance(value, ast.Call)  # and nothing returned, or the reason is
        for earlier in itertools.takewhile(_leaves, reversed(body[:at])):
            if not _says(earlier.body) and not (said and _is_silent(earlier)):
                yield earlier.test, "guard", True


def _leaves(statement: ast.stmt) -> TypeGuard[ast.If]:
    return isinstance(statement, ast.If) and isinstance(statement.body[-1], _LEAVING)


def _parts(condition: ast.expr, instead: bool) -> list[tuple[ast.expr, bool]]:
    """The parts of a condition of which each alone refuses, and what each is without the guard.

    `instead` False: the condition refuses where it is true. So does each operand of an `or`; of an `and`, and of a
    `not` with the sides exchanged, the parts of the operands.
    """
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        inner = _parts(condition.operand, not instead)
        return inner if len(inner) > 1 else [(condition, instead)]
    if isinstance(condition, ast.BoolOp):
        parts = [_parts(value, instead) for value in condition.values]
        if isinstance(condition.op, ast.And if instead else ast.Or):
            return [part for of_value in parts for part in of_value]
        return [part for of_value in parts if len(of_value) > 1 for part in of_value] or [(condition, instead)]
    if isinstance(condition, ast.Call) and ast.unparse(condition.func) == ("all" if instead else "any"):
        inner = _parts(condition.args[0].elt, instead) if isinstance(condition.args[0], ast.GeneratorExp) else []
        return inner if len(inner) > 1 else [(condition, instead)]
    return [(condition, instead)]


def _says(body: Sequence[ast.stmt]) -> bool:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAYING:
                return True
        if isinstance(statement, ast.Raise):
            return True
        if isinstance(statement, ast.Return) and _is_reason(statement.value):
            return True
    return False


def _is_reason(value: ast.expr | None) -> bool:
    """Whether the value is a text, has one, or says one."""
    if isinstance(value, ast.Tuple):
        return any(_is_reason(v) for v in value.elts)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in SAYING
    if isinstance(value, ast.Constant):
        return isinstance(value.value, str) and " " in value.value
    return isinstance(value, ast.JoinedStr)


def _is_text(node: ast.IfExp) -> bool:
    return all(isinstance(v, ast.Constant) and isinstance(v.value, str) and v.value for v in (node.body, node.orelse))


def _is_silent(node: ast.If) -> bool:
    last = node.body[-1]
    return len(node.body) == 1 and (not isinstance(last, ast.Return) or _is_nothing(last.value))


def _is_nothing(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value in (None, False, 0, ""))
