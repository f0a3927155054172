"""An exported program -> a `Compiled`: from the cache, or built, verified and stored there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..backends.aot.library import BUNDLED
from ..backends.choices import Choices
from ..backends.gpu.identity import gpu_compiler
from ..errors import InputError, NumericMismatch, PassError
from ..passes.families import restrict
from . import artifact, calibration, compare, fingerprint, loading, tune, twins, verify
from .build import Built, build
from .cache import Cache
from .capture import Captured, Signature, TensorSpec, capture, example_tensors
from .compiled import Compiled
from .fakes import wrong_fake
from .obstacle import obstacle
from .pass_checks import Pass, name_of
from .precision import FP32, Precision, Sample, check_tolerance
from .report import ErrorRow, Report
from .rewriting import rewrite_again
from .selection import identities
from .without_assertions import without_assertions

if TYPE_CHECKING:
    from .api import Options
    from .calibration import Example

log = logging.getLogger(__name__)

# Operators whose machine code may be wrong before PyTorch runs the whole model: to find each, all values are compared.
MOST_LEFT_OUT = 4


def assemble(
    exported: ExportedProgram,
    parameters: tuple[str, ...],
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    options: Options,
    started: float,
) -> Compiled:
    """Compile an exported program, or take the result from the cache.

    `example` holds (args, kwargs) to verify with; None skips verification. `started` is when the user called, so that
    the report counts export too. Raises NumericMismatch, CaptureError, UnsupportedOp.
    """
    graph = _Graph(exported, parameters, options)
    if options.tune is not None:
        options = replace(options, preferred=_tuned(graph, example, options, options.tune).preferred)
    passes, unknown = identities(options.passes)
    if options.cache and unknown is not None:
        log.warning("the result is not cached: %s", unknown)
    if not options.cache or unknown is not None:
        directory = Path(tempfile.mkdtemp(prefix="graphwright-"))
        try:
            _write(directory, graph, example, options, started)
            compiled = _load(directory, graph, options, example)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        weakref.finalize(compiled, shutil.rmtree, directory, True)
        return compiled
    key = fingerprint.fingerprint(exported, options.hw, _decisive(options, example) | {"passes": passes})
    store = Cache()
    path = store.get(key)
    cached = path is not None
    if path is None:
        path = store.put(key, lambda directory: _write(directory, graph, example, options, started))
    return _load(path, graph, options, example, cached)


def _decisive(options: Options, example: Any) -> dict[str, Any]:
    """The options that decide the result; what was not verified, or only loosely, is no substitute for what was."""
    verified = options.verify and example is not None
    return {
        "precision": options.precision,
        "verified": verified,
        "tolerance": options.tolerance if verified or options.precision != "fp32" else None,
        "fallback": options.fallback,
        "calibration": None if options.calibration is None else calibration.digest(example, options.calibration),
        "method": options.method if options.precision == "int8" else None,
        "measured": sorted(options.preferred.items()),
        "memory_limit": options.memory_limit,
        "fusions": None if options.fusions is None else sorted(options.fusions),
        "gpu compiler": gpu_compiler(options.hw) if options.hw.kind == "gpu" else None,
    }


def tuned(
    exported: ExportedProgram,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    options: Options,
    seconds: float,
    remote: str | None,
) -> tune.Tuned:
    """Measure candidates for an exported program, on this machine or on the board `remote`, and keep what won."""
    return _tuned(_Graph(exported, (), options), example, options, seconds, remote)


def _tuned(graph: _Graph, example: Any, options: Options, seconds: float, remote: str | None = None) -> tune.Tuned:
    hw = options.hw
    if example is None:
        raise InputError("tune= measures the model on example inputs: give some")
    if options.precision == "int8":
        raise InputError("tune= ranks candidates of float kernels, and kernels of int8 have one each: leave it out")
    if remote is None and (reason := obstacle(hw)) is not None:
        board = f"; `graphwright tune --target {hw.id} --remote user@board` measures there" if hw.isa in BUNDLED else ""
        raise InputError(f"tune= measures the model on this machine, and {reason}{board}")
    captured = graph.captured
    inputs = example_tensors(example, captured.signature)
    precision = Precision(options.precision)
    if remote is None:
        here = partial(tune.on_this_machine, inputs, options.threads)
        return tune.tune(captured.graph, hw, seconds, here, precision, options.passes)
    from .commands.tune_board import measuring

    with measuring(remote, hw, captured.signature, inputs, options.threads, seconds) as there:
        return tune.tune(captured.graph, hw, seconds, there, precision, options.passes)


class _Graph:
    """The captured graph of a program, made when it is first needed: a hit in the cache never needs it."""

    def __init__(self, exported: ExportedProgram, parameters: tuple[str, ...], options: Options) -> None:
        self.exported, self.parameters, self.options = exported, parameters, options
        self._captured: Captured | None = None

    @property
    def captured(self) -> Captured:
        if self._captured is None:
            self._captured = capture(self.exported, self.parameters)
            restrict(self._captured.graph, self.options.fusions)
            without_assertions(self._captured.graph, self.options.hw)
        return self._captured

    def signature(self, saved: Signature) -> Signature:
        """The saved signature with this program's own structures, which may hold types that JSON cannot name."""
        call = self.exported.module_call_graph[0].signature
        assert call is not None
        return replace(saved, in_spec=call.in_spec, out_spec=call.out_spec, parameters=self.parameters)

    def rewritten(self, report: Report, example: Example | None) -> fx.GraphModule:
        """The graph after the passes that the report does not leave out, in the precisions decided for it."""
        options = self.options
        observed = calibration.inputs_of(example, options.calibration, self.captured.signature).calibration
        precision = Precision(options.precision, observed=observed, method=options.method)
        passes = _remaining(options.passes, report.left_out)
        return rewrite_again(self.captured.graph, options.hw, passes, precision, report.precisions)


