"""Remove every guard of every pass, one at a time, and demand that a test fails: `make mutate`.

A guard is an `if` that says why it refuses (`keep(...)`, or a reason that is returned) and leaves; each operand of an
`or` is a guard of its own. A match is an `if` that leaves without a word, and each operand of an `and` that a function
returns: of those the script says which survive, but does not insist.

    python tests/mutate_guards.py                        all passes; docs/measurements/guards.json
    python tests/mutate_guards.py fuse_conv_activation   some, in the place of what the file says of them
    python tests/mutate_guards.py --matches              the matches as well
    python tests/mutate_guards.py --list                 what there is, without running anything

Nothing is written to the sources: a forked process gives the module's functions the code of a changed syntax tree, and
runs the tests of the pass, and those of the passes that import it, until one fails. Tests that
draw examples do not count.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSES = ROOT / "passes"
FILE = ROOT / "docs" / "measurements" / "guards.json"
SECONDS = 120  # of processor time that the tests of one mutant may take
NOT_CHANGED = 99  # the status of a process that could not take a guard away
# What refuses nothing: the machinery, and the meaning of operators.
EXCLUDED = {"__init__", "default", "printer", "refusals", "rewrite"}
SAYING = {"keep", "_refuse", "_keep", "refuse"}


@dataclass(frozen=True)
class Guard:
    """One condition that can be taken away."""

    module: str
    line: int
    text: str
    kind: str  # "guard" or "match"
    place: int  # of the node that holds the condition, in the order of ast.walk
    operand: int | None  # of an `or` or `and`; None: the whole condition

    @property
    def name(self) -> str:
        """Where it stands, for people."""
        return f"passes/{self.module}.py:{self.line}: {self.text}"


def guards_of(module: str) -> list[Guard]:
    """The guards and matches of a module, in the order of its lines."""
    tree = ast.parse((PASSES / f"{module}.py").read_text())
    found = []
    for place, node in enumerate(ast.walk(tree)):
        kind = _kind(node)
        if kind is None:
            continue
        condition = _condition(node)
        joint = ast.And if isinstance(node, ast.Return) and not isinstance(node.value, ast.IfExp) else ast.Or
        if isinstance(condition, ast.BoolOp) and isinstance(condition.op, joint):
            parts: list[tuple[int | None, ast.expr]] = list(enumerate(condition.values))
        else:
            parts = [(None, condition)]
        for operand, part in parts:
            found.append(Guard(module, part.lineno, ast.unparse(part), kind, place, operand))
    return sorted(found, key=lambda g: (g.line, g.place, g.operand or 0))


def mutated(guard: Guard) -> ast.Module:
    """The module's syntax tree without the guard."""
    tree = ast.parse((PASSES / f"{guard.module}.py").read_text())
    for place, node in enumerate(ast.walk(tree)):
        if place == guard.place:
            _remove(node, guard.operand)
    return ast.fix_missing_locations(tree)


def _kind(node: ast.AST) -> str | None:
    if (
        isinstance(node, ast.If)
        and not node.orelse
        and isinstance(node.body[-1], (ast.Return, ast.Continue, ast.Break))
    ):
        if _says(node.body):
            return "guard"
        last = node.body[-1]
        silent = len(node.body) == 1 and (not isinstance(last, ast.Return) or _is_nothing(last.value))
        return "match" if silent else None
    if isinstance(node, ast.Return) and isinstance(node.value, ast.IfExp):
        first, second = _is_reason(node.value.body), _is_reason(node.value.orelse)
        return "guard" if first != second else None
    if isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.And):
        return "match"
    return None


def _condition(node: ast.AST) -> ast.expr:
    if isinstance(node, ast.If):
        return node.test
    assert isinstance(node, ast.Return)
    assert node.value is not None
    return node.value.test if isinstance(node.value, ast.IfExp) else node.value


def _remove(node: ast.AST, operand: int | None) -> None:
    """Let the condition be as if the guard were not there."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp):
        assert operand is not None
        node.value = _without(node.value, operand)
        return
    holder: Any = node if isinstance(node, ast.If) else node.value  # type: ignore[attr-defined]
    if operand is not None:
        holder.test = _without(holder.test, operand)
        return
    refuses = isinstance(node, ast.If) or _is_reason(holder.body)
    holder.test = ast.copy_location(ast.Constant(not refuses), holder.test)


def _without(condition: ast.BoolOp, operand: int) -> ast.expr:
    """The condition without one operand."""
    del condition.values[operand]
    return condition if len(condition.values) > 1 else condition.values[0]


def _says(body: Sequence[ast.stmt]) -> bool:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAYING:
                return True
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.debug":
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


def _is_nothing(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value in (None, False, 0, ""))


def modules() -> list[str]:
    """The modules of passes, in order."""
    return sorted(p.stem for p in PASSES.glob("*.py") if p.stem not in EXCLUDED)


def tests_of(module: str) -> list[str]:
    """The tests that tell whether a module is right: its own, then those of the passes that import it."""
    importers: dict[str, set[str]] = {}
    for path in PASSES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [a.name for a in node.names]
                for name in names:
                    importers.setdefault(name, set()).add(path.stem)
    order, waiting = [module], [module]
    while waiting:
        for user in sorted(importers.get(waiting.pop(0), set()) - EXCLUDED):
            if user not in order:
                order.append(user)
                waiting.append(user)
    found = [ROOT / "tests" / "passes" / f"test_{name}.py" for name in (module, "refusing", *order[1:])]
    return [str(p.relative_to(ROOT)) for p in found if p.exists()]


def run_tests(tests: Sequence[str], guard: Guard | None) -> tuple[int, str]:
    """The exit status of the tests in a process of its own without the guard, and the test that failed."""
    with tempfile.NamedTemporaryFile("r") as log:
        child = os.fork()
        if not child:
            _child(tests, guard, log.name)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return 1, "timeout"
        failed = [line for line in log.read().splitlines() if line.startswith(("FAILED", "ERROR"))]
    if os.waitstatus_to_exitcode(status) == NOT_CHANGED:
        raise RuntimeError(f"{guard.name if guard else 'nothing'} cannot be taken away: {failed}")
    name = failed[0].split(" ")[1] if failed else ""
    return os.waitstatus_to_exitcode(status), name


class _RefusingFirst:
    """Order for pytest: the tests that a guard falls to, by their names, before the others."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: not _REFUSING.search(item.name))


