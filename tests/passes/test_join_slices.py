"""Concats of all slices of a value are a permute of it; what leaves out, repeats or mixes is not."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.join_slices import join_slices
from graphwright.passes.moves.index_map import IndexMap, factored, from_moves

permute = torch.ops.graphwright.permute
X = torch.randn(2, 4, 6, 3)


def merged(x):
    return torch.cat([x[:, row::2, col::2, :] for col in range(2) for row in range(2)], -1)


def test_patches_merge():
    """Columns stay where they are: two rows change places with the columns they share."""

    def after(x):
        return permute(x, [4, 2, 6, 3], [0, 2, 1, 3], [2, 2, 3, 12]).sin()

    assert_rewrite(lambda x: merged(x).sin(), after, [X], join_slices)


def test_halves_that_change_places():
    assert_rewrite(lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1).sin(), None, [torch.randn(3, 8)], join_slices)


def test_parts_of_two_values(caplog):
    assert_kept(lambda x, y: torch.cat([x[..., ::2], y[..., 1::2]], -1).sin(), [X, X], join_slices)
    assert_kept(lambda x: torch.cat([x, x[..., ::2]], -1).sin(), [X], join_slices)


def test_parts_that_leave_out_some(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(lambda x: torch.cat([x[..., :1], x[..., 2:]], -1).sin(), [X], join_slices)
    assert "not all of" in caplog.text


def test_parts_that_repeat_some(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(lambda x: torch.cat([x[..., :2], x[..., :2]], -1).sin(), [torch.randn(3, 4)], join_slices)
    assert "in no order" in caplog.text


def test_halves_that_are_rolled_have_no_digits():
    assert_kept(lambda x: torch.cat([x[..., 3:], x[..., :3]], -1).sin(), [torch.randn(3, 8)], join_slices)


def test_nothing_to_join():
    assert_kept(lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1).sin(), [torch.randn(0, 8)], join_slices)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5), st.data())
def test_factoring_undoes_numbering(shape, data):
    """Every permute has digits, and they are those of its normal form."""
    dims = data.draw(st.permutations(range(len(shape))))
    numbers = torch.arange(math.prod(shape)).reshape(shape).permute(dims)
    wanted = from_moves(shape, shape, dims, numbers.shape)
    assert factored(numbers.reshape(-1)) == wanted.digits


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(8)))
def test_any_order_has_the_right_digits_or_none(order):
    digits = factored(torch.tensor(order))
    if digits is not None:
        in_shape, dims, _ = IndexMap((8,), digits, (8,)).moves()
        assert torch.arange(8).reshape(in_shape).permute(dims).reshape(-1).tolist() == list(order)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_slices(data):
    shape = data.draw(st.tuples(*[st.sampled_from([2, 4, 6])] * 3))
    axis, dim = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    order = data.draw(st.permutations(range(2)))

    def model(x):
        parts = [
            x.select(axis, i).unsqueeze(axis) if shape[axis] == 2 else x.split(shape[axis] // 2, axis)[i] for i in order
        ]
        stepped = [(x[::1].movedim(axis, 0)[i::2]).movedim(0, axis) for i in order]
        return torch.cat(stepped, dim).sin(), torch.cat(parts, dim).cos()

    x = torch.arange(1, 1 + math.prod(shape)).reshape(shape).float()
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    join_slices(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    assert join_slices(graph, HW) == 0
