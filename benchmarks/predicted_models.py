"""Predicted against measured latency of the models of the zoo on this machine; the table goes into docs/predictions.md.

python benchmarks/predicted_models.py [FILE ...]

The files are what `make bench` wrote, by default all of docs/measurements/models-*.json: their float32 rows at batch 1
are the measured side. They must have been measured on a machine like this one, with the same vectors or narrower ones.
Predicted is what `graphwright hw predict MODEL` prints there. Both sides are kept in
docs/measurements/predicted_models.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

from graphwright.compiler.benchmarking import models as bench_models
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.prediction.predict import Predictor
from graphwright.hwdb import Hardware, detect
from graphwright.hwdb.loader import database

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "measurements" / "predicted_models.json"
PAGE = DOCS / "predictions.md"
BEGIN, END = "<!-- begin models -->", "<!-- end models -->"
WITHIN = 1.3


def machine_of(known: dict[str, Any]) -> Hardware:
    """This machine as it showed itself when a file was measured: maybe without its wider vectors."""
    hw = detect()
    for fact, here in (("cpu", hw.name), ("isa", hw.isa), ("cores", hw.cores)):
        if known[fact] != here:
            sys.exit(f"measured with {fact} {known[fact]}, and this machine has {here}")
    if known["vector_bits"] == hw.vector_bits:
        return hw
    narrow = frozenset(name for name in hw.features if not name.startswith("avx512"))
    kept = ("name", "cores", "clock_mhz", "caches", "dram_gbs", "native")
    masked = database().build(hw.id, features=narrow, **{name: getattr(hw, name) for name in kept})
    if known["vector_bits"] != masked.vector_bits:
        sys.exit(f"measured with vectors of {known['vector_bits']} bits, and this machine has {hw.vector_bits}")
    return masked


@cache
def predictor(model: str) -> Predictor:
    return Predictor(*zoo.build(model))


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks: 1 where both order the models alike."""

    def ranks(values: list[float]) -> list[int]:
        return [sorted(values).index(value) for value in values]

    return statistics.correlation(ranks(first), ranks(second))


def table(models: dict[str, dict[str, float]], machine: dict[str, Any]) -> str:
    """The rows as Markdown, fastest first, and what they add up to."""
    lines = ["| model | predicted ms | measured ms | predicted / measured |", "|---|---:|---:|---:|"]
    ordered = sorted(models.items(), key=lambda item: item[1]["measured_ms"])
    for name, row in ordered:
        ratio = row["predicted_ms"] / row["measured_ms"]
        lines.append(f"| {name} | {row['predicted_ms']:.2f} | {row['measured_ms']:.2f} | {ratio:.2f} |")
    guessed, measured = ([row[key] for _, row in ordered] for key in ("predicted_ms", "measured_ms"))
    near = sum(1 / WITHIN <= p / m <= WITHIN for p, m in zip(guessed, measured, strict=True))
    calibrated = f"calibrated {machine['calibrated']}" if machine["calibrated"] else "not calibrated"
    lines += [
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['vector_bits']}-bit vectors, {calibrated}: "
        f"{near} of {len(ordered)} within {WITHIN}x; correlation of the ranks {spearman(guessed, measured):.3f}. "
        "By `python benchmarks/predicted_models.py`.",
    ]
    return "\n".join(lines)


def compared(file: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The machine of a file, and both sides of its models."""
    known = bench_models.read(file)
    hw = machine_of(known["machine"])
    models = {}
    for row in known["rows"]:
        if (row.batch, row.precision) == (1, "fp32"):
            predicted = predictor(row.model).predict(hw).milliseconds
            models[row.model] = {"predicted_ms": predicted, "measured_ms": row.milliseconds["graphwright"]}
    return {**known["machine"], "calibrated": hw.calibrated}, models


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted((DOCS / "measurements").glob("models-*.json"))
    found = [compared(file) for file in files]
    RESULTS.write_text(
        json.dumps([{"machine": machine, "models": models} for machine, models in found], indent=1) + "\n"
    )
    text = "\n\n".join(table(models, machine) for machine, models in found)
    print(text)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
