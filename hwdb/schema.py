"""The keys of a record: what each class of hardware may say, of which type, in which unit.

    [architecture.ID], [device.ID]    facts that differ from the record named by `extends`; source, confidence
    [source.ID]                       where facts come from

A key that is absent is unknown, or inherited. `features` adds to the parent's, `without` removes; of a table (rates
by dtype) the entries given replace the parent's. Checks here see one record alone and return what is wrong with it
as (key, message) pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import suggest
from .dtypes import BITS

KINDS = ("architecture", "device", "source")
CLASSES = ("cpu", "board", "gpu", "npu")
CONFIDENCES = ("high", "medium", "low")
SOURCE_KINDS = (
    "vendor_datasheet",
    "vendor_doc",
    "driver_dump",
    "measured",
    "press",
    "derived",
    "memory",
    "system",
)
ACCELERATOR_ISAS = {
    "nvptx": "nvptx64-nvidia-cuda",
    "amdgcn": "amdgcn-amd-amdhsa",
    "spirv": "spirv64-unknown-unknown",
    "metal": "air64-apple-macosx",
    "none": "",
}

Mistake = tuple[str, str]  # the key, and what is wrong with it


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is not a string"


def identifier(value: Any) -> str | None:
    """What commands and other records call a record: `name` and `aliases` are for how people write it."""
    known = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", value)
    return None if known else "is not letters, digits and - _ . +, beginning with a letter or digit"


def texts(value: Any) -> str | None:
    whole = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    return None if whole else "is not a list of strings"


def sources(value: Any) -> str | None:
    """Ids of sources; short_forms leaves text where `confidence` is a key too."""
    return "says how sure it is, and so does another key" if isinstance(value, str) else texts(value)


def number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "is not a number"
    if math.isinf(value):
        return "is not finite: leave an unknown value out"
    return None if value > 0 else "is not positive: leave an unknown value out"


def whole(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return "is not a whole number"
    return None if value > 0 else "is not positive: leave an unknown value out"


def between(low: float, high: float, kind: Callable[[Any], str | None] = number) -> Callable[[Any], str | None]:
    """A number, or of another `kind`, that a machine may have: beyond `high` something was written in another unit."""

    def check(value: Any) -> str | None:
        if wrong := kind(value):
            return wrong
        return None if low <= value <= high else f"is not between {low:g} and {high:g}"

    return check


def truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is not true or false"


def rates(value: Any, most: float = 1e8) -> str | None:
    """A number by dtype: FLOP a clock and unit, or a factor."""
    if not isinstance(value, dict):
        return "is not a table of numbers by dtype"
    for dtype, rate in value.items():
        if dtype not in BITS:
            return f"has an unknown dtype {dtype!r}{suggest(dtype, BITS)}"
        if wrong := between(1e-6, most)(rate):
            return f"has {dtype} = {rate!r}, which {wrong}"
    return None


def total_rates(value: Any) -> str | None:
    """As rates, of a whole device in op/s."""
    return rates(value, 1e21)


def factors(value: Any) -> str | None:
    """As rates, none below 1: sparse arithmetic is never slower than dense."""
    wrong = rates(value)
    below = [dtype for dtype, factor in value.items() if factor < 1] if wrong is None else []
    return f"is below 1 for {', '.join(below)}: sparse rates are multiples of the dense ones" if below else wrong


def dtypes(value: Any) -> str | None:
    unknown = [dtype for dtype in value if dtype not in BITS] if texts(value) is None else []
    return f"has an unknown dtype {unknown[0]!r}{suggest(unknown[0], BITS)}" if unknown else texts(value)


def shapes(value: Any) -> str | None:
    """Matrix instructions in order of preference: "m16n8k16:float16", "m16n8k8:float16:float16"."""
    if wrong := texts(value):
        return wrong
    for shape in value:
        try:
            matrix_shape(shape)
        except ValueError:
            return f"has {shape!r}, which is not like 'm16n8k16:float16' or 'm16n8k8:float16:float16'"
    return None


def matrix_shape(shape: str) -> tuple[int, int, int, str, str]:
    """Return (m, n, k, type multiplied, type accumulated); ValueError where `shape` says it otherwise.

    What is not said is accumulated in float32, float64 in itself, integers in int32.
    """
    size, multiplied, *said = shape.split(":")
    wide = "int32" if multiplied.startswith("int") else "float64" if multiplied == "float64" else "float32"
    (accumulated,) = said or (wide,)
    m, rest = size.removeprefix("m").split("n")
    n, k = rest.split("k")
    if multiplied not in BITS or accumulated not in BITS:
        raise ValueError(shape)
    if min(int(m), int(n), int(k)) < 1:
        raise ValueError(shape)
    return int(m), int(n), int(k), multiplied, accumulated


def vector_rate(value: Any) -> str | None:
    """A number, or one by vector width in bits."""
    if not isinstance(value, dict):
        return FMA(value)
    if not value:
        return "has no rate"
    for bits, rate in value.items():
        if bits not in ("128", "256", "512") or FMA(rate):
            return f"has {bits} = {rate!r}: vector bits (128, 256, 512) to a rate of 0.01 to 64"
    return None


# Of every machine there is, with room for those to come.
CLOCK = between(1, 20_000)
FMA = between(0.01, 64)  # vectors a cycle
COUNT = between(1, 1 << 16, whole)
SIZE = between(1, 1 << 40, whole)  # bytes of a cache, or of shared memory
RATE = between(1e-3, 1e8)  # GB/s: the memory inside an NPU of a whole wafer has 2.1e7
_CACHE_KEYS = {
    "level": between(1, 9, whole),
    "size_bytes": SIZE,
    "line_bytes": COUNT,
    "ways": COUNT,
    "shared_by_cores": COUNT,
}


def caches(value: Any) -> str | None:
    last = 0
    if not isinstance(value, list):
        return "is not a list"
    for cache in value:
        if not isinstance(cache, dict) or not {"level", "size_bytes"} <= set(cache):
            return f"each has at least level and size_bytes, or is like '36M 12 /24', not {cache!r}"
        for key, number_of in cache.items():
            if key not in _CACHE_KEYS:
                return f"unknown key {key!r}{suggest(key, _CACHE_KEYS)}"
            if wrong := _CACHE_KEYS[key](number_of):
                return f"{key} = {number_of!r} {wrong}"
        if cache["level"] <= last:
            return f"levels must ascend, L{cache['level']} follows L{last}"
        last = cache["level"]
    return None


def clusters(value: Any) -> str | None:
    """Groups of equal cores, the fastest first: { core = "cortex-a76", count = 4, clock_mhz = 2400 }."""
    if not isinstance(value, list) or not value:
        return "is not a list of clusters"
    for cluster in value:
        if not isinstance(cluster, dict) or not {"core", "count"} <= set(cluster) <= {"core", "count", "clock_mhz"}:
            return f"each has core, count and maybe clock_mhz, or is like '4 cortex-a76 2400', not {cluster!r}"
        if text(cluster["core"]) or COUNT(cluster["count"]) or CLOCK(cluster.get("clock_mhz", 1)):
            return f"{cluster!r} is not a name, a count and a clock"
    return None


def one_of(*known: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in known else f"is not one of {', '.join(known)}"

    return check


def only_in_short(form: str) -> Callable[[Any], str | None]:
    """Of a key that short_forms writes out: what is still there is not like `form`, or stands beside what it says."""
    return lambda value: f"is not like {form}, or says again what another key says"


# Of every class. `class` is inherited; `toolchain = "none"` says that nothing we know makes code for it.
COMMON = {
    "extends": text,
    "name": text,
    "aliases": texts,
    "class": one_of(*CLASSES),
    "vendor": text,
    "year": between(1970, 2100, whole),
    "isa": text,
    "clock_mhz": CLOCK,
    "memory": only_in_short("'24G 1008'"),
    "dram_bytes": between(1 << 10, 1 << 50, whole),  # largest option
    "dram_gbs": RATE,  # of all channels, 1e9 bytes a second
    "tdp_watts": between(1e-3, 1e6),
    "launch_us": between(1e-3, 1e6),
    "toolchain": one_of("none"),
    "features": texts,
    "without": texts,
    "note": text,
    "conflicts": texts,  # "dram_gbs: 1640 (source-a), 2300 (source-b)"
    "source": sources,
    "confidence": one_of(*CONFIDENCES),
}
CPU = {
    "triple": text,
    "llvm_cpu": text,
    "cpuid": texts,
    "parts": texts,
    "fma_per_cycle": vector_rate,
    "fma_latency_cycles": between(1, 64, whole),
    "in_order": truth,
    "byte_rate": between(0.01, 100),  # products of bytes by smull and sadalp in the time of one of floats
    "load_stall_cycles": between(1, 64, whole),  # in which a vector that is loaded keeps multiply-adds from starting
    "cores": COUNT,
    "caches": caches,
    "core_dram_gbs": RATE,
    "wake_us": between(1e-3, 1e6),
    "clusters": clusters,
    "soc": text,
    "gpu": text,  # the record of the GPU in the same package
    "npu": text,
}
ACCELERATOR = {
    "units": between(1, 1 << 20, whole),  # SMs, compute units, Xe cores, NPU cores
    "tensor_clock_mhz": CLOCK,  # where the matrix units run slower than clock_mhz
    "vector_flops": rates,  # dense FLOP a clock and unit; a multiply-add counts two
    "matrix_flops": rates,
    "matrix_shapes": shapes,
    "sparse_factor": factors,
    "rate_scale": rates,  # of cut-down parts
    "peak_ops": total_rates,  # dense op/s of the device, where only that is published
    "l2_bytes": SIZE,
    "l3_bytes": SIZE,
    "l2_gbs": RATE,
    "l3_gbs": RATE,
    "host_link_gbs": RATE,
}
GPU = {
    "llvm_cpu": text,
    "warp_threads": between(1, 1024, whole),
    "max_warps_per_unit": COUNT,
    "max_blocks_per_unit": COUNT,
    "max_threads_per_block": COUNT,
    "schedulers_per_unit": between(1, 64, whole),  # each owns an equal share of the registers
    "registers_per_unit": between(1, 1 << 30, whole),  # of 32 bits
    "max_registers_per_thread": COUNT,
    "register_allocation": COUNT,  # a warp gets a multiple of so many
    "shared_bytes_per_unit": SIZE,
    "shared_bytes_per_block": SIZE,
    "shared_allocation_bytes": SIZE,
    "shared_reserved_bytes": SIZE,  # of every block, by the driver
    "shared_banks": between(1, 1024, whole),
    "l1_bytes_per_unit": SIZE,
    "operand_copies": between(1, 64, whole),  # lanes of a warp that hold the same part of a matrix operand
    "fp8_format": one_of("ocp", "fnuz"),
    "dies": between(1, 64, whole),  # GPUs that the runtime sees, of equal shares
}
NPU = {"sram_bytes": SIZE, "sram_gbs": RATE, "dtypes": dtypes}

KEYS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "cpu": {**COMMON, **CPU},
    "board": {**COMMON, **CPU},
    "gpu": {**COMMON, **ACCELERATOR, **GPU},
    "npu": {**COMMON, **ACCELERATOR, **NPU},
}
ALL_KEYS = {key: check for keys in KEYS.values() for key, check in keys.items()}
SOURCE_KEYS = {
    "kind": one_of(*SOURCE_KINDS),
    "title": text,
    "url": text,
    "date": text,
    "accessed": text,
}
_CPU_NEEDS = ("name", "isa", "triple", "llvm_cpu", "fma_per_cycle", "fma_latency_cycles", "cores")
NEEDED = {
    "cpu": _CPU_NEEDS,
    "board": _CPU_NEEDS,
    "gpu": ("name", "isa", "vendor"),
    "npu": ("name", "isa"),
}
# What a GPU that code can be made for must say besides.
NEEDED_FOR_CODE = ("warp_threads", "max_threads_per_block", "shared_bytes_per_block", "vector_flops")
# Those that LLVM makes machine code for name the processor; SPIR-V and Metal are compiled by the driver.
COMPILED_BY_LLVM = ("nvptx", "amdgcn")

# What a record says of itself only: not handed down to those that extend it.
OWN = frozenset(
    {"aliases", "cpuid", "parts", "features", "without", "source", "confidence", "extends", "note", "conflicts"}
)
# Tables whose entries are inherited one by one.
TABLES = frozenset({"vector_flops", "matrix_flops", "sparse_factor", "rate_scale", "peak_ops"})


def mistakes(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """What is wrong with a record by itself."""
    yield from _checked(values, ALL_KEYS)
    for key in ("source", "confidence"):
        if not values.get(key):
            yield key, f"{key} missing: every record says where it comes from and how sure it is"


def source_mistakes(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """What is wrong with a source."""
    yield from _checked(values, SOURCE_KEYS)
    for key in ("kind", "title"):
        if key not in values:
            yield key, f"{key} missing"


def class_mistakes(merged: Mapping[str, Any]) -> Iterator[Mistake]:
    """What is wrong with a record once it has inherited: keys of another class, and needed ones that are absent."""
    kind = merged.get("class", "cpu")
    for key in merged:
        if key not in KEYS[kind]:
            owners = [other for other in CLASSES if key in KEYS[other]]
            yield key, f"{key} belongs to {' and '.join(owners)} records, and this one is a {kind}"
    needed: Iterable[str] = NEEDED[kind]
    if kind == "gpu" and merged.get("isa") != "none":
        needed = (*needed, *NEEDED_FOR_CODE)
        needed = (*needed, "llvm_cpu") if merged.get("isa") in COMPILED_BY_LLVM else needed
    missing = [key for key in needed if key not in merged]
    if missing:
        yield missing[0], f"{', '.join(missing)} missing here and in what it extends"


def _checked(values: Mapping[str, Any], keys: Mapping[str, Callable[[Any], str | None]]) -> Iterator[Mistake]:
    for key, value in values.items():
        check = keys.get(key)
        if check is None:
            yield key, f"unknown key {key!r}{suggest(key, keys)}"
        elif wrong := check(value):
            tables = isinstance(value, list) and any(isinstance(item, dict) for item in value)
            yield key, f"{key}: {wrong}" if tables else f"{key} = {value!r} {wrong}"
