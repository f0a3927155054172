"""The damage of 8 bits as one self-contained page: products ranked by signal to noise, and what stays float32.

The plot is inline SVG made here: no script, nothing fetched. Names pass jinja2's escaping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader

if TYPE_CHECKING:
    from ...passes.assign_precision import Choice
    from ..report import Report

WORTH_A_LOOK = 20.0  # dB, below which another range or float32 may be better: docs/compression.md
_LEFT, _WIDTH, _RIGHT, _ROW, _TOP = 300.0, 900.0, 70.0, 16, 20


@dataclass(frozen=True)
class Bar:
    """One product whose damage by 8 bits is known."""

    name: str
    operator: str
    y: float
    width: float
    label: str
    text: str
    kind: str  # "bar", "low": worth a look, "back": in float32 after all


def page(report: Report, title: str) -> str:
    """The page as HTML. Products without noise (all zeros, or exact) are as long as the longest bar."""
    ranked = report.damage()
    finite = [row.sqnr_db for row in ranked if row.sqnr_db is not None and math.isfinite(row.sqnr_db)]
    most = max([2 * WORTH_A_LOOK, *finite])
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    bars = [_bar(row, i, scale, most) for i, row in enumerate(ranked)]
    ticks = [(_LEFT + scale * value, value) for value in range(0, int(most) + 1, 10)]
    kept = [row for row in report.precisions if row.dtype == "float32"]
    return (
        Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
        .get_template("damage_page.html")
        .render(
            title=title,
            report=report,
            bars=bars,
            kept=kept,
            ticks=ticks,
            left=_LEFT,
            top=_TOP,
            width=_WIDTH,
            height=_TOP + _ROW * len(bars) + 8,
            limit=_LEFT + scale * WORTH_A_LOOK,
            worth=WORTH_A_LOOK,
        )
    )


def _bar(row: Choice, place: int, scale: float, most: float) -> Bar:
    ratio = row.sqnr_db if row.sqnr_db is not None else 0.0
    length = most if math.isinf(ratio) and ratio > 0 else max(0.0, ratio)
    outputs = "" if row.error is None else f", alone {row.error:.1e} at the outputs"
    text = f"{row.node} ({row.operator}): {ratio:.1f} dB{outputs}; {row.reason}"
    name = row.node if len(row.node) <= 40 else f"...{row.node[-37:]}"
    kind = "back" if row.dtype == "float32" else "low" if ratio < WORTH_A_LOOK else "bar"
    return Bar(name, row.operator, _TOP + _ROW * place, length * scale, f"{ratio:.1f}", text, kind)
