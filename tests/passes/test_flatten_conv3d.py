"""Convolutions over volumes become convolutions over images."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import assert_kept, assert_rewrite

from graphwright.passes.flatten_conv3d import flatten_conv3d

aten = torch.ops.aten
# The same products, added in another order: 108 roundings of partial sums of up to 30 by half of 2^-19 each, which add
# up like their square root. In float64 the two differ by 1e-9 at most.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
X = torch.randn(2, 4, 5, 6, 7, generator=torch.Generator().manual_seed(1))


class Conv(torch.nn.Module):
    """A conv3d with a constant weight."""

    def __init__(self, weight, *geometry, bias=None):
        super().__init__()
        self.weight, self.geometry = torch.nn.Parameter(weight), geometry
        self.bias = None if bias is None else torch.nn.Parameter(bias)

    def forward(self, x):
        return F.conv3d(x, self.weight, self.bias, *self.geometry)


def targets(graph):
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


def test_taps_in_depth_become_channels():
    graph = assert_rewrite(Conv(torch.randn(8, 4, 3, 3, 3), 1, 1), None, [X], flatten_conv3d, 1, **CLOSE)
    assert targets(graph).count(aten.conv2d.default) == 1
    assert targets(graph).count(aten.slice.Tensor) == 3
    assert aten.conv3d.default not in targets(graph)


def test_one_tap_in_depth_copies_nothing():
    graph = assert_rewrite(Conv(torch.randn(8, 4, 1, 3, 3)), None, [X], flatten_conv3d, 1, **CLOSE)
    assert not {aten.cat.default, aten.slice.Tensor, aten.constant_pad_nd.default} & set(targets(graph))


def test_refused():
    weight = torch.randn(8, 4, 3, 3, 3)
    assert_kept(Conv(weight), [X[0]], flatten_conv3d)  # not a batch
    assert_kept(Conv(torch.randn(4, 1, 3, 3, 3), 1, 0, 1, 4), [X], flatten_conv3d)  # each channel by itself


@given(
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.tuples(*[st.integers(0, 1)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.sampled_from([1, 2]),
    st.booleans(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_geometry(kernel, stride, padding, dilation, groups, biased):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4 // groups, *kernel, generator=random)
    bias = torch.randn(6, generator=random) if biased else None
    model = Conv(weight, stride, padding, dilation, groups, bias=bias)
    assert_rewrite(model, None, [X], flatten_conv3d, 1, **CLOSE)
