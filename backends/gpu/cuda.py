"""CUDA C++ -> machine code: nvcc where there is one, else NVRTC from pip.

nvcc makes a fatbin, of the architecture's machine code and PTX that later ones translate; NVRTC a cubin for it alone.
Both are asked for IEEE arithmetic: no flush of denormals, exact division and square root.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import GraphwrightError, ToolMissing

_USUAL = "/usr/local/cuda/bin/nvcc"
_INSTALL = "pip install 'graphwright[cuda]', or install NVIDIA's CUDA toolkit and put nvcc on PATH or set CUDA_PATH"


@dataclass(frozen=True)
class Compiler:
    """A way to compile: `nvcc`, or the library of NVRTC and the folders of headers that come with it."""

    name: str
    path: Path
    headers: tuple[Path, ...] = ()


def find_compiler() -> Compiler:
    """nvcc in CUDA_PATH or CUDA_HOME, on PATH, or in /usr/local/cuda; else NVRTC from pip. Raises ToolMissing."""
    homes = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    candidates = [*(Path(home, "bin", "nvcc") for home in homes), shutil.which("nvcc"), _USUAL]
    for candidate in candidates:
        if candidate is not None and os.access(candidate, os.X_OK):
            return Compiler("nvcc", Path(candidate))
    nvrtc = find_nvrtc()
    if nvrtc is None:
        raise ToolMissing(f"machine code for NVIDIA GPUs needs a CUDA compiler and none is here: {_INSTALL}")
    return nvrtc


def makes_fatbins() -> bool:
    """Whether the compiler here is nvcc, whose fatbins hold PTX for later architectures."""
    try:
        return find_compiler().name == "nvcc"
    except ToolMissing:
        return False


def find_nvrtc() -> Compiler | None:
    """NVRTC and its headers as pip installs them (nvidia-cuda-nvrtc, -runtime, -cccl), or None."""
    libraries = from_pip("*/lib/libnvrtc.so.*")
    if not libraries:
        return None
    return Compiler("NVRTC", libraries[-1], (*from_pip("*/include"), *from_pip("*/include/cccl")))


def from_pip(pattern: str) -> list[Path]:
    """The files of NVIDIA's packages that match, those of each folder on the path of modules in order of names."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def compile_cuda(source: str, arch: str) -> tuple[bytes, str]:
    """Machine code of CUDA C++ for `arch` ("sm_80"), and what it is: "fatbin" or "cubin".

    Raises ToolMissing where there is no compiler, GraphwrightError where it does not know the architecture.
    """
    compiler = find_compiler()
    check_architecture(compiler, arch)
    arch = _common(arch)
    if compiler.name == "nvcc":
        return _with_nvcc(compiler, source, arch), "fatbin"
    return _with_nvrtc(compiler, source, arch), "cubin"


def check_architecture(compiler: Compiler, arch: str) -> None:
    """Raise GraphwrightError where the compiler makes no code for `arch`."""
    known = architectures(compiler)
    if _common(arch) not in known:
        raise GraphwrightError(
            f"{compiler.name} at {compiler.path} makes no code for {arch}, it knows {', '.join(known)}; choose a "
            "target among these, or another release of CUDA"
        )


def _common(arch: str) -> str:
    """`arch` without what its suffix adds (sm_90a: wgmma), which no kernel uses and later devices do not run."""
    return arch.rstrip("af")


@functools.lru_cache(maxsize=4)
def architectures(compiler: Compiler) -> tuple[str, ...]:
    """The architectures the compiler makes machine code for."""
    if compiler.name == "nvcc":
        return tuple(re.findall(r"sm_\d+\w?", _run([str(compiler.path), "--list-gpu-code"])))
    library = ctypes.CDLL(str(compiler.path))
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    numbers = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
    return tuple(f"sm_{number}" for number in numbers)


def _with_nvcc(compiler: Compiler, source: str, arch: str) -> bytes:
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as scratch:
        code, out = Path(scratch, "kernels.cu"), Path(scratch, "kernels.fatbin")
        code.write_text(source)
        generated = f"-gencode=arch=compute_{number},code=[{arch},compute_{number}]"
        _run([str(compiler.path), "-fatbin", "-O3", "-std=c++17", "-w", generated, str(code), "-o", str(out)])
        return out.read_bytes()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GraphwrightError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _with_nvrtc(compiler: Compiler, source: str, arch: str) -> bytes:
    library = ctypes.CDLL(str(compiler.path))
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    _check(library, made, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={arch}", "--std=c++17", "-w", *(f"-I{folder}" for folder in compiler.headers)]
        listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), listed):
            raise GraphwrightError(f"NVRTC failed: {_text(library, program, 'ProgramLog')[-2000:].decode()}")
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """A result of NVRTC by the name its two functions share."""
    size = ctypes.c_size_t()
    _check(library, library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    text = ctypes.create_string_buffer(size.value)
    _check(library, library[f"nvrtcGet{what}"](program, text), f"nvrtcGet{what}")
    return text.raw


def _check(library: ctypes.CDLL, code: int, call: str) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise GraphwrightError(f"{call} failed: {library.nvrtcGetErrorString(code).decode()}")
