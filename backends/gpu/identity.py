"""What makes the machine code of a GPU here: part of the key under which results are kept."""

from __future__ import annotations

from ...hwdb import Hardware
from . import cuda, rocm


def gpu_compiler(hw: Hardware) -> str:
    """The compiler with its path and the architectures it knows, or the device libraries. Raises ToolMissing."""
    if hw.isa == "nvptx":
        compiler = cuda.find_compiler()
        cuda.check_architecture(compiler, hw.llvm_cpu)
        stamp = compiler.path.stat()
        return f"{compiler.name} {compiler.path} {stamp.st_size} {stamp.st_mtime_ns}"
    return f"device libraries {[(str(p), p.stat().st_size) for p in rocm.bitcode(hw.llvm_cpu, hw.vector_bits // 32)]}"
