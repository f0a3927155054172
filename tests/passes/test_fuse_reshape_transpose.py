"""Chains of reshapes and permutes come to nothing, one reshape or one permute, bit for bit."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.moves.index_map import identity
from graphwright.testing import check_pass

permute = torch.ops.graphwright.permute


def test_reshapes_and_permutes_become_one_permute():
    def before(x):
        heads = x.view(2, 8, 4, 3).permute(0, 2, 1, 3)
        return heads.reshape(8, 8, 3).sin()

    def after(x):
        return permute(x, [2, 8, 4, 3], [0, 2, 1, 3], [8, 8, 3]).sin()

    assert_rewrite(before, after, [torch.randn(2, 8, 12)], fuse_reshape_transpose, 1)


def test_there_and_back_is_nothing():
    def before(x):
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).sin()

    assert_rewrite(before, torch.sin, [torch.randn(2, 3, 4, 5)], fuse_reshape_transpose, 1)


@pytest.mark.parametrize("shape", [(12, 2), (4, 3, 2)])
def test_a_returned_copy_of_what_is_returned_too_stays_one(shape):
    def model(x):
        middle = x.permute(2, 1, 0)
        return middle.reshape(2, 12).reshape(shape), middle

    x = torch.randn(2, 3, 4)
    graph = check_pass(fuse_reshape_transpose, trace_core(model, [x], True), [x], exact=True, hw=HW)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [permute.default, permute.default]


def test_reshapes_become_one():
    def before(x):
        return x.unsqueeze(1).flatten().view(4, 6).squeeze().sin()

    def after(x):
        return x.reshape(4, 6).sin()

    assert_rewrite(before, after, [torch.randn(2, 12)], fuse_reshape_transpose, 1)


def test_moving_dims_of_one_is_a_reshape():
    def before(x):
        return x.permute(2, 0, 1, 3).sin()

    def after(x):
        return x.reshape(1, 4, 5, 3).sin()

    assert_rewrite(before, after, [torch.randn(4, 5, 1, 3)], fuse_reshape_transpose, 1)


def test_a_value_that_is_read_keeps_its_place():
    def before(x):
        middle = x.permute(1, 0, 2)
        return middle.sin(), middle.reshape(3, 8).cos()

    def after(x):
        middle = permute(x, [2, 3, 4], [1, 0, 2], [3, 2, 4])
        return middle.sin(), middle.reshape(3, 8).cos()

    assert_rewrite(before, after, [torch.randn(2, 3, 4)], fuse_reshape_transpose, 2)


def test_undoing_a_move_that_is_read_takes_no_copy():
    def before(x):
        middle = x.permute(1, 0, 2)
        return middle.sin(), middle.permute(1, 0, 2).cos()

    def after(x):
        return permute(x, [2, 3, 4], [1, 0, 2], [3, 2, 4]).sin(), x.cos()

    assert_rewrite(before, after, [torch.randn(2, 3, 4)], fuse_reshape_transpose, 2)


def test_a_chain_is_cut_where_it_is_no_single_permute(caplog):
    def before(x):  # 2 x 3 permuted, joined, split as 2 x 3 again and permuted: 2 does not divide 3
        return x.permute(1, 0).reshape(2, 3).permute(1, 0).sin()

    def after(x):
        return permute(permute(x, [2, 3], [1, 0], [2, 3]), [2, 3], [1, 0], [3, 2]).sin()

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_rewrite(before, after, [torch.randn(2, 3)], fuse_reshape_transpose, 2)
    assert "no single permute" in caplog.text


def test_a_copy_that_is_returned_stays_a_copy(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(torch.clone, [torch.randn(2, 3)], fuse_reshape_transpose)
    assert "returns this copy" in caplog.text


def test_a_split_of_channels_and_back():
    """ShuffleNet's shuffle between two NHWC convolutions permutes channels alone."""

    def before(x):  # NHWC -> NCHW -> shuffle -> NHWC
        y = x.permute(0, 3, 1, 2).reshape(1, 2, 3, 4, 5).transpose(1, 2).reshape(1, 6, 4, 5)
        return y.permute(0, 2, 3, 1).sin()

    def after(x):
        return permute(x, [20, 2, 3], [0, 2, 1], [1, 4, 5, 6]).sin()

    assert_rewrite(before, after, [torch.randn(1, 4, 5, 6)], fuse_reshape_transpose, 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.complex64])
