"""The database: records of TOML files by name, what they inherit, and where each fact is stated.

    database()                      the records of the package, of GRAPHWRIGHT_HWDB and of `register`
    database().lineage("zen4")      the record and its ancestors, nearest first
    database().merged("zen4")       its facts with the inherited ones filled in

A mistake in a file raises RecordError naming the file, the line, the record and the key.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecordError, UnknownTarget, suggest
from . import isa as instruction_set
from . import schema
from .build import build
from .files import Record, records_of
from .naming import bare, brand, maker, spelling, squeezed, without_model
from .records import Hardware, Source


class Database:
    """Every record of some TOML files: found at once, parsed and built on demand; `trusted` ones as they stand."""

    def __init__(self, files: Iterable[Path], trusted: bool = False) -> None:
        self.records: dict[str, Record] = {}
        self._source_records: dict[str, Record] = {}
        self._sources: dict[str, Source] = {}
        self._merged: dict[str, Mapping[str, Any]] = {}
        self._names: dict[str, str] = {}
        for file in files:
            for record in records_of(file, trusted):
                self.enter(record)

    def enter(self, record: Record) -> None:
        """Take in one more record. Raises RecordError where its id or an alias belongs to another."""
        table = self._source_records if record.kind == "source" else self.records
        if record.id in table:
            record.mistake("", f"this record already exists: {table[record.id].where}")
        table[record.id] = record
        for name in (record.id, *record.aliases) if record.kind != "source" else ():
            if (spelled := spelling(name)) == "native":
                record.mistake("aliases", "the name 'native' means the machine one works on")
            if (other := self._names.setdefault(spelled, record.id)) != record.id:
                record.mistake("aliases", f"the name {name!r} already belongs to {self.records[other].where}")
        self._forget_names()

    def remove(self, id: str) -> Record | None:
        """Take the record `id` out, if there is one, and return it."""
        self._names = {name: owner for name, owner in self._names.items() if owner != id}
        self._forget_names()
        self._merged.clear()
        return self.records.pop(id, None)

    def _forget_names(self) -> None:
        for table in ("_product_names", "_bare_names"):
            vars(self).pop(table, None)

    def check(self, records: Iterable[Record] | None = None) -> None:
        """Read and check every record (or `records`) with its sources and ancestors. Raises RecordError."""
        everything = (*self.records.values(), *self._source_records.values())
        for record in everything if records is None else records:
            record.check()
            if record.kind == "source":
                self.source(record.id)
            else:
                self._check(record)

    def source(self, id: str) -> Source:
        """Return the source called `id`; raises KeyError where there is none."""
        if id not in self._sources:
            self._sources[id] = Source(id, **self._source_records[id].values)
        return self._sources[id]

    def sources_of(self, record: Record) -> tuple[Source, ...]:
        """Return where the facts stated by `record` itself come from."""
        return tuple(self.source(id) for id in record.values["source"])

    def lineage(self, id: str) -> tuple[Record, ...]:
        """Return the record and its ancestors, nearest first. Raises RecordError where they go in a circle."""
        chain = [self.records[id]]
        while (parent := self._parent(chain[-1])) is not None:
            if parent in chain:
                chain[-1].mistake("extends", f"extends {parent.id!r}, which extends it in turn")
            chain.append(parent)
        return tuple(chain)

    def _parent(self, record: Record) -> Record | None:
        parent = record.values.get("extends")
        if parent is not None and parent not in self.records:
            near = suggest(parent, self.records)
            record.mistake("extends", f"extends {parent!r}, which does not exist{near}")
        return None if parent is None else self.records[parent]

    def merged(self, id: str) -> Mapping[str, Any]:
        """Return a record's facts with the inherited ones filled in; `features` is the final frozenset."""
        if id not in self._merged:
            record = self.records[id]
            parent = self._parent(record)
            inherited = {} if parent is None else self.merged(parent.id)
            self._merged[id] = _with_own(inherited, record.values)
        return self._merged[id]

    def find(self, name: str) -> str | None:
        """Return the id of the record that `name` means: an id, an alias or the product's name, or None.

        Spelling does not matter, nor do brands and hyphens where one record only is meant: "NVIDIA GeForce RTX 4090",
        "rtx4090" and "Radeon RX 7900 XTX" as drivers and people write them. Nor does the letter of a model where the
        product's name has none: firmware calls the Raspberry Pi 5 a Model B, and there is no other.
        """
        if found := self._names.get(spelling(name)) or self._product_names.get(spelling(name)):
            return found
        found = self._find_bare(name)
        if found is None or (made_by := brand(name)) is None:
            return found
        facts = self.merged(found)
        return found if facts.get("vendor", maker(facts["name"])) == made_by else None  # a "Tesla M4" is no Apple M4

    def _find_bare(self, name: str) -> str | None:
        short = self._bare_names
        if found := short.get(squeezed(name)) or self._names.get(bare(name)):
            return found
        lettered, plain = without_model(name)
        if (found := short.get(squeezed(lettered))) or (found := short.get(squeezed(plain))) is None:
            return found
        return found if squeezed(self.records[found].name) == squeezed(plain) else None

    def id_of(self, name: str) -> str:
        """Like `find`; raises UnknownTarget with the nearest names."""
        found = self.find(name)
        if found is None:
            raise UnknownTarget(
                f"unknown target {name!r}{suggest(bare(name), {'native', *self._names})} "
                "(`graphwright hw list` prints all names; 'native' is this machine)"
            )
        return found

    @functools.cached_property
    def _product_names(self) -> dict[str, str]:
        """What products are called in full: a board and the GPU on it differ in a word that `bare` leaves out."""
        return {spelling(record.name): record.id for record in reversed(tuple(self.records.values())) if record.name}

    @functools.cached_property
    def _bare_names(self) -> dict[str, str]:
        """Ids, aliases and product names, squeezed, that mean one record. Made on the first miss: few ask for it."""
        owners: dict[str, set[str]] = {}
        for record in tuple(self.records.values()):
            for name in (record.id, *record.aliases, record.name):
                owners.setdefault(squeezed(name), set()).add(record.id)
        return {name: min(ids) for name, ids in owners.items() if len(name) > 1 and len(ids) == 1}

    def build(self, id: str, **facts: Any) -> Hardware:
        """Build the Hardware of record `id`; `facts` (fields of Hardware) replace the record's."""
        return build(id, self.merged(id), self.sources_of(self.records[id]), **facts)

    def with_key(self, key: str) -> Iterator[Record]:
        """Yield the records that state `key` themselves, in the order of the files; only they are parsed."""
        return (record for record in tuple(self.records.values()) if record.states(key))

    def children(self, id: str) -> Iterator[Record]:
        """Yield the records that extend `id`; only they are parsed."""
        return (record for record in tuple(self.records.values()) if record.extends(id))

    def _check(self, record: Record) -> None:
        for id in record.values["source"]:
            if id not in self._source_records:
                record.mistake("source", f"source {id!r} is not in any [source.*]{suggest(id, self._source_records)}")
            self.source(id)
        if set(record.values.get("aliases", ())) != set(record.aliases):
            record.mistake("aliases", "write `aliases = [...]` at the beginning of a line")
        lineage = self.lineage(record.id)
        values = self.merged(record.id)
        for key, message in schema.class_mistakes({k: v for k, v in values.items() if k != "features"}):
            parents = " > ".join(parent.id for parent in lineage[1:]) or "nothing"
            record.mistake(key, f"{message} ({parents})" if message.endswith("extends") else message)
        isa, cpu = values["isa"], values.get("class", "cpu") in ("cpu", "board")
        known: Iterable[str] = instruction_set.FLAGS if cpu else schema.ACCELERATOR_ISAS
        if isa not in known:
            record.mistake("isa", f"isa {isa!r} is not one of {', '.join(known)}")
        if cpu and not values["triple"].startswith(isa):
            record.mistake("triple", f"triple {values['triple']!r} is not one of {isa}, the record's isa")
        for key in ("features", "without"):
            for name in record.values.get(key, ()):
                flags: Mapping[str, str] = instruction_set.FLAGS[isa] if cpu else {}
                if name not in flags:
                    record.mistake(key, f"{key}: {name!r} is not a known {isa} feature{suggest(name, flags)}")
        for key in ("gpu", "npu"):
            if (other := record.values.get(key)) is not None and other not in self.records:
                record.mistake(key, f"{key} {other!r} does not exist{suggest(other, self.records)}")
        for cluster in (clusters := record.values.get("clusters", ())):
            if cluster["core"] not in self.records:
                near = suggest(cluster["core"], self.records)
                record.mistake("clusters", f"core {cluster['core']!r} does not exist{near}")
        if clusters and clusters[0]["core"] not in {parent.id for parent in lineage}:
            record.mistake(
                "clusters", f"the fastest cores come first, and the record extends theirs: {lineage[1].id!r}"
            )


