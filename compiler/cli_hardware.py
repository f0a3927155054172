"""`graphwright hw`: list and show the database's records, this machine, and predicted latencies."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, suggest

if TYPE_CHECKING:
    from ..hwdb import Hardware

hardware = typer.Typer(no_args_is_help=True, help="The hardware database: list, show, detect, predict.")
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@hardware.command("list")
def list_records(
    kind: Annotated[str | None, typer.Option(help="architecture or device.")] = None,
    isa: Annotated[str | None, typer.Option(help="x86_64 or aarch64.")] = None,
) -> None:
    """List the names that --target takes, one a line when piped."""
    from .. import hwdb
    from ..hwdb.isa import FLAGS
    from ..hwdb.loader import database

    for value, known in ((kind, ("architecture", "device")), (isa, tuple(FLAGS))):
        if value is not None and value not in known:
            raise InputError(f"{value!r} is none of {', '.join(known)}{suggest(value, known)}")
    rows = []
    for id in hwdb.names():
        record = database().records.get(id)
        hw = hwdb.lookup(id)
        if (kind and (record is None or record.kind != kind)) or (isa and hw.isa != isa):
            continue
        aliases = ", ".join(record.values.get("aliases", ())) if record else ""
        rows.append(
            (
                id,
                record.kind if record else "this machine",
                hw.isa,
                str(hw.vector_bits),
                _giga(hw.peak_flops(), 0),
                hw.name + (f" ({aliases})" if aliases else ""),
            )
        )
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "kind", "isa", "vector bits", "fp32 GFLOP/s", "name (aliases)", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@hardware.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An id or alias of `hw list`.")],
    why: Annotated[
        bool, typer.Option("--why", help="Print the sources, and the record each fact is inherited from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every fact of a record."""
    from .. import hwdb

    hw = hwdb.lookup(name)
    if as_json:
        typer.echo(json.dumps(_data(hw), indent=1))
        return
    for line in _facts(hw):
        typer.echo(line)
    if why:
        for line in _sources(hw):
            typer.echo(line)


@hardware.command()
def detect(as_json: Json = False) -> None:
    """Show what this machine is, as this process may use it."""
    from .. import hwdb

    hw = hwdb.detect()
    if as_json:
        typer.echo(json.dumps(_data(hw), indent=1))
        return
    for line in _facts(hw):
        typer.echo(line)


@hardware.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 file, module:factory, or an example model.")],
    devices: Annotated[
        str | None, typer.Option(help="Comma-separated names; default: this machine and all devices.")
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="SHAPE[:DTYPE]", help="Once per input tensor.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank devices by the latency that the roofline model predicts for MODEL; nothing is compiled or run."""
    from .. import hwdb

    wanted = [name.strip() for name in devices.split(",")] if devices else None
    targets = [hwdb.lookup(name) for name in wanted] if wanted else None  # a wrong name fails before the model loads
    from .cli import progress
    from .model_argument import load_model
    from .predict import predict_latency

    with progress(f"reading {model}"):
        loaded, examples = load_model(model, input or ())
        rows = predict_latency(loaded, examples, targets)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        typer.echo(row.line())


def _facts(hw: Hardware) -> list[str]:
    dots = [f"{dtype} {family}" for dtype in ("int8", "bfloat16") if (family := hw.dot_product(dtype))]
    rows = {
        "id": hw.id,
        "name": hw.name,
        "instruction set": f"{hw.isa}, {hw.vector_registers} vector registers of {hw.vector_bits} bits",
        "features": " ".join(sorted(hw.features)),
        "dot products": ", ".join(dots) or "none",
        "multiply-adds": f"{hw.fma_per_cycle:g} vectors a cycle and core, {hw.fma_latency_cycles} cycles each",
        "cores": str(hw.cores),
        "clock": "unknown" if hw.clock_mhz is None else f"{hw.clock_mhz:.0f} MHz",
        "peak": f"{_giga(hw.peak_flops(), 1)} GFLOP/s float32",
        **{f"L{cache.level} cache": _cache(hw, cache.level) for cache in hw.caches},
        "memory": _rate(hw.dram_gbs),
        "launch": f"{hw.launch_us:g} us a parallel region",
        "LLVM": f"{hw.triple} {hw.llvm_cpu}",
        "confidence": hw.confidence,
    }
    return [f"{key:16s} {value}" for key, value in rows.items()]


def _sources(hw: Hardware) -> list[str]:
    from ..hwdb.loader import database

    lines = ["", "facts, and the record that states them:"]
    stated: set[str] = set()
    for record in database().lineage(hw.id):
        own = [key for key in record.values if key not in {*stated, "source", "confidence", "extends", "aliases"}]
        where = Path(record.where.split(":")[0]).name
        lines.append(f"  {record.id} ({where}, {record.values['confidence']} confidence): {', '.join(own)}")
        stated |= set(own) - {"features", "without"}
        lines += [f"    from {_source(database().source(id))}" for id in record.values["source"]]
    if hw.native:
        lines.append(f"  read from this machine, in place of the above: {_source(database().source('host'))}")
    return lines


def _source(source: Any) -> str:
    return f"{source.title} [{source.kind}]" + (f" {source.url}" if source.url else "")


def _cache(hw: Hardware, level: int) -> str:
    cache = hw.cache(level)
    assert cache is not None
    ways = f", {cache.ways} ways" if cache.ways else ""
    shared = f", shared by {cache.shared_by_cores} cores" if cache.shared_by_cores > 1 else ""
    return (
        f"{cache.size_bytes / 1024:g} KiB{ways}, {cache.line_bytes} B lines{shared}, {_rate(hw.bandwidth_gbs(level))}"
    )


def _rate(gbs: float | None) -> str:
    return "unknown" if gbs is None else f"{gbs:.0f} GB/s"


def _giga(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value / 1e9:.{digits}f}"


def _data(hw: Hardware) -> dict[str, Any]:
    return {
        **dataclasses.asdict(hw),
        "features": sorted(hw.features),
        "peak_flops": hw.peak_flops(),
        "tvm_target": hw.tvm_target() if hw.kind != "npu" else None,
    }
