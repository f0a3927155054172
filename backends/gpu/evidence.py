"""What the machine code says of each kernel, without running it: registers, spills, memory of a block, instructions.

    NVIDIA    registers and stack from .nv.info, shared memory from .nv.shared.NAME (ELF sections of the cubin);
    AMD       the note of the code object: MessagePack, LLVM's AMDGPU usage guide, code object V3 metadata
    both      instructions: instructions.py

Occupancy follows from registers, shared memory and threads by the limits in the database. None of it is a time.
Attribute numbers of .nv.info are those that `cuobjdump -elf` prints: EIATTR_REGCOUNT 0x2f, EIATTR_FRAME_SIZE 0x11.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from ...hwdb import Hardware
from .instructions import Counts, counts
from .launches import Launch

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info whose value is (symbol, number)
_VALUE_SIZED = 4  # how an attribute's value is stored: behind its size
_CUDA_MACHINE = 190


@dataclass(frozen=True)
class Evidence:
    """Of one kernel. None is unknown: there was no disassembler, or the machine has no such registers."""

    registers: int  # 32-bit, of a thread (VGPR on AMD, with those for accumulating)
    spilled: int  # bytes of a thread that are in memory instead (NVIDIA: its stack; AMD: scratch)
    shared_bytes: int
    occupancy: float | None  # share of the warps a unit can hold
    limited_by: str | None
    scalar_registers: int | None = None
    counts: Counts | None = None

    def text(self) -> str:
        """What the report says."""
        parts = [f"{self.registers} registers", f"{self.spilled} bytes spilled" if self.spilled else "none spilled"]
        if self.scalar_registers is not None:
            parts.insert(1, f"{self.scalar_registers} scalar")
        if self.occupancy is not None:
            parts.append(f"occupancy {self.occupancy:.0%} (by {self.limited_by})")
        if self.counts is not None:
            parts.append(f"{self.counts.wide_loads} of {self.counts.loads} loads of 128 bits")
            parts.append(f"{self.counts.matrix} on matrix units")
        return ", ".join(parts)


def evidence(image: bytes, launches: Sequence[Launch], hw: Hardware) -> dict[str, Evidence]:
    """What `image` (fatbin, cubin or hsaco) says of each launch, by its name; empty where it cannot be read."""
    if hw.isa == "amdgcn":
        return _of_amd(image, launches, hw)
    cubin = _cubin(image)
    return {} if cubin is None else _of_nvidia(cubin, launches, hw)


def _of(hw: Hardware, launch: Launch, registers: int, spilled: int, shared: int, **more: Any) -> Evidence:
    found = hw.occupancy(registers, shared, launch.threads)
    share, limit = (None, None) if found is None else (found.share, found.limited_by)
    return Evidence(registers, spilled, shared, share, limit, **more)


# NVIDIA


def _cubin(image: bytes) -> bytes | None:
    """The first ELF file in a fatbin; fatbins of nvcc hold it uncompressed unless asked otherwise."""
    start = image.find(b"\x7fELF")
    if start < 0 or len(image) < start + 64 or struct.unpack_from("<H", image, start + 18)[0] != _CUDA_MACHINE:
        return None
    return image[start:]


def _of_nvidia(cubin: bytes, launches: Sequence[Launch], hw: Hardware) -> dict[str, Evidence]:
    sections = dict(_sections(cubin))
    symbols = _symbols(cubin, sections)
    numbers: dict[tuple[int, str], int] = {}
    for attribute, value in _attributes(sections.get(".nv.info", (b"", 0))[0]):
        if attribute in (_REGISTERS, _FRAME):
            symbol, number = struct.unpack("<II", value)
            numbers[attribute, symbols[symbol]] = number
    counted = counts(cubin, "nvptx")
    found = {}
    for launch in launches:
        if (_REGISTERS, launch.name) not in numbers:
            continue
        shared = sections.get(f".nv.shared.{launch.name}", (b"", 0))[1]
        frame = numbers.get((_FRAME, launch.name), 0)
        registers = numbers[_REGISTERS, launch.name]
        found[launch.name] = _of(hw, launch, registers, frame, shared, counts=counted.get(launch.name))
    return found


def _sections(cubin: bytes) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Name, content and size of each section."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    rows = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    table = rows[names][4]
    for name, kind, _, _, offset, length in rows:
        end = cubin.index(b"\0", table + name)
        content = b"" if kind == 8 else cubin[offset : offset + length]  # 8: no bits in the file
        yield cubin[table + name : end].decode(), (content, length)


def _symbols(cubin: bytes, sections: Mapping[str, tuple[bytes, int]]) -> list[str]:
    table, names = sections[".symtab"][0], sections[".strtab"][0]
    places = [struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24)]
    return [names[place : names.index(b"\0", place)].decode() for place in places]


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and value of each attribute of an .nv.info section."""
    at = 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == _VALUE_SIZED:
            yield attribute, content[at : at + size]
            at += size


# AMD


def _of_amd(image: bytes, launches: Sequence[Launch], hw: Hardware) -> dict[str, Evidence]:
    notes = {kernel[".name"]: kernel for kernel in metadata(image)["amdhsa.kernels"]}
    counted = counts(image, "amdgcn")
    found = {}
    for launch in launches:
        note = notes[launch.name]
        # gfx90a and later count both kinds of vector registers in .vgpr_count already.
        registers = note[".vgpr_count"]
        found[launch.name] = _of(
            hw,
            launch,
            registers,
            note[".private_segment_fixed_size"],
            note[".group_segment_fixed_size"],
            scalar_registers=note[".sgpr_count"],
            counts=counted.get(launch.name),
        )
    return found


def metadata(image: bytes) -> dict[str, Any]:
    """The note of an AMD code object."""
    start = image.index(b"AMDGPU\0\0")
    (size,) = struct.unpack_from("<I", image, start - 8)
    found: dict[str, Any] = msgpack.unpackb(image[start + 8 : start + 8 + size])
    return found
