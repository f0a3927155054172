"""`graphwright hw calibrate`: measure this machine or a board, and use the figures from now on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError
from ...hwdb import Hardware
from ...hwdb.measured import Measured


def calibrate(
    dry: Annotated[bool, typer.Option("--dry-run", help="Measure and print, but keep nothing.")] = False,
    seconds: Annotated[float, typer.Option(help="For each figure; nothing else should run meanwhile.")] = 0.6,
    remote: Annotated[str | None, typer.Option(metavar="HOST", help="A board, as ssh knows it: user@pi.")] = None,
    target: Annotated[str | None, typer.Option(help="What the board is: a name of `graphwright hw list`.")] = None,
    name: Annotated[str, typer.Option(help="The name of the board's record.")] = "my-board",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the board's record goes (TOML).")] = None,
) -> None:
    """Measure multiply-adds, bytes from every level, and parallel regions; predictions and choices then use them."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds {seconds}: a figure takes some time to measure")
    if (remote is None) != (target is None):
        raise InputError("--remote HOST and --target NAME go together: where the board is, and what it is")
    if remote is not None and target is not None:
        _calibrate_board(remote, target, seconds, name, None if dry else output or Path(f"{name}.toml"))
        return
    if output is not None:
        raise InputError("--output is for the record of a board; the figures of this machine have a place of their own")
    from ...hwdb import host, measured
    from ..cli import progress

    plain = host.detect_plain()
    with progress("measuring this machine"):
        from .measure_host import measure

        found = measure(plain, seconds)
    _print(plain, found)
    if dry:
        return
    try:
        path = measured.store(plain, found)
    except OSError as error:
        raise InputError(f"the figures cannot be kept: {error}; GRAPHWRIGHT_DATA names another directory") from error
    typer.echo(f"kept in {path}; remove the file to go back to the record")


def _calibrate_board(remote: str, target: str, seconds: float, name: str, output: Path | None) -> None:
    from ...hwdb import lookup
    from ..cli import progress

    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise InputError(f"--name {name!r}: a record's name is of letters, digits, - and _")
    hw = lookup(target)
    with progress(f"measuring {remote}"):
        from .measure_board import measure_board, record

        found = measure_board(remote, hw, seconds, lambda text: None)
    _print(hw, found)
    if output is None:
        return
    try:
        output.write_text(record(hw, found, name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the record cannot be written: {error}; --output names another file") from error
    typer.echo(f"wrote {output}; with GRAPHWRIGHT_HWDB={output.parent.resolve()} it is the target {name}")


def _print(plain: Hardware, found: Measured) -> None:
    from ...hwdb import measured

    now = measured.with_figures(plain, found)
    typer.echo(f"{'':24s} {'measured':>10s} {'record':>10s}")
    rows = [("float32 GFLOP/s", found.flops / 1e9, (plain.peak_flops() or 0.0) / 1e9)]
    rows.append(("clock MHz", now.clock_mhz or 0.0, plain.clock_mhz or 0.0))
    for level in (*(n for n in found.level_gbs if n), 0):
        text = f"L{level} GB/s" if level else "memory GB/s"
        rows.append((text, found.level_gbs[level], plain.bandwidth_gbs(level) or 0.0))
    rows += [("parallel region us", now.launch_us, plain.launch_us), ("waking a thread us", now.wake_us, plain.wake_us)]
    for text, value, typical in rows:
        typer.echo(f"{text:24s} {value:10.4g} {'unknown' if not typical else f'{typical:.4g}':>10s}")
