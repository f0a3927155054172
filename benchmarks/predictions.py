"""Predicted against measured time of every layer of ResNet-50 and BERT-base; the table goes into docs/kernels.md.

python benchmarks/predictions.py [MODEL ...]

Layers of equal kernels are one row. A ratio is predicted over measured, and "off" its distance from 1 either way.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphwright
from graphwright.compiler.benchmarking import bench, zoo
from graphwright.compiler.benchmarking import models as bench_models

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin predictions -->", "<!-- end predictions -->"


def measure(name: str, rounds: int = 50) -> list[dict[str, Any]]:
    """One row for each distinct kernel of the model: calls, predicted and measured microseconds of one call."""
    model, inputs = zoo.build(name)
    compiled = graphwright.compile(model, inputs, cache=False, verify=False)
    bench.settle()
    groups: dict[Any, list[float]] = {}
    for row in compiled.profile(*inputs, rounds=rounds).rows:
        groups.setdefault(replace(row.kernel, name="", step=0), []).append(row.measured_us)
    return [
        {
            "kernel": kernel.algorithm,
            "operators": kernel.operators,
            "choice": kernel.choice,
            "calls": len(times),
            "predicted_us": kernel.predicted_us,
            "measured_us": statistics.median(times),
        }
        for kernel, times in groups.items()
    ]


def summary(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The median and the worst distance of predicted from measured, over all calls: 1 is exact, 2 double or half."""
    off = []
    for row in rows:
        if row["predicted_us"]:
            ratio = row["predicted_us"] / row["measured_us"]
            off += [max(ratio, 1 / ratio)] * row["calls"]
    return statistics.median(off), max(off)


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    median, worst = summary(rows)
    lines = [
        f"**{name}**: off by {median:.2f} in the median, {worst:.2f} at worst",
        "",
        "| calls | kernel | choice | predicted us | measured us | ratio |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for row in rows:
        predicted, measured = row["predicted_us"], row["measured_us"]
        given = ("", "") if predicted is None else (f"{predicted:.1f}", f"{predicted / measured:.2f}")
        lines.append(
            f"| {row['calls']} | {row['kernel']} | {row['choice']} | {given[0]} | {measured:.1f} | {given[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    names = sys.argv[1:] or ["resnet50", "bert"]
    found = {name: measure(name) for name in names}
    text = "\n\n".join(table(name, rows) for name, rows in found.items())
    print(text)
    if not sys.argv[1:]:
        machine = bench_models.machine(2)
        target = DOCS / "measurements" / "predictions.json"
        target.write_text(json.dumps({"machine": machine, "models": found}, indent=1) + "\n")
        page = DOCS / "kernels.md"
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
