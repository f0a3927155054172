"""`graphwright.compile`: what users call. The steps it takes are in assemble.py, in their order."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import InputError
from ..hwdb import Hardware, Target, compile_target
from . import tune as tuning
from .assemble import assemble, tuned
from .calibration import check_options, listed
from .capture import Model, arguments, example_of, export
from .compiled import Compiled
from .compression.int8_method import DEFAULT, Method, int8_method
from .functions import parameters_of
from .memory_limit import with_memory_limit
from .numbers_given import is_number
from .pass_checks import Pass
from .precision import GPU_PRECISIONS, check_error_bound, check_precision
from .selection import select
from .specialised import Specialised

log = logging.getLogger(__name__)

# torch.export keeps its state in globals: compilations of several threads take turns.
_TRACING = threading.RLock()
THREADS = 256  # that the runtime can hold: the caller and its workers


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for, checked."""

    hw: Hardware
    precision: str
    tolerance: float | None
    verify: bool
    cache: bool
    threads: int
    passes: tuple[Pass, ...]
    fusions: frozenset[str] | None = None  # families; None: all
    tune: float | None = None  # seconds
    preferred: Mapping[str, str] = field(default_factory=dict)  # what measurements decided: tune.py
    memory_limit: int | None = None  # bytes of activations
    fallback: str | None = None
    calibration: Any = None
    method: Method = DEFAULT  # of int8


def compile(
    model: Model,
    example_inputs: Any = None,
    *,
    target: Target = "native",
    precision: str = "fp32",
    tolerance: float | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    cache: bool = True,
    threads: int | None = None,
    tune: str | float | None = None,
    memory_limit: int | str | None = None,
    passes: Sequence[Pass] | None = None,
    kernel_fusion: Sequence[str] | None = None,
    fallback: str | None = None,
    calibration: Any = None,
    int8: Mapping[str, Any] | None = None,
) -> Compiled | Specialised:
    """Compile a PyTorch model to machine code.

    model: an nn.Module (in eval mode), a function, an ExportedProgram, an fx.GraphModule, or the path of a .pt2 file.
    example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; shapes, dtypes and
        arguments that are not tensors become part of the compiled model, as do the weights at this moment. Without
        it the model is compiled at its first call, and again for every further set of shapes.
    target: "native"; a machine of the database by name or alias (`graphwright hw list`); a TVM target dictionary; or a
        `Hardware`. Where the facts of a machine are uncertain, the report says so and its caches count as small ones.
    precision: "fp32"; "bf16" or "fp16": products with constant weights in that precision (sums, bias and activation in
        float32) where the machine gains by it; "auto": the fastest mixture by the cost model within `tolerance`;
        "int8": products in 8 bits where the machine gains by it, with ranges found on `calibration`; "adaptive": as
        "auto" beside a float32 build, between which the size of the inputs decides at each call. The report says what
        was chosen and why. Inputs and outputs keep their dtypes.
    tolerance: the relative L2 error against float64 that is allowed; None allows a few times eager's own, and under
        reduced precisions what compare.REDUCED says (1e-2 under "auto"). Operators stay float32 until it is kept.
    dynamic_shapes: as in torch.export; a shape within them is compiled when it is first met.
    verify: run the example inputs through the machine code and compare with PyTorch in float64.
    cache: reuse and store results under the user's cache directory (GRAPHWRIGHT_CACHE).
    threads: threads one call uses; None takes torch.get_num_threads(), at most the machine's cores.
    tune: a time such as "30s": measure the cost model's best candidates so long, and keep what wins for this and later
        compilations on this machine. Without it nothing is measured, and what was kept is used. On a board `tune` does
        that.
    memory_limit: the most bytes, such as "64MB", that the activations of one call may take in compiled code; where the
        order of operators does not keep it, cheap values are computed again instead of being kept.
    passes: the passes to run, in order; None is `graphwright.passes.default.PASSES`, the list to start one's own from.
        Passes that a file of source does not tell apart (closures, functions typed into a shell) bypass the cache.
    kernel_fusion: the families of fusions to make, of those in `graphwright.passes.default.FAMILIES`; None makes all
        of them, [] none.
    fallback: "fp32" builds the model a second time in float32, which runs where the reduced build gives infinities or
        NaN for finite inputs; `report().calls` counts.
    calibration: inputs besides the example to keep the tolerance on: an iterable of them, read once, each as
        example_inputs, or a mapping from input names to tensors with a leading axis of samples. "int8" and "adaptive"
        need it, int8={"activation": "dynamic"} for depthwise convolutions alone.
    int8: how "int8" quantises: the options of `graphwright.quantize` from scheme to attention, as a mapping.

    Raises CaptureError, UnknownTarget, InputError, PassError, MemoryLimit, UnsupportedOp (targets where PyTorch cannot
    take over) and NumericMismatch, which names the pass or the operator to blame.
    """
    started = time.perf_counter()
    options = _options(target, precision, tolerance, verify, cache, threads, tune, passes, kernel_fusion)
    options = with_memory_limit(options, memory_limit)
    if options.hw.kind == "gpu" and (memory_limit is not None or fallback is not None):
        raise InputError(f"memory_limit= and fallback= are for CPUs: leave them out for {options.hw.id}")
    has_example = example_inputs is not None or isinstance(model, (ExportedProgram, str, os.PathLike))
    method, calibration = int8_method(precision, int8), listed(calibration)
    check_options(precision, fallback, calibration, has_example, method)
    options = replace(options, fallback=fallback, calibration=calibration, method=method)
    if isinstance(model, (ExportedProgram, str, os.PathLike)):
        program = export(model)
        with _TRACING:
            return assemble(program, (), example_of(program, example_inputs), options, started)
    if example_inputs is not None and dynamic_shapes is None:
        args, kwargs = arguments(example_inputs)
        return _compile(model, args, kwargs, options, started)

    def compile_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
        return _compile(model, args, kwargs, options, time.perf_counter())

    lazy = Specialised(model, compile_for, dynamic_shapes)
    if example_inputs is not None:
        lazy.prepare(*arguments(example_inputs))
    return lazy


