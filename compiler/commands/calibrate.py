"""`graphwright hw calibrate`: measure this machine, and use the figures from now on."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from ...errors import InputError


def calibrate(
    dry: Annotated[bool, typer.Option("--dry-run", help="Measure and print, but keep nothing.")] = False,
    seconds: Annotated[float, typer.Option(help="For each figure; nothing else should run meanwhile.")] = 0.6,
) -> None:
    """Measure multiply-adds, bytes from every level, and parallel regions; predictions and choices then use them."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds {seconds}: a figure takes some time to measure")
    from ...hwdb import host, measured
    from ..cli import progress

    plain = host.detect_plain()
    with progress("measuring this machine"):
        from .measure_host import measure

        found = measure(plain, seconds)
    now = measured.with_figures(plain, found)
    typer.echo(f"{'':24s} {'measured':>10s} {'record':>10s}")
    rows = [("float32 GFLOP/s", found.flops / 1e9, (plain.peak_flops() or 0.0) / 1e9)]
    rows.append(("clock MHz", now.clock_mhz or 0.0, plain.clock_mhz or 0.0))
    for level in (*(n for n in found.level_gbs if n), 0):
        name = f"L{level} GB/s" if level else "memory GB/s"
        rows.append((name, found.level_gbs[level], plain.bandwidth_gbs(level) or 0.0))
    rows += [("parallel region us", now.launch_us, plain.launch_us), ("waking a thread us", now.wake_us, plain.wake_us)]
    for name, value, typical in rows:
        typer.echo(f"{name:24s} {value:10.4g} {'unknown' if not typical else f'{typical:.4g}':>10s}")
    if dry:
        return
    try:
        path = measured.store(plain, found)
    except OSError as error:
        raise InputError(f"the figures cannot be kept: {error}; GRAPHWRIGHT_DATA names another directory") from error
    typer.echo(f"kept in {path}; remove the file to go back to the record")
