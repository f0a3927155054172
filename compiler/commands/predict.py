"""`graphwright hw predict`: rank devices by predicted latency, as a table and as a page with a roofline plot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 file, module:factory, or an example model.")],
    devices: Annotated[
        str | None, typer.Option(help="Comma-separated names; default: this machine and all devices.")
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="SHAPE[:DTYPE]", help="Once per input tensor.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16 or int8; devices without it are predicted in the widest they have.")
    ] = "fp32",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the plots and the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Rank devices by the latency predicted for MODEL; nothing is compiled, run or measured."""
    from ... import hwdb

    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"--html {html}: there is no directory {html.absolute().parent}")
    if html is not None and html.is_dir():
        raise InputError(f"--html {html} is a directory: name a file in it")
    wanted = [name.strip() for name in devices.split(",")] if devices else None
    named = [hwdb.lookup(name) for name in wanted] if wanted else None  # a wrong name fails before the model loads
    from ..cli import progress
    from ..prediction.predict import Prediction, Predictor, precision_dtype, ranked
    from ..prediction.predict import devices as every_device
    from .model_argument import load_model

    dtype = precision_dtype(precision)
    with progress(f"predicting {model}"):
        predictor = Predictor(*load_model(model, input or ()))
        targets = every_device() if named is None else named
        rows = ranked(predictor, targets, dtype)
        if html is not None:
            from ..prediction.page import page

            html.write_text(page(model, predictor, targets, rows, dtype, chosen=named is not None), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    typer.echo(Prediction.heading())
    for row in rows:
        typer.echo(row.line())
    if html is not None:
        typer.echo(f"wrote {html}")
