"""The weights file: safetensors, every tensor on a 64-byte boundary, mapped read-only and never copied.

    layout = Layout.of({"w": ("float32", (64, 3, 7, 7))})     # decided before any data is there; BuildInfo.weights
    write(path, layout, {"w": tensor})
    with Weights(path) as weights: weights.address, weights.nbytes

The format demands that tensors lie without holes, so a gap is itself a tensor, named `__pad_<n>`; any safetensors
library reads the file. The header is filled up with spaces, as the format allows, so that the data starts on a 64-byte
boundary as well. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArtifactError
from .program import item_bytes

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
HUGE_PAGE = 2 << 20
_PADDING = "__pad_"
_FORMAT_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: `offset` bytes into the data section."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Which tensor lies where in a data section of `nbytes`."""

    entries: dict[str, Entry]
    nbytes: int

    @staticmethod
    def of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
        """Lay tensors, given as (TVM dtype name, shape), one after another in the order of the mapping."""
        entries: dict[str, Entry] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            assert not name.startswith("__"), f"the name {name} is reserved"
            entries[name] = entry = Entry(dtype, tuple(shape), end)
            end += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        return Layout(entries, end)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file without a layout, for tensors that are read, not mapped.

    Whoever may read what else this process writes may read it: `save_file` leaves it to its owner alone.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path)  # in the place of the file
    path.chmod(mode)


def write(path: Path, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of `layout`, one at a time; equal tensors give equal bytes.

    Raises KeyError for a tensor that is missing and ValueError for one of another dtype or shape.
    """
    for name, entry in layout.entries.items():
        found = (str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape))
        if found != (entry.dtype, entry.shape):
            raise ValueError(f"weight {name} is {found}; the code was compiled for {(entry.dtype, entry.shape)}")
    checksum = 0
    for name in layout.entries:
        checksum = zlib.crc32(_bytes_of(tensors[name]), checksum)
    header = _header(layout, checksum)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, entry in layout.entries.items():
            file.write(_bytes_of(tensors[name]))
            file.write(bytes(-entry.nbytes % ALIGNMENT))


def read_layout(path: Path) -> Layout:
    """The layout of a weights file, from its header. Raises ArtifactError where it is not one that `write` made."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or (8 + length) % ALIGNMENT:
            raise _damaged(path)
        text = file.read(length)
    try:
        fields = json.loads(text)
        entries = {
            name: Entry(_DTYPES[field["dtype"]], tuple(field["shape"]), field["data_offsets"][0])
            for name, field in fields.items()
            if not name.startswith("__")
        }
        ends = [field["data_offsets"][1] for name, field in fields.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path) from error
    layout = Layout(entries, size - 8 - length)
    if max(ends, default=0) != layout.nbytes or any(e.offset % ALIGNMENT for e in entries.values()):
        raise _damaged(path)
    return layout


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is not a whole weights file of graphwright; compile the model again")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order, copied only where the tensor is strided."""
    import torch

    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().data


def _header(layout: Layout, checksum: int) -> bytes:
    """`checksum` tells files apart that hold other values of the same model: bundles look at the header alone."""
    fields: dict[str, object] = {"__metadata__": {"crc32": f"{checksum:08x}"}}
    for number, (name, entry) in enumerate(layout.entries.items()):
        end = entry.offset + entry.nbytes
        fields[name] = {
            "dtype": _FORMAT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, end],
        }
        if gap := -entry.nbytes % ALIGNMENT:
            fields[f"{_PADDING}{number}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % ALIGNMENT)


class Weights:
    """The data section of a weights file in memory of its own, in large pages where the system has them.

    A mapping of the file would be shared between processes, but in pages of 4 KiB, each of which costs a miss in the
    translation buffer for every call, and which the system may take back while the model rests.
    `address` is where the data lies (a multiple of 64), `nbytes` its length. Close it after the last use.
    """

    def __init__(self, path: Path) -> None:
        """Read `path`. Raises ArtifactError where it is damaged."""
        self.layout = read_layout(path)
        self.nbytes = self.layout.nbytes
        page = HUGE_PAGE if self.nbytes >= 2 * HUGE_PAGE else ALIGNMENT
        self._map = mmap.mmap(-1, self.nbytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if page == HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without large pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(self._map, np.uint8)
        first = -memory.ctypes.data % page
        with open(path, "rb") as file:
            file.seek(-self.nbytes, os.SEEK_END)
            if file.readinto(memory[first : first + self.nbytes].data) != self.nbytes:
                raise ArtifactError(f"{path} became shorter while it was read; compile the model again")
        self.address: int = memory.ctypes.data + first

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
