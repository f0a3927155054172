"""Chains of moves that wrap around are one gather of rows, or nothing where rows return; the tables compose."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, trace_core
from windows import image, operators, rolled, windows

from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager
from graphwright.passes import dialect
from graphwright.passes.gather_rows import gather_rows
from graphwright.passes.moves.row_moves import inverse, rows_moved
from graphwright.passes.refusals import recording

aten = torch.ops.aten


def rewritten(model, inputs, count=1):
    """The graph behind the pass, which finds nothing more; numbers are kept bit for bit."""
    graph = trace_core(model, inputs, pre_dispatch=True)  # torch.export would spell a roll as selections
    before = copy_graph(graph)
    assert gather_rows(graph, HW) == count
    graph.graph.lint()
    assert_same_numbers(before, graph, inputs)
    assert gather_rows(graph, HW) == 0
    return graph


def kept(model, inputs):
    rewritten(model, inputs, 0)


def test_a_shifted_window_is_one_gather():
    graph = rewritten(lambda x: windows(rolled(x, -1), 2).sin(), [torch.randn(2, 4, 6, 8)])
    assert operators(graph) == [aten.index_select.default, aten.sin.default]


def test_selections_by_constants_are_rolls_as_well():
    order = torch.tensor([2, 0, 1, 3])

    def model(x):
        return x.index_select(1, order).transpose(0, 1).reshape(8, 5).sin()

    graph = rewritten(model, [torch.randn(2, 4, 5)])
    assert operators(graph) == [aten.index_select.default, aten.sin.default]


def test_there_and_back_is_nothing():
    def model(x):
        return rolled(image(windows(rolled(x, -1), 2), 2, 4, 6), 1).sin()

    graph = rewritten(model, [torch.randn(2, 4, 6, 8)])
    assert operators(graph) == [aten.sin.default]


def test_one_roll_stays_a_roll():
    kept(lambda x: rolled(x, 1).sin(), [torch.randn(2, 4, 6, 8)])


def test_chains_without_wrap_around_are_left_to_their_own_form():
    kept(lambda x: windows(x, 2).transpose(0, 1).sin(), [torch.randn(2, 4, 6, 8)])


def test_short_rows_are_not_gathered(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(lambda x: windows(rolled(x, -1), 2).sin(), [torch.randn(2, 4, 6, 3)])
    assert "shorter than" in caplog.text


def test_one_number_has_no_rows(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(lambda x: torch.roll(torch.roll(x.reshape(1), 1, 0), 1, 0).reshape(()).sin(), [torch.tensor(2.0)])
    assert "it is one number" in caplog.text


def test_a_row_that_is_cut_is_no_row():
    def model(x):  # halves of rows change places
        return x.flip(1).view(2, 2, 2, 4).transpose(1, 2).reshape(4, 8).sin()

    graph = trace_core(model, [torch.randn(4, 8)])
    before = copy_graph(graph)
    gather_rows(graph, HW)
    assert_same_numbers(before, graph, [torch.randn(4, 8)])
    assert aten.index_select.default not in operators(graph)


def test_a_selection_that_repeats_rows_is_no_move():
    order = torch.tensor([0, 0, 1, 3])
    kept(lambda x: x.index_select(1, order).transpose(0, 1).sin(), [torch.randn(2, 4, 8)])


def test_a_selection_at_run_time_is_no_move():
    index = torch.tensor([3, 2, 1, 0])
    inputs = [torch.randn(2, 4, 8), index]
    kept(lambda x, i: x.index_select(1, i).transpose(0, 1).sin(), inputs)


def test_nothing_to_move():
    kept(lambda x: rolled(x, 1).transpose(1, 2).sin(), [torch.randn(2, 0, 3, 8)])


def test_a_value_that_is_read_ends_a_chain():
    def model(x):
        y = rolled(x, -1)
        return y.cos(), windows(y, 2).flip(0).sin()

    graph = rewritten(model, [torch.randn(1, 4, 4, 8)])
    assert aten.index_select.default in operators(graph)


@st.composite
def chains(draw):
    """Rows of 4, and moves of them: the dims in front are split, permuted, rolled and flipped."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    steps, current = [], shape
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["reshape", "permute", "roll", "flip"]))
        if kind == "reshape":
            current = draw(splits(math.prod(current)))
            steps.append((kind, (*current, 4)))
        elif kind == "permute":
            dims = draw(st.permutations(range(len(current))))
            current = tuple(current[d] for d in dims)
            steps.append((kind, (*dims, len(dims))))
        else:
            steps.append((kind, (draw(st.integers(-3, 3)), draw(st.integers(0, len(current) - 1)))))
    return (*shape, 4), steps


@st.composite
def splits(draw, count):
    shape = []
    while count > 1:
        shape.append(draw(st.sampled_from([d for d in range(2, count + 1) if count % d == 0])))
        count //= shape[-1]
    return tuple(shape) or (1,)


def moved(x, steps):
    for kind, argument in steps:
        if kind == "reshape":
            x = x.reshape(argument)
        elif kind == "permute":
            x = x.permute(argument)
        else:
            x = x.roll(argument[0], argument[1]) if kind == "roll" else x.flip(argument[1])
    return x


@settings(max_examples=60, deadline=None)
@given(chains())
def test_any_chain_of_rows(chain):
    """The table applied to rows is what the steps do one after another; its inverse takes them back."""
    shape, steps = chain
    x = torch.arange(1, 1 + math.prod(shape), dtype=torch.int64).reshape(shape)
    graph = trace_core(lambda x: moved(x, steps).neg(), [x])
    last = next(n for n in graph.graph.nodes if n.target is aten.neg.default).args[0]
    move = rows_moved(graph, last)
    if move is not None:
        there = x.reshape(-1, 4)[move.table]
        assert torch.equal(there.reshape(-1), moved(x, steps).reshape(-1))
        assert torch.equal(there[inverse(move.table)], x.reshape(-1, 4))
    before = copy_graph(graph)
    gather_rows(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    assert gather_rows(graph, HW) == 0
    assert dialect.permute not in operators(graph)


def test_a_roll_by_nothing_is_returned_as_a_copy():
    graph = trace_core(lambda x: x.roll(0, 1), [torch.randn(1, 7, 6)])
    with recording() as refusals:
        assert gather_rows(graph, HW) == 0
    assert [r.reason for r in refusals] == ["the graph returns what this copies from arg0_1"]


def test_windows_that_are_returned_with_a_copy_of_them_stay(caplog):
    """A reshape copies windows that are a view; of gathered rows it would be a view itself."""

    def model(x):
        windows = torch.roll(x, (-1, -1), (1, 2)).view(2, 3, 2, 4, 2, 16).permute(0, 1, 3, 2, 4, 5)
        return windows, windows.reshape(24, 4, 16)

    x = torch.randn(2, 6, 8, 16)
    graph = trace_core(model, [x], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        gather_rows(graph, HW)
    assert "what a reshape copies from it" in caplog.text
    windows, copied = run_eager(graph, [x])
    assert windows.untyped_storage().data_ptr() != copied.untyped_storage().data_ptr()
