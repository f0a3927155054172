"""graphwright compiles PyTorch models to machine code: fx passes, hardware facts, Apache TVM, verified numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactError,
    CaptureError,
    GraphwrightError,
    InputError,
    NumericMismatch,
    PassError,
    ToolMissing,
    UnknownTarget,
    UnsupportedOp,
)

if TYPE_CHECKING:
    from .compiler.api import compile as compile
    from .compiler.compiled import Compiled as Compiled
    from .compiler.loading import load as load
    from .compiler.prune import KeptZeros as KeptZeros
    from .compiler.prune import keep_zeros as keep_zeros
    from .compiler.prune import prune as prune
    from .compiler.qat import convert as convert
    from .compiler.qat import prepare_qat as prepare_qat
    from .compiler.quantize import Quantized as Quantized
    from .compiler.quantize import quantize as quantize

__version__ = "0.1.0"

# Resolved on first use, so that `import graphwright` imports neither torch nor tvm.
_LAZY = {
    "compile": ("compiler.api", "compile"),
    "load": ("compiler.loading", "load"),
    "KeptZeros": ("compiler.prune", "KeptZeros"),
    "convert": ("compiler.qat", "convert"),
    "keep_zeros": ("compiler.prune", "keep_zeros"),
    "prepare_qat": ("compiler.qat", "prepare_qat"),
    "prune": ("compiler.prune", "prune"),
    "Compiled": ("compiler.compiled", "Compiled"),
    "Quantized": ("compiler.quantize", "Quantized"),
    "quantize": ("compiler.quantize", "quantize"),
}

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Compiled",
    "GraphwrightError",
    "InputError",
    "KeptZeros",
    "NumericMismatch",
    "PassError",
    "Quantized",
    "ToolMissing",
    "UnknownTarget",
    "UnsupportedOp",
    "compile",
    "convert",
    "keep_zeros",
    "load",
    "prepare_qat",
    "prune",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
