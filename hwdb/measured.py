"""Rates measured on this machine (`graphwright hw calibrate`), kept in a file, in place of the record's.

    <user data>/graphwright/calibration-<digest>.json       GRAPHWRIGHT_DATA names another directory

The digest is of what the measurement depends on: processor, cores in use, vector width. A machine that shows other
features or gives other cores than when it was measured is not calibrated, rather than wrongly so. A file that cannot
be used is left aside with a warning that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .records import Hardware, Source

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Measured:
    """What was measured, of all cores together."""

    machine: str  # `identity` of the machine
    date: str  # 2026-11-30
    flops: float  # float32 FLOP/s of independent multiply-adds
    level_gbs: Mapping[int, float]  # GB/s read, by cache level; 0 is memory
    launch_us: float  # starting and joining a parallel region whose threads are awake
    wake_us: float  # until a sleeping thread runs


def identity(hw: Hardware) -> str:
    """What figures of `hw` hold for."""
    return f"{hw.id}, {hw.name}, {hw.cores} cores, {hw.vector_bits}-bit vectors"


def path_of(hw: Hardware) -> Path:
    """Where the figures of `hw` are kept."""
    directory = os.environ.get("GRAPHWRIGHT_DATA")
    if directory is None:
        import platformdirs

        directory = platformdirs.user_data_dir("graphwright")
    digest = hashlib.sha256(identity(hw).encode()).hexdigest()[:12]
    return Path(directory) / f"calibration-{digest}.json"


def store(hw: Hardware, measured: Measured) -> Path:
    """Write `measured` for `hw` in one step; returns the file. Raises OSError where it cannot be written."""
    path = path_of(hw)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps({"version": VERSION, **asdict(measured)}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read(hw: Hardware) -> Measured | None:
    """The figures measured on `hw`, or None where there are none that can be used."""
    path = path_of(hw)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn(path, str(error))
        return None
    try:
        found = _parsed(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _warn(path, f"{type(error).__name__}: {error}")
        return None
    if found.machine != identity(hw):
        _warn(path, f"it was measured on {found.machine}, and this is {identity(hw)}")
        return None
    return found


def applied(hw: Hardware) -> Hardware:
    """`hw` with the rates measured on it; `hw` itself where it was not calibrated."""
    found = read(hw)
    return hw if found is None else with_figures(hw, found)


def with_figures(hw: Hardware, found: Measured) -> Hardware:
    """`hw` with the rates that `found` has."""
    per_cycle = 2.0 * hw.lanes("float32") * hw.fma_per_cycle * hw.cores
    source = Source("calibration", "measured", "graphwright hw calibrate on this machine", date=found.date)
    return replace(
        hw,
        clock_mhz=found.flops / per_cycle / 1e6,
        core_gbs=tuple((level, rate / hw.cores) for level, rate in sorted(found.level_gbs.items()) if level),
        dram_gbs=found.level_gbs.get(0, hw.dram_gbs),
        launch_us=found.launch_us,
        wake_us=found.wake_us,
        calibrated=found.date,
        sources=(source, *hw.sources),
    )


def _parsed(data: Any) -> Measured:
    if data["version"] != VERSION:
        raise ValueError(f"its version is {data['version']!r}, not {VERSION}")
    levels = {int(level): _positive("level_gbs", rate) for level, rate in data["level_gbs"].items()}
    if min(levels, default=0) < 0:
        raise ValueError(f"level_gbs has the level {min(levels)}, and 0 is memory")
    rates = {key: _positive(key, data[key]) for key in ("flops", "launch_us", "wake_us")}
    return Measured(str(data["machine"]), str(data["date"]), level_gbs=levels, **rates)


def _positive(key: str, value: Any) -> float:
    number = 0.0 if isinstance(value, bool) else float(value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{key} is {value!r}, not a positive number")
    return number


def _warn(path: Path, why: str) -> None:
    log.warning("%s is not used: %s; measure again with `graphwright hw calibrate`, or remove the file", path, why)
