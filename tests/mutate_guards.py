"""Remove every guard of every pass, one at a time, and demand that a test fails: `make mutate`.

What guards and matches are, tests/guards.py says. Of the matches the script says which survive, but does not insist.

    python tests/mutate_guards.py                        all passes; docs/measurements/guards.json
    python tests/mutate_guards.py fuse_conv_activation   some, in the place of what the file says of them
    python tests/mutate_guards.py --matches              the matches as well
    python tests/mutate_guards.py --list                 what there is, without running anything

Nothing is written to the sources: a forked process gives the module's functions the code of a changed syntax tree, and
runs tests until one fails. It runs those in which the condition refuses, for no other can tell; a run with every
condition watched has found them. Tests that draw examples do not count.
"""

from __future__ import annotations

import argparse
import ast
import builtins
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from guards import PASSES, Guard, guards_of, mutated, source, watched

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "measurements" / "guards.json"
SECONDS = 120  # of processor time that the tests of one mutant may take
# What refuses nothing: the machinery, and the meaning of operators.
EXCLUDED = {"__init__", "default", "printer", "refusals", "rewrite"}
_PACKAGE = "graphwright.passes"


def modules() -> list[str]:
    """The modules of passes, in order."""
    return sorted(_module(p) for p in PASSES.rglob("*.py") if p.stem not in EXCLUDED)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PASSES).with_suffix("").parts)


def tests_of(module: str) -> tuple[list[str], list[str]]:
    """The files of tests that can tell whether a module is right: those that import it, and those of passes that do."""
    imported_by: dict[str, set[str]] = {}
    for path in PASSES.rglob("*.py"):
        for name in _imported(path) - {_module(path)}:
            imported_by.setdefault(name, set()).add(_module(path))
    order, waiting = [module], [module]
    while waiting:
        for user in sorted(imported_by.get(waiting.pop(0), set()) - EXCLUDED - set(order)):
            order.append(user)
            waiting.append(user)
    near, far = [], []
    for path in sorted((ROOT / "tests" / "passes").glob("test_*.py")):
        names = _imported(path)
        if not names.isdisjoint(order):
            (near if module in names else far).append(str(path.relative_to(ROOT)))
    return near, far


def _imported(path: Path) -> set[str]:
    """The modules of passes that a file imports; what it imports from them goes by such names too."""
    names: set[str] = set()
    rooms = path.parent.relative_to(PASSES).parts if path.is_relative_to(PASSES) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if 0 < node.level <= len(rooms) + 1:
            module = ".".join([*rooms[: len(rooms) + 1 - node.level], *module.split(".")]).strip(".")
        elif not f"{module}.".startswith(f"{_PACKAGE}."):
            continue
        module = module.removeprefix(_PACKAGE).strip(".")
        names |= {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
    return names


def run_tests(files: Sequence[str], guard: Guard, only: set[str] | None) -> tuple[str, str]:
    """What becomes of the guard in a process of its own, and the test that failed; `only` these tests of the files."""
    with tempfile.NamedTemporaryFile("r") as log:
        child = os.fork()
        if not child:
            _child(files, lambda: _change(guard.module, mutated(guard)), _Chosen(only), log.name)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return "killed", "timeout"
        failed = [line for line in log.read().splitlines() if line.startswith(("FAILED", "ERROR"))]
    code = os.waitstatus_to_exitcode(status)
    # A name that only the guard defined says nothing about the guard; nor does pytest, where no test ran.
    if code not in (0, 1) or any(_OF_THE_MUTANT.search(line) for line in failed):
        return "no verdict", f"status {code}: {failed}"
    return ("killed" if code else "survived"), failed[0].split(" ")[1] if failed else ""


def watch(files: Sequence[str], guards: Sequence[Guard]) -> dict[Guard, set[str]]:
    """For each guard, the tests in which its condition is other than it would be without the guard; "": all.

    No other test can tell the guard from nothing.
    """
    fired: dict[Guard, set[str]] = {guard: set() for guard in guards}
    for file in files:
        with tempfile.NamedTemporaryFile("r") as log:
            child = os.fork()
            if not child:
                plugin = _Watching(guards)
                _child([file], plugin.install, plugin, log.name)
            os.waitpid(child, 0)
            lines = log.read().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if failed:
            raise SystemExit("These fail while every guard is there:\n" + "\n".join(failed))
        (seen,) = (line for line in lines if line.startswith(_Watching.MARK))
        for place, tests in json.loads(seen.removeprefix(_Watching.MARK)).items():
            fired[guards[int(place)]].update(f"{file}::" if test == "" else test for test in tests)
    return fired


class _Chosen:
    """For pytest: the chosen tests, those first whose names say that something is refused; none that draw examples."""

    def __init__(self, only: set[str] | None = None) -> None:
        self.only = only

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not getattr(item.obj, "is_hypothesis_test", False)]
        items[:] = [item for item in items if self.only is None or item.nodeid in self.only]
        items.sort(key=lambda item: not _REFUSING.search(item.name))


