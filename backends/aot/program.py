"""What the ahead-of-time path compiles: kernels, and the order and operands in which one region calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Buffer:
    """A tensor of a region: dense, row-major, its address a multiple of 64 except for inputs and outputs."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # TVM's name: "float32", "int64", "bool" (one byte)
    kind: Literal["input", "output", "weight", "temporary"]
    alias: str | None = None  # the buffer whose bytes this one reinterprets (a reshape); it has no storage of its own

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        raise NotImplementedError


@dataclass(frozen=True)
class Step:
    """One kernel call: the operands in the order of the kernel's parameters. kernel=None copies args[0] to args[1]."""

    kernel: str | None
    args: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """One compiled region of a graph.

    kernels: name -> scheduled tirx.PrimFunc (buffers only). `weights` maps a weight buffer's name to the name of the
    tensor in the weights file (several regions may share one).
    """

    name: str
    kernels: dict[str, Any]
    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, str]
