"""Copies from memory to shared memory that go past the registers: cp.async, on NVIDIA's GPUs from sm_80 on.

PTX ISA, "Data movement and conversion instructions: cp.async". TVM's generator calls two functions, which
`device_functions.with_functions` defines in front of the kernels.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

_COPY, _COPY_INSIDE, _WAIT = "copy_16_bytes", "copy_16_bytes_inside", "wait_for_copies"

_SOURCE = f"""
static __device__ __forceinline__ void {_COPY}(void* shared, const void* memory) {{
  unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(place), "l"(memory));
}}
static __device__ __forceinline__ void {_COPY_INSIDE}(void* shared, const void* memory, int inside) {{
  unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(place), "l"(memory), "r"(inside ? 16 : 0));
}}
static __device__ __forceinline__ void {_WAIT}() {{ asm volatile("cp.async.wait_all;" ::: "memory"); }}
"""
CUDA_SOURCES = {f"{_WAIT}(": _SOURCE}  # with what calls it by


def copy_16_bytes(shared: Any, place: Any, memory: Any, start: Any) -> None:
    """Begin to copy 16 bytes from element `start` of `memory` to element `place` of `shared`."""
    T.evaluate(T.call_extern("void", _COPY, T.address_of(shared[place]), T.address_of(memory[start])))


def copy_16_bytes_inside(shared: Any, place: Any, memory: Any, start: Any, inside: Any) -> None:
    """As `copy_16_bytes` where `inside`; zeros come instead where not."""
    source = T.address_of(memory[tirx.Select(inside, start, 0)])
    call = T.call_extern("void", _COPY_INSIDE, T.address_of(shared[place]), source, tirx.Cast("int32", inside))
    T.evaluate(call)


def wait_for_copies() -> None:
    """Wait until the copies of this thread have arrived; a barrier shows them to others."""
    T.evaluate(T.call_extern("void", _WAIT))
