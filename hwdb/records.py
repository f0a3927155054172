"""What is known about one machine: frozen records, and the questions the compiler asks of them.

Units are in the names; None means unknown and is never replaced by 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from . import isa as instruction_set
from .dtypes import BITS, WITHIN_FLOAT32, dtype_name

# What CPUs compute with, float16 and bfloat16 where there are features for them.
_MACOS = "aarch64-apple-macosx"
_CPU_DTYPES = frozenset(
    {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
)

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

# Feature -> m, n, k, type multiplied, type accumulated. Intel optimization manual (AMX tiles of 16 rows of 64 bytes),
# Arm architecture reference manual (SMMLA, BFMMLA).
_MATRIX_INSTRUCTIONS = (
    ("amx-int8", 16, 16, 64, "int8", "int32"),
    ("amx-bf16", 16, 16, 32, "bfloat16", "float32"),
    ("amx-fp16", 16, 16, 32, "float16", "float32"),
    ("i8mm", 2, 2, 8, "int8", "int32"),
    ("bf16", 2, 2, 4, "bfloat16", "float32"),
)


@dataclass(frozen=True)
class Source:
    """Where a fact comes from."""

    id: str
    kind: Literal["vendor_datasheet", "vendor_doc", "driver_dump", "measured", "press", "derived", "memory", "system"]
    title: str
    url: str | None = None
    date: str | None = None
    accessed: str | None = None


@dataclass(frozen=True)
class Cache:
    """One data or unified cache level."""

    level: int
    size_bytes: int
    line_bytes: int = 64
    ways: int | None = None
    shared_by_cores: int = 1


@dataclass(frozen=True)
class Cluster:
    """Equal cores of a processor that has several kinds."""

    core: str  # the record of the microarchitecture
    count: int
    clock_mhz: float | None = None


@dataclass(frozen=True)
class Board:
    """What is in the package beside the cores: the chip's name, and the records of its GPU and NPU."""

    soc: str | None = None
    gpu: str | None = None
    npu: str | None = None


