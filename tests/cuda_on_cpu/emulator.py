"""CUDA on the CPU: TVM's own host code and runtime, over a driver of ours that runs kernels as threads of one block.

    start()                     before tvm is imported: from then on this process has a CUDA device
    take_over()                 graphwright compiles for it
    compile_cuda(source, arch)  in the place of backends.gpu.cuda.compile_cuda: an image that the driver loads

A kernel is compiled as C++ for this processor, with CUDA's words defined in include/device.h. What it shows: indexing,
launches, memory plans, barriers (in both orders of lanes). What it does not: the CUDA compiler, timing, races between
blocks, weak memory order. x86-64 only.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_LIBRARIES = {"libcudart.so.13": "cuda*", "libcuda.so.1": "cu*"}  # what each exports
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^;{]*\) \{', re.MULTILINE)
_ALIGNED = re.compile(r"__shared__ (alignas\(\d+\))")  # nvcc takes the attribute there, C++ in front
_DYNAMIC = re.compile(r"extern __shared__ (?:alignas\(\d+\) |__align__\(\d+\) )?(\w+) (\w+)\[\];")


def start() -> None:
    """Compile the driver and load it, for all that follows in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in _LIBRARIES:
            ctypes.CDLL(str(build_driver(name, Path(scratch))), mode=ctypes.RTLD_GLOBAL)


def build_driver(name: str, directory: Path) -> Path:
    """One of the driver's libraries, under its name in `directory`."""
    script, library = directory / "exports.map", directory / name
    script.write_text(f"{name} {{ global: {_LIBRARIES[name]}; local: *; }};\n")
    options = [f"-Wl,-soname,{name}", f"-Wl,--version-script={script}", "-ldl"]
    _compile("cc", str(HERE / "driver.c"), library, options)
    return library


class Counts(ctypes.Structure):
    """What driver.c calls Shared."""

    _fields_ = (
        ("capture", ctypes.c_void_p),
        ("launches", ctypes.c_ulonglong),
        ("replays", ctypes.c_ulonglong),
        ("stream", ctypes.c_void_p),
    )


def counts() -> Counts:
    """Launches made one by one and replays of graphs so far, and the stream of the last; stays up to date."""
    shared = ctypes.CDLL("libcudart.so.13").cudaEmulatedShared
    shared.restype = ctypes.POINTER(Counts)
    return shared().contents


def take_over() -> None:
    """Let graphwright compile for the emulator instead of by nvcc."""
    from graphwright.backends.gpu import cuda

    cuda.compile_cuda = compile_cuda
    cuda.find_compiler = lambda: cuda.Compiler("emulator", Path(__file__))
    cuda.check_architecture = lambda compiler, arch: None


def compile_cuda(source: str, arch: str) -> tuple[bytes, str]:
    """The kernels of generated CUDA C++ as an image of the emulated driver."""
    source = as_cpp(_without_functions(source))
    names = _KERNEL.findall(source)
    entries = [
        f'extern "C" {{ void emulated_{n}(void **arguments) {{ emulated::call({n}, arguments); }}'
        f" extern const int emulated_arguments_{n} = emulated::count({n}); }}"
        for n in names
    ]
    text = "\n".join(['#include "device.h"', source, *entries, '#include "threads.h"', ""])
    with tempfile.TemporaryDirectory() as scratch:
        code, library = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        code.write_text(text)
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE / 'include'}"]
        _compile("c++", str(code), library, options)
        image = library.read_bytes()
    return b"EMULATED" + struct.pack("<Q", len(image)) + image, "fatbin"


def _without_functions(source: str) -> str:
    """Without what is in front of kernels that copy and multiply fragments: device.h has it in another form."""
    from graphwright.backends.gpu.device_functions import CUDA_SOURCES

    for text in CUDA_SOURCES.values():
        source = source.replace(text, "")
    return source


def as_cpp(source: str) -> str:
    """CUDA C++ as TVM generates it, in the form that include/device.h makes C++ of."""
    source = _ALIGNED.sub(r"\1 __shared__", source)
    source = _DYNAMIC.sub(r"\1* \2 = (\1*)emulated::dynamic_shared;", source)
    if "EMULATED_WITHOUT_BARRIERS" in os.environ:
        source = source.replace("__syncthreads();", "")
    return source


def _compile(language: str, source: str, output: Path, options: list[str]) -> None:
    """A shared library by the system's compiler, or ziglang's where there is none."""
    system = shutil.which(language)
    command = [system] if system else [sys.executable, "-m", "ziglang", language]
    done = subprocess.run(
        [*command, "-w", "-fPIC", "-shared", source, "-o", str(output), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
