"""Functions in CUDA C++ that our kernels call, in front of the kernels that call them."""

from __future__ import annotations

from . import copies, mma

CUDA_SOURCES = {**copies.CUDA_SOURCES, **mma.CUDA_SOURCES}


def with_functions(source: str) -> str:
    """CUDA C++ of kernels, behind the definitions of what they call."""
    return "".join(text for called, text in CUDA_SOURCES.items() if called in source) + source
