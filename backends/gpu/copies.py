"""Copies from memory to shared memory that go past the registers: cp.async, on NVIDIA's GPUs from sm_80 on.

PTX ISA, "Data movement and conversion instructions: cp.async". TVM's generator calls two functions, which
`device_functions.with_functions` defines in front of the kernels.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

_COPY, _WAIT = "copy_16_bytes", "wait_for_copies"

_SOURCE = f"""
static __device__ __forceinline__ void {_COPY}(void* shared, const void* memory) {{
  unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(place), "l"(memory));
}}
static __device__ __forceinline__ void {_WAIT}() {{ asm volatile("cp.async.wait_all;" ::: "memory"); }}
"""
CUDA_SOURCES = {f"{_COPY}(": _SOURCE}  # with what calls it by


def copy_16_bytes(shared: Any, place: Any, memory: Any, start: Any) -> None:
    """Begin to copy 16 bytes from element `start` of `memory` to element `place` of `shared`."""
    T.evaluate(T.call_extern("void", _COPY, T.address_of(shared[place]), T.address_of(memory[start])))


def wait_for_copies() -> None:
    """Wait until the copies of this thread have arrived; a barrier shows them to others."""
    T.evaluate(T.call_extern("void", _WAIT))
