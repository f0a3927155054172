"""What the documentation shows is run: Python blocks as they stand, shell lines by asking the commands for help."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from graphwright.compiler.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> str:
    """The page's Python blocks as one program: later ones use what earlier ones made."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page), str(page), "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in re.findall(r"^    graphwright (.+)$", page.read_text(), re.M):
        words = shlex.split(line, comments=True)
        command = words[:2] if words[0] == "hw" else words[:1]
        result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, line
        for word in words:
            if word.startswith("--"):
                assert word in result.output, f"{line}: no {word}"


@pytest.mark.slow
def test_the_section_on_boards_of_the_readme(tmp_path: Path) -> None:
    """With Python, what pip installed and the emulator alone: no compiler, no linker, no shell."""
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64-static is not installed (Debian: apt-get install qemu-user-static)")
    section = re.search(r"^## For a Raspberry Pi\n(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M)
    assert section is not None
    commands = re.findall(r"^    (.+)$", section[1], re.M)
    assert len(commands) == 2
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qemu-aarch64-static").symlink_to(emulator)
    bare = {**os.environ, "PATH": str(tmp_path / "bin")}
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] == "graphwright":
            words = [sys.executable, "-m", "graphwright.compiler.cli", *words[1:]]
        program = shutil.which(words[0], path=bare["PATH"]) or words[0]
        done = subprocess.run(
            [program, *words[1:]], cwd=tmp_path, env=bare, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "latency: first call" in done.stdout
    assert np.load(tmp_path / "scores.npy").shape == (1, 1000)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:hwdb|passes|backends|compiler|testing|tests|benchmarks)/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path


def test_make_help_lists_the_commands_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:.*##", makefile, re.M), target


def test_the_page_of_passes_says_what_the_passes_say() -> None:
    made = runpy.run_path(str(ROOT / "tests" / "passes_page.py"))["page"]()
    assert (ROOT / "docs" / "passes.md").read_text() == made, "run `python tests/passes_page.py` to write the page anew"
