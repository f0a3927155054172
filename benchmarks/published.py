"""Predictions beside latencies that others published (published.toml); the table goes into docs/predictions.md.

python benchmarks/published.py

A prediction is meant to be a lower bound: the table says where it is not, and how far below it lies.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.prediction.predict import Prediction, Predictor, precision_dtype
from graphwright.hwdb import lookup

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "predictions.md"
BEGIN, END = "<!-- begin published -->", "<!-- end published -->"


@dataclass(frozen=True)
class Row:
    """One published figure and its prediction."""

    model: str
    batch: int
    published: float
    source: str
    note: str
    held_back: bool
    prediction: Prediction

    @property
    def ratio(self) -> float:
        """How many times longer than predicted it took."""
        assert self.prediction.milliseconds is not None
        return self.published / self.prediction.milliseconds


@cache
def predictor(model: str, batch: int) -> Predictor:
    return Predictor(*zoo.build(model, batch=batch))


def rows(data: dict[str, Any]) -> list[Row]:
    """Every published figure with its prediction."""
    found = []
    for row in data["row"]:
        for model, published in row["ms"].items():
            batch = row.get("batch", 1)
            prediction = predictor(model, batch).predict(lookup(row["device"]), precision_dtype(row["precision"]))
            found.append(
                Row(
                    model, batch, published, row["source"], row.get("note", ""), row.get("held_back", False), prediction
                )
            )
    return found


def summary(what: str, found: list[Row]) -> str:
    """How many of the figures are as predicted."""
    above = sum(row.ratio >= 1 for row in found)
    near = sum(1 <= row.ratio <= 2 for row in found)
    inside = sum(row.prediction.least_ms <= row.published <= row.prediction.most_ms for row in found)  # type: ignore[operator]
    return (
        f"{what} {len(found)} figures: {above} no faster than predicted, {near} within twice, {inside} within the band"
    )


def table(found: list[Row], sources: dict[str, Any]) -> str:
    """The rows as Markdown, and what they add up to."""
    lines = [
        "| device | model | batch | dtype | predicted ms | band ms | published ms | ratio | with |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in found:
        p = row.prediction
        lines.append(
            f"| {p.name} | {row.model} | {row.batch} | {p.precision} | {p.milliseconds:.3g} | "
            f"{p.least_ms:.3g} to {p.most_ms:.3g} | {row.published:g} | {row.ratio:.2f} | {row.source}"
            + (f": {row.note}" if row.note else "")
            + (", held back |" if row.held_back else " |")
        )
    held = [row for row in found if row.held_back]
    lines += [
        "",
        f"{summary('Of', [row for row in found if not row.held_back])}. {summary('Held back', held)}.",
        "",
    ]
    lines += [f"- {id}: {source['title']}, <{source['url']}>" for id, source in sources.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    data = tomllib.loads((HERE / "published.toml").read_text())
    text = table(rows(data), data["source"])
    print(text)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
