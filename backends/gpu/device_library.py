"""The files of `build` on a machine with the GPU, through TVM's runtime and virtual machine.

    library = DeviceLibrary(directory)
    results = library.call([x, ...])

Inputs and results are CPU tensors: they are copied to the device and back.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...errors import ArtifactError
from ...hwdb import Hardware
from .launches import DEVICE_NAME, HOST_NAME, WEIGHTS_NAME, Description, module_bytes

# By the kind of TVM's target: the loader of its runtime, and the form it is told.
_LOADERS = {"cuda": ("cuda", "cubin"), "rocm": ("hip", "hsaco")}
_KINDS = {"nvptx": "cuda", "amdgcn": "rocm"}


def absence(hw: Hardware) -> str | None:
    """Why code for the GPU `hw` cannot run here, or None where it can."""
    return _absence(_KINDS[hw.isa], hw.llvm_cpu)


def _absence(kind: str, arch: str) -> str | None:
    import tvm

    if tvm.get_global_func(f"device_api.{kind}", allow_missing=True) is None:
        needed = "libcuda.so.1 and libcudart.so.13" if kind == "cuda" else "a build of TVM with ROCm"
        return f"there is no {arch} device here: TVM's {kind} runtime does not load, which needs {needed}"
    device = tvm.device(kind, 0)
    if not device.exist:
        return f"there is no {arch} device here: the {kind} runtime finds none"
    if kind == "cuda":
        here, wanted = str(device.compute_version).split("."), arch.removeprefix("sm_").rstrip("af")
        major, minor = wanted[:-1], wanted[-1]
        if here[0] != major or int(here[1]) < int(minor):
            return f"it is {arch} code and the device here is sm_{''.join(here)}"
    return None


class DeviceLibrary:
    """Kernels and weights on a device of this machine."""

    threads = 1  # of the host

    def __init__(self, directory: Path) -> None:
        """Load code and weights onto the first device. Raises ArtifactError where there is none that runs the code."""
        import tvm
        from tvm import relax

        described = Description.read(directory / DEVICE_NAME)
        if reason := _absence(described.kind, described.arch):
            raise ArtifactError(f"this model cannot run: {reason}")
        loader, form = _LOADERS[described.kind]
        content = module_bytes((directory / described.image).read_bytes(), described.kernels, form)
        kernels = tvm.get_global_func(f"ffi.Module.load_from_bytes.{loader}")(content)
        with tempfile.TemporaryDirectory() as scratch:
            # A copy under a name of its own: the loader takes a file of a known name for the one it has.
            own = shutil.copy(directory / HOST_NAME, scratch)
            host = tvm.runtime.load_module(own)
        (launching,) = host.imports  # the compiled functions; the host module itself is bytecode
        launching.import_module(kernels)
        self._device = tvm.device(described.kind, 0)
        self._tensor = tvm.runtime.tensor
        self._main = relax.VirtualMachine(host, self._device)["main"]
        weights = load_file(directory / WEIGHTS_NAME)
        self._weights = [self._there(weights[name]) for name in described.weights]
        self._lock = threading.Lock()  # one call at a time: the machine keeps its registers between instructions

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on CPU tensors, contiguous, of the shapes and dtypes the model was compiled for."""
        with self._lock:
            results = self._main(*[self._there(tensor) for tensor in tensors], *self._weights)
            return [torch.utils.dlpack.from_dlpack(result.copyto(_cpu())).clone() for result in results]

    def _there(self, tensor: torch.Tensor) -> Any:
        return self._tensor(tensor.detach().contiguous().numpy(), self._device)


def _cpu() -> Any:
    import tvm

    return tvm.cpu()
