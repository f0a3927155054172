"""The cache: whole entries or none, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from graphwright.compiler.cache import DEFAULT_LIMIT_BYTES, Cache


def write(text: str = "hello", name: str = "file"):
    return lambda directory: (directory / name).write_text(text)


def left_over(cache: Cache) -> list[str]:
    return [path.name for path in cache.root.iterdir() if path.name.startswith(".")]


def test_an_entry_is_found_by_its_key_and_only_by_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("a") is None
    path = cache.put("a", write())
    assert cache.get("a") == path
    assert (path / "file").read_text() == "hello"
    assert cache.get("b") is None
    assert left_over(cache) == []


def test_a_key_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Cache(tmp_path).get("../etc")


def test_what_write_raises_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.put("a", fail)
    assert cache.get("a") is None
    assert list(cache.root.iterdir()) == []


def test_the_entry_that_was_there_first_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def overtaken(directory: Path) -> None:
        cache.put("a", write("theirs"))
        (directory / "file").write_text("ours")

    assert (cache.put("a", overtaken) / "file").read_text() == "theirs"
    assert left_over(cache) == []


@pytest.mark.parametrize("harm", ["truncate", "change", "delete", "no index", "bad index", "strange index"])
def test_a_damaged_entry_is_dropped_and_made_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    path = cache.put("a", write())
    {
        "truncate": lambda: (path / "file").write_text("hell"),
        "change": lambda: (path / "file").write_text("hullo"),
        "delete": lambda: (path / "file").unlink(),
        "no index": lambda: (path / ".index.json").unlink(),
        "bad index": lambda: (path / ".index.json").write_text('{"file": '),
        "strange index": lambda: (path / ".index.json").write_text("[1]"),
    }[harm]()
    assert cache.get("a") is None
    assert "dropping" in caplog.text
    assert not path.exists()
    assert (cache.put("a", write("again")) / "file").read_text() == "again"


def test_put_replaces_a_damaged_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (cache.put("a", write()) / ".index.json").unlink()
    assert (cache.put("a", write("again")) / "file").read_text() == "again"


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=250)
    for number, key in enumerate("abc"):
        cache.put(key, write("x" * 100))
        if key != "c":  # an hour apart: no clock is fine enough to tell three quick writes apart
            os.utime(tmp_path / "artifacts" / key / ".index.json", (number * 3600, number * 3600))
        if key == "b":
            assert cache.get("a")  # now the most recently used
    assert cache.get("a")
    assert cache.get("b") is None
    assert cache.get("c")


def test_an_entry_larger_than_the_limit_stays_until_the_next(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=10)
    assert (cache.put("a", write("x" * 100)) / "file").exists()
    cache.put("b", write("x"))
    assert cache.get("a") is None
    assert cache.get("b")


def test_the_limit_and_the_place_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_BYTES", "123")
    cache = Cache()
    assert cache.limit_bytes == 123
    assert cache.put("a", write()).is_relative_to(tmp_path / "here")
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_BYTES", "much")
    assert Cache().limit_bytes == DEFAULT_LIMIT_BYTES
    assert "not a number" in caplog.text


@pytest.mark.parametrize("root", ["/proc/nowhere", "a file"])
def test_without_a_place_to_write_it_warns_and_goes_on(
    tmp_path: Path, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    if root == "a file":
        (tmp_path / "file").write_text("")
        root = str(tmp_path / "file")
    cache = Cache(Path(root))
    assert cache.get("a") is None
    with caplog.at_level(logging.WARNING):
        path = cache.put("a", write())
    assert (path / "file").read_text() == "hello"
    assert "GRAPHWRIGHT_CACHE" in caplog.text
    assert cache.get("a") is None


def test_a_read_only_cache_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    path = cache.put("a", write())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    for name in ("utime", "rename", "unlink"):  # a mode does not stop the superuser, whom containers run as
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert cache.get("a") == path
    assert not cache.put("b", write()).is_relative_to(tmp_path)


def test_a_full_disk_warns_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)

    def fill(directory: Path) -> None:
        if directory.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "no space left on device")
        (directory / "file").write_text("hello")

    assert (cache.put("a", fill) / "file").exists()
    assert "no space left" in caplog.text
    assert list(cache.root.iterdir()) == []


def test_another_error_of_the_system_in_write_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Cache(tmp_path).put("a", lambda directory: (directory / "missing").read_text())


CHILD = """
import sys, time
from pathlib import Path
from graphwright.compiler.cache import Cache

def write(directory):
    (directory / "half").write_text("x" * 1000)
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    (directory / "rest").write_text("y")

print(Cache(Path(sys.argv[1])).put("a", write), flush=True)
"""


def start(root: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(root), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_9_in_the_middle_leaves_no_entry_and_is_cleaned_up(tmp_path: Path) -> None:
    child = start(tmp_path, 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    cache = Cache(tmp_path)
    cache.put("other", write())
    assert len(left_over(cache)) == 2  # the lock and the directory of a writer at work are left alone
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert cache.get("a") is None
    cache.put("a", write())
    assert left_over(cache) == []
    assert cache.get("a")


def test_two_processes_write_one_key(tmp_path: Path) -> None:
    children = [start(tmp_path, 0.3) for _ in range(2)]
    results = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert results[0] == results[1] == ["writing", str(tmp_path / "artifacts" / "a")]
    cache = Cache(tmp_path)
    path = cache.get("a")
    assert path is not None
    assert (path / "rest").read_text() == "y"
    assert left_over(cache) == []


RACER = """
import sys, random
from pathlib import Path
from graphwright.compiler.cache import Cache
cache = Cache(Path(sys.argv[1]), limit_bytes=3000)
random.seed(int(sys.argv[2]))
for turn in range(150):
    key = random.choice("abcdef")
    path = cache.get(key) or cache.put(key, lambda d: (d / "file").write_text(key * 1000))
    try:
        assert (path / "file").read_text() == key * 1000
    except FileNotFoundError:
        pass  # evicted by the other process since
    if turn % 7 == 0:
        cache.drop(key)
"""


def test_processes_that_write_read_drop_and_evict_at_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert left_over(Cache(tmp_path)) == []
