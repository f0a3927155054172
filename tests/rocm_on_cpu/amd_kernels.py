"""Single kernels for AMD's GPUs on the CPU: the LLVM IR that TVM's generator really makes of them, not their CUDA form.

    texts, launches = generated({"name": function}, hw)       of PrimFuncs that have their threads
    run = compiled(texts, launches, wave_threads)             run("name", {"in0": array, ...})

As in kernels.py of cuda_on_cpu, whose threads, barriers, shuffles and matrix instructions these run on. Instruction
selection by the AMDGPU backend is not shown: what runs is what that gets.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_on_cpu"))
from host_ir import host_ir
from kernels import Kernel, _described
from tvm import ir
from tvm.target import Target

from graphwright.backends.gpu import lower, rocm
from graphwright.hwdb import Hardware

HERE = Path(__file__).parent
CUDA = HERE.parent / "cuda_on_cpu"

_LINES = {
    "barrier": re.compile(r"^ .*call void @llvm\.amdgcn\.s\.barrier\(\).*\n", re.MULTILINE),
    "release": re.compile(r"^ *fence syncscope\(\"workgroup\"\) release.*\n", re.MULTILINE),
}


def generated(functions: Mapping[str, Any], hw: Hardware) -> tuple[dict[str, str], dict[str, Kernel]]:
    """LLVM IR and launch of each function by its name; of several kernels by "name_0", "name_1" in their order."""
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    texts, kernels = {}, {}
    for symbol, function in functions.items():
        variable = ir.GlobalVar(symbol)
        _, device = lower._split(variable, function.with_attr("global_symbol", symbol), target)
        text = llvm_ir(device, target)
        parts = [kernel for _, kernel in device.functions_items()]
        for number, kernel in enumerate(parts):
            lower._check_limits(lower._launch(kernel), target)
            key = symbol if len(parts) == 1 else f"{symbol}_{number}"
            kernels[key], texts[key] = _described(kernel), text
    return texts, kernels


def llvm_ir(device: Any, target: Target) -> str:
    """What TVM's generator for AMD makes of kernels, optimised as it is for the backend."""
    arch, wave_threads = str(target.attrs["mcpu"]), int(target.attrs["thread_warp_size"])
    # Functions of AMD's libraries keep their names, and no code object is made.
    with (
        mock.patch.object(rocm, "bitcode", return_value=[]),
        mock.patch.object(rocm, "link", return_value=b""),
        rocm.callbacks(arch, wave_threads),
    ):
        return str(rocm.generated(device, target).inspect_source("llvm"))


def without(text: str, what: str) -> list[str]:
    """The text without each "barrier", or the fence in front of it ("release"), one at a time."""
    return [text[: m.start()] + text[m.end() :] for m in _LINES[what].finditer(text)]


class Library:
    """Kernels of several texts, compiled for this processor."""

    def __init__(self, texts: Sequence[str], wave_threads: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "kernels.so")
            files = [Path(scratch, f"kernel_{number}.ll") for number in range(len(texts))]
            for number, (file, text) in enumerate(zip(files, texts, strict=True)):
                file.write_text(host_ir(text, number)[0])
            command = [sys.executable, "-m", "ziglang", "c++", "-shared", "-fPIC", "-w", "-O1", "-std=c++17"]
            command += ["-ffp-contract=off", "-fno-sanitize=all", "-fno-strict-aliasing", "-Wl,-z,defs"]
            command += [f"-DEMULATED_WARP={wave_threads}", f"-I{CUDA / 'include'}", f"-I{HERE / 'include'}"]
            command += [str(HERE / "include" / "kernels.cpp"), *map(str, files), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            self._library = ctypes.CDLL(str(path))
        self._library.emulated_launch_in.restype = ctypes.c_char_p

    def launch(
        self,
        number: int,
        kernel: str,
        memory: Sequence[tuple[int, int]],
        grid: Sequence[int],
        block: Sequence[int],
        reverse: bool,
    ) -> str | None:
        """What went wrong with a kernel of text `number`, or None; its arguments are addresses and bytes of memory."""
        pointers = [ctypes.c_void_p(address) for address, _ in memory]
        addresses = (ctypes.c_void_p * len(memory))(*[ctypes.addressof(pointer) for pointer in pointers])
        ends = (ctypes.c_void_p * (2 * len(memory)))(*[end for start, size in memory for end in (start, start + size)])
        axes = [(ctypes.c_uint * 3)(*extents) for extents in (grid, block)]
        entry = self._library[f"emulated_{number}_{kernel}"]
        error = self._library.emulated_launch_in(entry, addresses, *axes, int(reverse), ends, len(memory))
        return error.decode() if error else None


def compiled(
    variants: Mapping[str, str], kernels: Mapping[str, Kernel], wave_threads: int
) -> Callable[..., str | None]:
    """run(variant, arrays, reverse=False) of each text: the arrays are read and written; what went wrong, or None.

    A variant is called like its kernel, or like it with a number behind a colon.
    """
    distinct = {text: number for number, text in enumerate(dict.fromkeys(variants.values()))}
    library = Library(tuple(distinct), wave_threads)

    def run(variant: str, arrays: Mapping[str, np.ndarray], reverse: bool = False) -> str | None:
        kernel = kernels[variant.split(":")[0]]
        held = [_in_memory(arrays[name]) for name in kernel.arguments]
        memory = [(x.ctypes.data, x.nbytes) for x in held]
        number = distinct[variants[variant]]
        error = library.launch(number, kernel.limits.name, memory, kernel.grid, kernel.block, reverse)
        for name, x in zip(kernel.arguments, held, strict=True):
            arrays[name][...] = x
        return error

    return run


def _in_memory(x: np.ndarray) -> np.ndarray:
    """A copy that begins where allocations of a GPU do, at a multiple of 256 bytes."""
    room = np.empty(x.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    held = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    held[...] = x
    return held
