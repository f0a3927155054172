"""The house stands: imports go one way, importing is cheap, the wheel holds every package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "hwdb": {"hwdb", "errors"},
    "passes": {"passes", "hwdb", "errors"},
    "backends": {"backends", "passes", "hwdb", "errors"},
    "compiler": {"compiler", "backends", "passes", "hwdb", "errors", "__version__"},
    "testing": {"testing", "compiler", "backends", "passes", "hwdb", "errors"},  # for tests: nothing imports it
}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_folders(source: str, package: tuple[str, ...]) -> set[str]:
    """The top-level names of the package that a file of `package` imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module.split(".") if node.module else ()))
            found |= {full[0]} if full else {alias.name for alias in node.names}
        elif node.module and node.module.split(".")[0] == "graphwright":
            found.add(f"absolute import of {node.module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[:-1]
    assert imported_folders(path.read_text(), package) <= ALLOWED[package[0]]


def test_a_wrong_import_is_seen() -> None:
    source = "from ..compiler import api\nfrom .. import passes\ndef f():\n    from graphwright.hwdb import detect\n"
    assert imported_folders(source, ("hwdb",)) == {
        "compiler",
        "passes",
        "absolute import of graphwright.hwdb",
    }


@pytest.mark.parametrize("module", ["graphwright", "graphwright.hwdb"])
def test_importing_brings_in_neither_torch_nor_tvm(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'tvm', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_takes_less_than_a_tenth_of_a_second() -> None:
    code = "import time; t = time.process_time(); import graphwright; print(time.process_time() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    # The CPU seconds of the fastest of three: a busy machine does not change them.
    assert min(seconds) < 0.1
