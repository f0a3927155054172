"""Padding goes to where it is free; what differs by a zero that is not counted, or by a reader, stays."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_conv_activation import fuse_conv_activation
from graphwright.passes.merge_pads import merge_pads

aten = torch.ops.aten
IMAGE = torch.randn(2, 3, 8, 9)
WEIGHT = torch.randn(4, 3, 3, 3)
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # another algorithm of PyTorch's for the same sums


def test_two_pads_are_one():
    def after(x):
        return aten.constant_pad_nd(x, [1, 3, 2, 2], 0.5).sin()

    assert_rewrite(
        lambda x: F.pad(F.pad(x, (1, 2), value=0.5), (0, 1, 2, 2), value=0.5).sin(), after, [IMAGE], merge_pads
    )


@pytest.mark.parametrize(
    "model",
    [
        lambda x: F.pad(F.pad(x, (1, 2)), (0, 1), value=1.0).sin(),
        lambda x: F.pad(F.pad(x, (1, 2)), (0, -1)).sin(),
        lambda x: F.pad(F.pad(x, (1, 2)), (0, 1), value=-0.0).sin(),
    ],
)
def test_pads_that_stay_two(model):
    assert_kept(model, [IMAGE], merge_pads)


@pytest.mark.parametrize(
    "function", [F.relu, torch.abs, torch.tanh, F.silu, F.gelu, F.hardswish, torch.sin, torch.sqrt]
)
def test_a_pad_goes_behind_what_keeps_zero(function):
    assert_rewrite(
        lambda x, w: F.conv2d(function(F.pad(x, (1, 2, 0, 1))), w),
        lambda x, w: F.conv2d(aten.constant_pad_nd(function(x), [1, 2, 0, 1], 0.0), w),
        [IMAGE.abs(), WEIGHT],
        merge_pads,
        rtol=1.3e-6,  # where a row ends, PyTorch rounds an element otherwise than in a vector; rows are shorter now
        atol=1e-6,
    )


def padded_twice(x, w):
    y = F.pad(x, (1, 1))
    return F.conv2d(y.relu(), w), y.sin()


@pytest.mark.parametrize(
    "model",
    [
        padded_twice,
        lambda x, w: F.conv2d(F.pad(x, (1, 1)).sigmoid(), w),
        lambda x, w: F.conv2d(F.pad(x, (1, 1)).neg(), w),
        lambda x, w: F.conv2d(F.pad(x, (1, 1), value=1.0).relu(), w),
        lambda x, w: F.pad(x, (1, 1)).relu().sum() + w,
    ],
)
def test_pads_that_stay_in_front(model):
    assert_kept(model, [IMAGE, WEIGHT], merge_pads)


def test_pools_pad():
    graph = trace(lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), [IMAGE])
    before = copy_graph(graph)
    assert merge_pads(graph, HW) == 1
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.avg_pool2d.default]
    assert_same_numbers(before, graph, [IMAGE], rtol=1e-6, atol=1e-7)  # PyTorch sums the window in another order
    graph = trace(lambda x: F.max_pool2d(F.pad(x, (1, 1, 0, 0), value=-math.inf), 3, 1, (1, 0)), [IMAGE])
    before = copy_graph(graph)
    assert merge_pads(graph, HW) == 1
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.max_pool2d.default]
    assert_same_numbers(before, graph, [IMAGE])
    assert merge_pads(graph, HW) == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (1, 0, 1, 1)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 0)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (-1, -1, -1, -1)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (2, 2, 1, 1)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (1, 1, 2, 2)), 3, 2),
        lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2, ceil_mode=True),
        lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2, count_include_pad=False),
        lambda x: F.avg_pool2d(F.pad(x, (0, 0, 0, 0, 1, 1)), 3, 2),
    ],
)
def test_pools_that_do_not(model):
    assert_kept(model, [IMAGE], merge_pads)


def test_what_is_cut_off_is_not_computed():
    """As in wav2vec2: a window of even size, padded on both sides, and the last element dropped."""

    def model(x, w):
        return F.conv1d(x, w, padding=4)[:, :, :-1].relu()

    inputs = [torch.randn(2, 3, 11), torch.randn(5, 3, 8)]
    graph = trace(model, inputs)
    before = copy_graph(graph)
    assert merge_pads(graph, HW) == 1
    assert_same_numbers(before, graph, inputs, **SUMS)
    assert merge_pads(graph, HW) == 0
    fuse_conv_activation(graph, HW)
    (conv,) = [n for n in graph.graph.nodes if n.target is dialect.conv2d]
    assert conv.args[5] == [0, 0, 4, 3]
    assert conv.args[8] == "relu"
    assert_same_numbers(before, graph, inputs, **SUMS)


def read_twice(x, w):
    y = F.conv2d(x, w, padding=1)
    return y[:, :, :-1] + 1, y.sin()


@pytest.mark.parametrize(
    "model",
    [
        read_twice,
        lambda x, w: F.conv2d(x, w, padding=1)[:, :, ::2] + 1,
        lambda x, w: F.conv2d(x, w, padding=1)[:, :, 2:] + 1,
        lambda x, w: F.conv2d(x, w, padding=1)[:, :, :-2] + 1,
        lambda x, w: F.conv2d(x, w, padding=1)[:, :2] + 1,
        lambda x, w: F.conv2d(x, w, padding=1)[:, :, 3:3] + 1,
        lambda x, w: F.conv2d(x[:, :, :2], w, padding=2)[:, :, ::2] + 1,
        lambda x, w: F.conv2d(x[:, :, :1], w, padding=2)[:, :, 2:2] + 1,
    ],
)
def test_cuts_that_stay(model):
    assert_kept(model, [IMAGE, WEIGHT], merge_pads)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from([2, 3]),
)
def test_any_cut_keeps_the_numbers(kernel, stride, dilation, padding, first, last, dim):
    def model(x, w):
        y = F.conv2d(x, w, None, stride, padding, dilation)
        return y.narrow(dim, min(first, y.shape[dim] - 1), max(1, y.shape[dim] - first - last)).relu()

    inputs = [torch.randn(1, 2, 13, 12), torch.randn(3, 2, kernel, kernel)]
    with torch.no_grad():
        try:
            model(*inputs)
        except RuntimeError:
            return
    graph = trace(model, inputs)
    before = copy_graph(graph)
    merge_pads(graph, HW)
    assert_same_numbers(before, graph, inputs, **SUMS)
    assert merge_pads(graph, HW) == 0