def tune(
    model: Model,
    example_inputs: Any = None,
    *,
    target: Target = "native",
    remote: str | None = None,
    time: str | float = "60s",
    precision: str = "fp32",
    threads: int | None = None,
    passes: Sequence[Pass] | None = None,
    kernel_fusion: Sequence[str] | None = None,
) -> tuning.Tuned:
    """Measure the cost model's best candidates for a model, and keep what wins: `compile` for the target then uses it.

    remote: a board as ssh names it ("pi@raspberrypi"), on which the candidates run; None is this machine. `target` says
        what the board is (`graphwright hw list`).
    time: "60s", "2m" or seconds, about which building and measuring may take.
    threads: of one call; None is all cores of the board, and on this machine as many as PyTorch uses.
    The others are as in `compile`; example_inputs are those that are measured with.

    Raises InputError where there are no example inputs, for targets that cannot be measured so and boards of another
    kind, GraphwrightError where ssh or a program on the board fails, and what `compile` raises for the model.
    """
    options = _options(target, precision, None, False, False, threads, time, passes, kernel_fusion)
    if remote is not None:
        options = replace(options, threads=threads or min(options.hw.cores, THREADS))
    with _TRACING:
        if isinstance(model, (ExportedProgram, str, os.PathLike)):
            program = export(model)
            example = example_of(program, example_inputs)
        else:
            example = None if example_inputs is None else arguments(example_inputs)
            if example is None:
                raise InputError("tune measures the model on example inputs: give some")
            program = export(model, *example)
        assert options.tune is not None
        return tuned(program, example, options, options.tune, remote)


def _compile(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, started: float) -> Compiled:
    with _TRACING:
        return assemble(export(model, args, kwargs), parameters_of(model), (args, kwargs), options, started)


def check(options: Mapping[str, Any]) -> None:
    """Raise what `compile` raises for the values of these options, whatever the model."""
    get = options.get
    _options(
        get("target", "native"), get("precision", "fp32"), get("tolerance"), get("verify", True), get("cache", True),
        get("threads"), None, get("passes"), get("kernel_fusion"),
    )  # fmt: skip
    method = int8_method(get("precision", "fp32"), get("int8"))
    check_options(get("precision", "fp32"), get("fallback"), get("calibration"), True, method)


def _options(
    target: Target,
    precision: str,
    tolerance: float | None,
    verify: bool,
    cache: bool,
    threads: int | None,
    tune: str | float | None,
    passes: Sequence[Pass] | None,
    kernel_fusion: Sequence[str] | None,
) -> Options:
    hw = compile_target(target)
    check_precision(precision)
    if hw.kind == "gpu" and (precision not in GPU_PRECISIONS or tune is not None):
        there = ", ".join(GPU_PRECISIONS)
        raise InputError(f"code for GPUs is {there} and not tuned: leave tune= and other precision= out for {hw.id}")
    check_error_bound(tolerance)
    if threads is not None and (not isinstance(threads, int) or not is_number(threads) or not 1 <= threads <= THREADS):
        raise InputError(f"threads must be a whole number from 1 to {THREADS}, got {threads!r}")
    count = threads or max(1, min(torch.get_num_threads(), hw.cores))
    chosen, fusions = select(passes, kernel_fusion, hw)
    seconds = tuning.budget(tune)
    return Options(hw, precision, tolerance, verify, cache, count, chosen, fusions, seconds, tuning.stored(hw))
