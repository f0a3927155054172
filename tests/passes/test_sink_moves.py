"""Moves sink through groups that carry them where fewer are left; every refusal, and random graphs bit for bit."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_values, trace_core
from torch import fx

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.merge_duplicates import merge_duplicates
from graphwright.passes.sink_moves import sink_moves

aten = torch.ops.aten
X, Y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
GAIN, BIAS, ONE = torch.randn(5), torch.randn(5), torch.tensor(3.0)
TABLE = torch.tensor([2, 0, 1, 3])


def turned(x):
    return x.permute(0, 2, 1, 3)


def prepared(model: Any, inputs: list[torch.Tensor]) -> fx.GraphModule:
    graph = trace_core(model, inputs, pre_dispatch=True)
    merge_duplicates(graph, HW)  # one name for a constant
    fuse_reshape_transpose(graph, HW)
    return graph


def moves(graph: fx.GraphModule) -> int:
    moving = (dialect.permute, aten.permute.default, aten.index_select.default)
    return sum(n.target in moving for n in graph.graph.nodes)


def rewritten(model: Any, inputs: list[torch.Tensor], left: int, count: int = 1) -> fx.GraphModule:
    """The graph behind the pass and the normal form, in which `left` moves are left."""
    graph = prepared(model, inputs)
    before = copy_graph(graph)
    assert sink_moves(graph, HW) == count
    graph.graph.lint()
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs)
    assert sink_moves(graph, HW) == 0
    fuse_reshape_transpose(graph, HW)
    assert_same_numbers(before, graph, inputs)
    assert moves(graph) == left
    return graph


def kept(model: Any, inputs: list[torch.Tensor]) -> None:
    assert sink_moves(prepared(model, inputs), HW) == 0


def test_a_join_moves_once():
    rewritten(lambda x, y: (turned(x).sin() + turned(y) * 2).exp(), [X, Y], 1)


def test_there_and_back_around_a_join_is_nothing():
    rewritten(lambda x, y: turned(turned(x).sin() + turned(y)), [X, Y], 0)


def test_a_residual_around_a_norm():
    """The moved value is read twice, both times within the group."""

    def model(x):
        y = turned(x)
        return turned(y + F.layer_norm(y, (5,), GAIN, BIAS).relu())

    rewritten(model, [X], 0)


def test_values_along_rows_and_numbers():
    rewritten(lambda x, y: turned(x) * GAIN + turned(y) / ONE, [X, Y], 1)


def test_softmax_of_rows():
    rewritten(lambda x: turned(turned(x).softmax(-1)), [X], 0)


def test_gathers_of_rows():
    def model(x, y):
        return x.index_select(0, TABLE).sin() + y.index_select(0, TABLE)

    rewritten(model, [torch.randn(4, 8), torch.randn(4, 8)], 1)


def test_as_many_moves_are_no_gain(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(lambda x: turned(x).sin(), [X])
        kept(lambda x, y: (s := turned(x).sin(), s + turned(y)), [X, Y])
    assert "2 moves behind for 2 before" in caplog.text


def test_a_move_that_somebody_else_reads_stays_anyway():
    def model(x, y):
        a, b = turned(x), turned(y)
        return a + b, a.reshape(-1).flip(0), b.reshape(-1).flip(0)

    kept(model, [X, Y])


def test_a_move_that_cannot_be_joined_takes_in_none():
    def model(x):  # 2 x 3 permuted, joined, split as 2 x 3 again
        return x.permute(1, 0).reshape(2, 3).sin().permute(1, 0)

    kept(model, [torch.randn(2, 3)])


def test_other_moves_do_not_join():
    kept(lambda x, y: turned(x) + y.permute(0, 2, 3, 1).reshape(2, 4, 3, 5), [X, torch.randn(2, 3, 4, 5)])


def test_operands_that_do_not_move():
    kept(lambda x, y: turned(turned(x) + y), [X, torch.randn(2, 4, 3, 5)])


def test_broadcast_operands_do_not_move():
    kept(lambda x, y: turned(turned(x) + y), [X, torch.randn(4, 1, 5)])


def test_rows_that_are_cut_are_no_rows():
    def cut(x):
        return x.permute(0, 1, 3, 2)

    kept(lambda x: cut(cut(x) * torch.ones(4).cumsum(0)), [X])
    kept(lambda x: cut(cut(x).softmax(-1)), [X])


def test_softmax_over_another_dim():
    kept(lambda x: turned(turned(x).softmax(1)), [X])


def test_a_norm_over_two_dims():
    kept(lambda x: turned(F.layer_norm(turned(x), (3, 5))), [X])


def test_random_numbers_are_drawn_in_order():
    kept(lambda x: turned(F.dropout(turned(x), 0.5, training=True)), [X])


def test_a_selection_that_is_no_constant():
    index = torch.tensor([1, 0, 2, 3])

    def model(x, y, i):
        return x.index_select(0, i) + y.index_select(0, i)

    kept(model, [torch.randn(4, 8), torch.randn(4, 8), index])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_graph_keeps_its_elements(data):
    draw = data.draw
    kinds = ["move", "move", "unary", "join", "join", "row", "softmax"]
    steps = [
        (draw(st.sampled_from(kinds)), draw(st.integers(0, 20)), draw(st.integers(0, 20)))
        for _ in range(draw(st.integers(2, 9)))
    ]
    orders = [(0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 3, 2)]

    def model(x, y):
        values = [x, y]
        for kind, first, second in steps:
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            if kind == "move":
                values.append(a.permute(orders[second % 3]))
            elif kind == "unary":
                values.append(a.neg())
            elif kind == "join" and a.shape == b.shape:
                values.append(a + b)
            elif kind == "row" and a.shape[-1] == 5:
                values.append(a * GAIN)
            elif kind == "softmax":
                values.append(a.softmax(-1))
        return values[-1], values[len(values) // 2]

    graph = prepared(model, [X, Y])
    before = copy_graph(graph)
    there = moves(graph)
    sink_moves(graph, HW)
    graph.graph.lint()
    check_values(graph, [X, Y])
    assert_same_numbers(before, graph, [X, Y])
    fuse_reshape_transpose(graph, HW)
    assert moves(graph) <= there
    assert sink_moves(graph, HW) == 0 or moves(graph) <= there


def test_nobody_reads_it():
    """Nothing is gained by moving what is not read; remove_dead takes it away."""

    def model(x):
        x.permute(0, 2, 1).contiguous()
        return x.reshape(1, 1, 16)

    graph = trace_core(model, [torch.randn(2, 2, 4)])
    sink_moves(graph, HW)
    assert sink_moves(graph, HW) == 0


def test_rows_of_another_rank_keep_their_dim():
    """Windows of an image have six dims, the image four: the last is meant in both."""

    def model(x):
        windows = x.view(3, 3, 2, 2, 2, 5).permute(0, 1, 3, 2, 4, 5)
        back = F.log_softmax(windows, 5).permute(0, 1, 3, 2, 4, 5)
        return back.reshape(3, 6, 4, 5)

    x = torch.randn(3, 6, 4, 5)
    graph = trace_core(model, [x], pre_dispatch=True)
    fuse_reshape_transpose(graph, HW)
    before = copy_graph(graph)
    assert sink_moves(graph, HW) == 1
    assert_same_numbers(before, graph, [x])
