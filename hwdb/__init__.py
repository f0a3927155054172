"""Facts about hardware and questions about them. Imports neither torch nor tvm.

hw = detect()                   this machine, as this process may use it
hw = lookup("raspberry-pi-4")   any record by name, alias, "native" or TVM target; UnknownTarget offers near names
hw = register("my-board", extends="raspberry-pi-5", clock_mhz=2800)      a machine of one's own
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from . import loader, targets
from .cost import Work
from .records import Cache, Cluster, Hardware, MatrixShape, Occupancy, Source

# What `target=` takes: a name, a description as TVM's Target takes it, or a machine.
Target = str | Mapping[str, Any] | Hardware

__all__ = [
    "Cache",
    "Cluster",
    "Hardware",
    "MatrixShape",
    "Occupancy",
    "Source",
    "Target",
    "Work",
    "compile_target",
    "detect",
    "lookup",
    "missing_features",
    "names",
    "obstacle",
    "register",
]


def detect() -> Hardware:
    """Return this machine: microarchitecture, usable features and cores, caches. Read once."""
    from .host import detect as read

    return read()


def lookup(target: Target) -> Hardware:
    """Return the machine of that name, or the one that a TVM target dictionary describes; "native" is this machine.

    Raises UnknownTarget, with the nearest names, where there is none.
    """
    return targets.resolve(target)


def compile_target(target: Target) -> Hardware:
    """As `lookup`, for generating code: with generic limits where the facts are uncertain.

    Raises UnknownTarget also where no code can be made for the machine.
    """
    return targets.compile_target(target)


def register(id: str, *, extends: str, kind: str = "device", **facts: Any) -> Hardware:
    """Add a machine to the database of this process, or replace one that was registered before; return it.

    `facts` are the keys of a record (docs/hardware.md) that differ from the record `extends`; without `source` they
    are what the program says, without `confidence` its is medium. Raises RecordError for a wrong fact.
    """
    return loader.register(id, {"extends": extends, **facts}, kind)


def names() -> list[str]:
    """Return every name that `lookup` takes, aliases left out; "native" comes first."""
    return ["native", *sorted(loader.database().records)]


def missing_features(required: Iterable[str]) -> list[str]:
    """Return those of the LLVM features `required` that this machine lacks: code using them would die."""
    return sorted(set(required) - detect().features)


def obstacle(hw: Hardware) -> str | None:
    """Return why code made for `hw` cannot run on this machine, or None where it can."""
    here = detect()
    if hw.isa != here.isa:
        return f"it is {hw.isa} code and this machine is {here.isa}"
    if "-macosx" in hw.triple and sys.platform != "darwin":
        return "it is code for macOS"
    lacking = missing_features(hw.features)
    return f"this machine lacks {', '.join(lacking)}" if lacking else None
