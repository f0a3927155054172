"""A computed weight in the arrangement a kernel reads: one gather in front of the kernel.

    packed[i] = weight[order[i] - 1]   where order[i] > 0, else 0

The order is what the kernel's own `pack` makes of 1, 2, 3, ... when compiling, so every arrangement that only moves
elements and pads with zeros serves computed weights too; Winograd's, which computes, does not.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from tvm import te, tirx

from .registry import Packed


def order_of(packed: Packed, shape: tuple[int, ...]) -> torch.Tensor:
    """Which element of a weight of `shape`, counted from 1, every element of the packed one is; 0 for padding."""
    count = prod(shape)
    order = packed.pack(torch.arange(1, count + 1, dtype=torch.int32).reshape(shape)).contiguous()
    assert order.dtype == torch.int32
    assert 0 <= order.min() <= order.max() <= count
    return order


def gather(weight: te.Tensor, order: te.Tensor) -> te.Tensor:
    """The packed form of `weight`, which is flat."""

    def element(*i: Any) -> Any:
        at = order(*i)
        found = weight(tirx.max(at - 1, tirx.const(0, "int32")))
        return tirx.Select(at > 0, found, tirx.const(0, str(weight.dtype)))

    return te.compute(order.shape, element, name="repack")
