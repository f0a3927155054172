"""What `graphwright hw` prints of machines: a line of the list, the facts, where each is from, and two side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...hwdb import Hardware
    from ...hwdb.accelerators import Accelerator, Gpu
    from ...hwdb.files import Record

COLUMNS = ("id", "class", "kind", "vendor", "isa", "units", "fp32 GFLOP/s", "memory", "confidence", "sources", "name")

# The types worth a line where the machine computes in them.
_DTYPES = (
    *("float64", "float32", "tf32", "float16", "bfloat16", "float8", "float6", "float4"),
    *("int8", "int4"),
)
# Of the record rather than of the machine.
_ABOUT = {"source", "confidence", "extends", "aliases", "note", "conflicts", "features", "without"}


def row(hw: Hardware) -> tuple[str, ...]:
    """The fields of COLUMNS for one machine."""
    record = _record(hw)
    aliases = ", ".join(record.aliases) if record and not hw.native else ""
    return (
        "native" if hw.native else hw.id,
        hw.kind,
        "this machine" if hw.native or record is None else record.kind,
        hw.vendor or "",
        hw.isa,
        str(hw.cores),
        _giga(hw.peak_flops(), 0),
        _size(hw.dram_bytes),
        hw.confidence,
        ",".join(source.id for source in hw.sources),
        hw.name + (f" ({aliases})" if aliases else ""),
    )


def facts(hw: Hardware) -> dict[str, str]:
    """What to know of a machine, by what it is about, for reading."""
    from ...hwdb.accelerators import Accelerator

    about = {"id": hw.id, "name": hw.name, "class": f"{hw.kind}, {hw.vendor or 'of any vendor'}"}
    if hw.year:
        about["year"] = str(hw.year)
    about |= _accelerator(hw) if isinstance(hw, Accelerator) else _processor(hw)
    about |= {f"L{cache.level} cache": _cache(hw, cache.level) for cache in hw.caches}
    about["memory"] = f"{_size(hw.dram_bytes)}, {_rate(hw.dram_gbs)}"
    if hw.tdp_watts:
        about["power"] = f"{hw.tdp_watts:g} W"
    about["LLVM"] = f"{hw.triple} {hw.llvm_cpu}".strip() or "none"
    about["compile"] = hw.refusal() or "yes"
    about["confidence"] = hw.confidence
    return about


def lines(hw: Hardware) -> list[str]:
    """`facts`, a line each."""
    return [f"{key:16s} {value}" for key, value in facts(hw).items()]


def why(hw: Hardware) -> list[str]:
    """Every fact of the machine's record, the record that states it and its sources; then those sources."""
    from ...hwdb.loader import database

    records = database()
    lineage = records.lineage(hw.id)
    rows = list(_stated(lineage))
    width = max(len(key) for key, _, _ in rows)
    out = ["", "facts, the records that state them, and their sources:"]
    for key, value, record in rows:
        out.append(f"  {key:{width}s}  {value}  [{record.id}: {', '.join(record.values['source'])}]")
    if hw.native:
        stated = {id for record in lineage for id in record.values["source"]}
        read = ", ".join(source.id for source in hw.sources if source.id not in stated)
        out.append(f"  what this machine says of itself counts in place of the above: {read}")
    out += [
        "",
        "computed from these: vector width and registers, peaks, bandwidths of caches, the TVM target",
        "",
        "records:",
    ]
    for record in lineage:
        out.append(f"  {record.id}  {Path(record.file).name}:{record.line}, {record.values['confidence']} confidence")
        out += [f"    note: {note}" for note in [record.values.get("note")] if note]
        out += [f"    sources disagree: {conflict}" for conflict in record.values.get("conflicts", ())]
    out += ["", "sources:"]
    used = {source.id: source for record in lineage for source in records.sources_of(record)}
    for source in {**used, **{source.id: source for source in hw.sources}}.values():
        day = f", {source.date}" if source.date else ""
        out.append(f"  {source.id}: {source.title} [{source.kind}{day}]" + (f" {source.url}" if source.url else ""))
    return out


def compare(first: Hardware, second: Hardware) -> list[tuple[str, str, str, str]]:
    """What is about both, side by side, and how many times as much the second has of it where that is a figure."""
    figures = (_figures(first), _figures(second))
    rows = []
    told = (facts(first), facts(second))
    for key in dict.fromkeys([*told[0], *told[1]]):
        if key.startswith("peak ") or key == "memory":
            continue
        rows.append((key, told[0].get(key, ""), told[1].get(key, ""), ""))
    for key in dict.fromkeys([*figures[0], *figures[1]]):
        a, b = figures[0].get(key), figures[1].get(key)
        ratio = f"{b / a:.2f}x" if a and b else ""
        rows.append((key, "unknown" if a is None else f"{a:,.6g}", "unknown" if b is None else f"{b:,.6g}", ratio))
    return rows


def data(hw: Hardware) -> dict[str, Any]:
    """A machine as JSON data."""
    from ...hwdb.accelerators import Npu

    return {
        **dataclasses.asdict(hw),
        "features": sorted(hw.features),
        "peak_flops": hw.peak_flops(),
        "peaks": {dtype: peak for dtype in _DTYPES if hw.supports(dtype) and (peak := hw.peak_flops(dtype))},
        "tvm_target": None if isinstance(hw, Npu) or hw.isa == "none" else hw.tvm_target(),
    }


def _figures(hw: Hardware) -> dict[str, float | None]:
    """Facts that can be divided by those of another machine."""
    peaks = {
        f"peak {dtype}, GFLOP/s": peak / 1e9
        for dtype in _DTYPES
        if hw.supports(dtype) and (peak := hw.peak_flops(dtype))
    }
    return {
        **peaks,
        "memory, GB/s": hw.dram_gbs,
        "memory, GiB": None if hw.dram_bytes is None else hw.dram_bytes / 2**30,
        "power, W": hw.tdp_watts,
    }