def _write(
    directory: Path,
    graph: _Graph,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    options: Options,
    started: float,
) -> None:
    """Build, verify, and leave a complete artifact in `directory`."""
    exported_at = time.perf_counter()
    captured = graph.captured
    captured_at = time.perf_counter()
    inputs = calibration.inputs_of(example, options.calibration, captured.signature)
    if options.precision == "adaptive":
        twins.check_adaptive(inputs)
    samples = calibration.samples_for(captured, inputs, options)
    precision = Precision(
        options.precision, options.tolerance, samples, observed=inputs.calibration, method=options.method
    )
    attempt = _Attempt(options)
    built = _build(directory, captured, attempt, precision)
    built_at = time.perf_counter()
    errors: tuple[ErrorRow, ...] = ()
    if _can_verify(captured, inputs, options):
        built, errors = _verify(directory, captured, built, inputs.example or [], attempt, precision)
    build_twin = partial(_build_float32, captured, attempt, inputs)
    built, twin, notes = twins.beside(directory, captured, built, inputs, options, build_twin)
    report = Report(
        options.hw.id,
        options.precision,
        options.threads,
        built.passes,
        built.kernels,
        built.eager,
        errors,
        built.precisions,
        time.perf_counter() - started,
        stages={
            "export": exported_at - started,
            "capture": captured_at - exported_at,
            **built.stages,
            "verify": time.perf_counter() - built_at,
        },
        fusions=None if options.fusions is None else tuple(sorted(options.fusions)),
        left_out=attempt.left_out,
        notes=(*built.notes, *notes),
        caution=options.hw.caution,
        **built.sizes,
    )
    described = loading.Description(built.plan, captured.signature, report, twin)
    artifact.seal(directory, options.hw, loading.to_data(described))


@dataclass
class _Attempt:
    """The options of a build, and the passes of ours that it does without because they failed."""

    options: Options
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, error: PassError | NumericMismatch) -> None:
        """Go on without the pass to blame; raises `error` where that is none of ours, or it is gone already."""
        if error.rewrite is None or error.rewrite in self.left_out:
            raise error
        log.warning("%s\nUntil then it is left out.", error)
        self.left_out[error.rewrite] = str(error).splitlines()[0]
        self.options = replace(self.options, passes=_remaining(self.options.passes, self.left_out))


def _remaining(passes: Sequence[Pass], left_out: Mapping[str, str]) -> tuple[Pass, ...]:
    return tuple(one for one in passes if name_of(one) not in left_out)


def _build(
    directory: Path,
    captured: Captured,
    attempt: _Attempt,
    precision: Precision,
    left_out: Mapping[str, str] | None = None,
) -> Built:
    """Build with the passes of the attempt, without those of ours that fail; `left_out` are nodes left to PyTorch."""
    while True:
        options = attempt.options
        choices = Choices(options.preferred)
        try:
            return build(
                captured.graph,
                options.hw,
                directory,
                options.passes,
                choices,
                precision,
                memory_limit=options.memory_limit,
                left_out=left_out,
            )
        except PassError as error:
            attempt.leave_out(error)


def _build_float32(captured: Captured, attempt: _Attempt, inputs: calibration.Inputs, directory: Path) -> Built:
    """The twin of a reduced build, verified like it."""
    built = _build(directory, captured, attempt, FP32)
    if _can_verify(captured, inputs, attempt.options):
        own = _Attempt(replace(attempt.options, tolerance=None), attempt.left_out)
        built, _ = _verify(directory, captured, built, inputs.example or [], own, FP32)
    return built


