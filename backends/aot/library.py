"""Programs -> model.so, and its use from Python.

    info = build(programs, hw, directory)                        # writes directory/model.so
    weights.write(directory / "weights.safetensors", info.weights, {name: tensor, ...})
    library = Library(directory / "model.so", directory / "weights.safetensors", threads=4)
    library.run(region, [x.data_ptr(), ...], [y.data_ptr(), ...])   # region: the program's position in `programs`

A call releases the GIL and may be made from any number of threads. Inputs and outputs are addresses of dense row-major
tensors aligned to their element; outputs must not overlap inputs.
"""

from __future__ import annotations

import _ctypes
import ctypes
import logging
import os
import re
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArtifactError, GraphwrightError
from . import weights
from .program import Program, check

if TYPE_CHECKING:
    from ...hwdb import Hardware
    from .memory import Plan

log = logging.getLogger(__name__)

LIBRARY_NAME = "model.so"
WEIGHTS_NAME = "weights.safetensors"
OBJECT_NAME = "model.o"  # the generated code, not yet linked: what bundles are made from
BUNDLED = ("aarch64", "armv7")  # instruction sets that get one


@dataclass(frozen=True)
class BuildInfo:
    """What `build` made."""

    library: Path
    weights: weights.Layout  # what the weights file must hold: weights.write
    plans: tuple[Plan, ...]  # of each region
    kernels: int  # compiled, after merging equal ones
    kernel_calls: int
    code_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Arena bytes of one running call: the largest region's."""
        return max((plan.peak_bytes for plan in self.plans), default=0)


def build(programs: Sequence[Program], hw: Hardware, directory: Path) -> BuildInfo:
    """Compile `programs` for `hw` into directory/model.so, and model.o where bundles are made for the instruction set.

    Equal programs give equal bytes.
    """
    from . import codegen, mach_o, memory, region, toolchain

    start = time.perf_counter()
    for program in programs:
        check(program)
    layout = weights_layout(programs)
    offsets = {name: entry.offset for name, entry in layout.entries.items()}
    plans = tuple(memory.plan(program, offsets) for program in programs)
    kernels, symbols = merge_kernels(programs)
    names = [f"gw_region_{number}" for number in range(len(programs))]
    marks = list(accumulate((region.marks(program) for program in programs), initial=0))
    graph = {
        name: region.region_function(program, plan, table, mark, hw.pointer_bits)
        for name, program, plan, table, mark in zip(names, programs, plans, symbols, marks[:-1], strict=True)
    }
    arena = max((plan.peak_bytes for plan in plans), default=0)
    graph |= region.model_functions(names, arena, layout.nbytes, marks[-1], hw.pointer_bits)
    target = hw.tvm_target()
    output = Path(directory, LIBRARY_NAME)
    with tempfile.TemporaryDirectory() as scratch:
        contents = [*codegen.compile_objects(kernels, target), codegen.compile_object(graph, target)]
        objects = [Path(scratch, f"{number}.o") for number in range(len(contents))]
        for path, content in zip(objects, contents, strict=True):
            path.write_bytes(content)
        linked, whole = [*objects, *toolchain.runtime_objects(hw.triple)], output.with_name(OBJECT_NAME)
        if toolchain.is_macos(hw.triple):
            mach_o.link(linked, output, hw.triple)
            mach_o.merge(objects, whole, hw.triple)
        else:
            toolchain.link(linked, output)
            if hw.isa in BUNDLED:
                toolchain.merge(objects, whole)
    info = BuildInfo(
        library=output,
        weights=layout,
        plans=plans,
        kernels=len(kernels),
        kernel_calls=sum(step.kernel is not None for program in programs for step in program.steps),
        code_bytes=output.stat().st_size,
        seconds=time.perf_counter() - start,
    )
    log.debug(
        "%d kernels for %d calls, %d bytes, %.2f s",
        info.kernels,
        info.kernel_calls,
        info.code_bytes,
        info.seconds,
    )
    return info


