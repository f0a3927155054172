"""Find the records in a TOML file without reading them all: reading 100 KB of TOML takes longer than a look-up may.

A file is cut at its headers, which are [kind.id] at the beginning of a line; its aliases are found the same way. The
text between is parsed when somebody asks for the record, so that looking one up costs as much as its ancestors.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ..errors import RecordError, suggest
from . import schema
from .short_forms import written_out

# [kind.id] or [kind."id"]; `aliases = [...]`, on one line or several.
_LANDMARK = re.compile(
    r"""^(?: \[ \s* ([\w-]+) \s* \. \s* (?: "([^"\n]+)" | ([\w-]+) ) \s* \]
           | aliases \s* = \s* \[ ([^\]]*) \] )""",
    re.MULTILINE | re.VERBOSE,
)
_STRING = re.compile(r"""["']([^"'\n]*)["']""")


@dataclass(frozen=True)
class Record:
    """One table of a TOML file: an architecture, a device or a source."""

    id: str
    kind: str
    file: str
    line: int
    text: str  # from its header to the next
    aliases: tuple[str, ...] = ()
    given: Mapping[str, Any] | None = None  # what a program registered, in place of text

    @property
    def where(self) -> str:
        """For messages: "x86.toml:12: architecture.haswell"."""
        return self._at(self.line)

    @functools.cached_property
    def values(self) -> Mapping[str, Any]:
        """What the record says, each value checked by itself. Raises RecordError."""
        values = written_out(self._parsed() if self.given is None else self.given)
        check = schema.source_mistakes if self.kind == "source" else schema.mistakes
        for key, message in check(values):
            self.mistake(key, message)
        return values

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
        tables = parsed(self.text, self.file, self.line)
        for kind in tables:
            if kind != self.kind:
                self.mistake("", f"[{kind}]: a record is [kind.id]{suggest(kind, schema.KINDS)}")
        values: Mapping[str, Any] = tables[self.kind][self.id]
        return values


def records_of(file: Path) -> Iterator[Record]:
    """Yield the records of `file`, none of them parsed yet. Raises RecordError for what is no record."""
    text = file.read_text(encoding="utf-8")
    heads: list[tuple[int, str, str, list[str]]] = []  # where it starts, kind, id, aliases
    for mark in _LANDMARK.finditer(text):
        kind, quoted, bare, aliases = mark.groups()
        if kind is not None:
            heads.append((mark.start(), kind, quoted or bare, []))
        elif heads:
            heads[-1][3].extend(_STRING.findall(aliases))
    first = heads[0][0] if heads else len(text)
    if text[:first].strip() and parsed(text[:first], str(file), 1):
        raise RecordError(f"{file}:1: values before the first record; a record begins with [kind.id]")
    line, last = 1, 0
    for index, (start, kind, id, names) in enumerate(heads):
        end = heads[index + 1][0] if index + 1 < len(heads) else len(text)
        line, last = line + text.count("\n", last, start), start
        if kind not in schema.KINDS:
            raise RecordError(f"{file}:{line}: [{kind}.{id}]: unknown kind of record{suggest(kind, schema.KINDS)}")
        yield Record(id, kind, str(file), line, text[start:end], tuple(names))


def parsed(text: str, file: str, line: int) -> dict[str, Any]:
    """Parse TOML that begins at `line` of `file`. Raises RecordError with the line in the file."""
    toml = _toml()
    try:
        tables: dict[str, Any] = toml.loads(text)
    except toml.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        at = line + int(found.group(1)) - 1 if found else line + text.count("\n")
        raise RecordError(f"{file}:{at}: not valid TOML: {error}") from error
    return tables


@functools.cache
def _toml() -> ModuleType:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        return importlib.import_module("tomli")
