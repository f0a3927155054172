"""The cache key of a compilation: everything that decides the result, and nothing else."""

from __future__ import annotations

import functools
import hashlib
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


def _machine(hw: Hardware) -> str:
    """Every fact, the features in order: a set prints in another order in every process."""
    return f"{replace(hw, features=frozenset())!r} {sorted(hw.features)}"


def _calling_convention(exported: ExportedProgram) -> str:
    """How inputs and outputs map to the graph, structure included."""
    signature = exported.graph_signature
    call = exported.module_call_graph[0].signature
    assert call is not None
    return f"{signature.input_specs} {signature.output_specs} {call.in_spec} {call.out_spec}"


def _meta(node: Any) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return " ".join(f"{v.dtype}{tuple(v.shape)}" if isinstance(v, torch.Tensor) else str(v) for v in values)


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
