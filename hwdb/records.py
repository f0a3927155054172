"""What is known about one machine: frozen records, and the questions the compiler asks of them.

Units are in the names; None means unknown and is never replaced by 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where a fact comes from."""

    id: str
    kind: Literal["vendor_datasheet", "vendor_doc", "driver_dump", "measured", "press", "derived", "memory", "system"]
    title: str
    url: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class Cache:
    """One data or unified cache level."""

    level: int
    size_bytes: int
    line_bytes: int = 64
    ways: int | None = None
    shared_by_cores: int = 1


@dataclass(frozen=True)
class Hardware:
    """A CPU target: enough facts to choose kernels, tiles and precision, and to ask LLVM for code."""

    id: str
    name: str
    isa: Literal["x86_64", "aarch64"]
    triple: str
    llvm_cpu: str
    features: frozenset[str]  # LLVM feature names without '+': "avx2", "fma", "avx512f", "neon", "dotprod"
    vector_bits: int
    vector_registers: int
    fma_per_cycle: float  # vector FMA instructions retired per core and cycle
    fma_latency_cycles: int
    cores: int  # cores this process may use (affinity and cgroup quota applied for "native")
    clock_mhz: float | None = None
    caches: tuple[Cache, ...] = ()  # ascending level, data or unified only
    dram_gbs: float | None = None
    launch_us: float = 1.5  # starting and joining a parallel region
    native: bool = False
    confidence: Literal["high", "medium", "low"] = "medium"
    sources: tuple[Source, ...] = field(default=())

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of `dtype` in one vector register."""
        raise NotImplementedError

    def peak_flops(self, dtype: str = "float32") -> float | None:
        """FLOP/s of all cores together for `dtype` multiply-adds, or None where the clock is unknown."""
        raise NotImplementedError

    def cache(self, level: int) -> Cache | None:
        """The data (or unified) cache of that level."""
        raise NotImplementedError

    def bandwidth_gbs(self, level: int) -> float | None:
        """Sustained GB/s of all cores together from cache `level`; level 0 is DRAM."""
        raise NotImplementedError

    def dot_product(self, dtype: str = "int8") -> str | None:
        """The instruction family that multiplies and accumulates `dtype` (vnni, sdot, i8mm, bf16, amx), or None."""
        raise NotImplementedError

    def supports(self, dtype: str) -> bool:
        """Whether arithmetic in `dtype` runs in hardware."""
        raise NotImplementedError

    def tvm_target(self) -> dict[str, Any]:
        """The description TVM's Target takes: kind, mtriple, mcpu, mattr, num-cores."""
        raise NotImplementedError
