"""The cache key of a compilation: everything that decides the result, and nothing else.

Rates of the machine count in steps of 7 %: code made for one of them is right for all, and as fast as rates are sure.
So measuring a machine again (`hw calibrate`) does not compile every model again.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..hwdb import Hardware

_ROOT = Path(__file__).resolve().parent.parent


def fingerprint(exported: ExportedProgram, hw: Hardware, options: dict[str, Any]) -> str:
    """Digest of the graph, its weights, the machine, the options, and the versions of the compilers."""
    digest = hashlib.sha256()
    for part in (_compiler(), _machine(hw), repr(sorted(options.items())), _calling_convention(exported)):
        digest.update(part.encode() + b"\0")
    for node in exported.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {_meta(node)}\n".encode())
    for name, value in sorted({**exported.state_dict, **exported.constants}.items()):
        digest.update(name.encode() + b"\0")
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def setting(hw: Hardware) -> str:
    """Digest of the machine and of the versions of the compilers, this one included."""
    return hashlib.sha256(f"{_compiler()}\0{_machine(hw)}".encode()).hexdigest()


# Facts that no choice of code reads: they describe, or serve predictions only.
_DESCRIBES = {
    **dict.fromkeys(("name", "vendor", "year", "dram_bytes", "tdp_watts", "calibrated", "board"), None),
    "sources": (),
    "confidence": "medium",
    "wake_us": 0.0,
}
_STEP = 1.07  # rates nearer than that make the same choices: measuring a machine again changes no key


def _machine(hw: Hardware) -> str:
    """Every fact that choices hang on, the features in order: a set prints in another order in every process."""
    rates = {
        "clock_mhz": _rounded(hw.clock_mhz),
        "dram_gbs": _rounded(hw.dram_gbs),
        "launch_us": _rounded(hw.launch_us),
    }
    near = tuple((level, _rounded(rate)) for level, rate in hw.core_gbs)
    facts: dict[str, Any] = {**_DESCRIBES, **rates, "core_gbs": near, "features": frozenset()}
    return f"{replace(hw, **facts)!r} {sorted(hw.features)}"


def _rounded(rate: float | None) -> int | None:
    """The number of a rate's step."""
    return None if rate is None else round(math.log(rate) / math.log(_STEP))


def _calling_convention(exported: ExportedProgram) -> str:
    """How inputs and outputs map to the graph, structure included."""
    signature = exported.graph_signature
    call = exported.module_call_graph[0].signature
    assert call is not None
    return f"{signature.input_specs} {signature.output_specs} {call.in_spec} {call.out_spec}"


def _meta(node: Any) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return " ".join(_described(v) if isinstance(v, torch.Tensor) else str(v) for v in values)


def _described(value: torch.Tensor) -> str:
    """Dtype, shape and strides: of inputs that lie otherwise, torch.export may have made another program."""
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"{value.dtype}{tuple(value.shape)}{strides}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order, as bytes, copied only where the tensor is strided."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data: memoryview = dense.view(torch.uint8).numpy().data
    return data


@functools.lru_cache(maxsize=1)
def _compiler() -> str:
    """Versions of what compiles, with a digest of this package's own source."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for folder in ("hwdb", "passes", "backends", "compiler"):
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".toml", ".c", ".h"}:
                digest.update(path.read_bytes())
    return f"{digest.hexdigest()} torch {torch.__version__} tvm {version('apache-tvm')} zig {version('ziglang')}"
