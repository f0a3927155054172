"""What the compiler makes of a model: the graph around every pass, what was refused, the kernels chosen, and why.

print(explained(model, x).text())
Path("model.html").write_text(explained(model, x).html("my model"))
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from ...backends.choices import Choices
from ...backends.lowering.registry import KernelInfo
from ...errors import size
from ...hwdb import Hardware, Target, compile_target
from ...passes.families import restrict
from ...passes.moves.copies import Copies, count_copies
from ...passes.printer import diff_graphs, format_graph
from ...passes.refusals import Refusal, recording
from .. import compare, pipeline
from ..build import build, kernels_of
from ..calibration import MEASURED, check_options, inputs_of, listed
from ..capture import Model, arguments, capture, export
from ..compression.int8_method import int8_method
from ..functions import parameters_of
from ..pass_checks import Pass
from ..precision import Precision, check_precision
from ..report import Report, passes_lines
from ..rewriting import divided
from ..selection import select
from ..tune import stored
from .trail import Trail

# Convolutions have kernels for images in NHWC: without layouts, what is compared would be the loss of those.
PLAIN = ("layout",)


@dataclass(frozen=True)
class Cost:
    """What the cost model says of a graph's kernels."""

    milliseconds: float  # of the kernels it can predict
    kernels: int
    unknown: int  # kernels it cannot

    @staticmethod
    def of(kernels: Sequence[KernelInfo]) -> Cost:
        known = [k.predicted_us for k in kernels if k.predicted_us is not None]
        return Cost(sum(known) / 1e3, len(kernels), len(kernels) - len(known))

    def text(self) -> str:
        unknown = f", {self.unknown} of them not predicted" if self.unknown else ""
        time = f"{self.milliseconds:.2f} ms" if self.milliseconds >= 1 else f"{self.milliseconds * 1e3:.1f} us"
        return f"{time} in {self.kernels} kernels{unknown}"


@dataclass(frozen=True)
class Explanation:
    """Every step of a compilation; nothing of it was run."""

    hw: Hardware
    captured: fx.GraphModule
    rewritten: fx.GraphModule  # as it was lowered
    steps: tuple[tuple[str, str], ...]  # passes that rewrote, each with the lines that it took away and brought
    origins: Mapping[str, tuple[str, list[str]]]  # node -> the pass that made it, the captured nodes it stands for
    refusals: tuple[Refusal, ...]
    report: Report
    copies: tuple[Copies, Copies]  # captured, rewritten
    costs: tuple[Cost, Cost]  # with `PLAIN` alone, as it is
    float32: Cost | None = None  # as it is but for the precision, where that is reduced

    def text(self) -> str:
        """All of it, for reading in a terminal."""
        lines = [_machine(self.hw), "", "captured:", format_graph(self.captured), ""]
        for name, diff in self.steps:
            lines += [f"after {name}:", diff, ""]
        lines += [*passes_lines(self.report.passes), ""]
        if (layout := self.rewritten.meta.get("layout")) is not None:
            lines += [layout.text(), ""]
        lines += [*_refused(self.refusals), "", *self.savings(), ""]
        return "\n".join([*lines, self.report.text(), *_decisions(self.report.kernels, self.hw)])

    def savings(self) -> list[str]:
        """What the passes save, as far as it can be counted or predicted."""
        before, after = self.copies
        unfused, fused = self.costs
        wide = "" if self.float32 is None else f"; with precision='fp32' {self.float32.text()}"
        return [
            f"copies: {before.count} nodes that only move elements ({size(before.bytes)}) as captured, "
            f"{after.count} ({size(after.bytes)}) behind the passes",
            f"predicted by the cost model, not measured: {fused.text()}; "
            f"with kernel_fusion={list(PLAIN)} {unfused.text()}{wide}",
        ]

    def html(self, title: str) -> str:
        """A page that needs nothing but a browser."""
        from .page import page

        return page(self, title)


