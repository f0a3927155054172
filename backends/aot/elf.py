"""What a linked ELF file says of itself: machine, needed libraries and symbol versions, page alignment.

Little-endian, 32 and 64 bits. Layouts: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html and, for versions,
https://refspecs.linuxfoundation.org/LSB_5.0.0/LSB-Core-generic/LSB-Core-generic/symversion.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_KINDS = {1: "object", 2: "executable", 3: "shared"}
_LOAD, _DYNAMIC, _INTERPRETER, _TLS, _STACK = 1, 2, 3, 7, 0x6474E551
_DYNSYM, _VERNEED = 11, 0x6FFFFFFE
_NEEDED, _TEXTREL = 1, 22


@dataclass(frozen=True)
class Elf:
    """The facts of one file."""

    machine: str
    kind: str  # "executable" (at a fixed address), "shared" (or position-independent), "object"
    bits: int
    flags: int
    interpreter: str | None  # the loader a dynamic program names
    needed: tuple[str, ...]  # libraries
    undefined: frozenset[str]  # symbols expected of other libraries
    defined: frozenset[str]  # symbols others can find
    versions: frozenset[tuple[str, str]]  # (library, version) it insists on
    alignments: tuple[int, ...]  # bytes, of each loadable segment
    executable_stack: bool
    text_relocations: bool
    thread_local: bool  # it has variables that the loader gives every thread


def read(path: Path) -> Elf:
    """Read `path`. Raises ValueError where it is not a little-endian ELF file."""
    content = path.read_bytes()
    if content[:4] != b"\x7fELF" or len(content) < 52 or content[5] != 1:
        raise ValueError(f"{path} is not a little-endian ELF file")
    return _Reader(content).facts()


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.wide = content[4] == 2
        kind, machine = struct.unpack_from("<HH", content, 16)
        # Behind type and machine: version, entry, segments, sections, flags, sizes and counts.
        layout = "<IQQQIHHHHHH" if self.wide else "<IIIIIHHHHHH"
        fields = struct.unpack_from(layout, content, 20)
        (_, _, segments, sections, flags, _, segment_size, segment_count, section_size, section_count, _) = fields
        self.kind, self.machine, self.flags = kind, machine, flags
        # kind, offset, bytes in the file, flags, alignment
        self.segments = [self._segment(segments + i * segment_size) for i in range(segment_count)]
        # kind, offset, size, link, info, entry size
        self.sections = [self._section(sections + i * section_size) for i in range(section_count)]

    def _segment(self, at: int) -> tuple[int, int, int, int, int]:
        if self.wide:
            kind, flags, offset, _, _, size, _, align = struct.unpack_from("<IIQQQQQQ", self.content, at)
        else:
            kind, offset, _, _, size, _, flags, align = struct.unpack_from("<IIIIIIII", self.content, at)
        return kind, offset, size, flags, align

    def _section(self, at: int) -> tuple[int, int, int, int, int, int]:
        layout = "<IIQQQQIIQQ" if self.wide else "<IIIIIIIIII"
        _, kind, _, _, offset, size, link, info, _, entry = struct.unpack_from(layout, self.content, at)
        return kind, offset, size, link, info, entry

    def _text(self, at: int) -> str:
        return self.content[at : self.content.index(b"\0", at)].decode()

    def _symbols(self) -> Iterator[tuple[str, int]]:
        """The name and section (0: elsewhere) of each dynamic symbol but the first."""
        for kind, offset, size, link, _, entry in self.sections:
            if kind == _DYNSYM:
                strings = self.sections[link][1]
                for at in range(offset + entry, offset + size, entry):
                    name, section = struct.unpack_from("<I", self.content, at)[0], at + (6 if self.wide else 14)
                    yield self._text(strings + name), struct.unpack_from("<H", self.content, section)[0]

    def _dynamic(self) -> Iterator[tuple[int, int]]:
        layout, size = ("<qQ", 16) if self.wide else ("<iI", 8)
        for kind, offset, length, _, _ in self.segments:
            if kind == _DYNAMIC:
                for at in range(offset, offset + length, size):
                    yield struct.unpack_from(layout, self.content, at)

    def _versions(self) -> Iterator[tuple[str, str]]:
        for kind, offset, _, link, count, _ in self.sections:
            if kind != _VERNEED:
                continue
            strings = self.sections[link][1]
            for _ in range(count):
                _, entries, library, first, following = struct.unpack_from("<HHIII", self.content, offset)
                at = offset + first
                for _ in range(entries):
                    _, _, _, name, onward = struct.unpack_from("<IHHII", self.content, at)
                    yield self._text(strings + library), self._text(strings + name)
                    at += onward
                offset += following

    def facts(self) -> Elf:
        symbols = list(self._symbols())
        dynamic = list(self._dynamic())
        strings = next((self.sections[link][1] for kind, _, _, link, _, _ in self.sections if kind == _DYNSYM), 0)
        interpreter = [self._text(offset) for kind, offset, _, _, _ in self.segments if kind == _INTERPRETER]
        return Elf(
            machine=_MACHINES.get(self.machine, str(self.machine)),
            kind=_KINDS.get(self.kind, str(self.kind)),
            bits=64 if self.wide else 32,
            flags=self.flags,
            interpreter=interpreter[0] if interpreter else None,
            needed=tuple(self._text(strings + value) for tag, value in dynamic if tag == _NEEDED),
            undefined=frozenset(name for name, section in symbols if section == 0),
            defined=frozenset(name for name, section in symbols if section),
            versions=frozenset(self._versions()),
            alignments=tuple(align for kind, _, _, _, align in self.segments if kind == _LOAD),
            executable_stack=any(kind == _STACK and flags & 1 for kind, _, _, flags, _ in self.segments),
            text_relocations=any(tag == _TEXTREL for tag, _ in dynamic),
            thread_local=any(kind == _TLS for kind, _, _, _, _ in self.segments),
        )
