"""What a compilation did: passes, kernels, errors, sizes and seconds, as text and as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backends.choices import Decision
from ..backends.lowering.registry import KernelInfo
from ..errors import size
from ..passes.assign_precision import Choice
from .pipeline import PassRun

_MOST_DAMAGED = 10  # products that the text ranks


@dataclass(frozen=True)
class EagerRow:
    """An operator left to PyTorch, and why."""

    operator: str
    count: int
    reason: str


@dataclass(frozen=True)
class ErrorRow:
    """The error of one output against float64: ours, and that of PyTorch eager beside it.

    `no_float64`: why the model does not run in float64, so that PyTorch eager is what both are compared with.
    """

    output: str
    relative_l2: float
    max_absolute: float
    eager_relative_l2: float
    eager_max_absolute: float
    no_float64: str | None = None


@dataclass(frozen=True)
class Report:
    """A compilation in figures. Errors are empty where the model was compiled with verify=False."""

    target: str
    precision: str
    threads: int
    passes: tuple[PassRun, ...] = ()
    kernels: tuple[KernelInfo, ...] = ()
    eager: tuple[EagerRow, ...] = ()
    errors: tuple[ErrorRow, ...] = ()
    precisions: tuple[Choice, ...] = ()  # of operators that compute, where the precision is not fp32
    compile_seconds: float = 0.0
    cached: bool = False
    weights_bytes: int = 0
    code_bytes: int = 0
    arena_bytes: int = 0  # activation memory of one call
    arena_lower_bound_bytes: int = 0  # the most that is live at once
    activations_bytes: int = 0  # what the activations would take without sharing
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage
    fusions: tuple[str, ...] | None = None  # families that kernel_fusion chose; None: all
    left_out: dict[str, str] = field(default_factory=dict)  # passes of ours that failed on this model, and how
    notes: tuple[str, ...] = ()  # how precisions were decided, and what was measured
    caution: str | None = None  # what is uncertain about the target
    fallbacks: tuple[str, ...] = ()  # schedules for GPUs that failed, and why: another took the place of each
    calls: dict[str, int] | None = None  # of each build since loading, where there are two: variants.Counts

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """The report that `to_dict` wrote."""
        rows = {
            "passes": tuple(PassRun(**r) for r in data["passes"]),
            "kernels": tuple(_kernel(r) for r in data["kernels"]),
            "eager": tuple(EagerRow(**r) for r in data["eager"]),
            "errors": tuple(ErrorRow(**r) for r in data["errors"]),
            "precisions": tuple(Choice(**r) for r in data.get("precisions", ())),
            "notes": tuple(data.get("notes", ())),
            "fallbacks": tuple(data.get("fallbacks", ())),
            "fusions": None if data.get("fusions") is None else tuple(data["fusions"]),
        }
        return Report(**{**data, **rows})

    def text(self) -> str:
        """The report for reading."""
        lines = [
            f"target {self.target}, precision {self.precision}, {self.threads} threads; "
            + (
                f"from the cache, first compiled in {self.compile_seconds:.1f} s"
                if self.cached
                else f"compiled in {self.compile_seconds:.1f} s"
            ),
            f"weights {size(self.weights_bytes)}, code {size(self.code_bytes)}, "
            f"activations {size(self.arena_bytes)} (at most {size(self.arena_lower_bound_bytes)} live at once, "
            f"{size(self.activations_bytes)} without sharing)",
        ]
        if self.caution:
            lines.append(self.caution)
        if self.stages:
            lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.stages.items()))
        lines += passes_lines(self.passes)
        lines += [f"  {name} left out: {reason}" for name, reason in self.left_out.items()]
        if self.fusions is not None:
            lines.append(f"fusions: {', '.join(self.fusions) or 'none'}, as kernel_fusion chose")
        if self.precision != "fp32":
            lines += ["precisions:", *(f"  {row}" for row in (*self.notes, *self._precision_lines()))]
        lines += self._damage_lines()
        if self.calls is not None:
            lines.append("calls since loading: " + ", ".join(f"{k} {v}" for k, v in self.calls.items()))
        lines.append(f"kernels: {len(self.kernels)} calls")
        lines += [f"  {row}" for row in self._kernel_lines()]
        if self.fallbacks:
            lines.append(f"{len(self.fallbacks)} schedules failed, and others took their place:")
            lines += [f"  {row}" for row in self.fallbacks]
        if self.eager:
            lines.append("left to PyTorch:")
            lines += [f"  {r.operator} x{r.count}: {r.reason}" for r in self.eager]
        for row in self.errors:
            ours = f"relative L2 {row.relative_l2:.1e}, max {row.max_absolute:.1e}"
            if row.no_float64 is None:
                eager = f"PyTorch eager: {row.eager_relative_l2:.1e}, {row.eager_max_absolute:.1e}"
                lines.append(f"error of {row.output} against float64: {ours} ({eager})")
            else:
                lines.append(f"error of {row.output} against PyTorch eager: {ours} (not in float64: {row.no_float64})")
        return "\n".join(lines)

    def _precision_lines(self) -> list[str]:
        """Equal decisions on one line, with the first operator they are about."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in self.precisions:
            groups.setdefault((row.dtype, row.operator, row.reason), []).append(row.node)
        if not groups:
            return ["no operator computes in floating point"]
        return [
            f"{len(nodes):3d} x {dtype} {operator}: {reason} ({nodes[0]}{', ...' if len(nodes) > 1 else ''})"
            for (dtype, operator, reason), nodes in groups.items()
        ]

    def damage(self) -> tuple[Choice, ...]:
        """The products weighed for 8 bits, the most damaged first: by the ratio of signal to quantisation noise.

        Those that went back to float32 for it are among them (`dtype`).
        """
        found = [row for row in self.precisions if row.sqnr_db is not None]
        return tuple(sorted(found, key=lambda row: row.sqnr_db or 0.0))

    def damage_page(self, title: str) -> str:
        """The ranking as a plot, and what stays float32: an HTML page that needs nothing but a browser."""
        from .compression.damage_page import page

        return page(self, title)

    def _damage_lines(self) -> list[str]:
        ranked = self.damage()
        if not ranked:
            return []
        lines = ["most damaged by 8 bits (signal to noise of the product alone):"]
        for row in ranked[:_MOST_DAMAGED]:
            at_outputs = "" if row.error is None else f", alone {row.error:.1e} at the outputs"
            lines.append(f"  {row.sqnr_db:6.1f} dB  {row.node} ({row.operator}): {row.dtype}{at_outputs}")
        return lines

    def _kernel_lines(self) -> list[str]:
        """Equal kernels on one line, with how often they are called."""
        counts: dict[KernelInfo, int] = {}
        for row in self.kernels:
            key = dataclasses.replace(row, name="", step=0)
            counts[key] = counts.get(key, 0) + 1
        lines = []
        for row, count in counts.items():
            predicted = "" if row.predicted_us is None else f"  predicted {row.predicted_us:.1f} us"
            lines.append(f"{count:3d} x {row.algorithm}: {row.operators} ({row.choice}){predicted}")
        return lines


def passes_lines(runs: Sequence[PassRun]) -> list[str]:
    """A line a pass, and one for a budget that was spent."""
    lines = ["passes:"]
    for run in runs:
        rounds = f"  in {run.runs} runs" if run.runs > 1 and run.rewrites else ""
        lines.append(f"  {run.name:28s} {run.rewrites:5d} rewrites  {run.seconds * 1e3:8.1f} ms{rounds}")
    if unfinished := list(dict.fromkeys(run.name for run in runs if run.unfinished)):
        lines.append(f"  stopped by the budget of rounds and rewrites: {', '.join(unfinished)} still rewrote")
    return lines


def _kernel(data: dict[str, Any]) -> KernelInfo:
    decisions = tuple(
        Decision(**{**d, "candidates": tuple((reason, cycles) for reason, cycles in d["candidates"])})
        for d in data.get("decisions", ())
    )
    return KernelInfo(**{**data, "decisions": decisions})
