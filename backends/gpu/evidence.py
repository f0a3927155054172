"""What the machine code says of each kernel, without running it: registers, spills, memory of a block, instructions.

    NVIDIA    registers and stack from .nv.info, shared memory from .nv.shared.NAME (ELF sections of the cubin);
              instructions from nvdisasm, where it is (CUDA's toolkit, pip install nvidia-cuda-nvdisasm)
    AMD       the note of the code object: MessagePack, LLVM's AMDGPU usage guide, code object V3 metadata

Occupancy follows from registers, shared memory and threads by the limits in the database. None of it is a time.
Attribute numbers of .nv.info are those that `cuobjdump -elf` prints: EIATTR_REGCOUNT 0x2f, EIATTR_FRAME_SIZE 0x11.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hwdb import Hardware
from .launches import Launch
from .messagepack import unpacked

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info whose value is (symbol, number)
_VALUE_SIZED = 4  # how an attribute's value is stored: behind its size
_CUDA_MACHINE = 190
_WIDE, _MATRIX = re.compile(r"\bLDG\.\S*128\b"), re.compile(r"\b[HIBD]G?MMA\.")


@dataclass(frozen=True)
class Evidence:
    """Of one kernel. None is unknown: there was no disassembler, or the machine has no such registers."""

    registers: int  # 32-bit, of a thread (VGPR on AMD, with those for accumulating)
    spilled: int  # bytes of a thread that are in memory instead (NVIDIA: its stack; AMD: scratch)
    shared_bytes: int
    occupancy: float | None  # share of the warps a unit can hold
    limited_by: str | None
    scalar_registers: int | None = None
    wide_loads: int | None = None  # of 128 bits from memory
    matrix: int | None = None  # multiplications on tensor cores

    def text(self) -> str:
        """What the report says."""
        parts = [f"{self.registers} registers", f"{self.spilled} bytes spilled" if self.spilled else "none spilled"]
        if self.scalar_registers is not None:
            parts.insert(1, f"{self.scalar_registers} scalar")
        if self.occupancy is not None:
            parts.append(f"occupancy {self.occupancy:.0%} (by {self.limited_by})")
        if self.wide_loads is not None:
            parts.append(f"{self.wide_loads} loads of 128 bits")
        if self.matrix is not None:
            parts.append(f"{self.matrix} on tensor cores")
        return ", ".join(parts)


def evidence(image: bytes, launches: Sequence[Launch], hw: Hardware) -> dict[str, Evidence]:
    """What `image` (fatbin, cubin or hsaco) says of each launch, by its name; empty where it cannot be read."""
    if hw.isa == "amdgcn":
        return _of_amd(image, launches, hw)
    cubin = _cubin(image)
    return {} if cubin is None else _of_nvidia(cubin, launches, hw)


def disassembler() -> Path | None:
    """nvdisasm in CUDA_PATH or CUDA_HOME, on PATH, in /usr/local/cuda, or as pip installs it; None without."""
    homes = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    spec = importlib.util.find_spec("nvidia")
    wheels = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    candidates = [Path(home, "bin", "nvdisasm") for home in (*homes, "/usr/local/cuda")]
    candidates += [path for wheel in wheels for path in sorted(wheel.glob("*/bin/nvdisasm"))]
    if found := shutil.which("nvdisasm"):
        candidates.insert(0, Path(found))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


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
    counts = _instructions(cubin)
    found = {}
    for launch in launches:
        if (_REGISTERS, launch.name) not in numbers:
            continue
        shared = sections.get(f".nv.shared.{launch.name}", (b"", 0))[1]
        wide, matrix = counts.get(launch.name, (None, None))
        frame = numbers.get((_FRAME, launch.name), 0)
        registers = numbers[_REGISTERS, launch.name]
        found[launch.name] = _of(hw, launch, registers, frame, shared, wide_loads=wide, matrix=matrix)
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


def _instructions(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Loads of 128 bits and multiplications on tensor cores of each kernel; empty without a disassembler."""
    tool = disassembler()
    if tool is None:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernels.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {}
    parts = re.split(r"^\.text\.(\w+):", done.stdout, flags=re.MULTILINE)
    return {
        name: (len(_WIDE.findall(text)), len(_MATRIX.findall(text)))
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


# AMD


def _of_amd(image: bytes, launches: Sequence[Launch], hw: Hardware) -> dict[str, Evidence]:
    notes = {kernel[".name"]: kernel for kernel in metadata(image)["amdhsa.kernels"]}
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
        )
    return found


def metadata(image: bytes) -> dict[str, Any]:
    """The note of an AMD code object."""
    start = image.index(b"AMDGPU\0\0")
    (size,) = struct.unpack_from("<I", image, start - 8)
    found: dict[str, Any] = unpacked(image[start + 8 : start + 8 + size])
    return found