def weights_layout(programs: Sequence[Program]) -> weights.Layout:
    """The weights of all programs, each once, in the order they are first met."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for program in programs:
        for name, tensor in program.weights.items():
            buffer = program.buffers[name]
            described = (buffer.dtype, buffer.shape)
            known = tensors.setdefault(tensor, described)
            assert known == described, f"{program.name}: weight {tensor} is both {known} and {described}"
    return weights.Layout.of(tensors)


def merge_kernels(programs: Sequence[Program]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Give every distinct kernel one C name: the functions by name, and for each program its kernels' names."""
    from tvm_ffi import StructuralKey

    functions: dict[str, Any] = {}
    known: dict[Any, str] = {}
    tables = []
    for program in programs:
        table = {}
        for name in dict.fromkeys(step.kernel for step in program.steps if step.kernel is not None):
            bare = program.kernels[name].without_attr("global_symbol")
            symbol = known.get(key := StructuralKey(bare))
            if symbol is None:
                symbol = known[key] = f"gw{len(functions)}_{re.sub(r'[^0-9A-Za-z_]', '_', name)[:64]}"
                functions[symbol] = bare
            table[name] = symbol
        tables.append(table)
    return functions, tables


# How many calls of compiled models this process is running.
_callers = ctypes.c_int32(0)
os.register_at_fork(after_in_child=lambda: setattr(_callers, "value", 0))


class Library:
    """A model.so loaded into this process with its weights mapped."""

    def __init__(self, path: Path, weights_path: Path | None = None, threads: int = 0) -> None:
        """Load and initialise; threads=0 uses every core this process may use. Raises ArtifactError.

        weights_path: by default weights.safetensors beside the library.
        """
        path = Path(path).resolve()
        weights_path = weights_path or path.with_name(WEIGHTS_NAME)
        try:
            code = ctypes.CDLL(str(path))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be loaded: {error}; compile the model again") from error
        code.gw_init.argtypes = (
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
        )
        code.gw_run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
        code.gw_set_threads.argtypes = (ctypes.c_void_p, ctypes.c_int)
        code.gw_get_threads.argtypes = (ctypes.c_void_p,)
        code.gw_trace.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        code.gw_share_callers.argtypes = (ctypes.POINTER(ctypes.c_int32),)
        code.gw_share_callers.restype = None
        code.gw_error.argtypes = (ctypes.c_void_p,)
        code.gw_error.restype = ctypes.c_char_p
        code.gw_free.argtypes = (ctypes.c_void_p,)
        code.gw_free.restype = None
        mapped = weights.Weights(weights_path)
        context = ctypes.c_void_p()
        if code.gw_init(mapped.address, mapped.nbytes, threads, ctypes.byref(context)):
            reason = code.gw_error(None).decode()
            mapped.close()
            _ctypes.dlclose(code._handle)
            raise ArtifactError(f"{path} and {weights_path} do not fit together: {reason}; compile the model again")
        code.gw_share_callers(ctypes.byref(_callers))
        self._code = code
        self._context = context.value or 0
        self._run = code.gw_run
        self._packers: dict[int, Any] = {}
        self._close = weakref.finalize(self, _release, code, self._context, mapped)
        self._close.atexit = False  # a daemon thread may still be inside a call when the interpreter ends

    def run(self, region: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Run one region on addresses; returns when the outputs are written. Raises GraphwrightError or MemoryError."""
        # A packed string of addresses is the cheapest array of pointers ctypes can pass, and private to this call.
        code = self._run(self._context, region, self._table(inputs), self._table(outputs))
        if code:
            reason = self._code.gw_error(self._context).decode()
            if "out of memory" in reason:
                raise MemoryError(reason)
            raise GraphwrightError(f"region {region} failed: {reason}")

    def _table(self, addresses: Sequence[int]) -> bytes:
        count = len(addresses)
        try:
            pack = self._packers[count]
        except KeyError:
            pack = self._packers[count] = struct.Struct(f"{count}Q").pack
        table: bytes = pack(*addresses)
        return table

    @contextmanager
    def trace(self) -> Iterator[Any]:
        """Let calls write when they begin and when each step ends: an array of nanoseconds, region after region.

        One call at a time may run meanwhile.
        """
        stamps = (ctypes.c_int64 * self._code.gw_trace(self._context, None))()
        self._code.gw_trace(self._context, stamps)
        try:
            yield stamps
        finally:
            self._code.gw_trace(self._context, None)

    @property
    def threads(self) -> int:
        """Threads of one call, the caller's included."""
        return int(self._code.gw_get_threads(self._context))

    @threads.setter
    def threads(self, count: int) -> None:
        self._code.gw_set_threads(self._context, count)

    def close(self) -> None:
        """Free memory, stop the threads and unload the code. No call may be running or follow."""
        self._close()


def _release(code: Any, context: int, mapped: weights.Weights) -> None:
    code.gw_free(context)
    _ctypes.dlclose(code._handle)
    mapped.close()