@dataclass(frozen=True)
class MatrixShape:
    """One matrix instruction: c[m, n] += a[m, k] @ b[k, n], with the types multiplied and accumulated."""

    m: int
    n: int
    k: int
    dtype: str
    accumulate: str

    def __str__(self) -> str:
        return f"m{self.m}n{self.n}k{self.k}:{self.dtype}:{self.accumulate}"


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a GPU kernel are resident on one unit at a time, and what keeps out the next one."""

    blocks_per_unit: int
    warps_per_unit: int
    share: float  # of the warps a unit can hold
    limited_by: str  # "threads", "blocks", "registers" or "shared memory"


@dataclass(frozen=True)
class Hardware:
    """A machine: enough facts to choose kernels, tiles and precision, and to ask LLVM for code.

    As it stands this is a CPU, or a board with one. `Gpu` and `Npu` (accelerators.py) extend it: their cores are the
    units that share nothing but the outer caches, a vector is one warp, and the questions are the same.
    """

    id: str
    name: str
    isa: str  # x86_64, aarch64, armv7, riscv64, loongarch64; nvptx, amdgcn, spirv, metal; none
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
    in_order: bool = False  # instructions start in the order of the program: none hides another's wait for memory
    byte_rate: float = 1.0  # products of bytes by widening multiplies and pairwise sums in the time of one of floats
    load_stall_cycles: int = 0  # in which a vector that is loaded keeps multiply-adds from starting
    native: bool = False
    confidence: Literal["high", "medium", "low"] = "medium"
    sources: tuple[Source, ...] = field(default=())
    kind: Literal["cpu", "board", "gpu", "npu"] = "cpu"
    vendor: str | None = None
    year: int | None = None
    dram_bytes: int | None = None  # the largest option
    tdp_watts: float | None = None
    clusters: tuple[Cluster, ...] = ()  # of processors with unequal cores, the fastest first; `cores` are the first's
    board: Board | None = None
    toolchain: str | None = None  # "none": nothing we know makes code for it
    core_gbs: tuple[tuple[int, float], ...] = ()  # GB/s of one core by cache level, where they were measured
    calibrated: str | None = None  # when rates were measured on this machine
    caution: str | None = None  # what is uncertain about the facts, and what was done about it

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of `dtype` in one vector register."""
        return self.vector_bits // BITS[dtype_name(dtype)]

    def peak_flops(self, dtype: str = "float32", *, sparse: bool = False) -> float | None:
        """FLOP/s of all cores together for `dtype` multiply-adds; None where it is unknown or not `supports(dtype)`.

        `computed_in` says what such types are widened to. `sparse` counts the zeros that structured (2:4) sparsity
        skips, where the hardware can skip them.
        """
        name = dtype_name(dtype)
        if self.clock_mhz is None or not self.supports(name):
            return None
        fp32 = 2.0 * self.lanes("float32") * self.fma_per_cycle * self.cores * self.clock_mhz * 1e6
        family = self.dot_product(name)
        if family is not None:
            return fp32 * _DOT_RATE[("int8" if name == "uint8" else name), family]
        if name in ("float64", "int64"):
            return fp32 / 2
        if name in ("int8", "uint8"):
            return fp32 * self.byte_rate
        return fp32 * 2 if name == "float16" else fp32

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
        for known, rate in self.core_gbs:
            if known == level:
                return rate * self.cores
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
        return name in _CPU_DTYPES

    def computed_in(self, dtype: str) -> str | None:
        """The type in which arithmetic of `dtype` runs: itself, or float32 where that holds every value of it, or None.

        The same for every class of hardware: float16 on a Cortex-A72, float8 on a T4 and int4 on a Zen 4 are widened,
        float64 on a GPU that lacks it is not. Whether the rate is known, `peak_flops` says.
        """
        name = dtype_name(dtype)
        if self.supports(name):
            return name
        return "float32" if name in WITHIN_FLOAT32 and self.supports("float32") else None

    @property
    def multiplies_by_element(self) -> bool:
        """Whether one lane of a register may be a factor of a whole vector: fmla v0.4s, v1.4s, v2.s[i] on Arm."""
        return self.isa == "aarch64"

    def matrix_instructions(self, dtype: str) -> tuple[MatrixShape, ...]:
        """Instructions that multiply small matrices of `dtype`, the preferred one first; empty where there are none."""
        return tuple(
            MatrixShape(m, n, k, name, accumulate)
            for feature, m, n, k, name, accumulate in _MATRIX_INSTRUCTIONS
            if feature in self.features and name == dtype_name(dtype)
        )

    def occupancy(self, registers: int, shared_bytes: int, threads: int) -> Occupancy | None:
        """Blocks of `threads` threads that are resident on one unit at a time; None where there are no such blocks.

        `registers` of 32 bits are per thread, `shared_bytes` per block.
        """
        return None

    def refusal(self) -> str | None:
        """Why graphwright makes no code for this machine, or None where it does."""
        if self.toolchain == "none":
            return "no compiler for it is known here; it is in the database for planning"
        if self.kind != "gpu" and "linux" not in self.triple.split("-") and not self.triple.startswith(_MACOS):
            return f"code is made for Linux, Android and macOS on Apple's processors, and {self.triple} is none of them"
        return None

    @property
    def pointer_bits(self) -> int:
        """Bits of an address."""
        return 32 if self.isa == "armv7" else 64

    def tvm_target(self) -> dict[str, Any]:
        """The description TVM's Target takes: kind, mtriple, mcpu, mattr, num-cores."""
        target: dict[str, Any] = {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.llvm_cpu,
            "mattr": instruction_set.attributes(self.isa, self.features),
            "num-cores": self.cores,
        }
        if abi := instruction_set.ABI.get(self.isa):
            target["mabi"] = abi
        if self.isa == "loongarch64":  # whose vectors TVM does not know
            target["vector-width"] = self.vector_bits
        return target
