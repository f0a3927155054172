"""The files that hold TE definitions, and how to fill `LOWERINGS` from all of them."""

from __future__ import annotations

import importlib

FAMILIES = (
    "activations",
    "bits",
    "convolution_te",
    "creation",
    "elementwise",
    "grid_sample",
    "indexing",
    "matmul_te",
    "movement",
    "normalisation",
    "padding",
    "polynomials",
    "pooling",
    "quantisation",
    "reduction",
    "resize",
    "scan",
    "scatter",
    "sort",
    "special",
    "unary",
)


def load() -> None:
    """Import every family, which enters its definitions in `registry.LOWERINGS`."""
    for family in FAMILIES:
        importlib.import_module(f".{family}", __package__)
