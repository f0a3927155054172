"""Single kernels on the emulator, in this process: no TVM runtime, no driver, arrays of numpy in the place of memory.

    source, launches = generated({"name": function}, hw)      TVM's CUDA C++ of PrimFuncs that have their threads
    run = compiled(source, launches)                          run("name", {"in0": array, ...})

Variants of a kernel are compiled together, each in a namespace of its own: removing one barrier at a time costs one
call of the compiler.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from emulator import HERE, _compile, as_cpp
from tvm import ir, tirx
from tvm.target import Target

from graphwright.backends.gpu import lower
from graphwright.backends.gpu.without_views import without_views
from graphwright.hwdb import Hardware

_SYNC = re.compile(r"__syncthreads\(\);|__syncwarp\(\);")
_WAIT = re.compile(r"wait_for_copies\(\);")
_SHUFFLE = re.compile(r"__shfl_(?:\w+_)?sync\(")


@dataclass(frozen=True)
class Kernel:
    """How a kernel is launched: the arrays it takes in order, blocks and threads."""

    arguments: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    limits: lower.Launch


def generated(
    functions: Mapping[str, Any], hw: Hardware, amd: bool = False
) -> tuple[dict[str, str], dict[str, Kernel]]:
    """CUDA C++ and launch of each function by its name; of several kernels by "name_0", "name_1" in their order.

    `amd`: accesses name what was allocated, as in kernels for AMD.
    """
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    sources, kernels = {}, {}
    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda *_: b"", override=True)
    try:
        for symbol, function in functions.items():
            variable = ir.GlobalVar(symbol)
            _, device = lower._split(variable, function.with_attr("global_symbol", symbol), target)
            device = without_views(device) if amd else device
            source = str(tvm.get_global_func("target.build.cuda")(device, target).inspect_source("cuda"))
            parts = [kernel for _, kernel in device.functions_items()]
            for number, kernel in enumerate(parts):
                lower._check_limits(lower._launch(kernel), target)
                key = symbol if len(parts) == 1 else f"{symbol}_{number}"
                kernels[key], sources[key] = _described(kernel), source
    finally:
        if before is not None:
            tvm_ffi.register_global_func(name, before, override=True)
    return sources, kernels


def _described(kernel: Any) -> Kernel:
    extents: dict[str, int] = {}

    def thread(node: Any) -> None:
        if node.attr_key == "thread_extent":
            extents[str(node.node.thread_tag)] = int(node.value)

    tvm_ffi.structural_walk(kernel.body, [(tirx.AttrStmt, thread)])
    grid, block = (tuple(extents.get(f"{what}.{axis}", 1) for axis in "xyz") for what in ("blockIdx", "threadIdx"))
    names = tuple(str(parameter.name).removesuffix("_ptr") for parameter in kernel.params)
    return Kernel(names, grid, block, lower._launch(kernel))


def without(source: str, what: str) -> list[str]:
    """The source without each of its barriers ("sync"), waits ("wait") or shuffles ("shuffle"), one at a time."""
    if what != "shuffle":
        pattern = _SYNC if what == "sync" else _WAIT
        return [source[: m.start()] + source[m.end() :] for m in pattern.finditer(source)]
    found = []
    for match in _SHUFFLE.finditer(source):
        if "#define" in source[source.rindex("\n", 0, match.start()) : match.start()]:
            continue  # names of older CUDA
        end = _closing(source, match.end())
        inner = source[match.end() : end].split(",", 1)[1]
        found.append(f"{source[: match.start()]}({_first_argument(inner)}){source[end + 1 :]}")
    return found


def _closing(source: str, start: int) -> int:
    depth = 1
    for place in range(start, len(source)):
        depth += {"(": 1, ")": -1}.get(source[place], 0)
        if depth == 0:
            return place
    raise AssertionError("no closing bracket")


def _first_argument(text: str) -> str:
    depth = 0
    for place, letter in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            return text[:place]
    return text


def _plain(source: str) -> str:
    """Functions of one name in several namespaces are one function where they are C's."""
    return source.replace('extern "C" ', "")


def compiled(
    variants: Mapping[str, str], kernels: Mapping[str, Kernel], warp_threads: int = 32
) -> Callable[..., str | None]:
    """run(variant, arrays, reverse=False) of each source: the arrays are read and written; what went wrong, or None.

    A variant is called like its kernel, or like it with a number behind a colon.
    """
    parts, entries = [f"#define EMULATED_WARP {warp_threads}", '#include "device.h"'], []
    for number, (variant, source) in enumerate(variants.items()):
        symbol = kernels[variant.split(":")[0]].limits.name
        # What TVM defines for half would hide those of other types in a namespace.
        parts.append(f"namespace variant_{number} {{\nusing std::min;\nusing std::max;\n{as_cpp(_plain(source))}\n}}")
        call = f"emulated::call(variant_{number}::{symbol}, arguments);"
        entries.append(f'extern "C" void emulated_{number}(void **arguments) {{ {call} }}')
    text = "\n".join([*parts, *entries, '#include "threads.h"', ""])
    with tempfile.TemporaryDirectory() as scratch:
        code, path = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        code.write_text(text)
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE / 'include'}"]
        _compile("c++", str(code), path, options)
        library = ctypes.CDLL(str(path))
    library.emulated_launch.restype = ctypes.c_char_p
    numbers = {variant: number for number, variant in enumerate(variants)}

    def run(variant: str, arrays: Mapping[str, np.ndarray], reverse: bool = False) -> str | None:
        kernel = kernels[variant.split(":")[0]]
        pointers = [ctypes.c_void_p(arrays[name].ctypes.data) for name in kernel.arguments]
        addresses = (ctypes.c_void_p * len(pointers))(*[ctypes.addressof(pointer) for pointer in pointers])
        axes = [(ctypes.c_uint * 3)(*extents) for extents in (kernel.grid, kernel.block)]
        assert prod(kernel.block) == kernel.limits.threads
        error = library.emulated_launch(
            library[f"emulated_{numbers[variant]}"], addresses, *axes, ctypes.c_size_t(0), ctypes.c_int(reverse)
        )
        return error.decode() if error else None

    return run
