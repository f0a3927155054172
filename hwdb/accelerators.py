"""GPUs and NPUs: the same questions as of a CPU, answered from rates per unit and clock.

    peak = units x FLOP per clock and unit x clock          (dense; sparse_factor times as much with 2:4 sparsity)

Rates, limits and shapes belong to the architecture (sm_90, gfx942); a device adds units, clocks and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError, UnknownTarget
from .dtypes import dtype_name
from .records import Hardware, MatrixShape, Occupancy

_MATRIX_FAMILY = {"nvptx": "mma", "spirv": "dpas", "metal": "simdgroup"}
_LANE_FAMILY = {"nvptx": "dp4a", "amdgcn": "dot4", "spirv": "dp4a"}


# Nothing is of this class alone: Gpu and Npu have the methods that dataclass would generate here, which takes a while.
@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class Accelerator(Hardware):
    """What GPUs and NPUs have in common. `cores` counts units; 1 where only figures of the whole are published."""

    tensor_clock_mhz: float | None = None  # where the matrix units run slower than clock_mhz
    vector_flops: Mapping[str, float] = field(default_factory=dict, hash=False)  # dense, per clock and unit
    matrix_flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    matrix_shapes: tuple[MatrixShape, ...] = ()
    sparse_factor: Mapping[str, float] = field(default_factory=dict, hash=False)
    rate_scale: Mapping[str, float] = field(default_factory=dict, hash=False)  # of cut-down parts
    peak_ops: Mapping[str, float] = field(default_factory=dict, hash=False)  # of the device, where only it is published
    l2_gbs: float | None = None
    l3_gbs: float | None = None
    host_link_gbs: float | None = None

    def peak_flops(self, dtype: str = "float32", *, sparse: bool = False) -> float | None:
        """FLOP/s (or op/s) of all units together for dense `dtype` multiply-adds; None: unknown, or not supported.

        The faster of vector lanes and matrix units; `computed_in` says what a type with neither is widened to.
        """
        name = dtype_name(dtype)
        name = "int8" if name == "uint8" else name
        factor = self.sparse_factor.get(name, 1.0) if sparse else 1.0
        if name in self.peak_ops:
            return self.peak_ops[name] * factor
        # Matrix units that slow down do so for the narrow types: H100 multiplies float64 at its boost clock.
        clock = self.clock_mhz if name == "float64" else self.tensor_clock_mhz or self.clock_mhz
        matrix = self._rate(self.matrix_flops, name, clock)
        vector = self._rate(self.vector_flops, name, self.clock_mhz)
        if matrix is None and vector is None:
            return None
        return max((matrix or 0.0) * factor, vector or 0.0)

    def _rate(self, flops: Mapping[str, float], dtype: str, clock_mhz: float | None) -> float | None:
        if dtype not in flops or clock_mhz is None:
            return None
        return flops[dtype] * self.rate_scale.get(dtype, 1.0) * self.cores * clock_mhz * 1e6

    def bandwidth_gbs(self, level: int) -> float | None:
        """GB/s of all units together from cache `level`, where it is known; level 0 is DRAM."""
        return {0: self.dram_gbs, 2: self.l2_gbs, 3: self.l3_gbs}.get(level)

    def dot_product(self, dtype: str = "int8") -> str | None:
        """The family of instructions that multiply and accumulate `dtype`, matrix units first, or None."""
        name = dtype_name(dtype)
        name = "int8" if name == "uint8" else name
        if name in self.matrix_flops:
            return _MATRIX_FAMILY.get(self.isa, "matrix")
        return self.vector_dot_product(name)

    def vector_dot_product(self, dtype: str = "int8") -> str | None:
        """As `dot_product`, on vector lanes."""
        name = dtype_name(dtype)
        return _LANE_FAMILY.get(self.isa) if name == "int8" and name in self.vector_flops else None

    def supports(self, dtype: str) -> bool:
        """Whether arithmetic in `dtype` runs in hardware."""
        name = dtype_name(dtype)
        name = "int8" if name == "uint8" else name
        return name in self.vector_flops or name in self.matrix_flops or name in self.peak_ops

    def matrix_instructions(self, dtype: str) -> tuple[MatrixShape, ...]:
        """Matrix instructions that multiply `dtype`, the preferred one first; empty where there are none."""
        return tuple(shape for shape in self.matrix_shapes if shape.dtype == dtype_name(dtype))


@dataclass(frozen=True, kw_only=True)
class Gpu(Accelerator):
    """A GPU: its units are SMs, compute units or Xe cores, and a vector is one 32-bit register of a whole warp.

    A warp waits for its own results while others run, so that a thread needs one accumulator (fma_latency_cycles 1).
    """

    warp_threads: int | None = None
    max_warps_per_unit: int | None = None
    max_blocks_per_unit: int | None = None
    max_threads_per_block: int | None = None
    schedulers_per_unit: int = 1  # each owns an equal share of the registers
    registers_per_unit: int | None = None  # of 32 bits
    max_registers_per_thread: int | None = None
    register_allocation: int = 1  # a warp gets a multiple of so many
    shared_bytes_per_unit: int | None = None
    shared_bytes_per_block: int | None = None
    shared_allocation_bytes: int = 1
    shared_reserved_bytes: int = 0  # of every block, by the driver
    shared_banks: int | None = None
    operand_copies: int = 1  # lanes of a warp that hold the same part of a matrix instruction's operand
    fp8_format: Literal["ocp", "fnuz"] | None = None
    dies: int = 1  # GPUs that the runtime sees, each with an equal share of the units and of the memory

    def bandwidth_gbs(self, level: int) -> float | None:
        """GB/s of all units together from cache `level`; level 0 is DRAM. L1 gives one word a bank and clock."""
        if level == 1 and self.shared_banks and self.clock_mhz:
            return 4.0 * self.shared_banks * self.cores * self.clock_mhz / 1e3
        return super().bandwidth_gbs(level)

    @property
    def copies_past_registers(self) -> bool:
        """Whether memory goes to shared memory without registers: cp.async, from sm_80 on (PTX ISA)."""
        return self.isa == "nvptx" and int("0" + "".join(c for c in self.llvm_cpu if c.isdigit())) >= 80

    def multiplies_two_of_four(self, dtype: str) -> bool:
        """Whether matrix units leave out 2 of 4 zeros by an instruction of a warp: mma.sp, from sm_80 on (PTX ISA)."""
        return self.copies_past_registers and self.sparse_factor.get(dtype_name(dtype), 1.0) > 1.0

    def dot_product(self, dtype: str = "int8") -> str | None:
        """mma, mfma, wmma, dpas, simdgroup on matrix units; dp4a, dot4 on vector lanes; or None."""
        family = super().dot_product(dtype)
        if family == "matrix" and self.isa == "amdgcn":
            return "mfma" if self.warp_threads == 64 else "wmma"
        return family

    def occupancy(self, registers: int, shared_bytes: int, threads: int) -> Occupancy | None:
        """Blocks of `threads` threads that are resident on one unit at a time; None where the limits are unknown.

        `registers` of 32 bits are per thread, `shared_bytes` per block. As CUDA's occupancy calculator does it
        (cuda_occupancy.h): registers are handed out by warp within one scheduler's share, shared memory by block.
        Raises InputError for a block without threads, or with less than nothing of the rest.
        """
        if threads < 1 or registers < 0 or shared_bytes < 0:
            raise InputError(f"no block has {threads} threads, {registers} registers a thread, {shared_bytes} bytes")
        if not (self.warp_threads and self.max_warps_per_unit and self.registers_per_unit):
            return None
        warps = -(-threads // self.warp_threads)
        limits = {"threads": self.max_warps_per_unit // warps}
        if self.max_blocks_per_unit:
            limits["blocks"] = self.max_blocks_per_unit
        if self.max_threads_per_block and threads > self.max_threads_per_block:
            limits["threads"] = 0
        if registers > 0:
            per_warp = _up(registers * self.warp_threads, self.register_allocation)
            share = self.registers_per_unit // self.schedulers_per_unit
            limits["registers"] = share // per_warp * self.schedulers_per_unit // warps
            if self.max_registers_per_thread and registers > self.max_registers_per_thread:
                limits["registers"] = 0
        if self.shared_bytes_per_unit:
            per_block = _up(shared_bytes + self.shared_reserved_bytes, self.shared_allocation_bytes)
            limits["shared memory"] = self.shared_bytes_per_unit // per_block if per_block else limits["threads"]
            if self.shared_bytes_per_block and shared_bytes > self.shared_bytes_per_block:
                limits["shared memory"] = 0
        limited_by = min(limits, key=lambda name: limits[name])
        blocks = limits[limited_by]
        return Occupancy(blocks, blocks * warps, blocks * warps / self.max_warps_per_unit, limited_by)

    def refusal(self) -> str | None:
        """Why graphwright makes no code for this machine, or None where it does: for CUDA and ROCm."""
        if self.isa in ("nvptx", "amdgcn"):
            return super().refusal()
        return f"code for GPUs is made with CUDA and ROCm, not {self.isa}; `hw show` and `hw predict` know the device"

    def tvm_target(self) -> dict[str, Any]:
        """The description TVM's Target takes: kind, processor, and the limits its schedules read.

        Raises UnknownTarget where TVM has no code generator for the device.
        """
        limits = {
            "max_threads_per_block": self.max_threads_per_block,
            "max_shared_memory_per_block": self.shared_bytes_per_block,
            "thread_warp_size": self.warp_threads,
        }
        known = {key: value for key, value in limits.items() if value is not None}
        if self.isa == "nvptx":
            l2 = next((cache.size_bytes for cache in self.caches if cache.level == 2), None)
            extra = {"registers_per_block": self.registers_per_unit, "l2_cache_size_bytes": l2}
            return {
                "kind": "cuda",
                "arch": self.llvm_cpu,
                "max_num_threads": self.max_threads_per_block,
                **known,
                **{key: value for key, value in extra.items() if value is not None},
            }
        if self.isa == "amdgcn":
            # TVM's ROCm code generator is wrong with more than 256 threads a block.
            threads = min(256, self.max_threads_per_block or 256)
            return {
                "kind": "rocm",
                "mcpu": self.llvm_cpu,
                "mtriple": "amdgcn-amd-amdhsa-hcc",
                **known,
                "max_num_threads": threads,
                "max_threads_per_block": threads,
            }
        kind = {"spirv": "opencl", "metal": "metal"}.get(self.isa)
        if kind is None:
            raise UnknownTarget(f"{self.name}: TVM has no code generator for it")
        return {"kind": kind, **known}


@dataclass(frozen=True, kw_only=True)
class Npu(Accelerator):
    """A fixed-function or vendor-programmed accelerator: no instruction set of ours, so its vector facts are 0."""

    sram_bytes: int | None = None
    sram_gbs: float | None = None
    dtypes: tuple[str, ...] = ()  # that it computes with, where only the list is published

    def supports(self, dtype: str) -> bool:
        """Whether arithmetic in `dtype` runs in hardware."""
        return dtype_name(dtype) in self.dtypes or super().supports(dtype)

    def refusal(self) -> str | None:
        """Why graphwright makes no code for this machine."""
        return "no open compiler makes code for it; it is in the database for planning"

    def tvm_target(self) -> dict[str, Any]:
        """Raises UnknownTarget: TVM has no code generator for NPUs."""
        raise UnknownTarget(f"{self.name}: TVM has no code generator for it")


def _up(value: int, granularity: int) -> int:
    return -(-value // granularity) * granularity
