"""What reduced precision is decided and checked by: sets of inputs, and the float32 twin that stands beside.

`calibration=` of compile is a list of inputs, each as example_inputs are, or a mapping from input names (arr_0, arr_1,
... for "in order") to tensors that hold several samples along a leading axis: what a .npz file holds.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import InputError, suggest
from ..hwdb import obstacle
from . import compare, loading
from .build import Built
from .capture import Captured, Signature, TensorSpec, arguments, example_tensors
from .executor import Run
from .precision import Sample
from .reference import run_eager
from .variants import Rule, calibrated, scales_of

if TYPE_CHECKING:
    from .api import Options

Example = tuple[tuple[Any, ...], dict[str, Any]]
MEASURED = 8  # sets of inputs that the error of int8 is measured on, besides the example


@dataclass(frozen=True)
class Inputs:
    """The tensors of the example, if there is one, and of every set of inputs to calibrate with."""

    example: list[torch.Tensor] | None
    calibration: tuple[list[torch.Tensor], ...]


def check_options(precision: str, fallback: Any, calibration: Any, has_example: bool) -> None:
    """Raise InputError for options that say nothing together."""
    if fallback is not None:
        if fallback != "fp32":
            near = suggest(str(fallback), ("fp32",))
            raise InputError(f"fallback={fallback!r}{near}: there is 'fp32', or None for no twin")
        if precision == "fp32":
            raise InputError(
                "fallback='fp32' needs a reduced precision: pass precision='auto', 'int8', 'bf16' or 'fp16'"
            )
    if calibration is not None:
        if precision == "fp32":
            raise InputError(
                "calibration serves reduced precision and fp32 decides nothing by it: leave it out, or "
                "pass precision='int8', 'auto', 'adaptive', 'bf16' or 'fp16'"
            )
        if not isinstance(calibration, (Mapping, list, tuple)) or not len(calibration):
            raise InputError(
                "calibration is a list of inputs, each as example_inputs are, or a mapping from input names to "
                f"tensors with a leading axis of samples; got {_shown(calibration)}"
            )
    if precision == "int8" and calibration is None:
        raise InputError(
            "precision='int8' finds the ranges of values on inputs: pass calibration=[inputs, ...], a few dozen that "
            "look like those the model will get"
        )
    if precision == "adaptive" and calibration is None:
        raise InputError(
            "precision='adaptive' learns from inputs when the reduced build is safe: pass calibration=[inputs, ...], "
            "or precision='auto' to decide once"
        )
    if precision == "adaptive" and not has_example:
        raise InputError("precision='adaptive' decides at compile time: pass example_inputs")


def inputs_of(example: Example | None, calibration: Any, signature: Signature) -> Inputs:
    """The tensors of the example and of the calibration. Raises InputError where one does not fit the model."""
    first = None if example is None else example_tensors(example, signature)
    if calibration is None:
        return Inputs(first, ())
    specs = signature.tensors
    if isinstance(calibration, Mapping):
        samples = _unstacked(calibration, specs)
    else:
        samples = [example_tensors(arguments(given), signature) for given in calibration]
    for number, tensors in enumerate(samples):
        for tensor, spec in zip(tensors, specs, strict=True):
            if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
                raise InputError(
                    f"calibration set {number}: {spec.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and the "
                    f"model is compiled for {spec.dtype} of shape {tuple(spec.shape)}"
                )
    return Inputs(first, tuple(samples))


def _unstacked(stacked: Mapping[str, Any], specs: Sequence[TensorSpec]) -> list[list[torch.Tensor]]:
    names = [spec.name for spec in specs]
    if set(stacked) == {f"arr_{i}" for i in range(len(specs))}:
        stacked = {name: stacked[f"arr_{i}"] for i, name in enumerate(names)}
    for name in stacked:
        if name not in names:
            near = suggest(str(name), names)
            raise InputError(f"calibration: the model takes {', '.join(names)}, not {name!r}{near}")
    if missing := [name for name in names if name not in stacked]:
        raise InputError(f"calibration: {', '.join(missing)} missing; the model takes {', '.join(names)}")
    tensors = [torch.as_tensor(stacked[name]) for name in names]
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(counts) != 1 or not min(counts):
        raise InputError(
            "calibration: every array holds the samples along its leading axis, as many as the others and at least "
            f"one; they have {', '.join(f'{n} {tuple(t.shape)}' for n, t in zip(names, tensors, strict=True))}"
        )
    return [[tensor[i] for tensor in tensors] for i in range(counts.pop())]


def digest(example: Example | None, calibration: Any) -> str:
    """Of the values that an adaptive build is made by."""
    made = hashlib.sha256()
    given = dict(sorted(calibration.items())) if isinstance(calibration, Mapping) else calibration
    for leaf in pytree.tree_leaves([example, given]):
        if hasattr(leaf, "__array__") and not isinstance(leaf, torch.Tensor):
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, torch.Tensor):
            dense = leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            made.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + dense.view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(leaf).encode())
    return made.hexdigest()


def samples_for(captured: Captured, inputs: Inputs, options: Options) -> tuple[Sample, ...]:
    """What precisions are decided by: the example, and where one assignment serves all inputs the calibration too."""
    decisive = options.precision in ("auto", "adaptive", "int8") or options.verify
    if options.precision == "fp32" or not decisive or compare.is_random(captured.graph):
        return ()
    sets = [] if inputs.example is None else [inputs.example]
    if options.precision == "int8":  # hundreds serve to find ranges; errors are measured on a few
        sets += inputs.calibration[:MEASURED]
    elif options.precision != "adaptive":
        sets += inputs.calibration
    return tuple((tensors, compare.reference(captured.graph, tensors)) for tensors in sets)


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


def _shown(value: Any) -> str:
    return "nothing" if value is not None and hasattr(value, "__len__") and not len(value) else type(value).__name__
