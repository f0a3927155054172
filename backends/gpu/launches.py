"""What the host has to know of the kernels in a code object: names, argument types, and what is passed at a launch.

TVM's runtime reads it as bytes, in front of the code (src/backend/cuda/runtime/cuda_module.cc, include/tvm/support/
serializer.h of TVM 0.27): little-endian counts of 64 bits before strings, lists and maps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_CODES = {"int": 0, "uint": 1, "float": 2, "handle": 3, "bfloat": 4, "bool": 6}
_NO_TAG = struct.pack("<i", 0)
T = TypeVar("T")

HOST_NAME, DEVICE_NAME, WEIGHTS_NAME = "host.so", "device.json", "weights.safetensors"


@dataclass(frozen=True)
class Launch:
    """A kernel by its symbol. `arguments` are types such as "handle" and "int32"; `threads` are those of a block."""

    name: str
    arguments: tuple[str, ...]
    tags: tuple[str, ...]  # "blockIdx.x", "threadIdx.x", ...: what a launch passes after the arguments
    threads: int
    shared_bytes: int
    blocks: int = 1  # of a launch

    def to_data(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "name": self.name,
            "arguments": list(self.arguments),
            "tags": list(self.tags),
            "threads": self.threads,
            "shared_bytes": self.shared_bytes,
            "blocks": self.blocks,
        }

    @staticmethod
    def from_data(data: dict[str, Any]) -> Launch:
        """What `to_data` wrote."""
        return Launch(
            str(data["name"]),
            tuple(data["arguments"]),
            tuple(data["tags"]),
            int(data["threads"]),
            int(data["shared_bytes"]),
            int(data.get("blocks", 1)),
        )


@dataclass(frozen=True)
class Description:
    """What device.json says of the files beside it."""

    arch: str
    kind: str  # of TVM's target: "cuda", "rocm"
    image: str  # the file with the kernels
    kernels: tuple[Launch, ...]
    weights: tuple[str, ...]  # names in the weights file, in the order the code takes them

    def write(self, path: Path) -> None:
        """Write device.json."""
        data = {**self.__dict__, "kernels": [launch.to_data() for launch in self.kernels]}
        path.write_text(json.dumps(data, indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Description:
        """What `write` wrote."""
        data = json.loads(path.read_text())
        kernels = tuple(Launch.from_data(row) for row in data["kernels"])
        return Description(data["arch"], data["kind"], data["image"], kernels, tuple(data["weights"]))


def module_bytes(code: bytes, launches: Sequence[Launch], form: str) -> bytes:
    """The device module as TVM's loaders read it; `form` is "cubin" (any image that CUDA loads) or "hsaco"."""
    table = b"".join(_string(launch.name) + _info(launch) for launch in launches)
    return _string(form) + struct.pack("<Q", len(launches)) + table + _bytes(code)


def _info(launch: Launch) -> bytes:
    return (
        _string(launch.name)
        + _list(launch.arguments, _dtype)
        + _list(launch.tags, _string)
        + _list(launch.arguments, lambda _: _NO_TAG)
    )


def _dtype(name: str) -> bytes:
    """Code, bits and lanes of a scalar type."""
    kind = name.rstrip("0123456789")
    bits = 64 if kind == "handle" else int(name[len(kind) :] or 8)
    return struct.pack("<BBH", _CODES[kind], bits, 1)


def _list(items: Sequence[T], encode: Callable[[T], bytes]) -> bytes:
    return struct.pack("<Q", len(items)) + b"".join(encode(item) for item in items)


def _string(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content
