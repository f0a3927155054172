"""Chains that only move channels of an image are one permute; what else they move, or who reads between, stops it."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.assign_layout import assign_layout
from graphwright.passes.fuse_conv_activation import fuse_conv_activation
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.recognise_channel_moves import recognise_channel_moves

permute = torch.ops.graphwright.permute
IMAGE = torch.randn(2, 6, 3, 4)


def shuffled(x, groups=2):
    batch, channels, height, width = x.shape
    y = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return y.reshape(batch, channels, height, width)


def test_a_shuffle_is_one_permute():
    def after(x):
        return permute(x, [2, 2, 3, 12], [0, 2, 1, 3], [2, 6, 3, 4]).sin()

    assert_rewrite(lambda x: shuffled(x).sin(), after, [IMAGE], recognise_channel_moves)


def test_the_operator_of_that_name():
    assert_rewrite(lambda x: F.channel_shuffle(x, 3).sin(), None, [IMAGE], recognise_channel_moves)


def test_pixels_that_move_are_kept(caplog):
    def model(x):
        return x.reshape(2, 6, 2, 6).transpose(2, 3).reshape(2, 6, 3, 4).sin()

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(model, [IMAGE], recognise_channel_moves)
    assert "more than channels" in caplog.text


def test_a_value_that_is_read_keeps_its_chain():
    def model(x):
        y = x.view(2, 2, 3, 3, 4).transpose(1, 2)
        return y.reshape(2, 6, 3, 4).sin(), y.cos()

    assert_kept(model, [IMAGE], recognise_channel_moves)


def test_another_shape_is_no_image():
    assert_kept(
        lambda x: x.view(2, 2, 3, 3, 4).transpose(1, 2).reshape(2, 6, 12).sin(), [IMAGE], recognise_channel_moves
    )


def test_a_chain_that_keeps_the_order_is_left_to_the_normal_form():
    def model(x):
        return x.view(2, 6, 1, 3, 4).transpose(1, 2).reshape(2, 6, 3, 4).sin()

    assert_kept(model, [IMAGE], recognise_channel_moves)


def test_nothing_to_move():
    assert_kept(lambda x: shuffled(x).sin(), [torch.randn(2, 6, 0, 4)], recognise_channel_moves)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.sampled_from([(4, 2), (6, 3), (6, 2), (3, 3)]), st.integers(1, 3))
def test_between_convolutions_the_shuffle_is_of_rows(batch, channels, size):
    """Behind `assign_layout` the shuffle moves the last dim alone, and nothing goes back to NCHW between."""
    count, groups = channels
    first, second = torch.randn(count, 2, 1, 1), torch.randn(5, count, 1, 1)
    x = torch.randn(batch, 2, size, size + 1)

    def model(x):
        return F.conv2d(shuffled(F.conv2d(x, first), groups), second).relu()

    graph = trace_core(model, [x], pre_dispatch=True)
    before = copy_graph(graph)
    for one in (fuse_conv_activation, recognise_channel_moves, assign_layout, fuse_reshape_transpose):
        one(graph, HW)
    assert_same_numbers(before, graph, [x], rtol=1e-5, atol=1e-6)  # another convolution kernel of torch's
    assert recognise_channel_moves(graph, HW) == 0
    between = [n for n in graph.graph.nodes if n.target is dialect.permute and n.args[0].target is dialect.conv2d]
    assert all(n.args[2][0] == 0 or n.users.keys() == {graph.graph.output_node()} for n in between)
