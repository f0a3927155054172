"""The runtime is compiled once, wherever it can be kept, and a missing tool is named."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest

from graphwright.backends.aot import toolchain
from graphwright.errors import GraphwrightError, ToolMissing

TRIPLE = "x86_64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("triple", "zig"),
    [
        ("x86_64-unknown-linux-gnu", "x86_64-linux-gnu"),
        ("aarch64-apple-macosx12.0.0", "aarch64-macos.12.0.0"),
        ("x86_64-linux-gnu", "x86_64-linux-gnu"),
        ("aarch64-unknown-linux-musl", "aarch64-linux-musl"),
        ("aarch64-linux-gnu", "aarch64-linux-gnu"),
        ("x86_64-linux", "x86_64-linux-gnu"),
    ],
)
def test_zigs_spelling_of_a_triple(triple: str, zig: str) -> None:
    assert toolchain.zig_target(triple) == zig


def test_the_runtime_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    first = toolchain.runtime_objects(TRIPLE)
    assert all(path.is_relative_to(tmp_path) for path in first)
    content = [path.read_bytes() for path in first]
    times = [path.stat().st_mtime_ns for path in first]
    assert toolchain.runtime_objects(TRIPLE) == first
    assert [path.stat().st_mtime_ns for path in first] == times
    first[0].unlink()  # an interrupted run: the rest is made again, the same
    assert toolchain.runtime_objects(TRIPLE) == first
    assert [path.read_bytes() for path in first] == content


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", "/proc/nowhere")
    assert all(path.is_file() for path in toolchain.runtime_objects(TRIPLE))


def test_without_the_ziglang_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as context:
        context.setattr(importlib.metadata, "version", missing)
        with pytest.raises(ToolMissing, match="pip install ziglang"):
            toolchain.runtime_objects(TRIPLE)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ToolMissing, match="ziglang cc failed with 1"):
        toolchain.runtime_objects(TRIPLE)
    assert not list(tmp_path.rglob("*.o"))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))
    full = tmp_path / "python"
    full.write_text("#!/bin/sh\necho 'error: unable to write model.o: No space left on device' >&2\nexit 1\n")
    full.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(full))
    out = tmp_path / "out"
    out.mkdir()
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room._replace(free=0 if place == out else 1 << 30))
    with pytest.raises(GraphwrightError, match=f"the disk is full: {out} has 0 .* left.*GRAPHWRIGHT_CACHE") as caught:
        toolchain.merge([tmp_path / "a.o"], out / "model.o")
    assert "ziglang" not in str(caught.value)


def test_linking_what_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_bytes(b"not an object")
    with pytest.raises(ToolMissing, match=r"bad\.o"):
        toolchain.link([tmp_path / "bad.o"], tmp_path / "model.so")
