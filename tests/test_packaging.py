"""The list of packages matches the disk, and the wheel works where the checkout is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("backends", "compiler", "hwdb", "passes", "testing")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_on_disk_is_listed() -> None:
    found = {"graphwright"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found.add(".".join(("graphwright", *path.relative_to(ROOT).parts[:-1])))
    assert set(SETTINGS["packages"]) == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"graphwright/__init__.py", "graphwright/__main__.py", "graphwright/errors.py", "graphwright/py.typed"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".toml", ".c", ".h", ".html"}:
                expected.add(f"graphwright/{path.relative_to(ROOT).as_posix()}")
    assert expected <= names
    assert not [n for n in names if n.startswith(("graphwright/tests", "graphwright/benchmarks", "tests"))]


def test_the_wheel_imports_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import graphwright, graphwright.hwdb, graphwright.compiler.capture as c;"
        "print(graphwright.__file__); print(c.__file__); print(graphwright.hwdb.detect().isa)"
    )
    # -S-like isolation from the editable install: the wheel's directory comes first.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split()
    assert all(line.startswith(str(target)) for line in lines[:2]), lines
