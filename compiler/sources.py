"""The files behind a function: its own, and those that it imports, and so on, as far as they may change.

Modules of Python, of this package and of PyTorch are told apart by versions and digests of their own. A module in
site-packages counts with its own file, and is not followed further.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_STARTED = time.time()
_KNOWN = frozenset({"torch", "tvm", "numpy", "graphwright"})


def digest_of(path: Path, module: str) -> tuple[str, str | None]:
    """A digest of all files that `module`, which lies at `path`, imports; and why there is none, where that is so."""
    digest, seen, waiting = hashlib.sha256(), {path}, [(path, module)]
    while waiting:
        here, name = waiting.pop(0)
        for other, file in sorted(_imported(here, name)):
            if file in seen:
                continue
            seen.add(file)
            if file.stat().st_mtime > _STARTED:
                # What was imported may be what stood there before: nothing tells.
                return "", f"imports {other}, whose file was changed while Python ran"
            digest.update(f"{other}\0".encode() + file.read_bytes())
            if not _within(file, "purelib", "platlib"):
                waiting.append((file, other))
    return digest.hexdigest(), None


def _imported(path: Path, module: str) -> Iterator[tuple[str, Path]]:
    """Modules that a file imports anywhere, with their files, as far as they are nobody else's matter."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if node.level and not package:
                continue
            base = importlib.util.resolve_name(base, package) if node.level else base
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] not in _KNOWN and (file := _file(name)) is not None:
                yield name, file


def _file(name: str) -> Path | None:
    try:
        spec: importlib.machinery.ModuleSpec | None = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None  # a name in a module, or a module that is not there: importing says so
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    file = Path(spec.origin).resolve()
    ours = file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in ("hwdb", "passes", "backends", "compiler")
    if file.suffix != ".py" or ours or (_within(file, "stdlib") and not _within(file, "purelib", "platlib")):
        return None
    return file


def _within(file: Path, *places: str) -> bool:
    return any(file.is_relative_to(Path(sysconfig.get_path(place)).resolve()) for place in places)
