"""Transposed convolutions take up biases, residuals and activations, and nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.assign_layout import assign_layout
from graphwright.passes.fuse_conv_transpose import fuse_conv_transpose

aten = torch.ops.aten
fused = torch.ops.graphwright.conv_transpose2d
# The bias enters the sum at another place: a rounding or two of sums of up to 36 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X, W, B = torch.randn(2, 4, 5, 6), torch.nn.Parameter(torch.randn(4, 8, 3, 3)), torch.nn.Parameter(torch.randn(8))
GEOMETRY = ([2, 2], [1, 1], [1, 1], [1, 1], 1)


class Up(torch.nn.Module):
    """A transposed convolution with the function behind it."""

    def __init__(self, behind=lambda y: y, weight=W):
        super().__init__()
        self.weight, self.bias, self.behind = weight, B, behind

    def forward(self, x, *rest):
        return self.behind(F.conv_transpose2d(x, self.weight, self.bias, 2, 1, 1), *rest)


def test_bias_residual_and_activation():
    y = torch.randn(2, 8, 10, 12)
    graph = assert_rewrite(Up(lambda z, y: torch.relu(z + y)), None, [X, y], fuse_conv_transpose, 1, **CLOSE)
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.target is dialect.conv_transpose2d
    assert node.args[4:] == (*GEOMETRY, "relu", [], "NCHW")
    assert node.args[3] is not None


def test_a_sequence_is_an_image_of_one_row():
    weight = torch.nn.Parameter(torch.randn(4, 3, 5))

    class Sequence(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return F.leaky_relu(F.conv_transpose1d(x, self.weight, None, 3, 2, 1, 2), 0.2)

    graph = assert_rewrite(Sequence(), None, [torch.randn(2, 4, 7)], fuse_conv_transpose, 1, **CLOSE)
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.conv_transpose2d]
    assert node.args[4:10] == ([1, 3], [0, 2], [0, 1], [1, 1], 2, "leaky_relu")


def test_the_image_goes_to_nhwc():
    graph = assert_rewrite(Up(torch.relu), None, [X], fuse_conv_transpose, 1, **CLOSE)
    before = copy_graph(graph)
    assert assign_layout(graph, HW) == 1
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.conv_transpose2d]
    assert node.args[-1] == "NHWC"
    assert_same_numbers(before, graph, [X], **CLOSE)


def test_refused():
    assert_kept(Up(), [X[0]], fuse_conv_transpose)  # not a batch


def test_what_is_read_elsewhere_stays():
    graph = assert_rewrite(Up(lambda z: (torch.relu(z), z)), None, [X], fuse_conv_transpose, 1, **CLOSE)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        dialect.conv_transpose2d,
        aten.relu.default,
    ]


@given(
    st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), st.sampled_from([1, 2]), st.sampled_from([F.silu, F.relu6])
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_geometry(stride, padding, dilation, groups, activation):
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, 5, 3, generator=random), torch.randn(4, 6 // groups, 3, 2, generator=random)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, x):
            extra = max(stride, dilation) - 1
            return activation(F.conv_transpose2d(x, self.weight, None, stride, padding, extra, groups, dilation))

    assert_rewrite(Model(), None, [x], fuse_conv_transpose, 1, **CLOSE)
