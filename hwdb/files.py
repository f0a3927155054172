"""Find the records in a TOML file without reading them all: reading 100 KB of TOML takes longer than a look-up may.

A file is cut at its headers, which are [kind.id] at the beginning of a line; its aliases are found the same way. The
text between is parsed when somebody asks for the record, so that looking one up costs as much as its ancestors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tomli  # compiled: a third of tomllib's time

from ..errors import RecordError, suggest
from . import schema
from .short_forms import written_out

# [kind.id] or [kind."id"]; `aliases = [...]`, on one line or several.
_LANDMARK = re.compile(
    r"""\n(?: \[ \s* ([\w-]+) \s* \. \s* (?: "([^"\n]+)" | ([\w-]+) ) \s* \]
            | aliases \s* = \s* \[ ([^\]]*) \] )""",
    re.VERBOSE,
)
_HEADER = "a record begins a line with [kind.id]; an id with a . or + stands in double quotes"
_COMMENTS = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*")
_STRING = re.compile(r"""["']([^"'\n]*)["']""")


class _Place(NamedTuple):
    """Where a record stands. A tuple, since hundreds are made before the first is read."""

    id: str
    kind: str
    file: str
    content: str  # a newline and the whole file
    start: int  # where in it the record's header begins, after a newline
    end: int  # where the next one does
    aliases: tuple[str, ...] = ()
    given: Mapping[str, Any] | None = None  # what a program registered, in place of text
    trusted: bool = False  # of the package, whose tests check it: that takes longer than reading it


class Record(_Place):
    """One table of a TOML file: an architecture, a device or a source."""

    @staticmethod
    def registered(id: str, kind: str, given: Mapping[str, Any]) -> Record:
        """A record that a program states rather than a file. Raises RecordError for a wrong fact."""
        record = Record(id, kind, "", "", 0, 0, (), given)
        record.check_id()
        if kind not in ("architecture", "device"):
            record.mistake("", f"kind {kind!r} is none of architecture, device{suggest(str(kind), schema.KINDS)}")
        return Record(id, kind, "", "", 0, 0, tuple(record.values.get("aliases", ())), given)

    def check_id(self) -> None:
        """Raise RecordError where the id is no identifier."""
        if wrong := schema.identifier(self.id):
            self.mistake("", f"the id {self.id!r} {wrong}; `name` says what people call it")

    @property
    def text(self) -> str:
        """From the record's header to the next."""
        return self.content[self.start : self.end]

    @property
    def line(self) -> int:
        """Of the header in the file."""
        return self.content.count("\n", 0, self.start)

    @property
    def where(self) -> str:
        """For messages: "x86.toml:12: architecture.haswell"."""
        return self._at(self.line)

    @functools.cached_property
    def values(self) -> Mapping[str, Any]:
        """What the record says; unless it is trusted, each value checked by itself. Raises RecordError."""
        values = written_out(self._parsed() if self.given is None else self.given)
        if not self.trusted:
            self._check(values)
        return values

    def check(self) -> None:
        """Check each value by itself, also of a record that is trusted. Raises RecordError."""
        self._check(self.values)

    def _check(self, values: Mapping[str, Any]) -> None:
        self.check_id()
        check = schema.source_mistakes if self.kind == "source" else schema.mistakes
        for key, message in check(values):
            self.mistake(key, message)

    @property
    def name(self) -> str:
        """The product's name, or "" where the record leaves it to its ancestor; the text is only searched."""
        if self.given is not None:
            return str(self.given.get("name", ""))
        found = re.search(r'^name\s*=\s*"([^"\n]*)"', self.text, re.MULTILINE)
        return found[1] if found else ""

    def states(self, key: str) -> bool:
        """Whether the record itself gives `key`; cheap, since its text is only searched."""
        if self.given is not None:
            return key in self.given
        return re.search(rf"^{key}\s*=", self.text, re.MULTILINE) is not None

    def extends(self, id: str) -> bool:
        """Whether the record extends `id`; as cheap as `states`."""
        if self.given is not None:
            return self.given.get("extends") == id
        return re.search(rf"^extends\s*=\s*[\"']{re.escape(id)}[\"']", self.text, re.MULTILINE) is not None

    def mistake(self, key: str, message: str) -> NoReturn:
        """Raise RecordError naming the file, the line of `key`, the record, and what is wrong."""
        found = re.search(rf"^[ \t]*{re.escape(key)}\s*=", self.text, re.MULTILINE)
        line = self.line + (self.text.count("\n", 0, found.start()) if found else 0)
        raise RecordError(f"{self._at(line)}: {message}")

    def _at(self, line: int) -> str:
        return f"{self.file}:{line}: {self.kind}.{self.id}" if self.given is None else f"register({self.id!r})"

    def _parsed(self) -> Mapping[str, Any]:
        tables = parsed(self.content, self.start, self.end, self.file)
        strange = [kind for kind in tables if kind != self.kind] or [
            f"{self.kind}.{id}" for id in tables[self.kind] if id != self.id
        ]
        if strange:
            near = "" if strange[0] in schema.KINDS else suggest(strange[0], schema.KINDS)
            self.mistake("", f"[{strange[0]}]: {_HEADER}{near}")
        values: Mapping[str, Any] = tables[self.kind][self.id]
        return values


def records_of(file: Path, trusted: bool = False) -> Iterator[Record]:
    """Yield the records of `file`, none of them parsed yet. Raises RecordError for what is no record or no text."""
    try:
        name, text = str(file), "\n" + file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read as text in UTF-8: {error}") from error
    heads: list[tuple[int, str, str, list[str]]] = []  # where it starts, kind, id, aliases
    for mark in _LANDMARK.finditer(text):
        kind, quoted, bare, aliases = mark.groups()
        if kind is not None:
            heads.append((mark.start() + 1, kind, quoted or bare, []))
        elif heads:
            heads[-1][3].extend(_STRING.findall(aliases))
    first = heads[0][0] if heads else len(text)
    if not _COMMENTS.fullmatch(text, 0, first) and parsed(text, 1, first, name):
        raise RecordError(f"{file}:1: values before the first record; a record begins with [kind.id]")
    for index, (start, kind, id, names) in enumerate(heads):
        end = heads[index + 1][0] if index + 1 < len(heads) else len(text)
        record = Record(id, kind, name, text, start, end, tuple(names), None, trusted)
        if kind not in schema.KINDS:
            raise RecordError(f"{record.where}: unknown kind of record{suggest(kind, schema.KINDS)}")
        yield record


def parsed(content: str, start: int, end: int, file: str) -> dict[str, Any]:
    """Parse the TOML of content[start:end]. Raises RecordError with the line in the file."""
    try:
        return tomli.loads(content[start:end])
    except tomli.TOMLDecodeError as error:
        found = re.search(r"at line (\d+), ", str(error))
        line = content.count("\n", 0, start) + int(found.group(1)) - 1 if found else content.count("\n", 0, end)
        what = str(error).replace(found.group(), "at ") if found else str(error)
        raise RecordError(f"{file}:{line}: not valid TOML: {what}") from error
