"""A region -> the files a machine with a GPU needs: kernels, the code that launches them, weights.

kernels.fatbin     (or .cubin, .hsaco) the GPU's machine code
host.so            TVM's bytecode and launch code, for the processor beside the GPU
device.json        the kernels and their arguments, and the order of the weights: launches.Description
weights.safetensors
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi

from ...errors import GraphwrightError
from ...hwdb import Hardware, detect
from ..aot import toolchain
from ..aot.weights import write_tensors
from ..lowering.registry import KernelInfo
from . import cuda, rocm
from .device_functions import with_functions
from .evidence import Evidence, evidence
from .launches import DEVICE_NAME, HOST_NAME, WEIGHTS_NAME, Description, Launch
from .lower import Lowered

if TYPE_CHECKING:
    from ..lowering.extract import Fused

log = logging.getLogger(__name__)

# Host code runs on any machine of the instruction set: the one with the GPU is another than this.
_HOSTS = {"x86_64": "x86-64", "aarch64": "generic"}


@dataclass(frozen=True)
class BuildInfo:
    """What `build` made."""

    kernels: list[KernelInfo]  # calls, in order
    code_bytes: int  # of the machine code of the GPU
    weights_bytes: int
    storage_bytes: int  # of the activations, as planned


def host_target() -> dict[str, Any]:
    """The processor beside the GPU: any of this machine's instruction set."""
    hw = detect()
    if hw.isa not in _HOSTS:
        raise GraphwrightError(f"artifacts for GPUs are driven by {' or '.join(_HOSTS)} code, and this is {hw.isa}")
    return {"kind": "llvm", "mtriple": hw.triple, "mcpu": _HOSTS[hw.isa]}


def check_compiler(hw: Hardware) -> None:
    """Raise ToolMissing without a compiler for the GPU `hw`, GraphwrightError where it makes no code for it."""
    if hw.isa == "nvptx":
        cuda.check_architecture(cuda.find_compiler(), hw.llvm_cpu)


def build(fused: Fused, lowered: Lowered, hw: Hardware, directory: Path) -> BuildInfo:
    """Compile a region, lowered for the GPU `hw`, into `directory`.

    Raises ToolMissing without a compiler for the GPU, GraphwrightError where the model is larger than its memory.
    """
    weights_bytes = sum(tensor.nbytes for tensor in fused.weights.values())
    needed = weights_bytes + lowered.storage_bytes + _input_bytes(fused)
    if hw.dram_bytes is not None and needed > hw.dram_bytes:
        raise GraphwrightError(
            f"the model needs {needed / 1e9:.1f} GB for weights, inputs and activations and {hw.name} has "
            f"{hw.dram_bytes / 1e9:.1f} GB; choose a smaller batch or a device with more memory"
        )
    code, form = _machine_code(lowered, hw)
    image = f"kernels.{form}"
    (directory / image).write_bytes(code)
    _write_host(lowered, directory / HOST_NAME)
    launches = tuple(launch for found in lowered.launches.values() for launch in found)
    described = Description(hw.llvm_cpu, lowered.target.kind.name, image, launches, tuple(fused.weights))
    described.write(directory / DEVICE_NAME)
    write_tensors(directory / WEIGHTS_NAME, {name: tensor.detach().clone() for name, tensor in fused.weights.items()})
    found = evidence(code, launches, hw)
    kernels = [_with_evidence(kernel, lowered.launches[kernel.name], found) for kernel in lowered.kernels]
    return BuildInfo(kernels, len(code), weights_bytes, lowered.storage_bytes)


def _input_bytes(fused: Fused) -> int:
    """Bytes of the inputs, which are copied to the device."""
    total = 0
    for parameter in fused.module["main"].params:
        if parameter.name in fused.inputs:
            extents = [int(extent) for extent in parameter.ty.shape.values]
            dtype = tvm_ffi.dtype(str(parameter.ty.dtype))
            total += prod(extents) * ((dtype.bits + 7) // 8)
    return total


def _with_evidence(kernel: KernelInfo, launches: Sequence[Launch], found: Mapping[str, Evidence]) -> KernelInfo:
    """What the report says of a kernel, with what its machine code says."""
    texts = [found[launch.name].text() for launch in launches if launch.name in found]
    return replace(kernel, choice=f"{kernel.choice}; {' + '.join(texts)}") if texts else kernel


def _machine_code(lowered: Lowered, hw: Hardware) -> tuple[bytes, str]:
    """The kernels as machine code of the GPU, and the form it has."""
    if hw.isa == "amdgcn":
        with rocm.callbacks(hw.llvm_cpu, int(lowered.target.attrs["thread_warp_size"])) as linked:
            rocm.generated(lowered.device, lowered.target)
        return linked[-1], "hsaco"
    return cuda.compile_cuda(_cuda_source(lowered), hw.llvm_cpu)


def _cuda_source(lowered: Lowered) -> str:
    """The kernels in CUDA C++. Where TVM has a CUDA runtime it wants them compiled: it gets an empty image."""
    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda *_: b"", override=True)
    try:
        module = tvm.get_global_func("target.build.cuda")(lowered.device, lowered.target)
    finally:
        if before is not None:
            tvm_ffi.register_global_func(name, before, override=True)
    return with_functions(str(module.inspect_source("cuda")))


def _write_host(lowered: Lowered, path: Path) -> None:
    """Bytecode and launch code as one library, linked by ziglang; what it calls is in the process that loads it."""
    host = tvm.get_global_func("target.build.llvm")(lowered.host, lowered.target.host)
    executable = tvm.get_global_func("relax.VMLink")(lowered.builder, lowered.target, host, [], {})
    tvm.relax.VMExecutable(executable).export_library(str(path), fcompile=_linked)


def _linked(output: str, files: Sequence[str], options: Any = None, **_: Any) -> None:
    toolchain.zig("ld.lld", "-shared", "--build-id=none", "-z", "noexecstack", *files, "-o", output)
