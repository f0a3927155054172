"""Object files -> programs and libraries for macOS, linked by zig against its list of what libSystem has.

Objects have flat names: of what another file defines, only what is listed as exported stays visible in a library, so
that two models in one process, which have names in common, keep their own.

Layout of Mach-O files: mach-o/loader.h and mach-o/nlist.h of XNU (https://github.com/apple-oss-distributions/xnu).
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from . import toolchain

_MAGIC_64, _SYMTAB = 0xFEEDFACF, 2
_HEADER_BYTES, _SYMBOL_BYTES = 32, 16
_EXTERNAL, _PRIVATE, _KIND, _UNDEFINED, _DEBUGGING = 0x01, 0x10, 0x0E, 0x00, 0xE0  # of a symbol's n_type
_OPTIONS = ("-s", "-Wl,-dead_strip")


def link(
    objects: Sequence[Path], output: Path, triple: str, exports: Sequence[str] = (), name: str | None = None
) -> None:
    """Link a shared library that exports the calls of runtime.h, and `exports`; `name` is what programs ask dyld for.

    Raises ToolMissing where libSystem lacks what the objects call.
    """
    named = f"-Wl,-install_name,@rpath/{name or output.name}"
    _link(("-dynamiclib", named), objects, output, triple, {*toolchain.EXPORTS, *exports})


def link_program(objects: Sequence[Path], output: Path, triple: str) -> None:
    """Link a program: dynamic, as all are on macOS, and in need of nothing but libSystem."""
    _link((), objects, output, triple, {"main"})


def merge(objects: Sequence[Path], output: Path, triple: str) -> None:
    """Link objects to one relocatable object."""
    with tempfile.TemporaryDirectory() as directory:
        target = toolchain.zig_target(triple)
        toolchain.zig(
            "cc", "-target", target, "-r", *map(str, objects), "-o", str(output), scratch=Path(directory)
        )  # fmt: skip


def _link(options: Sequence[str], objects: Sequence[Path], output: Path, triple: str, exports: Collection[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        closed = [scratch / f"{number}.o" for number in range(len(objects))]
        for path, given in zip(closed, objects, strict=True):
            path.write_bytes(hidden(given.read_bytes(), exports))
        target = toolchain.zig_target(triple)
        toolchain.zig(
            "cc", "-target", target, *options, *_OPTIONS, *map(str, closed), "-o", str(output), scratch=scratch
        )  # fmt: skip


def hidden(content: bytes, exports: Collection[str]) -> bytes:
    """An object that shows what it defines, but for `exports` (C names), to the linker alone."""
    magic, _, _, _, commands = struct.unpack_from("<IiiII", content)
    assert magic == _MAGIC_64, "no Mach-O file of 64 bits"
    changed = bytearray(content)
    at = _HEADER_BYTES
    for _ in range(commands):
        command, nbytes = struct.unpack_from("<II", content, at)
        if command == _SYMTAB:
            symbols, count, strings, _ = struct.unpack_from("<IIII", content, at + 8)
            for symbol in range(symbols, symbols + count * _SYMBOL_BYTES, _SYMBOL_BYTES):
                name_at, kind = struct.unpack_from("<IB", content, symbol)
                name = content[strings + name_at : content.index(0, strings + name_at)].decode()
                defined = kind & _EXTERNAL and kind & _KIND != _UNDEFINED and not kind & _DEBUGGING
                if defined and name.removeprefix("_") not in exports:
                    changed[symbol + 4] = kind | _PRIVATE
        at += nbytes
    return bytes(changed)