def test_any_dtype_moves(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert_rewrite(lambda x: x.permute(2, 0, 1).reshape(8, 3).clone().t() == 1, None, [x], fuse_reshape_transpose, 1)


def test_nothing_to_move():
    assert_rewrite(
        lambda x: x.permute(1, 0, 2).reshape(0, 6).abs(), None, [torch.randn(2, 0, 3)], fuse_reshape_transpose, 1
    )


def test_a_scalar_has_one_order():
    assert_rewrite(lambda x: x.permute(()).reshape(1).abs(), None, [torch.tensor(2.0)], fuse_reshape_transpose, 1)


@st.composite
def chains(draw, most=6):
    """A shape, and steps ("reshape", shape) or ("permute", dims) that can follow one another."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), max_size=4)))
    current, steps = shape, []
    for _ in range(draw(st.integers(1, most))):
        if draw(st.booleans()):
            current = draw(splits(math.prod(current)))
            steps.append(("reshape", current))
        else:
            dims = draw(st.permutations(range(len(current))))
            current = tuple(current[d] for d in dims)
            steps.append(("permute", tuple(dims)))
    return shape, steps


@st.composite
def splits(draw, count):
    """A shape of `count` elements."""
    shape = []
    while count > 1:
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        count //= shape[-1]
    shape += [1] * draw(st.integers(0, 1))
    return tuple(draw(st.permutations(shape)))


@settings(max_examples=300, deadline=None)
@given(chains())
def test_maps_compose(chain):
    """The normal form applied to numbered elements is what the steps do to them, one after another."""
    shape, steps = chain
    x = torch.arange(math.prod(shape)).reshape(shape)
    wanted, found = x, identity(shape)
    for kind, argument in steps:
        composed = found.reshape(argument) if kind == "reshape" else found.permute(argument)
        if composed is None:  # only a permute behind a reshape that joined what was apart
            assert kind == "permute"
            return
        found = composed
        wanted = wanted.reshape(argument) if kind == "reshape" else wanted.permute(argument)
    in_shape, dims, out_shape = found.moves()
    assert torch.equal(x.reshape(in_shape).permute(dims).reshape(out_shape), wanted)
    assert found.keeps_order == torch.equal(wanted.reshape(-1), x.reshape(-1))
    # Unique: no two neighbouring digits are one.
    assert all(a.stride != b.stride * b.extent for a, b in zip(found.digits, found.digits[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(chains(most=5), st.lists(st.integers(0, 4), max_size=2))
def test_any_chain_keeps_its_elements(chain, read):
    """Values in the middle of a chain may be read as well."""
    shape, steps = chain

    def model(x):
        outputs = []
        for i, (kind, argument) in enumerate(steps):
            x = x.reshape(argument) if kind == "reshape" else x.permute(argument)
            if i in read:
                outputs.append(x.neg())
        return (*outputs, x.abs())

    x = torch.arange(1, 1 + math.prod(shape), dtype=torch.int64).reshape(shape)
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    fuse_reshape_transpose(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    assert fuse_reshape_transpose(graph, HW) == 0


def test_a_reshape_of_what_lies_apart_is_returned_as_a_copy():
    """Undone by a second reshape, it would leave the graph returning a view of its input."""

    def model(x):
        return x.expand(2, 1, 1, 4).reshape(1, 8).permute(0, 1).reshape(2, 1, 1, 4)

    x = torch.randn(1, 1, 4)
    graph = trace_core(model, [x])
    fuse_reshape_transpose(graph, HW)
    (result,) = run_eager(graph, [x])
    assert result.data_ptr() != x.data_ptr()
    assert fuse_reshape_transpose(graph, HW) == 0


def test_a_returned_copy_of_what_is_returned_stays_a_copy():
    """The cut is right behind the first result; once that is packed, no reshape on the way copies any more."""

    def model(x):
        first = x.mT
        return first.reshape(2, 45).permute(0, 1).reshape(3, 1, 5, 6), first

    x = torch.randn(3, 1, 6, 5)
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    fuse_reshape_transpose(graph, HW)
    assert_same_numbers(before, graph, [x])
    copied, first = run_eager(graph, [x])
    assert copied.data_ptr() != first.data_ptr()
    assert fuse_reshape_transpose(graph, HW) == 0