class _Watching(_Chosen):
    """For pytest: which conditions of guards are met in which tests."""

    MARK = "guards that refuse: "

    def __init__(self, guards: Sequence[Guard]) -> None:
        super().__init__()
        self.guards = guards
        self.test = ""  # none: what runs while tests are collected
        self.fired: dict[int, set[str]] = {}

    def install(self) -> None:
        builtins.__dict__[_WATCHED] = self.note
        numbers = {guard: number for number, guard in enumerate(self.guards)}
        for module in {guard.module for guard in self.guards}:
            _change(module, watched(module, numbers, _WATCHED))

    def note(self, number: int, value: Any) -> Any:
        if bool(value) != self.guards[number].instead:
            self.fired.setdefault(number, set()).add(self.test)
        return value

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid

    def pytest_unconfigure(self) -> None:
        print(self.MARK + json.dumps({n: sorted(tests) for n, tests in self.fired.items()}))


def _child(files: Sequence[str], change: Callable[[], None], plugin: _Chosen, log: str) -> NoReturn:
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.RLIM_INFINITY))
    try:
        import pytest

        change()
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--no-header"]
        if not isinstance(plugin, _Watching):
            options.append("-x")
        status = int(pytest.main([*options, "--rootdir", str(ROOT), *files], plugins=[plugin]))
    except BaseException as error:
        print("ERROR", repr(error))
        status = 9
    sys.stdout.flush()
    os._exit(status)


def _change(module: str, tree: ast.Module) -> None:
    """Give the functions of a module, wherever they are referred to, the code of a changed syntax tree."""
    waiting = [compile(tree, str(source(module)), "exec")]
    codes: dict[tuple[str, int], list[types.CodeType]] = {}
    while waiting:
        code = waiting.pop()
        codes.setdefault((code.co_qualname, code.co_firstlineno), []).append(code)
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    for function in _FUNCTIONS[module]:
        # Lines are as they were: a name and a line are one function.
        (code,) = codes[function.__code__.co_qualname, function.__code__.co_firstlineno]
        assert code.co_freevars == function.__code__.co_freevars, code
        function.__code__ = code


def examine(module: str, kinds: set[str]) -> dict[Guard, tuple[str, str]]:
    """For each guard of a module "killed", "survived" or "no verdict", and by which test, or why not."""
    left = [g for g in guards_of(module) if g.kind in kinds]
    found = dict.fromkeys(left, ("survived", ""))
    for files in tests_of(module):
        fired = watch(files, left) if left else {}
        found |= {guard: _verdict(guard, tests) for guard, tests in fired.items()}
        left = [guard for guard in left if found[guard][0] == "survived"]
    return found


def _verdict(guard: Guard, fired: set[str]) -> tuple[str, str]:
    if not fired:
        return "survived", "it refuses in no test"
    files = list(dict.fromkeys(test.partition("::")[0] for test in sorted(fired)))
    outcome = "survived", ""
    if not any(test.endswith("::") for test in fired):
        outcome = run_tests(files, guard, fired)
    # What a test keeps for those behind it, they fail by.
    return run_tests(files, guard, None) if outcome[0] == "survived" else outcome


_REFUSING = re.compile(r"refus|kept|keep|stay|left|leave|not_|only|other|stop")
_OF_THE_MUTANT = re.compile(r"NameError|UnboundLocalError|SyntaxError")
_WATCHED = "__watched__"
_FUNCTIONS: dict[str, list[types.FunctionType]] = {}


def _prepare() -> None:
    """Import all that tests import, and let torch build its tables, before any fork."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hypothesis' reads all sources in every process
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
            if path.is_relative_to(PASSES):
                _FUNCTIONS.setdefault(_module(path), []).append(function)


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
        of_module = [(guard, *found) for guard, found in examine(module, kinds).items()]
        for guard, outcome, by in of_module:
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
