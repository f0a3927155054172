"""Which passes run: `compile(passes=..., kernel_fusion=...)`, checked, and told apart in the cache."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..errors import InputError, suggest
from ..hwdb import Hardware
from . import sources
from .pass_checks import Pass, checked_passes, is_ours, name_of


def select(
    passes: Any = None, kernel_fusion: Any = None, hw: Hardware | None = None
) -> tuple[tuple[Pass, ...], frozenset[str] | None]:
    """The passes to run for `hw`, and the families of fusions they may make; None stands for all of them.

    Raises PassError for what is no pass, InputError for what is no family.
    """
    from ..passes.default import FAMILIES, PASSES, passes_for

    defaults = PASSES if hw is None else passes_for(hw)
    chosen: tuple[Pass, ...] = defaults if passes is None else checked_passes(passes)
    families = checked_families(kernel_fusion, FAMILIES)
    if families is None:
        return chosen, None
    left_out = {rewrite for name, family in FAMILIES.items() if name not in families for rewrite in family.passes}
    return tuple(rewrite for rewrite in chosen if not any(rewrite is other for other in left_out)), families


def checked_families(kernel_fusion: Any, known: Iterable[str]) -> frozenset[str] | None:
    """The names as a set; raises InputError for one there is not, with the nearest ones."""
    if kernel_fusion is None:
        return None
    if isinstance(kernel_fusion, str) or not isinstance(kernel_fusion, Iterable):
        raise InputError(f'kernel_fusion is a list such as ["conv+relu", "matmul+bias"], got {kernel_fusion!r}')
    names = list(kernel_fusion)
    there = list(known)
    for name in names:
        if name not in there:
            near = suggest(str(name), there)
            raise InputError(f"kernel_fusion names {name!r}, which is no family of fusions{near}; {_all(there)}")
    return frozenset(names)


def _all(names: list[str]) -> str:
    return f"there are {', '.join(names)}"


def identities(passes: Iterable[Pass]) -> tuple[list[str], str | None]:
    """What tells the passes from others in the cache, and why there is no telling, where that is so."""
    found = []
    for rewrite in passes:
        identity, reason = _identity(rewrite)
        if reason is not None:
            return [], f"pass {name_of(rewrite)} {reason}"
        found.append(identity)
    return found, None


def _identity(rewrite: Any) -> tuple[str, str | None]:
    """Module, qualified name, and a digest of the function's code, of its file, and of the files that it imports."""
    if not isinstance(rewrite, FunctionType):
        return "", "is not a plain function, so what it holds is not known"
    name = f"{rewrite.__module__}.{rewrite.__qualname__}"
    if is_ours(rewrite) and getattr(sys.modules.get(rewrite.__module__), rewrite.__name__, None) is rewrite:
        return name, None  # the digest of this package says the rest
    if rewrite.__closure__ or rewrite.__defaults__ or rewrite.__kwdefaults__:
        return "", "holds values besides its source: a closure, or defaults of arguments"
    path = inspect.getsourcefile(rewrite)
    try:
        source = Path(path).read_bytes() if path else b""
    except OSError:
        source = b""
    if not source:
        return "", "has no source file"
    assert path is not None
    try:
        helpers, reason = sources.digest_of(Path(path).resolve(), rewrite.__module__)
    except SyntaxError:
        return "", f"stands in {path}, which is no Python module"
    if reason is not None:
        return "", reason
    # The file may have been edited since it was imported: what runs is the code.
    digest = hashlib.sha256(source + _code(rewrite.__code__).encode())
    return f"{name} {digest.hexdigest()} {helpers}", None


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
