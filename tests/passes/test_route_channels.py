"""Products read channels where they were written; a weight's order makes up for theirs. Every guard refuses once."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_values, trace_core
from torch import fx

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.dialect_joined import joined_linear, joined_rows
from graphwright.passes.fold_constants import fold_constants
from graphwright.passes.remove_dead import remove_dead
from graphwright.passes.route_channels import MOST_PIECES, route_channels

aten = torch.ops.aten
A, B = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
# Made before anything is traced: constants.
MATRIX = {(n, k): torch.randn(n, k) / 3 for n in (3, 4, 5, 12) for k in range(1, 97)}
BIAS, BIAS12, DEPTH = torch.randn(5), torch.randn(12), torch.randn(12, 1, 3, 3)
POINT = {(n, k): torch.randn(n, k, 1, 1) / 3 for n in (4, 5) for k in (4, 6, 8, 12)}
WIDE, MATRIX64 = torch.randn(5, 12, 3, 3), MATRIX[5, 12].double()
SQUARE = torch.randn(12, 12, 1, 1)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the same terms, added in another order


def conv(x, weight, bias=None, residual=None, stride=1, groups=1, activation="none"):
    pad = [weight.shape[-1] // 2] * 4
    return dialect.conv2d(x, weight, bias, residual, [stride] * 2, pad, [1, 1], groups, activation, [], "NHWC")


def linear(x, weight, bias=None, residual=None):
    return dialect.linear(x, weight, bias, residual, "relu", [])


def shuffled(x, groups=2):
    return dialect.permute(x, [x.numel() // x.shape[-1], groups, x.shape[-1] // groups], [0, 2, 1], list(x.shape))


def rewritten(model: Any, inputs: list[torch.Tensor], count: int = 1) -> fx.GraphModule:
    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    assert route_channels(graph, HW) == count
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    fold_constants(graph, HW)
    remove_dead(graph, HW)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert route_channels(graph, HW) == 0
    return graph


def test_many_pieces_of_rows_that_were_counted_otherwise():
    def model(x):
        return linear(x[22::2].reshape(1, 12), MATRIX[5, 12])

    graph = rewritten(model, [torch.randn(46)])
    assert any(n.target is joined_rows for n in graph.graph.nodes)


def test_rows_that_were_counted_otherwise():
    def model(x):
        first, second = x.split([4, 2], -1)
        return linear(torch.cat([second, first], -1).reshape(24, 6), MATRIX[5, 6])

    graph = rewritten(model, [A])
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.reshape.default, dialect.linear]


def kept(model: Any, inputs: list[torch.Tensor], caplog: Any = None, reason: str = "") -> None:
    graph = trace_core(model, inputs, pre_dispatch=True)
    if caplog is None:
        assert route_channels(graph, HW) == 0
        return
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert route_channels(graph, HW) == 0
    assert reason in caplog.text


def operators(graph: fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


def test_a_concat_is_read_where_its_parts_are():
    graph = rewritten(lambda a, b: linear(torch.cat([a, b], -1), MATRIX[5, 12], BIAS), [A, B])
    assert operators(graph) == [joined_linear]


def test_a_part_is_read_where_it_is():
    graph = rewritten(lambda a: linear(a.split([2, 4], -1)[1], MATRIX[5, 4]), [A])
    assert operators(graph) == [joined_linear]
    graph = rewritten(lambda a: linear(a[..., 1:4], MATRIX[5, 3]), [A])
    assert operators(graph) == [joined_linear]


def test_a_shuffle_goes_into_the_weight():
    graph = rewritten(lambda a: conv(shuffled(a), POINT[5, 6], activation="relu"), [A])
    assert operators(graph) == [dialect.conv2d]
    graph = rewritten(lambda a: linear(shuffled(a), MATRIX[5, 6]), [A])
    assert operators(graph) == [dialect.linear]


def test_a_reshape_keeps_channels():
    graph = rewritten(lambda a: linear(shuffled(a).reshape(6, 4, 6)[..., :4], MATRIX[5, 4]), [A])
    assert set(operators(graph)) == {joined_linear, aten.reshape.default}


def unit(x, weights):
    """ShuffleNetV2's, with a residual to see that it stays."""
    half = x.shape[-1] // 2
    kept_, taken = x.split(half, -1)
    y = conv(conv(taken, weights[0], activation="relu"), weights[1], groups=half)
    return shuffled(torch.cat([kept_, conv(y, weights[2], activation="relu")], -1))


def unit_weights(half):
    return [torch.randn(half, half, 1, 1) / 2, torch.randn(half, 1, 3, 3) / 3, torch.randn(half, half, 1, 1) / 2]


def test_units_pass_channels_on_untouched():
    weights = [unit_weights(4) for _ in range(3)]
    last = POINT[5, 8]

    def model(a, b):
        x = shuffled(torch.cat([a, b], -1))
        for each in weights:
            x = unit(x, each)
        return conv(x, last)

    graph = rewritten(model, [torch.randn(1, 3, 3, 4), torch.randn(1, 3, 3, 4)], 4)
    assert set(operators(graph)) == {joined_linear, dialect.conv2d}


