"""quantize(qlinear(...)) -> qlinear(..., result in 8 bits) where nobody reads the result in float32.

The rewrites of `requantise` that keep a model's own numbers: those for models that are quantised already.

Refused: products with a reader that does not round, whose value would change.
"""

from __future__ import annotations

from torch import fx

from ..hwdb import Hardware
from .requantise import requantise_alone


def give_bytes(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let products of 8 bits give 8 bits where all that reads them rounds them so."""
    return requantise_alone(graph, hw)
