"""The float32 build that stands beside a reduced one: its files, and the rule on the inputs that picks one of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from ..errors import InputError
from . import compare, loading
from .build import Built
from .calibration import Inputs
from .capture import Captured
from .executor import Run
from .obstacle import obstacle
from .reference import run_eager
from .variants import Rule, calibrated, scales_of

if TYPE_CHECKING:
    from .api import Options


def check_adaptive(inputs: Inputs) -> None:
    """Raise InputError where the inputs have nothing that a rule could look at."""
    if all(scale is None for scale in scales_of(inputs.calibration)):
        raise InputError(
            "precision='adaptive' looks at the size of floating point inputs, and this model has none that is not "
            "zero: use precision='auto'"
        )


def beside(
    directory: Path,
    captured: Captured,
    built: Built,
    inputs: Inputs,
    options: Options,
    build_float32: Callable[[Path], Built],
) -> tuple[Built, loading.Twin | None, tuple[str, ...]]:
    """Put the float32 twin of `built` into its directory, where options ask for one: what there is now, and notes.

    An adaptive build whose reduced form keeps the tolerance on no sample is replaced by its twin.
    """
    adaptive = options.precision == "adaptive"
    if not adaptive and options.fallback is None:
        return built, None, ()
    if all(choice.dtype == "float32" for choice in built.precisions):
        return built, None, ("there is one build: nothing is reduced, so there is nothing to fall back from",)
    rule = None
    notes: tuple[str, ...] = ()
    if adaptive:
        rule, note = _rule(directory, captured, built, inputs, options)
        notes = (note,)
    with tempfile.TemporaryDirectory(dir=directory.parent) as other:
        twin = build_float32(Path(other))
        if adaptive and rule is None:
            for old in directory.iterdir():
                if old.is_file():
                    old.unlink()
        prefix = "" if adaptive and rule is None else loading.TWIN
        for path in Path(other).iterdir():
            os.rename(path, directory / f"{prefix}{path.name}")
    if adaptive and rule is None:
        return twin, None, notes
    sizes = f"{twin.sizes.get('weights_bytes', 0) / 1e6:.1f} MB of weights"
    notes += (f"a float32 twin stands beside: {sizes} on disk, in memory from its first call on",)
    return built, loading.Twin(twin.plan, options.fallback is not None, rule), notes


def _rule(
    directory: Path, captured: Captured, built: Built, inputs: Inputs, options: Options
) -> tuple[Rule | None, str]:
    allowed = compare.REDUCED["adaptive"] if options.tolerance is None else options.tolerance
    sets = [*([] if inputs.example is None else [inputs.example]), *inputs.calibration]
    scales = scales_of(inputs.calibration)
    look = Rule(scales, 0.0, 0.0)
    run = _runner(directory, built, options)
    kept = []
    for tensors in sets:
        expected = compare.reference(captured.graph, tensors)
        kept.append(compare.compare(run(tensors), expected, allowed) is None)
    rule = calibrated(scales, [look.score(tensors) for tensors in sets], kept)
    counted = f"{sum(kept)} of {len(kept)} sets of inputs keep {allowed:.1e} in the reduced build"
    if rule is None:
        return None, f"adaptive: {counted}: there is one build, in float32"
    return rule, f"adaptive: {counted}; {rule.text()}"


def _runner(directory: Path, built: Built, options: Options) -> Run:
    """The reduced build; in PyTorch where this machine cannot run its code."""
    if obstacle(options.hw) is None:
        return loading.runner(directory, built.plan, options.threads)
    graph: fx.GraphModule = built.graph
    return lambda tensors: run_eager(graph, tensors)
