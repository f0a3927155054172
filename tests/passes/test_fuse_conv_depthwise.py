"""A convolution and the depthwise one behind it become one operator, where that is sound and pays."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, trace

from graphwright.passes import dialect_pairs
from graphwright.passes.fuse_conv_depthwise import fuse_conv_depthwise as fuse_where_it_pays

conv2d, permute = torch.ops.graphwright.conv2d, torch.ops.graphwright.permute
conv_depthwise = torch.ops.graphwright.conv_depthwise
ONE, NONE = [1, 1], [0, 0, 0, 0]
POINT = (ONE, NONE, ONE, 1, "relu6", [], "NHWC")
X = torch.randn(2, 20, 21, 16)


def fuse_conv_depthwise(graph, hw):
    """The pass for a machine whose L2 holds none of these small images."""
    return fuse_where_it_pays(graph, dataclasses.replace(hw, caches=()))


class Weights(torch.nn.Module):
    """Constants of a 1x1 convolution to 32 channels and a 3x3 depthwise one."""

    def __init__(self, first=(32, 16, 1, 1), second=(32, 1, 3, 3)):
        super().__init__()
        self.w, self.d = (torch.nn.Parameter(torch.randn(*shape) / 4) for shape in (first, second))
        self.b, self.e = (torch.nn.Parameter(torch.randn(shape[0])) for shape in (first, second))

    def depthwise(self, x, residual=None, groups=None, layout="NHWC"):
        groups = self.d.shape[0] if groups is None else groups
        options = ([2, 1], [1, 0, 1, 2], ONE, groups, "silu", [], layout)
        return conv2d(x, self.d, self.e, residual, *options)


class Pair(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w, self.b, None, *POINT))


class Fused(Weights):
    def forward(self, x):
        first = (x, self.w, self.b, ONE, NONE, ONE, "relu6", [])
        return conv_depthwise(*first, self.d, self.e, [2, 1], [1, 0, 1, 2], ONE, "silu", [], "NHWC")


def test_a_pair_becomes_one():
    assert_rewrite(Pair(), Fused(), [X], fuse_conv_depthwise)


def test_a_stem_reads_nchw():
    window = ([2, 2], [1, 1, 1, 1], ONE, 1, "relu", [])

    class Before(Weights):
        def forward(self, x):
            x = permute(x, [1, 3, 30, 40], [0, 2, 3, 1], [1, 30, 40, 3])
            return self.depthwise(conv2d(x, self.w, self.b, None, *window, "NHWC"))

    class After(Weights):
        def forward(self, x):
            first = (x, self.w, self.b, *window[:3], *window[4:])
            return conv_depthwise(*first, self.d, self.e, [2, 1], [1, 0, 1, 2], ONE, "silu", [], "NCHW")

    shapes = (32, 3, 3, 3), (32, 1, 3, 3)
    assert_rewrite(Before(*shapes), After(*shapes), [torch.randn(1, 3, 30, 40)], fuse_conv_depthwise)


def test_an_image_that_stays_in_l2_is_kept():
    assert_kept(Pair(), [X], fuse_where_it_pays)


class ReadTwice(Weights):
    def forward(self, x):
        hidden = conv2d(x, self.w, self.b, None, *POINT)
        return self.depthwise(hidden), hidden


class Residual(Weights):
    def forward(self, x):
        y = conv2d(x, self.w, self.b, None, *POINT)
        return self.depthwise(y, residual=x.new_ones(2, 10, 22, 32))


class ResidualBetween(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w, self.b, x.new_ones(2, 20, 21, 32), *POINT))


class Grouped(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w, self.b, None, ONE, NONE, ONE, 2, "relu6", [], "NHWC"))


class NotDepthwise(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w, self.b, None, *POINT), groups=16)


class Computed(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w * x.mean(), self.b, None, *POINT))


class Wide(Weights):
    def forward(self, x):
        return self.depthwise(conv2d(x, self.w, self.b, None, ONE, [1] * 4, ONE, 1, "relu6", [], "NHWC"))


@pytest.mark.parametrize(
    "model",
    [
        ReadTwice(),
        Residual(),
        ResidualBetween(),
        Grouped(first=(32, 8, 1, 1)),
        NotDepthwise(second=(32, 2, 3, 3)),
        Computed(),
        Wide(first=(32, 16, 3, 3)),
    ],
)
def test_what_is_kept(model):
    assert_kept(model, [X], fuse_conv_depthwise)


def test_other_layouts_and_dtypes_are_kept():
    class Nchw(Weights):
        def forward(self, x):
            return self.depthwise(conv2d(x, self.w, self.b, None, *POINT[:-1], "NCHW"), layout="NCHW")

    assert_kept(Nchw(), [X.permute(0, 3, 1, 2).contiguous()], fuse_conv_depthwise)
    assert_kept(Pair().double(), [X.double()], fuse_conv_depthwise)


def test_a_pair_too_small_to_share_is_kept():
    """One panel keeps one core busy, and most of so few rows would be computed twice."""
    narrow = Pair(first=(8, 2048, 1, 1), second=(8, 1, 3, 3))
    assert_kept(narrow, [torch.randn(1, 2, 300, 2048)], fuse_conv_depthwise)


@given(
    st.integers(1, 2),
    st.tuples(st.integers(3, 20), st.integers(3, 20)),
    st.sampled_from([1, 3, 7, 16]),
    st.sampled_from([2, 24, 50]),
    st.sampled_from(["none", "relu", "silu"]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_pair_keeps_its_numbers(batch, size, channels, hidden, activation):
    class Any(Weights):
        def forward(self, x):
            y = conv2d(x, self.w, self.b, None, ONE, NONE, ONE, 1, activation, [], "NHWC")
            return self.depthwise(y)

    model = Any((hidden, channels, 1, 1), (hidden, 1, 3, 3))
    x = torch.randn(batch, *size, channels)
    graph = trace(model, [x])
    found = fuse_conv_depthwise(graph, HW)
    assert found in (0, 1)
    fused = [n for n in graph.graph.nodes if n.target is dialect_pairs.conv_depthwise]
    assert len(fused) == found
    torch.testing.assert_close(graph(x)[0], model(x), rtol=0, atol=0)
