"""What the compiler makes of a model, in text: the graph around every pass, the kernels chosen, and why."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from ..backends.choices import Choices
from ..backends.lowering.registry import KernelInfo
from ..hwdb import Hardware, lookup
from ..passes.printer import diff_graphs, format_graph
from . import pipeline
from .build import build, default_passes
from .capture import Model, arguments, capture, export, parameters_of
from .report import Report
from .tune import stored


def explain(model: Model, example_inputs: Any = None, *, target: str = "native") -> str:
    """Compile without keeping anything, and describe each step.

    Arguments as in `graphwright.compile`. Raises what compile raises, but for wrong numbers: nothing is run.
    """
    hw = lookup(target)
    captured = capture(export(model, *arguments(example_inputs)), parameters_of(model))
    passes, graph = _passes(captured.graph, hw)
    with tempfile.TemporaryDirectory(prefix="graphwright-") as directory:
        built = build(graph, hw, Path(directory), passes=(), choices=Choices(stored(hw)))
    report = Report(
        hw.id, "fp32", hw.cores, kernels=built.kernels, eager=built.eager, stages=built.stages, **built.sizes
    )
    predicted = [k.predicted_us for k in built.kernels if k.predicted_us is not None]
    total = f"predicted by the cost model, not measured: {sum(predicted) / 1e3:.2f} ms in {len(predicted)} kernels"
    return "\n".join([_machine(hw), "", *passes, report.text(), *_decisions(built.kernels, hw), total])


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


def _passes(graph: fx.GraphModule, hw: Hardware) -> tuple[list[str], fx.GraphModule]:
    """The captured graph, then what each pass that rewrote changed."""
    text = format_graph(graph)
    lines = ["captured:", text, ""]
    last = [text]

    def after(name: str, current: fx.GraphModule) -> None:
        now = format_graph(current)
        lines.extend([f"after {name}:", diff_graphs(last[0], now), ""])
        last[0] = now

    rewritten, runs = pipeline.run(graph, hw, default_passes(), after)
    lines.extend(["passes:", *(f"  {r.name}: {r.rewrites} rewrites, {r.seconds * 1e3:.1f} ms" for r in runs), ""])
    if (layout := rewritten.meta.get("layout")) is not None:
        lines.extend([layout.text(), ""])
    return lines, rewritten


def _machine(hw: Hardware) -> str:
    peak = hw.peak_flops("float32")
    rate = "unknown" if peak is None else f"{peak / 1e9:.0f} GFLOP/s"
    caches = ", ".join(f"L{c.level} {c.size_bytes // 1024} KiB" for c in hw.caches)
    return f"target {hw.id}: {hw.name}, {hw.cores} cores, {hw.vector_bits}-bit vectors, peak {rate} fp32, {caches}"
