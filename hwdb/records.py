"""What is known about one machine: frozen records, and the questions the compiler asks of them.

Units are in the names; None means unknown and is never replaced by 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from . import isa as instruction_set

# Bytes of one element, by the dtype names of torch, TVM and common speech.
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_SPELLINGS = {
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
}

# Multiply-adds of one dot-product instruction, as a multiple of the float32 multiply-adds of one vector.
# AMX: a TDPBSSD does 16 x 16 x 64 int8 products in 16 cycles (Intel optimization manual, chapter on AMX):
# 1024 a cycle, against 32 of two 512-bit float32 FMAs; bfloat16 half of that.
_DOT_RATE = {
    ("int8", "vnni"): 4.0,
    ("int8", "sdot"): 4.0,
    ("int8", "i8mm"): 8.0,
    ("int8", "amx"): 32.0,
    ("bfloat16", "bf16"): 2.0,
    ("bfloat16", "amx"): 16.0,
}


def dtype_name(dtype: str) -> str:
    """Return the full name of `dtype`: "fp32" and "torch.float32" are "float32"."""
    name = dtype.removeprefix("torch.")
    return _SPELLINGS.get(name, name)


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
    wake_us: float = 50.0  # until a sleeping thread runs; measured on a virtual machine
    native: bool = False
    confidence: Literal["high", "medium", "low"] = "medium"
    sources: tuple[Source, ...] = field(default=())

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of `dtype` in one vector register."""
        return self.vector_bits // (8 * _ITEM_BYTES[dtype_name(dtype)])

    def peak_flops(self, dtype: str = "float32") -> float | None:
        """FLOP/s of all cores together for `dtype` multiply-adds, or None where the clock is unknown."""
        if self.clock_mhz is None:
            return None
        name = dtype_name(dtype)
        fp32 = 2.0 * self.lanes("float32") * self.fma_per_cycle * self.cores * self.clock_mhz * 1e6
        family = self.dot_product(name)
        if family is not None:
            return fp32 * _DOT_RATE[("int8" if name == "uint8" else name), family]
        if name in ("float64", "int64"):
            return fp32 / 2
        # Narrow types without arithmetic of their own are widened to float32 and computed there.
        return fp32 * 2 if name == "float16" and self.supports(name) else fp32

    @property
    def cycles_per_us(self) -> float:
        """The clock where a choice, but no prediction, hangs on it: 2000 where it is unknown."""
        return self.clock_mhz or 2000.0

    def cache(self, level: int) -> Cache | None:
        """The data (or unified) cache of that level."""
        return next((cache for cache in self.caches if cache.level == level), None)

    def bandwidth_gbs(self, level: int) -> float | None:
        """Sustained GB/s of all cores together from cache `level`; level 0 is DRAM."""
        if level == 0:
            return self.dram_gbs
        if self.clock_mhz is None or self.cache(level) is None:
            return None
        # Cores are built to load from L1 as many vectors per cycle as they multiply-add. Each level
        # outwards is taken at half of the one before, a shared cache at no more than 16 bytes per core and
        # cycle: a rule of thumb.
        core: float = self.fma_per_cycle * self.vector_bits / 8 / 2.0 ** (level - 1)
        if level >= 3:
            core = min(core, 16.0)
        return core * self.cores * self.clock_mhz / 1e3

    def dot_product(self, dtype: str = "int8") -> str | None:
        """The instructions that multiply and accumulate `dtype` (vnni, sdot, i8mm, bf16, amx), or None."""
        return instruction_set.dot_product(self.features, dtype_name(dtype))

    def vector_dot_product(self, dtype: str = "int8") -> str | None:
        """As `dot_product`, but only of instructions on vector registers: not amx, which has tiles of its own."""
        return instruction_set.dot_product(self.features - instruction_set.TILE_FEATURES, dtype_name(dtype))

    def supports(self, dtype: str) -> bool:
        """Whether arithmetic in `dtype` runs in hardware."""
        name = dtype_name(dtype)
        if name == "float16":
            return bool(self.features & {"fullfp16", "avx512fp16"})
        if name == "bfloat16":
            return self.dot_product(name) is not None
        return name in _ITEM_BYTES

    def tvm_target(self) -> dict[str, Any]:
        """The description TVM's Target takes: kind, mtriple, mcpu, mattr, num-cores."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.llvm_cpu,
            "mattr": instruction_set.attributes(self.isa, self.features),
            "num-cores": self.cores,
        }