def _with_own(inherited: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a record knows: `inherited` from its parent, and its `own` values."""
    values = dict(inherited)
    for key, value in own.items():
        if key in schema.TABLES:
            values[key] = {**values.get(key, {}), **value}
        elif key not in schema.OWN:
            values[key] = value
    if clusters := own.get("clusters"):
        values.update(_of_largest(clusters, own))
    features: frozenset[str] = values.get("features", frozenset())
    values["features"] = features.union(own.get("features", ())).difference(own.get("without", ()))
    return values | {"source": own["source"], "confidence": own["confidence"]}


def _of_largest(clusters: list[dict[str, Any]], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Cores and clock of the first cluster, unless stated: work is shared by equal cores only."""
    first = {"cores": clusters[0]["count"], "clock_mhz": clusters[0].get("clock_mhz")}
    return {key: value for key, value in first.items() if value is not None and key not in stated}


# What programs registered, to be entered into every database that is read; one thread at a time changes it.
_registered: dict[str, Record] = {}
_registering = threading.Lock()


def database() -> Database:
    """Return the records that come with the package, of the directories in GRAPHWRIGHT_HWDB, and of `register`.

    The directories are separated as in PATH. Raises RecordError for a mistake in a user's file.
    """
    return _database(os.environ.get("GRAPHWRIGHT_HWDB", ""))


def register(id: str, values: Mapping[str, Any], kind: str = "device") -> Hardware:
    """Enter a record from a program, in place of one it registered before. Raises RecordError for a wrong fact."""
    with _registering:
        return _register(id, values, kind)


def _register(id: str, values: Mapping[str, Any], kind: str) -> Hardware:
    records = database()
    given = {"source": ["program"], "confidence": "medium", **values}
    given.setdefault("name", id)
    if id in records.records and id not in _registered:
        raise RecordError(f"register({id!r}): this record already exists: {records.records[id].where}")
    record = Record.registered(id, kind, given)
    replaced = records.remove(id)
    try:
        records.enter(record)
        records.check([record])
    except RecordError:
        records.remove(id)
        if replaced is not None:
            records.enter(replaced)
        raise
    _registered[id] = record
    return records.build(id)


@functools.cache
def _database(directories: str) -> Database:
    records = Database(sorted(Path(__file__).parent.glob("*.toml")), trusted=True)
    own: list[Record] = []
    for directory in filter(None, directories.split(os.pathsep)):
        if not Path(directory).is_dir():
            raise RecordError(f"GRAPHWRIGHT_HWDB names {directory!r}, which is not a directory")
        for file in sorted(Path(directory).glob("*.toml")):
            for record in records_of(file):
                records.enter(record)
                own.append(record)
    for record in _registered.values():
        records.enter(record)
    records.check([*own, *_registered.values()])
    return records