def _child(tests: Sequence[str], guard: Guard | None, log: str) -> None:
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.RLIM_INFINITY))
    try:
        if guard is not None:
            _change(guard)
    except BaseException as error:
        print("ERROR", repr(error))
        sys.stdout.flush()
        os._exit(NOT_CHANGED)
    try:
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not hypothesis", "--no-header"]
        status = int(pytest.main([*options, "--rootdir", str(ROOT), *tests], plugins=[_RefusingFirst()]))
    except BaseException as error:
        print("ERROR", repr(error))
        status = 9
    sys.stdout.flush()
    os._exit(status)


def _change(guard: Guard) -> None:
    """Give the functions of the guard's module, wherever they are referred to, the code without the guard."""
    path = PASSES / f"{guard.module}.py"
    waiting, codes = [compile(mutated(guard), str(path), "exec")], {}
    while waiting:
        code = waiting.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    for function in _FUNCTIONS[guard.module]:
        # Lines are as they were: a name and a line are one function.
        code = codes[function.__code__.co_qualname, function.__code__.co_firstlineno]
        function.__code__ = code.replace(co_freevars=function.__code__.co_freevars)


def examine(names: Sequence[str], kinds: set[str]) -> Iterator[tuple[Guard, str, str]]:
    """Every guard with "killed", "survived" or "no verdict", and by which test."""
    sound = _SOUND
    for module in names:
        wanted = [g for g in guards_of(module) if g.kind in kinds]
        # One file after the other: most guards fall to the first.
        for guard in wanted:
            outcome, by = "survived", ""
            for test in tests_of(module):
                if test not in sound:
                    sound[test] = not run_tests([test], None)[0]
                if not sound[test]:
                    outcome = "no verdict"
                    continue
                changed, by = run_tests([test], guard)
                if changed:
                    outcome = "killed"
                    break
            yield guard, outcome, by


_REFUSING = re.compile(r"refus|kept|keep|stay|left|leave|not_|only|other|stop")
_SOUND: dict[str, bool] = {}  # test -> whether it passes as long as nothing is changed
_FUNCTIONS: dict[str, list[types.FunctionType]] = {}


def _prepare() -> None:
    """Import all that tests import, and let torch build its tables, before any fork."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import conftest  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a forked process has none of the threads that its parent started
    for module in modules():
        importlib.import_module(f"graphwright.passes.{module}")
    import graphwright.compiler.api
    import graphwright.compiler.verify  # noqa: F401
    from graphwright.testing import trace

    trace(lambda x: torch.nn.functional.gelu(x).softmax(-1) @ x.mT, [torch.randn(2, 3)])
    for function in gc.get_objects():
        if type(function) is types.FunctionType:
            path = Path(function.__code__.co_filename).resolve()
            if path.parent == PASSES:
                _FUNCTIONS.setdefault(path.stem, []).append(function)


def main() -> int:
    """Examine the guards; 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="names of passes; all without any")
    parser.add_argument("--matches", action="store_true", help="the matches as well")
    parser.add_argument("--list", action="store_true", help="print what there is")
    options = parser.parse_args()
    names = options.modules or modules()
    kinds = {"guard", "match"} if options.matches else {"guard"}
    if options.list:
        for module in names:
            for guard in guards_of(module):
                print(f"{guard.kind:5s} {guard.name}")
        return 0
    _prepare()
    results: list[tuple[Guard, str, str]] = []
    for module in names:
        of_module = []
        for guard, outcome, by in examine([module], kinds):
            of_module.append((guard, outcome, by))
            print(f"{outcome:10s} {guard.kind} {guard.name}   {by.rpartition('/')[2]}", flush=True)
        if of_module:
            _store(module, of_module)
        results += of_module
    counts = {o: sum(outcome == o for _, outcome, _ in results) for o in ("killed", "survived", "no verdict")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return any(outcome != "killed" and guard.kind == "guard" for guard, outcome, _ in results)


def _store(module: str, results: Sequence[tuple[Guard, str, str]]) -> None:
    """Put the module's verdicts in the place of its old ones, and add everything up."""
    modules: dict[str, Any] = json.loads(FILE.read_text())["modules"] if FILE.exists() else {}
    verdicts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    for kind in ("guard", "match"):
        of_kind = [r for r in results if r[0].kind == kind]
        if of_kind:
            verdicts[kind] = {
                "count": len(of_kind),
                "killed": sum(outcome == "killed" for _, outcome, _ in of_kind),
                "survived": [g.name for g, outcome, _ in of_kind if outcome != "killed"],
            }
    modules[module] = verdicts
    totals = {
        "guards": sum(v["guard"]["count"] for v in modules.values() if "guard" in v),
        "killed": sum(v["guard"]["killed"] for v in modules.values() if "guard" in v),
    }
    FILE.write_text(json.dumps({**totals, "modules": dict(sorted(modules.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
