"""Both operator tables, filled: importing this module enters every definition and every kernel."""

from __future__ import annotations

import importlib
import importlib.util

from . import families
from .registry import KERNELS, LOWERINGS

families.load()
for name in (
    "kernels_attention",
    "kernels_conv",
    "kernels_conv_other",
    "kernels_gating",
    "kernels_int8",
    "kernels_joined",
    "kernels_low_precision",
    "kernels_matmul",
    "kernels_norm",
    "kernels_pairs",
    "kernels_planar",
    "kernels_sparse",
):
    if importlib.util.find_spec(f"{__package__}.{name}") is not None:
        importlib.import_module(f".{name}", __package__)

__all__ = ["KERNELS", "LOWERINGS"]