def test_a_depthwise_convolution_takes_any_order():
    """What it computes is in that order too; the pieces are put side by side once, for both who read them."""
    w1, w2 = POINT[5, 12], POINT[4, 12]

    def model(a, b):
        x = shuffled(torch.cat([a, b], -1))
        return conv(conv(x, DEPTH, BIAS12, groups=12, stride=2), w1), conv(x, w2)

    graph = rewritten(model, [A, B])
    assert operators(graph) == [joined_rows, dialect.conv2d, dialect.conv2d, dialect.conv2d]


def test_a_concat_in_order_stays_for_a_depthwise_convolution():
    kept(lambda a, b: conv(conv(torch.cat([a, b], -1), DEPTH, groups=12), POINT[5, 12]), [A, B])


def test_many_pieces_are_put_side_by_side():
    graph = rewritten(lambda a: linear(a.repeat(1, 1, 1, 4)[..., ::2], MATRIX[5, 12]), [A])
    assert operators(graph) == [aten.repeat.default, joined_rows, dialect.linear]


def test_a_product_keeps_its_residual():
    rewritten(lambda a, b, r: linear(torch.cat([a, b], -1), MATRIX[5, 12], None, r), [A, B, torch.randn(2, 3, 4, 5)])


REASONS = {
    "reads it as it is": lambda a, b: torch.cat([a, b], -1).sin(),
    "reads it as more than its input": lambda a, b: linear(y := torch.cat([a, b], -1), MATRIX[12, 12], None, y),
    "is computed": lambda a, b: linear(torch.cat([a, b], -1), b.reshape(12, 12)),
    "neither 1x1 nor depthwise": lambda a, b: conv(torch.cat([a, b], -1), WIDE),
    "adds a residual": lambda a, b: conv(
        conv(shuffled(y := torch.cat([a, b], -1)), DEPTH, None, y.sin(), groups=12),
        POINT[5, 12],
    ),
    "bias of": lambda a, b: conv(
        conv(shuffled(torch.cat([a, b], -1)), DEPTH, b.reshape(-1)[:12], groups=12),
        POINT[5, 12],
    ),
    "is read by": lambda a, b: conv(shuffled(torch.cat([a, b], -1)), DEPTH, groups=12).sin(),
    "as it is": lambda a, b: conv(conv(shuffled(torch.cat([a, b], -1)), DEPTH, groups=12), WIDE),
    "conv2d_1 reads it as more than its input": lambda a, b: conv(
        y := conv(shuffled(torch.cat([a, b], -1)), DEPTH, groups=12), SQUARE, None, y
    ),
    "or its weight is computed": lambda a, b: conv(
        conv(shuffled(torch.cat([a, b], -1)), DEPTH, groups=12), b.reshape(12, 12, 1, 1)
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_refused(reason, caplog):
    kept(REASONS[reason], [A, torch.randn(1, 3, 8, 6)[:, :, :4].repeat(2, 1, 1, 1)], caplog, reason)


def test_another_dtype_is_kept():
    kept(lambda a, b: linear(torch.cat([a, b], -1), MATRIX64), [A.double(), B.double()])


def test_other_dims_are_no_channels():
    kept(lambda a, b: linear(torch.cat([a, b], 0), MATRIX[5, 6]), [A, B])
    kept(lambda a: linear(a.split(2, 1)[0], MATRIX[5, 6]), [A])
    kept(lambda a: linear(a[:, 1:], MATRIX[5, 6]), [A])
    kept(lambda a: linear(dialect.permute(a, [2, 12, 6], [1, 0, 2], [2, 3, 4, 6]), MATRIX[5, 6]), [A])
    kept(lambda a: linear(dialect.permute(a, [24, 6], [1, 0], [2, 3, 4, 6]), MATRIX[5, 6]), [A])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_route(data):
    """Random concats, splits, slices and shuffles in front of products; values in between may be read as well."""
    draw = data.draw
    inputs = [torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 6)]
    steps = draw(
        st.lists(st.sampled_from(["cat", "split", "slice", "shuffle", "linear", "read"]), min_size=1, max_size=7)
    )
    picks = [(draw(st.integers(0, 9)), draw(st.integers(0, 9))) for _ in steps]

    def model(*inputs):
        values, read = list(inputs), []
        for step, (first, second) in zip(steps, picks, strict=True):
            x, y = values[first % len(values)], values[second % len(values)]
            width = x.shape[-1]
            if step == "cat":
                values.append(torch.cat([x, y], -1))
            elif step == "split" and width > 1:
                values += x.split([width // 2, width - width // 2], -1)
            elif step == "slice":
                values.append(x[..., first % width :: 1 + second % 2])
            elif step == "shuffle" and width % 2 == 0:
                values.append(shuffled(x))
            elif step == "linear":
                values.append(linear(x, MATRIX[4, width]))
            else:
                read.append(x.sin())
        return [linear(values[-1], MATRIX[3, values[-1].shape[-1]]), *read]

    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    route_channels(graph, HW)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert route_channels(graph, HW) == 0
    for node in graph.graph.nodes:
        if node.target is joined_linear:
            assert len(node.args[0]) <= MOST_PIECES
