"""Two builds of one model, reduced and in float32, and what decides between them at each call.

fallback    the reduced build runs; where its results are not finite although the inputs are, the float32 twin runs
            instead. The check is one sum over each result: it reads them once and stores nothing. An infinity or NaN
            makes the sum one, so a finite sum means finite results; elements are looked at only where it is not.
rule        a statistic of the inputs says which build runs: data in the artifact's manifest, set by calibration.

The twin is the whole model: an infinity passes through the operators behind the one that made it, so the end of the
model sees what the end of a region sees, for one check a call and no memory held for going back. What a model itself
swallows (relu of minus infinity) is not seen; no form chosen today narrows the range of activations (bfloat16 has
float32's, float16 is for weights, which are checked when they are rounded). The twin has weights of its own, float32
beside 16 bits: three times the reduced weights on disk, in memory only from the first call that needs them.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .executor import Run

if TYPE_CHECKING:
    from ..backends.aot.library import Library


@dataclass(frozen=True)
class Rule:
    """The reduced build runs where low <= score <= high; score = the largest of max|x| / scale over the inputs.

    `scales`, by tensor input: the median of max|x| in calibration; None for an input that is not looked at.
    """

    scales: tuple[float | None, ...]
    low: float
    high: float
    statistic: str = "max_abs"

    def score(self, tensors: Sequence[torch.Tensor]) -> float:
        """The statistic of a call; NaN where an input holds one."""
        values = [_largest(x) / s for x, s in zip(tensors, self.scales, strict=True) if s is not None and x.numel()]
        return math.nan if any(math.isnan(v) for v in values) else max(values, default=0.0)

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the reduced build may run: never where an input is not finite."""
        return self.low <= self.score(tensors) <= self.high

    def text(self) -> str:
        """The rule for reading."""
        return f"the reduced build runs where max|input| is {self.low:.3g} to {self.high:.3g} times its usual size"

    def to_data(self) -> dict[str, Any]:
        """The rule as JSON data."""
        return {"statistic": self.statistic, "scales": list(self.scales), "low": self.low, "high": self.high}

    @staticmethod
    def from_data(data: dict[str, Any]) -> Rule:
        """The rule that `to_data` wrote. Raises ValueError for a statistic this version does not know."""
        if data["statistic"] != "max_abs":
            raise ValueError(f"the rule uses {data['statistic']!r}, which is not known here")
        scales = tuple(None if s is None else float(s) for s in data["scales"])
        return Rule(scales, float(data["low"]), float(data["high"]))


def scales_of(samples: Sequence[Sequence[torch.Tensor]]) -> tuple[float | None, ...]:
    """The usual size of each floating point input: the median of max|x| over the samples."""
    scales: list[float | None] = []
    for values in zip(*samples, strict=True):
        sizes = [_largest(x) for x in values if x.is_floating_point() and x.numel()]
        usual = statistics.median(sizes) if sizes else 0.0
        scales.append(usual if usual > 0 and math.isfinite(usual) else None)
    return tuple(scales)


def calibrated(scales: tuple[float | None, ...], scores: Sequence[float], kept: Sequence[bool]) -> Rule | None:
    """The rule that accepts the most samples and none that misses the tolerance; None where that is no sample."""
    missed = {score for score, ok in zip(scores, kept, strict=True) if not ok}
    best: list[float] = []
    run: list[float] = []
    for score in sorted(s for s in scores if math.isfinite(s)):
        run = [] if score in missed else [*run, score]
        best = run if len(run) > len(best) else best
    return Rule(scales, best[0], best[-1]) if best else None


@dataclass(frozen=True)
class Counts:
    """How often each build ran since the model was loaded. `fallbacks` of the float32 calls followed a reduced one."""

    reduced: int = 0
    float32: int = 0
    fallbacks: int = 0
    also_not_finite: int = 0  # fallbacks whose float32 results were not finite either


class Variants:
    """The function that runs a call through one of two builds. Safe to call from several threads."""

    def __init__(
        self,
        reduced: Run,
        open_twin: Callable[[], tuple[Library | None, Run]],
        fallback: bool,
        rule: Rule | None,
    ) -> None:
        self._reduced = reduced
        self._open_twin = open_twin
        self._fallback = fallback
        self._rule = rule
        self._lock = threading.Lock()
        self._twin: tuple[Library | None, Run] | None = None
        self._counts = [0, 0, 0, 0]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._rule is not None and not self._rule.accepts(tensors):
            self._count(float32=1)
            return self.twin()(tensors)
        results = self._reduced(tensors)
        if not self._fallback or are_finite(results) or not are_finite(tensors):
            self._count(reduced=1)
            return results
        results = self.twin()(tensors)
        self._count(float32=1, fallbacks=1, also_not_finite=int(not are_finite(results)))
        return results

    def twin(self) -> Run:
        """The float32 build, opened at the first call of this."""
        with self._lock:
            if self._twin is None:
                self._twin = self._open_twin()
            return self._twin[1]

    def counts(self) -> Counts:
        """How often each build ran."""
        with self._lock:
            return Counts(*self._counts)

    def set_threads(self, count: int) -> None:
        """Let the twin use as many threads as the model; it asks for them itself where it is not open yet."""
        with self._lock:
            if self._twin is not None and self._twin[0] is not None:
                self._twin[0].threads = count

    def _count(self, reduced: int = 0, float32: int = 0, fallbacks: int = 0, also_not_finite: int = 0) -> None:
        with self._lock:
            added = (reduced, float32, fallbacks, also_not_finite)
            self._counts = [old + new for old, new in zip(self._counts, added, strict=True)]


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no floating point element is infinite or NaN."""
    return all(_is_finite(t) for t in tensors if t.is_floating_point() or t.is_complex())


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    total = tensor.sum()
    # The sum of finite elements may overflow: only then are they looked at one by one.
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _largest(tensor: torch.Tensor) -> float:
    """max|x|; NaN where there is one."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(abs(float(low)), abs(float(high))) if not bool(low.isnan()) else math.nan
