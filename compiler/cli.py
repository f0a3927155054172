"""The `graphwright` command. torch and tvm are imported inside the commands that need them: help is immediate."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import GraphwrightError, InputError
from .commands.calibrate import calibrate
from .commands.hardware import hardware
from .commands.predict import predict
from .commands.tune import tune as tune_model

MODEL_HELP = (
    "A .pt2 file, module:factory (the factory returns a model or (model, example_inputs)), or an example model."
)


class _Commands(TyperGroup):
    """Prints a GraphwrightError as one message and exits with 1; --debug, anywhere, shows where it came from."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.ensure_object(dict)
        if "--debug" in args:
            ctx.obj["debug"] = True
            args = [arg for arg in args if arg != "--debug"]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GraphwrightError as error:
            if ctx.obj.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile PyTorch models to machine code, with the numbers verified.",
)
hardware.command()(predict)
hardware.command()(calibrate)
app.command("tune")(tune_model)
app.add_typer(hardware, name="hw")

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Target = Annotated[str, typer.Option(help="native, a name of `graphwright hw list`, or a TVM target as JSON.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE[:DTYPE]", help="1x3x224x224 or 1x128:int64; once per input tensor."),
]
Calibration = Annotated[Path | None, typer.Option(help="Inputs by name in a .npz file, several along a leading axis.")]
Int8 = Annotated[
    list[str] | None,
    typer.Option("--int8", metavar="NAME=VALUE", help="How int8 quantises: activation=dynamic (docs/compression.md)."),
]
Fusions = Annotated[
    str | None,
    typer.Option(metavar="FAMILIES", help="Make these families of fusions only: conv+relu,matmul+bias; '' makes none."),
]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16, int8, auto or adaptive: docs/precision.md.")]
Tolerance = Annotated[float | None, typer.Option(help="Relative L2 error allowed against float64.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one call; default: as many as PyTorch uses.")]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"graphwright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    if not debug:
        # torch logs a traceback of its own before it raises what is reported as one message.
        logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda record: False)
    # torch.export deep-copies treespecs, which this release of torch itself deprecates.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)


@app.command()
def compile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the artifact goes: a directory, or NAME.gw.")],
    target: Target = "native",
    precision: Precision = "fp32",
    tolerance: Tolerance = None,
    input: Inputs = None,
    calibration: Calibration = None,
    int8: Int8 = None,
    fallback: Annotated[str | None, typer.Option(help="fp32: a second build for results that are not finite.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the machine code with PyTorch in float64.")] = True,
    cache: Annotated[bool, typer.Option(help="Reuse and store results in the user's cache.")] = True,
    threads: Threads = None,
    tune: Annotated[str | None, typer.Option(help="A time such as 30s: measure candidates, keep what wins.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="The most that activations may take: 64MB.")] = None,
    kernel_fusion: Fusions = None,
    bundle: Annotated[
        bool | None,
        typer.Option(
            "--bundle/--artifact",
            help="What machines without Python need, or what graphwright.load takes; default: by the target.",
        ),
    ] = None,
    executable: Annotated[bool, typer.Option(help="A bundle of the static program alone.")] = False,
    single_file: Annotated[bool, typer.Option(help="A bundle with the weights inside.")] = False,
    damage: Annotated[
        Path | None, typer.Option(help="Write a page here that ranks products by what 8 bits cost them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile MODEL to an artifact of machine code and weights, or to a bundle for an ARM machine."""
    options = _int8_options(precision, int8, calibration)
    bundled = _is_bundled(target, output, bundle, executable or single_file)
    _check_page("--damage", damage)
    with progress(f"loading {model}"):
        from .artifact import check_place

        check_place(output)
        from . import api
        from .compiled import Compiled

        loaded, examples = _load(model, input)
    with progress(f"compiling {model} for {target}"):
        compiled = api.compile(
            loaded,
            examples,
            target=target,
            precision=precision,
            tolerance=tolerance,
            verify=verify,
            cache=cache,
            threads=threads,
            tune=tune,
            memory_limit=memory_limit,
            kernel_fusion=_names(kernel_fusion),
            fallback=fallback,
            calibration=None if calibration is None else _arrays(calibration),
            int8=options,
        )
        if bundled:
            if not isinstance(compiled, Compiled):
                raise InputError("a bundle has fixed shapes: give --input SHAPE for every input")
            saved = compiled.bundle(output, executable=executable, single_file=single_file)
        else:
            saved = compiled.save(output)
    report = compiled.report()
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.text())
    if damage is not None:
        damage.write_text(report.damage_page(model), encoding="utf-8")
        typer.echo(f"wrote {damage}", err=as_json)
    typer.echo(f"wrote {saved or output}", err=as_json)


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="What `graphwright compile -o OUT` wrote.")],
    input: Annotated[Path | None, typer.Option(help="Inputs by name in a .npz file; default: noise.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results to a .npz file.")] = None,
    threads: Threads = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls to time; the fastest is printed.")] = 10,
) -> None:
    """Run a compiled artifact on given inputs, or on noise, and print its results and the time of a call."""
    with progress(f"loading {artifact}"):
        from .commands.run_artifact import run_artifact
        from .loading import load

        compiled = load(artifact, threads=threads)
    for line in run_artifact(compiled, input, output, repeat):
        typer.echo(line)


