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
    from .compiler.api import tune as tune
    from .compiler.compiled import Compiled as Compiled
    from .compiler.compression.gate import gate as gate
    from .compiler.compression.prune import KeptZeros as KeptZeros
    from .compiler.compression.prune import keep_zeros as keep_zeros
    from .compiler.compression.prune import prune as prune
    from .compiler.compression.qat import convert as convert
    from .compiler.compression.qat import prepare_qat as prepare_qat
    from .compiler.compression.quantize import Quantized as Quantized
    from .compiler.compression.quantize import quantize as quantize
    from .compiler.loading import load as load

__version__ = "0.1.0"

# Resolved on first use, so that `import graphwright` imports neither torch nor tvm.
_LAZY = {
    "compile": ("compiler.api", "compile"),
    "tune": ("compiler.api", "tune"),
    "load": ("compiler.loading", "load"),
    "KeptZeros": ("compiler.compression.prune", "KeptZeros"),
    "convert": ("compiler.compression.qat", "convert"),
    "gate": ("compiler.compression.gate", "gate"),
    "keep_zeros": ("compiler.compression.prune", "keep_zeros"),
    "prepare_qat": ("compiler.compression.qat", "prepare_qat"),
    "prune": ("compiler.compression.prune", "prune"),
    "Compiled": ("compiler.compiled", "Compiled"),
    "Quantized": ("compiler.compression.quantize", "Quantized"),
    "quantize": ("compiler.compression.quantize", "quantize"),
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
    "gate",
    "keep_zeros",
    "load",
    "prepare_qat",
    "prune",
    "quantize",
    "tune",
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
