"""What the compiler makes of a model, in text: the graph around every pass, the kernels chosen, and why."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import fx

from ..hwdb import Hardware, lookup
from ..passes.printer import diff_graphs, format_graph
from . import pipeline
from .build import build, default_passes
from .capture import Model, arguments, capture, export, parameters_of
from .report import Report


def explain(model: Model, example_inputs: Any = None, *, target: str = "native") -> str:
    """Compile without keeping anything, and describe each step.

    Arguments as in `graphwright.compile`. Raises what compile raises, but for wrong numbers: nothing is run.
    """
    hw = lookup(target)
    captured = capture(export(model, *arguments(example_inputs)), parameters_of(model))
    passes, graph = _passes(captured.graph, hw)
    with tempfile.TemporaryDirectory(prefix="graphwright-") as directory:
        built = build(graph, hw, Path(directory), passes=())
    report = Report(
        hw.id, "fp32", hw.cores, kernels=built.kernels, eager=built.eager, stages=built.stages, **built.sizes
    )
    predicted = [k.predicted_us for k in built.kernels if k.predicted_us is not None]
    total = f"predicted by the cost model, not measured: {sum(predicted) / 1e3:.2f} ms in {len(predicted)} kernels"
    return "\n".join([_machine(hw), "", *passes, report.text(), total])


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
    return lines, rewritten


def _machine(hw: Hardware) -> str:
    peak = hw.peak_flops("float32")
    rate = "unknown" if peak is None else f"{peak / 1e9:.0f} GFLOP/s"
    caches = ", ".join(f"L{c.level} {c.size_bytes // 1024} KiB" for c in hw.caches)
    return f"target {hw.id}: {hw.name}, {hw.cores} cores, {hw.vector_bits}-bit vectors, peak {rate} fp32, {caches}"
