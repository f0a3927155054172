"""Predicted seconds of a piece of work on a machine: the one figure passes, tiling and reports share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .records import Hardware


@dataclass(frozen=True)
class Work:
    """A piece of work in plain numbers."""

    flops: Mapping[str, float] = field(default_factory=dict)  # by dtype; a multiply-add counts two
    bytes_read: float = 0.0  # distinct bytes that must come in (activations and weights)
    bytes_written: float = 0.0
    launches: int = 1  # parallel regions started
    tasks: int | None = None  # equal pieces the work divides into; None = as many as wanted
    efficiency: float = 0.8  # share of peak FLOP/s the inner loop reaches


def predict_seconds(hw: Hardware, work: Work) -> float | None:
    """Seconds `work` takes on `hw` by the roofline model, or None where the machine's rates are unknown."""
    raise NotImplementedError
