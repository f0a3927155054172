"""Read the TOML records beside this file, check them, and build `Hardware` from a record and what it extends.

    [architecture.ID], [device.ID]    facts that differ from the record named by `extends`; source, confidence
    [source.ID]                       where facts come from

A key that is absent is unknown, or inherited. `features` adds to the parent's, `without` removes. A mistake
in a file raises RecordError naming the file, the line of the record, the record and the key.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecordError, UnknownTarget, suggest
from . import isa as instruction_set
from .records import Cache, Hardware, Source

_NUMBER = (int, float)
# Key -> the types it takes. Sizes and rates are positive; unknown is absent, never 0.
_KEYS: dict[str, tuple[type, ...]] = {
    "extends": (str,),
    "name": (str,),
    "aliases": (list,),
    "isa": (str,),
    "triple": (str,),
    "llvm_cpu": (str,),
    "cpuid": (list,),
    "parts": (list,),
    "features": (list,),
    "without": (list,),
    "fma_per_cycle": (int, float, dict),
    "fma_latency_cycles": (int,),
    "cores": (int,),
    "clock_mhz": _NUMBER,
    "caches": (list,),
    "core_dram_gbs": _NUMBER,
    "dram_gbs": _NUMBER,
    "launch_us": _NUMBER,
    "wake_us": _NUMBER,
    "source": (list,),
    "confidence": (str,),
}
_CACHE_KEYS = {"level", "size_bytes", "line_bytes", "ways", "shared_by_cores"}
_SOURCE_KINDS = {
    "vendor_datasheet",
    "vendor_doc",
    "driver_dump",
    "measured",
    "press",
    "derived",
    "memory",
    "system",
}
# What a record says of itself only: not handed down to those that extend it.
_OWN = {"aliases", "cpuid", "parts", "features", "without", "source", "confidence", "extends"}
_NEEDED = ("name", "isa", "triple", "llvm_cpu", "fma_per_cycle", "fma_latency_cycles", "cores")


@dataclass(frozen=True)
class Record:
    """One table of a TOML file, checked by itself."""

    id: str
    kind: str
    where: str  # "x86.toml:12: architecture.haswell"
    values: Mapping[str, Any]


class Database:
    """Every record of some directories of TOML files; read once, built on demand."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.records: dict[str, Record] = {}
        self.sources: dict[str, Source] = {}
        self._aliases: dict[str, str] = {}
        for file in files:
            self._read(file)
        for record in self.records.values():
            self._check_references(record)

    def _read(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        toml = _toml()
        try:
            tables = toml.loads(text)
        except toml.TOMLDecodeError as error:
            raise RecordError(f"{file}: not valid TOML: {error}") from error
        for kind, entries in tables.items():
            if kind not in ("architecture", "device", "source"):
                near = suggest(kind, ("architecture", "device", "source"))
                raise RecordError(f"{file}: [{kind}]: unknown kind of record{near}")
            for id, values in entries.items():
                where = f"{file}:{_line(text, kind, id)}: {kind}.{id}"
                if kind == "source":
                    self.sources[id] = _source(id, values, where)
                    continue
                _check_values(values, where)
                self._enter(Record(id, kind, where, values))

    def _enter(self, record: Record) -> None:
        for name in (record.id, *record.values.get("aliases", ())):
            other = self._aliases.setdefault(spelling(name), record.id)
            if other != record.id:
                raise RecordError(f"{record.where}: the name {name!r} already belongs to {self.records[other].where}")
        if record.id in self.records:
            raise RecordError(f"{record.where}: this record already exists: {self.records[record.id].where}")
        self.records[record.id] = record

    def _check_references(self, record: Record) -> None:
        for id in record.values["source"]:
            if id not in self.sources:
                raise RecordError(f"{record.where}: source {id!r} is not in any [source.*]{suggest(id, self.sources)}")
        lineage = self.lineage(record.id)
        values = self.merged(record.id)
        missing = [key for key in _NEEDED if key not in values]
        if missing:
            raise RecordError(
                f"{record.where}: {', '.join(missing)} missing here and in what it extends "
                f"({' > '.join(r.id for r in lineage[1:]) or 'nothing'})"
            )
        isa = values["isa"]
        if isa not in instruction_set.FLAGS:
            raise RecordError(f"{record.where}: isa {isa!r} is not one of {', '.join(instruction_set.FLAGS)}")
        for key in ("features", "without"):
            for name in record.values.get(key, ()):
                if name not in instruction_set.FLAGS[isa]:
                    raise RecordError(
                        f"{record.where}: {key}: {name!r} is not a known {isa} feature"
                        f"{suggest(name, instruction_set.FLAGS[isa])}"
                    )

    def lineage(self, id: str) -> tuple[Record, ...]:
        """Return the record and its ancestors, nearest first."""
        chain = [self.records[id]]
        while (parent := chain[-1].values.get("extends")) is not None:
            if parent not in self.records:
                near = suggest(parent, self.records)
                raise RecordError(f"{chain[-1].where}: extends {parent!r}, which does not exist{near}")
            if self.records[parent] in chain:
                raise RecordError(f"{chain[-1].where}: extends {parent!r}, which extends it in turn")
            chain.append(self.records[parent])
        return tuple(chain)

    def merged(self, id: str) -> dict[str, Any]:
        """Return a record's facts with the inherited ones filled in; `features` is the final frozenset."""
        lineage = self.lineage(id)
        values: dict[str, Any] = {}
        features: set[str] = set()
        for record in reversed(lineage):
            values.update({key: value for key, value in record.values.items() if key not in _OWN})
            features |= set(record.values.get("features", ()))
            features -= set(record.values.get("without", ()))
        own = lineage[0].values
        return {
            **values,
            "features": frozenset(features),
            "source": own["source"],
            "confidence": own["confidence"],
        }

    def find(self, name: str) -> str | None:
        """Return the id of the record that `name` (an id or alias in any spelling) means."""
        return self._aliases.get(spelling(name))

    def id_of(self, name: str) -> str:
        """Like `find`; raises UnknownTarget with the nearest names."""
        found = self.find(name)
        if found is None:
            known = {*self.records, *(a for r in self.records.values() for a in r.values.get("aliases", ()))}
            raise UnknownTarget(
                f"unknown target {name!r}{suggest(spelling(name), {'native', *known})} "
                "(`graphwright hw list` prints all names; 'native' is this machine)"
            )
        return found

    def build(self, id: str, **facts: Any) -> Hardware:
        """Build the Hardware of record `id`; `facts` (fields of Hardware) replace the record's."""
        values = self.merged(id)
        features = instruction_set.closed(facts.pop("features", values["features"]))
        bits, registers = instruction_set.vector_shape(values["isa"], features)
        cores = facts.pop("cores", values["cores"])
        result: dict[str, Any] = {
            "id": id,
            "name": values["name"],
            "isa": values["isa"],
            "triple": values["triple"],
            "llvm_cpu": values["llvm_cpu"],
            "features": features,
            "vector_bits": bits,
            "vector_registers": registers,
            "fma_per_cycle": _at_width(values["fma_per_cycle"], bits),
            "fma_latency_cycles": values["fma_latency_cycles"],
            "cores": cores,
            "clock_mhz": values.get("clock_mhz"),
            "caches": tuple(Cache(**entry) for entry in values.get("caches", ())),
            "dram_gbs": _dram_gbs(values, cores),
            "confidence": values["confidence"],
            "sources": tuple(self.sources[source] for source in values["source"]),
        }
        for name in ("launch_us", "wake_us"):
            if name in values:
                result[name] = float(values[name])
        return Hardware(**{**result, **facts})


def spelling(name: str) -> str:
    """Return `name` as names are compared: lower case, `_`, ` ` and `.` as `-`."""
    return re.sub(r"[_ .]+", "-", name.strip().lower())


@functools.cache
def database() -> Database:
    """Return the records that come with the package."""
    return Database(sorted(Path(__file__).parent.glob("*.toml")))


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        return importlib.import_module("tomli")


def _line(text: str, kind: str, id: str) -> int:
    header = re.search(rf'^\[\s*{kind}\s*\.\s*"?{re.escape(id)}"?\s*\]', text, re.MULTILINE)
    return text.count("\n", 0, header.start()) + 1 if header else 1


def _source(id: str, values: Mapping[str, Any], where: str) -> Source:
    for key in ("kind", "title"):
        if not isinstance(values.get(key), str):
            raise RecordError(f"{where}: {key} missing")
    for key in values:
        if key not in ("kind", "title", "url", "date"):
            raise RecordError(f"{where}: unknown key {key!r}{suggest(key, ('kind', 'title', 'url', 'date'))}")
    if values["kind"] not in _SOURCE_KINDS:
        raise RecordError(f"{where}: kind {values['kind']!r} is not one of {', '.join(sorted(_SOURCE_KINDS))}")
    return Source(id, **values)


def _check_values(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if key not in _KEYS:
            raise RecordError(f"{where}: unknown key {key!r}{suggest(key, _KEYS)}")
        if isinstance(value, bool) or not isinstance(value, _KEYS[key]):
            expected = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise RecordError(f"{where}: {key} = {value!r} is not {expected}")
        if isinstance(value, _NUMBER) and value <= 0:
            raise RecordError(f"{where}: {key} = {value!r}: leave an unknown value out instead of writing it as 0")
        if key != "caches" and isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise RecordError(f"{where}: {key} is a list of strings")
    for key in ("source", "confidence"):
        if not values.get(key):
            raise RecordError(f"{where}: {key} missing: every record says where it comes from and how sure it is")
    if values["confidence"] not in ("high", "medium", "low"):
        raise RecordError(f"{where}: confidence {values['confidence']!r} is not high, medium or low")
    if isinstance(rates := values.get("fma_per_cycle"), dict):
        for bits, rate in rates.items():
            if bits not in ("128", "256", "512") or not isinstance(rate, _NUMBER) or rate <= 0:
                raise RecordError(f"{where}: fma_per_cycle: {bits} = {rate!r}: vector bits (128, 256, 512) to a rate")
    _check_caches(values.get("caches", ()), where)


def _check_caches(caches: Iterable[Any], where: str) -> None:
    last = 0
    for cache in caches:
        if not isinstance(cache, dict) or not {"level", "size_bytes"} <= set(cache):
            raise RecordError(f"{where}: caches: each has at least level and size_bytes, not {cache!r}")
        for key, value in cache.items():
            if key not in _CACHE_KEYS:
                raise RecordError(f"{where}: caches: unknown key {key!r}{suggest(key, _CACHE_KEYS)}")
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise RecordError(f"{where}: caches: {key} = {value!r} is not a positive integer")
        if cache["level"] <= last:
            raise RecordError(f"{where}: caches: levels must ascend, L{cache['level']} follows L{last}")
        last = cache["level"]


def _at_width(rate: Any, bits: int) -> float:
    """Return the rate at `bits`, else at the nearest narrower known width, else at the nearest wider one."""
    if not isinstance(rate, dict):
        return float(rate)
    widths = sorted(int(width) for width in rate)
    known = [width for width in widths if width <= bits] or widths[:1]
    return float(rate[str(known[-1])])


def _dram_gbs(values: Mapping[str, Any], cores: int) -> float | None:
    """Return what the memory sustains: one core's stream times the cores, up to what all channels give."""
    limits = []
    if "core_dram_gbs" in values:
        limits.append(float(values["core_dram_gbs"]) * cores)
    if "dram_gbs" in values:
        limits.append(float(values["dram_gbs"]))
    return min(limits, default=None)
