"""From the merged facts of a record to the Hardware the compiler asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import isa as instruction_set
from .accelerators import Gpu, Npu
from .naming import maker
from .records import Board, Cache, Cluster, Hardware, MatrixShape, Source
from .schema import ACCELERATOR_ISAS, matrix_shape

# Keys that are fields of the same name.
_SHARED = ("vendor", "year", "clock_mhz", "dram_bytes", "tdp_watts", "toolchain")
_ACCELERATOR = (
    "tensor_clock_mhz",
    "vector_flops",
    "matrix_flops",
    "sparse_factor",
    "rate_scale",
    "peak_ops",
    "l2_gbs",
    "l3_gbs",
    "host_link_gbs",
)
_GPU = (
    "warp_threads",
    "max_warps_per_unit",
    "max_blocks_per_unit",
    "max_threads_per_block",
    "schedulers_per_unit",
    "registers_per_unit",
    "max_registers_per_thread",
    "register_allocation",
    "shared_bytes_per_unit",
    "shared_bytes_per_block",
    "shared_allocation_bytes",
    "shared_reserved_bytes",
    "shared_banks",
    "operand_copies",
    "fp8_format",
    "dies",
)
_NPU = ("sram_bytes", "sram_gbs")


def build(id: str, values: Mapping[str, Any], sources: tuple[Source, ...], /, **facts: Any) -> Hardware:
    """Build the Hardware of the record `id` with the facts `values`; `facts` (fields of Hardware) replace them."""
    kind = values.get("class", "cpu")
    common = {
        "id": id,
        "name": values["name"],
        "kind": kind,
        "isa": values["isa"],
        "llvm_cpu": values.get("llvm_cpu", ""),
        "confidence": values["confidence"],
        "sources": sources,
        "vendor": maker(values["name"]),
        **{key: values[key] for key in _SHARED if key in values},
    }
    if "launch_us" in values:
        common["launch_us"] = float(values["launch_us"])
    if kind in ("cpu", "board"):
        return _cpu(common, values, facts)
    common |= {
        "triple": ACCELERATOR_ISAS[values["isa"]],
        "features": frozenset(),
        "fma_latency_cycles": 1,
        "cores": values.get("units", 1),
        "dram_gbs": values.get("dram_gbs"),
        "matrix_shapes": tuple(MatrixShape(*matrix_shape(shape)) for shape in values.get("matrix_shapes", ())),
        **{key: values[key] for key in _ACCELERATOR if key in values},
    }
    return _gpu(common, values, facts) if kind == "gpu" else _npu(common, values, facts)


def _cpu(common: dict[str, Any], values: Mapping[str, Any], facts: dict[str, Any]) -> Hardware:
    features = instruction_set.closed(facts.pop("features", values["features"]))
    bits, registers = instruction_set.vector_shape(values["isa"], features)
    clusters = tuple(Cluster(**cluster) for cluster in values.get("clusters", ()))
    cores = facts.pop("cores", values["cores"])
    board = Board(values.get("soc"), values.get("gpu"), values.get("npu"))
    result: dict[str, Any] = {
        **common,
        "triple": values["triple"],
        "features": features,
        "vector_bits": bits,
        "vector_registers": registers,
        "fma_per_cycle": _at_width(values["fma_per_cycle"], bits),
        "fma_latency_cycles": values["fma_latency_cycles"],
        "cores": cores,
        "caches": tuple(Cache(**entry) for entry in values.get("caches", ())),
        "dram_gbs": _dram_gbs(values, cores),
        "clusters": clusters,
        "board": None if board == Board() else board,
    }
    if "wake_us" in values:
        result["wake_us"] = float(values["wake_us"])
    if "byte_rate" in values:
        result["byte_rate"] = float(values["byte_rate"])
    result |= {key: values[key] for key in ("in_order", "load_stall_cycles") if key in values}
    return Hardware(**{**result, **facts})


def _gpu(common: dict[str, Any], values: Mapping[str, Any], facts: dict[str, Any]) -> Gpu:
    warp = values.get("warp_threads", 0)
    float32 = values.get("vector_flops", {}).get("float32", 0)
    result = {
        **common,
        "vector_bits": 32 * warp,
        "vector_registers": values.get("max_registers_per_thread", 0),
        "fma_per_cycle": float32 / (2 * warp) if warp else 0.0,
        "caches": _gpu_caches(values),
        **{key: values[key] for key in _GPU if key in values},
    }
    return Gpu(**{**result, **facts})


def _npu(common: dict[str, Any], values: Mapping[str, Any], facts: dict[str, Any]) -> Npu:
    result = {
        **common,
        "vector_bits": 0,
        "vector_registers": 0,
        "fma_per_cycle": 0.0,
        "dtypes": tuple(values.get("dtypes", ())),
        **{key: values[key] for key in _NPU if key in values},
    }
    return Npu(**{**result, **facts})


def _gpu_caches(values: Mapping[str, Any]) -> tuple[Cache, ...]:
    units = values.get("units", 1)
    sizes = [(1, "l1_bytes_per_unit", 1), (2, "l2_bytes", units), (3, "l3_bytes", units)]
    return tuple(Cache(level, values[key], 128, None, shared) for level, key, shared in sizes if key in values)


def _at_width(rate: Any, bits: int) -> float:
    """Return the rate at `bits`, else at the nearest narrower known width, else at the nearest wider one."""
    if not isinstance(rate, dict):
        return float(rate)
    widths = sorted(int(width) for width in rate)
    known = [width for width in widths if width <= bits] or widths[:1]
    return float(rate[str(known[-1])])


def _dram_gbs(values: Mapping[str, Any], cores: int) -> float | None:
    """Return what the memory sustains: one core's stream times the cores, up to what all channels give."""
    limits = []
    if "core_dram_gbs" in values:
        limits.append(float(values["core_dram_gbs"]) * cores)
    if "dram_gbs" in values:
        limits.append(float(values["dram_gbs"]))
    return min(limits, default=None)
