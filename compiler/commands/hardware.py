"""`graphwright hw`: list, show and compare machines of the database, this one, and predicted latencies."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ...errors import InputError, suggest

hardware = typer.Typer(no_args_is_help=True, help="The hardware database: list, show, compare, detect, predict.")
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@hardware.command("list")
def list_records(
    kind: Annotated[
        str | None, typer.Option(help="cpu, board, gpu or npu; or architecture or device.", metavar="KIND")
    ] = None,
    vendor: Annotated[str | None, typer.Option(help="nvidia, amd, intel, arm, raspberry-pi, ...")] = None,
    isa: Annotated[str | None, typer.Option(help="x86_64, aarch64, nvptx, amdgcn, ...")] = None,
) -> None:
    """List the machines of the database with their sources, one a line when piped."""
    from ... import hwdb
    from ...hwdb.naming import spelling
    from .hardware_tables import COLUMNS, row

    rows = [row(hwdb.lookup(id)) for id in hwdb.names()]
    filters = (("kind", kind, ("class", "kind")), ("vendor", vendor, ("vendor",)), ("isa", isa, ("isa",)))
    for option, value, columns in filters:
        places = [COLUMNS.index(column) for column in columns]
        known = sorted({fields[place] for fields in rows for place in places} - {""})
        if value is None:
            continue
        wanted = {text for text in known if spelling(text) == spelling(value)}
        if not wanted:
            among = " among these machines" if len(rows) < len(hwdb.names()) else ""
            raise InputError(
                f"no {option} {value!r}{among}: one of {', '.join(known)}{suggest(spelling(value), known)}"
            )
        rows = [fields for fields in rows if wanted & {fields[place] for place in places}]
    if not sys.stdout.isatty():
        for fields in rows:
            typer.echo("\t".join(fields))
        return
    _table(COLUMNS, rows)


@hardware.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An id or alias of `hw list`, or a product's name.")],
    why: Annotated[bool, typer.Option("--why", help="Print where every fact comes from.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is known of a machine."""
    from ... import hwdb
    from . import hardware_tables

    hw = hwdb.lookup(name)
    if as_json:
        typer.echo(json.dumps(hardware_tables.data(hw), indent=1))
        return
    for line in hardware_tables.lines(hw) + (hardware_tables.why(hw) if why else []):
        typer.echo(line)


@hardware.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="An id or alias of `hw list`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another; ratios are B / A.")],
) -> None:
    """Show two machines side by side."""
    from ... import hwdb
    from . import hardware_tables

    rows = hardware_tables.compare(hwdb.lookup(first), hwdb.lookup(second))
    if not sys.stdout.isatty():
        for fields in rows:
            typer.echo("\t".join(fields))
        return
    _table(("", first, second, "B / A"), rows)


@hardware.command()
def detect(as_json: Json = False) -> None:
    """Show what this machine is, as this process may use it."""
    from ... import hwdb
    from ...hwdb.host_gpus import detect_gpus, record_of
    from . import hardware_tables

    hw = hwdb.detect()
    gpus = [(found, record_of(found)) for found in detect_gpus()]
    if as_json:
        cards = [{**dataclasses.asdict(found), "record": id} for found, id in gpus]
        typer.echo(json.dumps({**hardware_tables.data(hw), "gpus": cards}, indent=1))
        return
    for line in hardware_tables.lines(hw):
        typer.echo(line)
    for found, id in gpus:
        name = found.name or found.architecture or found.vendor
        typer.echo(f"{'GPU':16s} {name} at {found.bus}: {f'record {id}' if id else 'in no record'}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for fields in rows:
        table.add_row(*fields)
    Console().print(table)
