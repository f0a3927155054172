"""Convolutions whose weights are computed: the kernels read them rearranged at run time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright
from graphwright.backends.lowering.registry import Packed
from graphwright.backends.lowering.repack import order_of
from graphwright.compiler.reference import relative_l2

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Computed(nn.Module):
    """A convolution of the first input with weights made from the second."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.function(x, w / (1 + w.abs().mean()))


@pytest.mark.parametrize(
    ("function", "x", "w", "algorithm"),
    [
        (lambda x, w: F.relu(F.conv2d(x, w, padding=1)), (1, 16, 9, 9), (20, 16, 3, 3), "direct conv"),
        (lambda x, w: F.conv2d(x, w, groups=4), (2, 8, 9, 9), (12, 2, 3, 3), "direct conv"),
        (lambda x, w: F.conv2d(x, w, padding=1, groups=13), (1, 13, 9, 9), (13, 1, 3, 3), "depthwise conv"),
        (lambda x, w: F.conv2d(x, w), (1, 24, 9, 9), (10, 24, 1, 1), "pointwise conv"),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2), (1, 12, 9, 9), (12, 5, 3, 3), "transposed conv"),
        (lambda x, w: F.conv1d(x, w, padding=2), (1, 20, 40), (9, 20, 5), "direct conv"),
        (lambda x, w: F.conv3d(x, w, padding=1), (1, 6, 5, 6, 7), (4, 6, 3, 3, 3), "direct conv"),
    ],
)
def test_computed_weights(function: Function, x: tuple[int, ...], w: tuple[int, ...], algorithm: str) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = (torch.randn(x, generator=random), torch.randn(w, generator=random))
    model = Computed(function)
    compiled = graphwright.compile(model, inputs, cache=False, verify=False)
    names = [kernel.algorithm for kernel in compiled.report().kernels]
    assert algorithm in names
    exact = model(*(t.double() for t in inputs))
    assert relative_l2(compiled(*inputs), exact) < 1e-6  # some hundred products summed in float32


def test_the_order_is_what_packing_makes_of_the_places() -> None:
    graph = torch.fx.Graph()
    packed = Packed(graph.placeholder("w"), "padded", lambda w: F.pad(w.t(), (0, 1)))
    assert order_of(packed, (2, 3)).tolist() == [[1, 4, 0], [2, 5, 0], [3, 6, 0]]