@app.command()
def run_remote(
    host: Annotated[str, typer.Argument(metavar="HOST", help="The board as ssh knows it: user@pi.")],
    bundle: Annotated[Path, typer.Argument(metavar="OUT", help="A bundle that `graphwright compile` wrote.")],
    input: Annotated[Path | None, typer.Option(help="Inputs by name in a .npz file; default: noise.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results to a .npz file.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one call; default: all cores.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls to time, after one that warms up.")] = 10,
) -> None:
    """Run a bundle on a board by ssh: copy it there once, time it, and bring the results back."""
    with progress(f"running {bundle} on {host}"):
        from .commands.run_artifact import check_output, write_results
        from .commands.run_remote import run_remote as call

        check_output(output)
        done = call(host, bundle, input, repeat, threads)
    typer.echo(f"copied {done.copied_bytes} bytes" if done.copied_bytes else "the bundle was there already")
    typer.echo(done.printed.rstrip())
    if output is not None:
        write_results(output, done.results)
        typer.echo(f"wrote {output}")


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    against: Annotated[str, typer.Option(help="Comma-separated: eager, inductor, onnxruntime, openvino.")] = "eager",
    input: Inputs = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the median counts.")] = 15,
    threads: Threads = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Time MODEL beside other runtimes: interleaved rounds, equal threads, a process for each."""
    if input and len(models) > 1:
        raise InputError("--input belongs to one MODEL; give several models only where each brings its own inputs")
    from .benchmarking.models import bench_models, check_peers
    from .benchmarking.worker import Subject

    peers = [peer for peer in against.split(",") if peer]
    check_peers(peers)
    subjects = [Subject(name, inputs=tuple(input or ())) for name in models]
    for subject in subjects:
        subject.build()  # what is wrong with a MODEL is said here, not by each of the runners
    # Progress is the table itself, which grows by a row a model.
    rows = bench_models(subjects, peers, rounds, threads, json_path)
    if any("graphwright" in row.unavailable for row in rows):
        raise typer.Exit(1)


@app.command()
def explain(
    model: Model,
    target: Target = "native",
    input: Inputs = None,
    kernel_fusion: Fusions = None,
    precision: Precision = "fp32",
    tolerance: Tolerance = None,
    calibration: Calibration = None,
    int8: Int8 = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with both graphs here, and print no graphs.")] = None,
) -> None:
    """Print the graph before and after each pass, the choices made and their reasons, and predicted costs."""
    _check_page("--html", html)
    options = _int8_options(precision, int8, calibration)
    with progress(f"explaining {model} for {target}"):
        from .explaining.explain import explained

        loaded, examples = _load(model, input)
        fusions = _names(kernel_fusion)
        found = explained(
            loaded,
            examples,
            target=target,
            kernel_fusion=fusions,
            precision=precision,
            tolerance=tolerance,
            calibration=None if calibration is None else _arrays(calibration),
            int8=options,
        )
        if html is not None:
            html.write_text(found.html(model), encoding="utf-8")
    if html is None:
        typer.echo(found.text())
        return
    for line in found.savings():
        typer.echo(line)
    typer.echo(f"wrote {html}")


def _check_page(option: str, page: Path | None) -> None:
    if page is not None and not page.absolute().parent.is_dir():
        raise InputError(f"{option} {page}: there is no directory {page.absolute().parent}")


@app.command()
def verify(model: Model, target: Target = "native", input: Inputs = None, kernel_fusion: Fusions = None) -> None:
    """Compare every pass and the machine code with PyTorch in float64; exit 1 where they differ."""
    with progress(f"verifying {model} for {target}"):
        from ..hwdb import lookup
        from .obstacle import obstacle
        from .verify import verify_model

        result = verify_model(*_load(model, input), target=target, kernel_fusion=_names(kernel_fusion))
    typer.echo(result.text())
    if reason := obstacle(lookup(target)):
        typer.echo(f"machine code not run: {reason}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what is installed, and which targets can be built and run here; exit 1 where something is broken."""
    with progress("checking this installation"):
        from .commands.doctor import examine

        findings = examine()
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(finding.line())
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show a spinner with `what` on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _int8_options(precision: str, texts: list[str] | None, calibration: Path | None) -> dict[str, Any] | None:
    """The options of --int8. Raises InputError for wrong ones, and where needed inputs are not given."""
    options = None
    if texts:
        from .compression.int8_method import int8_method, options_of

        options = options_of(texts)
        if not int8_method(precision, options).calibrates:
            return options
    why = {"int8": "finds the ranges of values on inputs", "adaptive": "learns from inputs when to reduce precision"}
    if precision in why and calibration is None:
        raise InputError(
            f"--precision {precision} {why[precision]}: give --calibration FILE.npz, with a few dozen that look like "
            "those the model will get, by the inputs' names and along a leading axis"
            + (" (--int8 activation=dynamic needs none)" if precision == "int8" else "")
        )
    return options


def _is_bundled(target: str, output: Path, asked: bool | None, options: bool) -> bool:
    """A bundle is made where it is asked for, and for boards that cannot run here, unless OUT is a .gw file.

    Raises InputError where there is none for the target.
    """
    if asked is False:
        if options:
            raise InputError("--executable and --single-file are about bundles: leave --artifact out")
        return False
    from ..hwdb import lookup, obstacle

    hw = lookup(target)
    own = hw.kind == "gpu" or hw.isa == "x86_64" or obstacle(hw) is None  # where Python is at home
    if not asked and not options and (own or output.suffix == ".gw"):
        return False
    from .bundle import check_bundled

    check_bundled(hw.id, hw.isa, output)
    return True


def _names(given: str | None) -> list[str] | None:
    """Names that commas separate; None where none were asked for."""
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def _load(model: str, inputs: list[str] | None) -> tuple[Any, Any]:
    from .commands.model_argument import load_model

    return load_model(model, inputs or ())


def _arrays(file: Path) -> dict[str, Any]:
    from .commands.run_artifact import arrays

    return arrays(file, "--calibration")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