def explained(
    model: Model,
    example_inputs: Any = None,
    *,
    target: Target = "native",
    passes: Sequence[Pass] | None = None,
    kernel_fusion: Sequence[str] | None = None,
    precision: str = "fp32",
    tolerance: float | None = None,
    calibration: Any = None,
    int8: Mapping[str, Any] | None = None,
) -> Explanation:
    """Compile without keeping anything, and note each step.

    Arguments as in `graphwright.compile`. Raises what compile raises, but for wrong numbers: nothing is run. Reduced
    precisions are decided in PyTorch.
    """
    hw = compile_target(target)
    check_precision(precision)
    method, calibration = int8_method(precision, int8), listed(calibration)
    check_options(precision, None, calibration, example_inputs is not None, method)
    chosen, fusions = select(passes, kernel_fusion, hw)
    early, late = divided(chosen) if precision == "int8" else (chosen, ())
    whole = capture(export(model, *arguments(example_inputs)), parameters_of(model))
    captured = whole.graph
    example = None if example_inputs is None else arguments(example_inputs)
    given = inputs_of(example, calibration, whole.signature)
    sets = [] if precision == "fp32" or given.example is None else [given.example, *given.calibration[:MEASURED]]
    samples = tuple((tensors, compare.reference(captured, tensors)) for tensors in sets)
    restrict(captured, fusions)
    trail, steps, last = Trail(), [], [format_graph(captured)]

    def after(name: str, current: fx.GraphModule) -> None:
        trail.after(name, current)
        now = format_graph(current)
        steps.append((name, diff_graphs(last[0], now)))
        last[0] = now

    with recording() as refusals:
        graph, runs = pipeline.run(captured, hw, early, after, before=trail.begin)
    choices = Choices(stored(hw))
    with tempfile.TemporaryDirectory(prefix="graphwright-") as directory, recording() as unfused:
        wanted = Precision(precision, tolerance, samples, observed=given.calibration, method=method)
        built = build(graph, hw, Path(directory), passes=late, choices=choices, precision=wanted)
    report = Report(
        hw.id,
        precision,
        hw.cores,
        passes=(*runs, *built.passes),
        precisions=built.precisions,
        notes=built.notes,
        kernels=built.kernels,
        eager=built.eager,
        stages=built.stages,
        fusions=None if fusions is None else tuple(sorted(fusions)),
        **built.sizes,
    )
    return Explanation(
        hw,
        captured,
        built.graph,
        tuple(steps),
        trail.by_name(),
        (*refusals, *unfused),
        report,
        (count_copies(captured), count_copies(graph)),
        (Cost.of(_unfused(captured, hw, chosen, choices)), Cost.of(built.kernels)),
        None if precision == "fp32" else Cost.of(kernels_of(pipeline.run(graph, hw, late)[0], hw, choices)),
    )


def explain(model: Model, example_inputs: Any = None, **options: Any) -> str:
    """The text of `explained`."""
    return explained(model, example_inputs, **options).text()


def _unfused(captured: fx.GraphModule, hw: Hardware, passes: Sequence[Pass], choices: Choices) -> Sequence[KernelInfo]:
    """The kernels of the model with no family of fusions but `PLAIN`: the same kernels and cost model otherwise."""
    chosen, fusions = select(passes, PLAIN)
    plain = pipeline.copy_graph(captured)
    restrict(plain, fusions)
    return kernels_of(pipeline.run(plain, hw, chosen)[0], hw, choices)


def _refused(refusals: Sequence[Refusal]) -> list[str]:
    """Equal refusals on one line, with the first node they are about."""
    counts = Counter((r.rule, r.operator, r.reason) for r in refusals)
    first: dict[tuple[str, str, str], str] = {}
    for r in refusals:
        first.setdefault((r.rule, r.operator, r.reason), r.node)
    lines = [
        f"  {rule}: {count:3d} x {operator} ({first[rule, operator, reason]}{', ...' if count > 1 else ''}): {reason}"
        for (rule, operator, reason), count in counts.items()
    ]
    return ["refused:", *lines] if lines else ["refused: nothing"]


def _decisions(kernels: Sequence[KernelInfo], hw: Hardware) -> list[str]:
    """What each kernel was weighed against: predicted times, the candidate taken marked."""
    lines = []
    for decision in dict.fromkeys(d for kernel in kernels for d in kernel.decisions):
        taken, cheapest = decision.candidates[decision.chosen][1], min(cycles for _, cycles in decision.candidates)
        why = "measured the fastest here" if decision.measured else "predicted the fastest"
        if taken > cheapest and not decision.measured:
            why = "its register tile is predicted the fastest, before the cores share the work"
        lines.append(f"  {decision.problem}: {why}")
        for number, (reason, cycles) in enumerate(decision.candidates):
            mark = ">" if number == decision.chosen else " "
            microseconds = cycles / hw.cycles_per_us
            lines.append(f"    {mark} {microseconds:9.1f} us, {cycles / taken:5.2f} of the one taken: {reason}")
    return ["decisions:", *lines] if lines else []


def _machine(hw: Hardware) -> str:
    peak = hw.peak_flops("float32")
    rate = "unknown" if peak is None else f"{peak / 1e9:.0f} GFLOP/s"
    caches = ", ".join(f"L{c.level} {c.size_bytes // 1024} KiB" for c in hw.caches)
    return f"target {hw.id}: {hw.name}, {hw.cores} cores, {hw.vector_bits}-bit vectors, peak {rate} fp32, {caches}" + (
        f"; {hw.caution}" if hw.caution else ""
    )