def _processor(hw: Hardware) -> dict[str, str]:
    dots = [f"{dtype} {family}" for dtype in ("int8", "bfloat16") if (family := hw.dot_product(dtype))]
    about = {
        "instruction set": f"{hw.isa}, {hw.vector_registers} vector registers of {hw.vector_bits} bits",
        "features": " ".join(sorted(hw.features)),
        "dot products": ", ".join(dots) or "none",
        "multiply-adds": f"{hw.fma_per_cycle:g} vectors a cycle and core, {hw.fma_latency_cycles} cycles each"
        + (", in order" if hw.in_order else ""),
        "cores": str(hw.cores),
        "clock": _clock(hw.clock_mhz),
    }
    if hw.clusters:
        clusters = (f"{c.count} {c.core}" + (f" at {c.clock_mhz:g} MHz" if c.clock_mhz else "") for c in hw.clusters)
        about["clusters"] = ", ".join(clusters) + "; a compiled model uses the first"
    if hw.board:
        parts = {"chip": hw.board.soc, "GPU": hw.board.gpu, "NPU": hw.board.npu}
        about["beside the cores"] = ", ".join(f"{key} {value}" for key, value in parts.items() if value)
    shapes = [str(shape) for dtype in _DTYPES for shape in hw.matrix_instructions(dtype)]
    if shapes:
        about["matrices"] = ", ".join(shapes)
    about["launch"] = f"{hw.launch_us:.3g} us a parallel region, {hw.wake_us:.3g} us to wake a thread"
    if hw.native:
        about["calibrated"] = hw.calibrated or "no: `graphwright hw calibrate` measures what is typical figures here"
    return about | {"peak": f"{_giga(hw.peak_flops(), 1)} GFLOP/s float32"}


def _accelerator(hw: Accelerator) -> dict[str, str]:
    from ...hwdb.accelerators import Gpu, Npu

    about = {"units": str(hw.cores), "clock": _clock(hw.clock_mhz)}
    if hw.tensor_clock_mhz:
        about["clock"] += f", matrix units {_clock(hw.tensor_clock_mhz)}"
    if isinstance(hw, Gpu) and hw.warp_threads:
        about |= _unit(hw)
    if isinstance(hw, Npu) and hw.sram_bytes:
        about["memory inside"] = f"{_size(hw.sram_bytes)}, {_rate(hw.sram_gbs)}"
    if isinstance(hw, Npu) and hw.dtypes:
        about["computes in"] = ", ".join(hw.dtypes)
    if hw.matrix_shapes:
        about["matrices"] = ", ".join(map(str, hw.matrix_shapes))
    for dtype in _DTYPES:
        if hw.supports(dtype) and (dense := hw.peak_flops(dtype)):
            sparse = hw.peak_flops(dtype, sparse=True) or dense
            about[f"peak {dtype}"] = f"{_giga(dense, 0)} G{'' if dtype.startswith('int') else 'FL'}OP/s" + (
                f", {_giga(sparse, 0)} with 2:4 sparsity" if sparse > dense else ""
            )
    return about


def _unit(hw: Gpu) -> dict[str, str]:
    """What one unit of a GPU holds; what is unknown is left out."""
    of_warps = {
        "threads": hw.warp_threads,
        "warps a unit": hw.max_warps_per_unit,
        "blocks a unit": hw.max_blocks_per_unit,
    }
    of_block = {"threads": hw.max_threads_per_block, "bytes of shared memory": hw.shared_bytes_per_block}
    return {
        "warps": ", ".join(f"{value} {key}" for key, value in of_warps.items() if value),
        "a block": "at most " + ", ".join(f"{value} {key}" for key, value in of_block.items() if value),
        "a unit": f"{hw.registers_per_unit or '?'} registers, {hw.shared_bytes_per_unit or '?'} bytes of shared memory",
    }


def _stated(lineage: tuple[Record, ...]) -> Iterator[tuple[str, str, Record]]:
    """Each fact that counts, and the record it is from: the nearest that states it; tables go entry by entry."""
    from ...hwdb.schema import OWN, TABLES

    seen: set[str] = set()
    for record in lineage:
        for key, value in record.values.items():
            entries = {f"{key}.{part}": v for part, v in value.items()} if key in TABLES else {key: value}
            for name, entry in entries.items():
                others = record is not lineage[0] and key in OWN
                if key not in _ABOUT and not others and name not in seen:
                    seen.add(name)
                    yield name, _written(entry), record
        for key, sign in (("features", "+"), ("without", "-")):
            if names := record.values.get(key):
                yield "features", " ".join(sign + name for name in names), record


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _record(hw: Hardware) -> Record | None:
    from ...hwdb.loader import database

    return database().records.get(hw.id)


def _cache(hw: Hardware, level: int) -> str:
    cache = hw.cache(level)
    assert cache is not None
    ways = f", {cache.ways} ways" if cache.ways else ""
    shared = f", shared by {cache.shared_by_cores}" if cache.shared_by_cores > 1 else ""
    return (
        f"{cache.size_bytes / 1024:g} KiB{ways}, {cache.line_bytes} B lines{shared}, {_rate(hw.bandwidth_gbs(level))}"
    )


def _clock(mhz: float | None) -> str:
    return "unknown" if mhz is None else f"{mhz:.0f} MHz"


def _rate(gbs: float | None) -> str:
    return "unknown GB/s" if gbs is None else f"{gbs:.0f} GB/s"


def _size(size_bytes: int | None) -> str:
    return "unknown size" if size_bytes is None else f"{size_bytes / 2**30:g} GiB"


def _giga(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value / 1e9:.{digits}f}"
