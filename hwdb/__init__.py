"""Facts about hardware and questions about them. Imports neither torch nor tvm.

hw = detect()                   this machine, as this process may use it
hw = lookup("raspberry-pi-4")   any record by name, alias or "native"; UnknownTarget offers the nearest names
"""

from __future__ import annotations

from collections.abc import Iterable

from .cost import Work
from .records import Cache, Cluster, Hardware, Occupancy, Source

__all__ = [
    "Cache",
    "Cluster",
    "Hardware",
    "Occupancy",
    "Source",
    "Work",
    "detect",
    "lookup",
    "missing_features",
    "names",
    "obstacle",
]


def detect() -> Hardware:
    """Return this machine: microarchitecture, usable features and cores, caches. Read once."""
    from .host import detect as read

    return read()


def lookup(name: str) -> Hardware:
    """Return the record called `name`; "native" is this machine.

    Raises UnknownTarget, with the nearest names, where there is none.
    """
    from .loader import database, spelling

    if spelling(name) == "native":
        return detect()
    records = database()
    return records.build(records.id_of(name))


def names() -> list[str]:
    """Return every name that `lookup` takes, aliases left out; "native" comes first."""
    from .loader import database

    return ["native", *sorted(database().records)]


def missing_features(required: Iterable[str]) -> list[str]:
    """Return those of the LLVM features `required` that this machine lacks: code using them would die."""
    return sorted(set(required) - detect().features)


def obstacle(hw: Hardware) -> str | None:
    """Return why code made for `hw` cannot run on this machine, or None where it can."""
    here = detect()
    if hw.isa != here.isa:
        return f"it is {hw.isa} code and this machine is {here.isa}"
    lacking = missing_features(hw.features)
    return f"this machine lacks {', '.join(lacking)}" if lacking else None
