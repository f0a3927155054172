"""The files of `build` on a machine with the GPU, through TVM's runtime and virtual machine.

    library = DeviceLibrary(directory)
    results = library.call([x, ...])

Tensors on the GPU are read where they lie, on PyTorch's current stream, and results stay there: no copy, no waiting.
Tensors on the CPU are copied to the device, and results back.

A library runs in a thread of its own. Values inside a function lie in memory of the thread that launches it (TVM's
workspaces): it is freed when that thread ends, while graphs that were recorded there go on using it, and models on two
streams would share it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...errors import ArtifactError, InputError
from ...hwdb import Hardware
from .cuda import from_pip, makes_fatbins
from .launches import DEVICE_NAME, HOST_NAME, WEIGHTS_NAME, Description, module_bytes

log = logging.getLogger(__name__)

# By the kind of TVM's target: the loader of its runtime, and the form it is told.
_LOADERS = {"cuda": ("cuda", "cubin"), "rocm": ("hip", "hsaco")}
_KINDS = {"nvptx": "cuda", "amdgcn": "rocm"}
_ALIGNMENT = 16  # of the widest loads, and of what is copied past the registers
_NEEDED = {
    "cuda": "libcuda.so.1 (NVIDIA's driver) and libcudart.so.13 (CUDA's toolkit, or pip install 'graphwright[cuda]')",
    "rocm": "a build of TVM with ROCm",
}


def absence(hw: Hardware) -> str | None:
    """Why code for the GPU `hw`, made by the compiler that is here, cannot run here, or None where it can."""
    kind = _KINDS[hw.isa]
    return _absence(kind, hw.llvm_cpu, kind == "cuda" and makes_fatbins())


def _absence(kind: str, arch: str, has_ptx: bool) -> str | None:
    import tvm

    if not _has_runtime(kind):
        return f"there is no {arch} device here: TVM's {kind} runtime does not load, which needs {_NEEDED[kind]}"
    device = tvm.device(kind, 0)
    if not device.exist:
        return f"there is no {arch} device here: the {kind} runtime finds none"
    if kind == "cuda" and not runs_on(arch, here := str(device.compute_version).replace(".", ""), has_ptx):
        return f"it is {arch} code and the device here is sm_{here}"
    return None


def runs_on(arch: str, here: str, has_ptx: bool) -> bool:
    """Whether a device of compute capability `here` ("90") runs code for `arch` ("sm_80").

    Machine code runs on later devices of the same major number, PTX on all later ones (CUDA C++ Programming Guide,
    Binary and PTX Compatibility).
    """
    wanted = arch.removeprefix("sm_").rstrip("af")
    return int(here) >= int(wanted) and (has_ptx or wanted[:-1] == here[:-1])


def _has_runtime(kind: str) -> bool:
    """Whether TVM has a runtime for the kind of target."""
    import tvm

    if kind == "cuda":
        _load_cuda()
    return tvm.get_global_func(f"device_api.{kind}", allow_missing=True) is not None


@functools.cache
def _load_cuda() -> None:
    """Load CUDA's runtime from pip's packages, where TVM's loader did not look when it was imported.

    Once in a process: a driver that is installed meanwhile is seen by the next one.
    """
    import tvm
    from tvm_ffi.libinfo import load_lib_ctypes

    if tvm.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return
    try:
        for runtime in from_pip("*/lib/libcudart.so.13")[:1]:
            ctypes.CDLL(str(runtime))
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", tvm.libinfo.package_lib_paths())
    except (OSError, RuntimeError) as error:
        log.info("no CUDA runtime: %s", error)


class DeviceLibrary:
    """Kernels and weights on a device of this machine."""

    threads = 1  # of the host

    def __init__(self, directory: Path) -> None:
        """Load code and weights onto the first device. Raises ArtifactError where there is none that runs the code."""
        import tvm
        import tvm_ffi
        from tvm import relax

        described = Description.read(directory / DEVICE_NAME)
        if reason := _absence(described.kind, described.arch, described.image.endswith(".fatbin")):
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
        self._from_torch, self._on_stream, self._empty = tvm_ffi.from_dlpack, tvm_ffi.use_raw_stream, tvm.runtime.empty
        self._main = relax.VirtualMachine(host, self._device)["main"]
        self._sources: list[Any] = []  # device memory of inputs that come from the CPU; made at the first such call
        weights = load_file(directory / WEIGHTS_NAME)
        self._weights = [self._copied(weights[name], None) for name in described.weights]
        self._device.sync()  # the copies read `weights`, which ends here
        self._stream: Any = None  # PyTorch's, of the last call with tensors on the GPU
        self._lock = threading.Lock()  # one call at a time: activations have the same memory in every call
        # A kernel is launched in the context of the thread, which a first call of the runtime sets.
        self._thread = ThreadPoolExecutor(1, "graphwright", initializer=self._device.sync)

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on tensors of the shapes and dtypes the model was compiled for, all on the CPU or all on the GPU.

        Results are on the same side. Raises InputError where the tensors are on both, or on another GPU.
        """
        there = [not tensor.is_cpu for tensor in tensors]
        with self._lock:
            if not any(there):
                return self._from_cpu(tensors)
            if not all(there):
                raise InputError("some inputs are on the CPU and some on the GPU: move all of them to one side")
            return self._where_they_lie(tensors)

    def _from_cpu(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._stream is not None:
            self._stream.synchronize()  # this call uses TVM's stream, and the memory of the call before
            self._stream = None
        before = self._sources or [None] * len(tensors)
        self._sources = [self._copied(*pair) for pair in zip(tensors, before, strict=True)]
        results = self._run(self._sources, None)
        copies = [torch.empty(tuple(result.shape), dtype=_dtype(result)) for result in results]
        for result, copy in zip(results, copies, strict=True):
            result.copyto(self._from_torch(copy))
        self._device.sync()
        return copies

    def _where_they_lie(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for tensor in tensors:
            if tensor.device.type != "cuda" or tensor.device.index != self._device.index:
                raise InputError(
                    f"an input is on {tensor.device} and the model was loaded on cuda:{self._device.index}: "
                    f'x.to("cuda:{self._device.index}")'
                )
        stream = torch.cuda.current_stream(self._device.index)
        if self._stream is None:
            self._device.sync()
        elif stream != self._stream:
            stream.wait_stream(self._stream)  # calls share memory, and results that were freed are used again
        self._stream = stream
        operands = [self._from_torch(_aligned(tensor)) for tensor in tensors]
        results = self._run(operands, stream.cuda_stream)
        return [torch.utils.dlpack.from_dlpack(result) for result in results]

    def _run(self, operands: Sequence[Any], stream: int | None) -> Any:
        """The results of the kernels, launched on `stream`, or TVM's own, by the library's thread."""

        def launch() -> Any:
            if stream is None:
                return self._main(*operands, *self._weights)
            with self._on_stream(self._device, stream):
                return self._main(*operands, *self._weights)

        return self._thread.submit(launch).result()

    def _copied(self, tensor: torch.Tensor, to: Any) -> Any:
        """A CPU tensor on the device, in the memory of `to` where there is one."""
        source = self._from_torch(tensor.detach().contiguous())
        if to is None:
            to = self._empty(tuple(tensor.shape), str(source.dtype), self._device)
        source.copyto(to)
        return to


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, dense, or a copy where kernels cannot read it 16 bytes at a time: a GPU faults on that."""
    dense = tensor.detach().contiguous()
    return dense if dense.data_ptr() % _ALIGNMENT == 0 else dense.clone()


def _dtype(tensor: Any) -> torch.dtype:
    """PyTorch's name of the type of a TVM tensor."""
    found = getattr(torch, str(tensor.dtype))
    assert isinstance(found, torch.dtype)
    return found
