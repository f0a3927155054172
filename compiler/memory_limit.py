"""`compile(memory_limit="64MB")`: the most bytes that the activations of one call may take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from .api import Options

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def with_memory_limit(options: Options, limit: int | str | None) -> Options:
    """`options` with a limit in bytes, or as a text such as "64MB" or "0.5GiB"; None sets none. Raises InputError."""
    return replace(options, memory_limit=_bytes(limit))


def _bytes(limit: int | str | None) -> int | None:
    if limit is None:
        return None
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        return limit
    found = (
        re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)\s*", limit, re.IGNORECASE)
        if isinstance(limit, str)
        else None
    )
    nbytes = 0 if found is None else int(float(found[1]) * _UNITS[found[2].upper()])
    if nbytes <= 0:
        raise InputError(f'memory_limit is a number of bytes, or a text such as "64MB" or "1.5GiB", got {limit!r}')
    return nbytes
