"""Instructions of each kernel in a cubin or a code object, counted by a disassembler where there is one.

    NVIDIA    nvdisasm: CUDA's toolkit, or pip install nvidia-cuda-nvdisasm
    AMD       llvm-objdump: ROCm's, or a Debian package llvm

Counts are of the text, not of what runs: an instruction in a loop is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LLVM_RELEASES = range(22, 16, -1)  # Debian's packages have the release in the name of the tool


@dataclass(frozen=True)
class Counts:
    """Of one kernel."""

    loads: int  # from global memory, into registers or shared memory
    wide_loads: int  # those of 128 bits
    asynchronous: int  # those that go to shared memory past the registers (cp.async)
    matrix: int  # on tensor cores, or AMD's matrix cores


@dataclass(frozen=True)
class _Syntax:
    options: tuple[str, ...]
    kernel: str  # begins the text of a kernel, and names it
    load: str
    wide: str
    asynchronous: str | None
    matrix: str


_SASS = _Syntax(
    options=("-c",),
    kernel=r"^\.text\.(\w+):",
    load=r"\bLDG(?:STS)?\.",
    wide=r"\bLDG(?:STS)?\.\S*128\b",
    asynchronous=r"\bLDGSTS\.",
    matrix=r"\b[HIBD]G?MMA\.",
)
_GCN = _Syntax(
    options=("-d", "--no-show-raw-insn"),
    kernel=r"^[0-9a-f]+ <(\w+)>:",
    load=r"\b(?:global|flat|buffer)_load_",
    wide=r"\b(?:global|flat|buffer)_load_(?:dwordx4|b128)\b",
    asynchronous=None,
    matrix=r"\bv_(?:mfma|smfmac|wmma|swmmac)_",
)


def nvidia_disassembler() -> Path | None:
    """nvdisasm on PATH, in CUDA_PATH or CUDA_HOME, in /usr/local/cuda, or as pip installs it; None without."""
    homes = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    spec = importlib.util.find_spec("nvidia")
    wheels = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    candidates = [Path(home, "bin", "nvdisasm") for home in (*homes, "/usr/local/cuda")]
    candidates += [path for wheel in wheels for path in sorted(wheel.glob("*/bin/nvdisasm"))]
    found = shutil.which("nvdisasm")
    return _first_of([*([Path(found)] if found else []), *candidates])


def amd_disassembler() -> Path | None:
    """llvm-objdump in ROCM_PATH, in /opt/rocm, Debian's of the latest release, or that on PATH; None without.

    In this order, because one that is older than the architecture does not know its instructions.
    """
    candidates = [
        Path(root, "llvm", "bin", "llvm-objdump") for root in (os.environ.get("ROCM_PATH"), "/opt/rocm") if root
    ]
    candidates += [Path(f"/usr/bin/llvm-objdump-{release}") for release in _LLVM_RELEASES]
    found = shutil.which("llvm-objdump")
    return _first_of([*candidates, *([Path(found)] if found else [])])


def _first_of(candidates: list[Path]) -> Path | None:
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def counts(image: bytes, isa: str) -> dict[str, Counts]:
    """What each kernel of an ELF file of `isa` "nvptx" or "amdgcn" has; empty without a disassembler that reads it."""
    tool, syntax = (amd_disassembler(), _GCN) if isa == "amdgcn" else (nvidia_disassembler(), _SASS)
    if tool is None:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernels.elf")
        path.write_bytes(image)
        command = [str(tool), *syntax.options, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(_counted(done.stdout, syntax)) if done.returncode == 0 else {}


def _counted(text: str, syntax: _Syntax) -> Iterator[tuple[str, Counts]]:
    parts = re.split(syntax.kernel, text, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        found = [
            0 if pattern is None else len(re.findall(pattern, body))
            for pattern in (syntax.load, syntax.wide, syntax.asynchronous, syntax.matrix)
        ]
        yield name, Counts(*found)
