"""What a linked Mach-O file says of itself, for tests: mach-o/loader.h, mach-o/nlist.h and kern/cs_blobs.h of XNU.

Files of 64 bits, whose numbers are little-endian but for those of the signature.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

ARM64 = 0x0100000C
_KINDS = {1: "object", 2: "executable", 6: "library"}
_SEGMENT, _SYMTAB, _LOAD_DYLIB, _ID_DYLIB, _SIGNATURE, _BUILD = 0x19, 0x2, 0xC, 0xD, 0x1D, 0x32
_WEAK = 0x8000 | 0x10000  # MH_WEAK_DEFINES, MH_BINDS_TO_WEAK
_DEBUGGING, _PRIVATE, _KIND, _EXTERNAL = 0xE0, 0x10, 0x0E, 0x01
_SUPER_BLOB, _CODE_DIRECTORY, _AD_HOC, _SHA256 = 0xFADE0CC0, 0xFADE0C02, 0x2, 2


@dataclass(frozen=True)
class Section:
    """Where a section lies."""

    segment: str
    name: str
    address: int
    bytes: int
    offset: int


@dataclass(frozen=True)
class MachO:
    """The facts of one file."""

    cpu: int
    kind: str
    platform: int  # 1: macOS
    oldest: tuple[int, int]  # system
    name: str  # by which programs ask for a library
    libraries: tuple[str, ...]
    exported: frozenset[str]  # C names
    undefined: dict[str, int]  # C name -> which of `libraries` has it, from 1
    weak: bool  # some of its symbols give way to those of other libraries, or they to its own
    segments: dict[str, tuple[int, int]]  # name -> address, offset in the file
    sections: tuple[Section, ...]
    signed: bool  # ad hoc, with the digest of every page right


def read(path: Path) -> MachO:
    """Read `path`. Raises ValueError where it is no little-endian Mach-O file of 64 bits."""
    content = path.read_bytes()
    magic, cpu, _, kind, count, _, flags = struct.unpack_from("<IiiIIII", content)
    if magic != 0xFEEDFACF:
        raise ValueError(f"{path} is no little-endian Mach-O file of 64 bits")
    segments: dict[str, tuple[int, int]] = {}
    sections: list[Section] = []
    libraries: list[str] = []
    exported: set[str] = set()
    undefined: dict[str, int] = {}
    name, platform, oldest, signed, at = "", 0, (0, 0), False, 32
    for _ in range(count):
        command, nbytes = struct.unpack_from("<II", content, at)
        if command == _SEGMENT:
            title, address, _, offset, _, _, _, parts, _ = struct.unpack_from("<16sQQQQiiII", content, at + 8)
            segments[_text(title)] = (address, offset)
            for i in range(parts):
                fields = struct.unpack_from("<16s16sQQI", content, at + 72 + 80 * i)
                sections.append(Section(_text(fields[1]), _text(fields[0]), *fields[2:]))
        elif command in (_LOAD_DYLIB, _ID_DYLIB):
            (start,) = struct.unpack_from("<I", content, at + 8)
            known = _text(content[at + start : at + nbytes])
            name = known if command == _ID_DYLIB else name
            libraries += [known] if command == _LOAD_DYLIB else []
        elif command == _BUILD:
            platform, version = struct.unpack_from("<II", content, at + 8)
            oldest = (version >> 16, version >> 8 & 0xFF)
        elif command == _SIGNATURE:
            signed = _is_signed(content, *struct.unpack_from("<II", content, at + 8))
        elif command == _SYMTAB:
            for symbol, bits, description in _symbols(content, *struct.unpack_from("<IIII", content, at + 8)):
                if bits & _DEBUGGING or not bits & _EXTERNAL or bits & _PRIVATE:
                    continue
                if bits & _KIND:
                    exported.add(symbol)
                else:
                    undefined[symbol] = description >> 8
        at += nbytes
    return MachO(
        cpu, _KINDS[kind], platform, oldest, name, tuple(libraries), frozenset(exported), undefined,
        bool(flags & _WEAK), segments, tuple(sections), signed,
    )  # fmt: skip


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()


def _symbols(content: bytes, symbols: int, count: int, strings: int, _: int) -> list[tuple[str, int, int]]:
    found = []
    for i in range(count):
        name, bits, _, description, _ = struct.unpack_from("<IBBHQ", content, symbols + 16 * i)
        found.append((_text(content[strings + name :][:300]).removeprefix("_"), bits, description))
    return found


def _is_signed(content: bytes, offset: int, _: int) -> bool:
    magic, _, blobs = struct.unpack_from(">III", content, offset)
    for i in range(blobs if magic == _SUPER_BLOB else 0):
        _, start = struct.unpack_from(">II", content, offset + 12 + 8 * i)
        at = offset + start
        if struct.unpack_from(">I", content, at) != (_CODE_DIRECTORY,):
            continue
        _, flags, digests, _, _, pages, limit = struct.unpack_from(">IIIIIII", content, at + 8)
        size, kind, _, log_page = struct.unpack_from(">BBBB", content, at + 36)
        first, end = at + digests, 1 << log_page
        return (
            bool(flags & _AD_HOC)
            and kind == _SHA256
            and limit == offset
            and all(
                hashlib.sha256(content[page * end : min((page + 1) * end, limit)]).digest()
                == content[first + page * size : first + (page + 1) * size]
                for page in range(pages)
            )
        )
    return False
