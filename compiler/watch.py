"""Whether constants still hold the bytes that were compiled in: asked at every call, so it takes microseconds.

Operators that write raise a tensor's version. PyTorch's batch_norm writes running statistics without that, and so do
`.data` and NumPy: the first and the last bytes of every tensor are compared too. A step of BatchNorm changes every
channel, so they tell; a write that leaves both ends of a tensor as they are, behind PyTorch's back, is not seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE = 32  # bytes at either end of a tensor


@dataclass(frozen=True)
class _State:
    """A tensor as it was: where its bytes lie, how often it had been written, and a sample of them."""

    memory: torch.Tensor  # held, so that no other tensor gets the address, and the sample stays readable
    address: int
    version: int
    ends: tuple[ctypes.Array[ctypes.c_char], ...]
    sample: bytes

    @staticmethod
    def of(tensor: torch.Tensor) -> _State:
        ends = _ends(tensor)
        (version,) = _versions([tensor])
        return _State(tensor.detach(), tensor.data_ptr(), version, ends, b"".join(ends))

    def holds(self, tensor: torch.Tensor) -> bool:
        same = tensor.data_ptr() == self.address and _versions([tensor]) == [self.version]
        return same and b"".join(self.ends) == self.sample


class Watch:
    """The constants of one compilation, by their positions among a call's inputs."""

    def __init__(self, constants: Mapping[int, torch.Tensor]) -> None:
        self._states = {i: _State.of(tensor) for i, tensor in constants.items()}
        states = self._states.values()
        # The same by column: a comparison of lists costs a fraction of as many calls.
        self._addresses = [s.address for s in states]
        self._versions = [s.version for s in states]
        self._ends = [end for s in states for end in s.ends]
        self._sample = b"".join(self._ends)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether all constants are as they were. Their bytes are read only where they lie where they did."""
        tensors = [inputs[i] for i in self._states]
        return (
            [t.data_ptr() for t in tensors] == self._addresses
            and _versions(tensors) == self._versions
            and b"".join(self._ends) == self._sample
        )

    def changed(self, inputs: Sequence[Any]) -> set[int]:
        """The positions of those that are not as they were."""
        return {i for i, state in self._states.items() if not state.holds(inputs[i])}


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each tensor was written; inference tensors do not count, and only their bytes tell."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [0 if t.is_inference() else t._version for t in tensors]


def _ends(tensor: torch.Tensor) -> tuple[ctypes.Array[ctypes.c_char], ...]:
    """Views of the first and last bytes of a dense tensor on the CPU; of all where there are few."""
    if not tensor.is_cpu or tensor.layout is not torch.strided or not tensor.numel() or not tensor.data_ptr():
        return ()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    extent = (1 + sum((size - 1) * stride for size, stride in pairs)) * tensor.element_size()
    first, kind = tensor.data_ptr(), ctypes.c_char * min(SAMPLE, extent)
    if extent <= SAMPLE:
        return (kind.from_address(first),)
    return kind.from_address(first), kind.from_address(first + extent - SAMPLE)
