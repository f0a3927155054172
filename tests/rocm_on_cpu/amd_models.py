"""Whole models for AMD's GPUs on the CPU: TVM's bytecode, launch code and memory plan around the kernels' LLVM IR.

    model = Emulated(module, inputs, "gfx90a", "fp16")
    results = model(reverse=False)                            a tensor each, in the order of the results

The launch code is made for a GPU whose memory is the host's, because TVM has no ROCm runtime here; it finds each kernel
by its name and calls it with addresses, blocks and threads.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tvm
import tvm_ffi
from safetensors.torch import load_file
from tvm import relax, tirx

sys.path.insert(0, str(Path(__file__).parent))
from amd_kernels import Library, llvm_ir

import graphwright
from graphwright.backends.gpu import build, lower
from graphwright.backends.gpu.launches import DEVICE_NAME, HOST_NAME, WEIGHTS_NAME, Description


class Emulated:
    """A compiled model; `report` is what the compiler says of it."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor], target: str, precision: str) -> None:
        lowered: list[Any] = []

        def on_host(attributes: dict[str, Any], host: Any) -> Any:
            return tvm.target.Target({**attributes, "target_device_type": int(tvm.cpu().dlpack_device_type())}, host)

        def kept(found: Any, _: Any) -> tuple[bytes, str]:
            lowered.append(found)
            return b"", "hsaco"

        with (
            mock.patch.object(lower, "Target", on_host),
            mock.patch.object(build, "_machine_code", kept),
            mock.patch.object(build, "evidence", return_value={}),
            tempfile.TemporaryDirectory() as scratch,
        ):
            compiled = graphwright.compile(module, tuple(inputs), target=target, precision=precision, cache=False)
            folder = compiled.save(Path(scratch, "model"))
            self.report = compiled.report()
            host = tvm.runtime.load_module(str(folder / HOST_NAME))
            described = Description.read(folder / DEVICE_NAME)
            weights = load_file(folder / WEIGHTS_NAME)
        self._weights = [tvm_ffi.from_dlpack(weights[name].clone()) for name in described.weights]
        self._inputs = [tvm_ffi.from_dlpack(x.contiguous()) for x in inputs]
        device, target_ = lowered[-1].device, lowered[-1].target
        self._library = Library([llvm_ir(device, target_)], int(target_.attrs["thread_warp_size"]))
        self._sizes = {str(f.attrs["global_symbol"]): _sizes(f) for _, f in device.functions_items()}
        self._reverse = False
        self.errors: list[str] = []  # of the last call
        for launch in described.kernels:
            tvm_ffi.register_global_func(launch.name, self._kernel(launch), override=True)
        self._main = relax.VirtualMachine(host, tvm.cpu())["main"]

    def __call__(self, reverse: bool) -> list[torch.Tensor]:
        """The results, with lanes upwards or downwards. Raises AssertionError for what goes wrong in a kernel."""
        self._reverse = reverse
        self.errors.clear()
        results = [torch.from_dlpack(x).clone() for x in self._main(*self._inputs, *self._weights)]
        assert not self.errors, self.errors[0]
        return results

    def _kernel(self, launch: Any) -> Any:
        assert set(launch.arguments) <= {"handle"}, launch
        sizes = self._sizes[launch.name]

        def run(*arguments: Any) -> None:
            given = dict(zip(launch.tags, arguments[len(sizes) :], strict=True))
            extents = [[int(given.get(f"{what}.{axis}", 1)) for axis in "xyz"] for what in ("blockIdx", "threadIdx")]
            memory = [(pointer.value or 0, size) for pointer, size in zip(arguments, sizes, strict=False)]
            if error := self._library.launch(0, launch.name, memory, *extents, self._reverse):
                self.errors.append(f"{launch.name}: {error}")

        return run


def _sizes(kernel: Any) -> list[int]:
    """Bytes behind each pointer that a kernel takes."""
    found: dict[str, int] = {}

    def look(statement: Any) -> None:
        data = statement.data
        if isinstance(data, tirx.Var):
            dtype = tvm_ffi.dtype(str(statement.buffer.dtype))
            elements = 1
            for extent in statement.buffer.shape:
                elements *= int(extent)
            size = elements * max(dtype.bits * dtype.lanes // 8, 1)
            found[str(data.name)] = max(size, found.get(str(data.name), 0))

    tvm_ffi.structural_walk(kernel.body, [(tirx.DeclBuffer, look)])
    return [found[str(parameter.name)] for parameter in kernel.params]
