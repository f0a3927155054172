"""`graphwright tune`: measure candidates for a model on this machine or a board, and keep what wins."""

from __future__ import annotations

from typing import Annotated

import typer


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 file, module:factory, or an example model.")],
    target: Annotated[str, typer.Option(help="native, or what the board is: `graphwright hw list`.")] = "native",
    remote: Annotated[str | None, typer.Option(metavar="HOST", help="A board, as ssh knows it: user@pi.")] = None,
    time: Annotated[str, typer.Option(help="For building and measuring, such as 30s or 5m.")] = "60s",
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="SHAPE[:DTYPE]", help="Once per input tensor.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, auto or adaptive.")] = "fp32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one call; default: a board's cores, or as PyTorch uses.")
    ] = None,
) -> None:
    """Time the best candidates for MODEL's kernels; `compile` for the same target uses the winners from then on."""
    from ..cli import progress
    from ..tune import budget
    from .model_argument import load_model

    budget(time)
    with progress(f"tuning {model} on {remote or 'this machine'}"):
        from .. import api

        loaded, examples = load_model(model, input or ())
        found = api.tune(
            loaded, examples, target=target, remote=remote, time=time, precision=precision, threads=threads
        )
    typer.echo(found.text())
    typer.echo(f"kept in {found.path}")