def _can_verify(captured: Captured, inputs: calibration.Inputs, options: Options) -> bool:
    there = options.verify and inputs.example is not None
    return there and obstacle(options.hw) is None and not compare.is_random(captured.graph)


def _verify(
    directory: Path,
    captured: Captured,
    built: Built,
    inputs: Sequence[torch.Tensor],
    attempt: _Attempt,
    precision: Precision,
) -> tuple[Built, tuple[ErrorRow, ...]]:
    """Run the machine code on the inputs; raises NumericMismatch with the pass or the operator to blame.

    Where a custom operator gives another shape than its fake kernel promises, no machine code runs: it might read past
    the end.
    Where reduced precision costs too much after all, it is decided again for less error, and the model built again;
    where machine code is to blame, PyTorch runs that operator; where a pass of ours is, the model is built without it.
    The report says both.
    """
    options = attempt.options
    left_out: dict[str, str] = {}
    if (wrong := wrong_fake(captured.graph, inputs)) is not None:
        log.warning("%s\nUntil then PyTorch runs the model.", wrong)
        left_out = {node.name: wrong.splitlines()[0] for node in built.graph.graph.nodes}
        built = _build_again(directory, captured, attempt, precision, left_out)
    samples = precision.samples or calibration.with_references(captured, [inputs])
    names = [s.name for s in captured.signature.outputs if isinstance(s, TensorSpec)]
    wide = precision is FP32 or options.precision == "fp32"
    allowed = compare.tolerance_for(captured.graph, options.tolerance) if wide else precision.allowed
    while True:
        results = _results(directory, built, samples, options.threads)
        pairs = zip(results, samples, strict=True)
        found = [compare.compare(result, expected, allowed) for result, (_, expected) in pairs]
        difference = next((d for d in found if d is not None), None)
        if difference is None:
            return built, compare.errors(names, results[0], samples[0][1])
        log.warning(
            "output %d differs from float64 by %.1e (allowed %.1e); looking for the cause",
            difference.output,
            difference.error,
            difference.allowed,
        )
        if not precision.strictness or all(choice.dtype == "float32" for choice in built.precisions):
            check_tolerance(samples, options.tolerance)
            passes = attempt.options.passes
            error = verify.blame(captured.graph, options.hw, inputs, options.tolerance, options.threads, passes)
            if error.rewrite is not None:
                attempt.leave_out(error)
                built = _build_again(directory, captured, attempt, precision, left_out)
                continue
            known = {node.name for node in built.graph.graph.nodes}
            if not error.in_machine_code or known <= left_out.keys():
                raise error
            log.warning("%s\nUntil then PyTorch runs it.", error)
            found_one = error.node in known - left_out.keys() and len(left_out) < MOST_LEFT_OUT
            reason = f"off by {difference.error:.1e} in machine code, {difference.allowed:.1e} is allowed"
            left_out |= dict.fromkeys([str(error.node)] if found_one else sorted(known), reason)
            built = _build_again(directory, captured, attempt, precision, left_out)
            continue
        precision = precision.stricter(difference.error, difference.allowed)
        log.warning("operators go back to float32: %.2f of the tolerance is aimed for", precision.strictness)
        built = _build_again(directory, captured, attempt, precision)


def _results(directory: Path, built: Built, samples: Sequence[Sample], threads: int) -> list[list[torch.Tensor]]:
    """What the machine code gives. Its library is closed again: the next build has its name, and would not open."""
    run = loading.runner(directory, built.plan, threads)
    return [run(tensors) for tensors, _ in samples]


def _build_again(
    directory: Path,
    captured: Captured,
    attempt: _Attempt,
    precision: Precision,
    left_out: Mapping[str, str] | None = None,
) -> Built:
    """Build beside `directory` and move the files there: what lies there may be mapped."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as other:
        built = _build(Path(other), captured, attempt, precision, left_out)
        for old in directory.iterdir():
            if old.is_file():
                old.unlink()
        for path in Path(other).iterdir():
            os.rename(path, directory / path.name)
    return built


def _load(path: Path, graph: _Graph, options: Options, example: Example | None, cached: bool = False) -> Compiled:
    """The compiled model at `path`, which this process wrote or found in its own cache."""
    described = loading.describe(path)
    report = replace(described.report, cached=cached, threads=options.threads)
    signature = graph.signature(described.signature)
    return loading.assembled(
        path,
        loading.Description(described.plan, signature, report, described.twin),
        options.threads,
        lambda: graph.rewritten(report, example),
    )
