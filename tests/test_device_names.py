"""A chip is data, not code: outside hwdb nothing asks for a machine by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from graphwright.hwdb.loader import database

ROOT = Path(__file__).resolve().parent.parent


def named_devices(source: str) -> set[str]:
    """String constants that are names of records, those in docstrings left out."""
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    }
    return {text for text in strings if names_a_machine(text)}


def names_a_machine(text: str) -> bool:
    """Whether `text` is the name of a machine, and not of an instruction set (aarch64, sm_80) or a level of it."""
    id = database().find(text)
    levels = ("x86-64", "sm_", "gfx")
    return id is not None and not id.startswith(levels) and "extends" in database().records[id].values


def questions_about_identity(source: str) -> list[int]:
    """Lines that compare the id, name or vendor of a machine."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Attribute)
        and side.attr in ("id", "name", "vendor", "llvm_cpu")
        and isinstance(side.value, ast.Name)
        and side.value.id in ("hw", "hardware", "machine", "target")
    ]


@pytest.mark.parametrize("folder", ["passes", "backends", "compiler", "testing"])
def test_no_machine_is_asked_for_by_name(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        where = str(file.relative_to(ROOT))
        named = named_devices(file.read_text())
        assert not named, f"{where} names {sorted(named)}: ask a question of Hardware instead"
        assert not questions_about_identity(file.read_text()), where


def test_the_test_finds_what_it_looks_for():
    assert named_devices('"""zen4 is fast"""\nif name == "zen4": pass\nx = "Raspberry Pi 5"') == {
        "zen4",
        "Raspberry Pi 5",
    }
    assert questions_about_identity("if hw.cores == 2: pass\nif hw.id == 'x': pass\nif 'A' in hw.name: pass") == [2, 3]
