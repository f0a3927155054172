"""A directory of finished artifacts, found by a key that stands for everything that decides their content.

    path = cache.get(key) or cache.put(key, write)     # write(directory) fills an empty directory

An entry is written under a temporary name and renamed when it is whole, so it is there entirely or not at all. A
writer holds a lock on its temporary directory; a lock that can be taken belongs to a process that died, and what it
left is removed. Every file's size and SHA-256 are checked by `get`; an entry that fails is dropped, to be made again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..backends.aot.toolchain import cache_directory

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 10 << 30
_INDEX = ".index.json"
_LOCK = ".lock"
_NAME = re.compile(r"[0-9A-Za-z_-]{1,128}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Cache:
    """Entries under `root`: by default the user's cache directory, or GRAPHWRIGHT_CACHE.

    They take at most `limit_bytes` (by default 10 GiB, or GRAPHWRIGHT_CACHE_BYTES); beyond that the entries used
    longest ago go. Safe for several processes and threads at once. Where the directory cannot be written, `put` warns
    and uses a temporary one.
    """

    def __init__(self, root: Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = (root or cache_directory()) / "artifacts"
        self.limit_bytes = _limit() if limit_bytes is None else limit_bytes

    def get(self, key: str) -> Path | None:
        """The directory entered under `key`, or None; marks it as used now."""
        entry = self._entry(key)
        try:
            index = json.loads((entry / _INDEX).read_text())
            damage = _damage(entry, index)
        except FileNotFoundError as error:
            if not entry.exists():
                return None
            damage = str(error)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            damage = f"its index is damaged ({error})"
        if damage:
            log.warning("dropping %s from the cache: %s", entry, damage)
            self.drop(key)
            return None
        with contextlib.suppress(OSError):  # a read-only cache serves too
            os.utime(entry / _INDEX)
        return entry

    def put(self, key: str, write: Callable[[Path], object]) -> Path:
        """Enter what `write` puts into the directory it is given; returns the directory where it lies for good.

        Where another process entered the same key meanwhile, that entry is kept and returned. An exception of `write`
        passes through and leaves nothing behind.
        """
        entry = self._entry(key)
        theirs: BaseException | None = None
        try:
            with self._temporary() as made:
                try:
                    write(made)
                except BaseException as error:
                    theirs = None if isinstance(error, OSError) and error.errno in _FULL else error
                    raise
                (made / _INDEX).write_text(json.dumps(_index(made)))
                while not _renamed(made, entry):
                    if known := self.get(key):
                        return known
                    if entry.exists():  # damaged, and could not be dropped
                        raise PermissionError(errno.EACCES, "cannot be replaced", str(entry))
        except OSError as error:
            if error is theirs:
                raise
            log.warning(
                "the cache %s cannot be written (%s), so nothing is kept for the next run; "
                "set GRAPHWRIGHT_CACHE to a directory that can",
                self.root,
                error,
            )
            return _uncached(write)
        self._evict(keep=entry)
        return entry

    def drop(self, key: str) -> None:
        """Remove the entry of `key`, if there is one."""
        self._remove(self._entry(key))

    def _entry(self, key: str) -> Path:
        assert _NAME.fullmatch(key), f"not a key: {key!r}"
        return self.root / key

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """An empty directory that is removed afterwards, by this process or by the next one that passes."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        handle, lock = self._locked()
        made = lock.with_suffix("")
        try:
            made.mkdir()
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(handle)

    def _locked(self) -> tuple[int, Path]:
        while True:
            handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=_LOCK, dir=self.root)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_nlink:  # a sweep may have taken the file between its creation and its lock
                    return handle, Path(name)
            except BlockingIOError:
                pass
            os.close(handle)

    def _sweep(self) -> None:
        """Remove the temporary directories whose writers have died."""
        for lock in self.root.glob(f".tmp-*{_LOCK}"):
            with contextlib.suppress(OSError):
                handle = os.open(lock, os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink()
                finally:
                    os.close(handle)

    def _evict(self, keep: Path) -> None:
        """Remove the entries used longest ago until the rest is within the limit; `keep` stays whatever its size."""
        entries = []
        for index in self.root.glob(f"*/{_INDEX}"):
            with contextlib.suppress(OSError, ValueError):
                size = sum(file["bytes"] for file in json.loads(index.read_text()).values())
                entries.append((index.stat().st_mtime_ns, size, index.parent))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.limit_bytes:
                break
            if entry != keep:
                log.info("removing %s from the cache: %d bytes are more than %d", entry, total, self.limit_bytes)
                self._remove(entry)
                total -= size

    def _remove(self, entry: Path) -> None:
        """Take the entry away in one step, then delete its files."""
        with contextlib.suppress(OSError), self._temporary() as trash:
            os.rename(entry, trash / "entry")


def _renamed(made: Path, entry: Path) -> bool:
    """Whether `made` became `entry`; False where there is one already."""
    try:
        os.rename(made, entry)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _uncached(write: Callable[[Path], object]) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="graphwright-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write(directory)
    return directory


def _index(directory: Path) -> dict[str, dict[str, int | str]]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }


def _damage(entry: Path, index: dict[str, dict[str, int | str]]) -> str | None:
    """What is wrong with an entry, or None."""
    for name, known in index.items():
        path = entry / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
        if file_digest(path) != known["sha256"]:
            return f"the content of {name} has changed"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _limit() -> int:
    text = os.environ.get("GRAPHWRIGHT_CACHE_BYTES", "")
    if text and not text.isdecimal():
        log.warning("GRAPHWRIGHT_CACHE_BYTES=%s is not a number of bytes; keeping %d", text, DEFAULT_LIMIT_BYTES)
    return int(text) if text.isdecimal() else DEFAULT_LIMIT_BYTES
