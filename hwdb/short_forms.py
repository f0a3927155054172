"""Short forms that keep the record files small, written out before a record is checked.

    l2_bytes = "32M"                          33554432; K, M and G are powers of 1024
    memory = "24G 1008"                       dram_bytes = "24G", dram_gbs = 1008
    caches = ["48K 12", "36M 12 /24"]         size, ways, cores that share it; "@128" bytes of a line. Level by place
    clusters = ["4 cortex-a76 2400"]          [{ core = "cortex-a76", count = 4, clock_mhz = 2400 }]
    source = "high: xla-spec, nvidia-a100"    source = ["xla-spec", "nvidia-a100"], confidence = "high"

What is like none of them stays as it is, for the checks to name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SIZE = re.compile(r"(\d+)([KMG])")
_CACHE = re.compile(r"(\d+[KMG])(?: (\d+))?(?: /(\d+))?(?: @(\d+))?")
_MEMORY = re.compile(r"(\d+[KMG]) (\d+(?:\.\d+)?)")
_CLUSTER = re.compile(r"(\d+) ([\w-]+)(?: (\d+(?:\.\d+)?))?")


def written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's values with their short forms written out."""
    result = {key: _bytes(value) if "bytes" in key else value for key, value in values.items()}
    memory = values.get("memory")
    if memory and (parts := _MEMORY.fullmatch(str(memory))) and not {"dram_bytes", "dram_gbs"} & values.keys():
        del result["memory"]
        result |= {"dram_bytes": _bytes(parts[1]), "dram_gbs": float(parts[2])}
    if isinstance(levels := values.get("caches"), list):
        result["caches"] = [_cache(entry, level) for level, entry in enumerate(levels, 1)]
    if isinstance(groups := values.get("clusters"), list):
        result["clusters"] = [_cluster(group) for group in groups]
    if isinstance(stated := values.get("source"), str):
        confidence, _, ids = stated.rpartition(":")
        given = {"confidence": confidence.strip()} if confidence else {}
        if not given.keys() & values.keys():
            result |= {**given, "source": [id.strip() for id in ids.split(",")]}
    return result


def _bytes(value: Any) -> Any:
    parts = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return value if parts is None else int(parts[1]) << {"K": 10, "M": 20, "G": 30}[parts[2]]


def _cache(entry: Any, level: int) -> Any:
    parts = _CACHE.fullmatch(entry) if isinstance(entry, str) else None
    if parts is None:
        return entry
    further = {"ways": parts[2], "shared_by_cores": parts[3], "line_bytes": parts[4]}
    known = {key: int(text) for key, text in further.items() if text is not None}
    return {"level": level, "size_bytes": _bytes(parts[1]), **known}


def _cluster(group: Any) -> Any:
    parts = _CLUSTER.fullmatch(group) if isinstance(group, str) else None
    if parts is None:
        return group
    clock = {"clock_mhz": float(parts[3])} if parts[3] else {}
    return {"core": parts[2], "count": int(parts[1]), **clock}
