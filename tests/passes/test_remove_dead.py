"""What nobody reads and what does nothing goes; what only looks so stays."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace_core

from graphwright.compiler.capture import capture, export
from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import rewrite
from graphwright.passes.remove_dead import remove_dead

aten = torch.ops.aten


@pytest.mark.parametrize(
    "nothing",
    [
        torch.clone,
        aten.alias,
        torch.detach,
        lambda x: x.contiguous(),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.expand(-1, 3),
        lambda x: x[:],
        lambda x: aten.slice(x, 0, 0, 2),
        lambda x: x.view(2, 3),
        lambda x: x.permute(0, 1),
        lambda x: aten.repeat(x, [1, 1]),
        lambda x: F.pad(x, (0, 0)),
        lambda x: aten._to_copy(x, dtype=torch.float32),
        lambda x: x * 1,
        lambda x: x / 1.0,
        lambda x: x - 0,
    ],
)
def test_no_ops_go(nothing):
    x = torch.tensor([[-0.0, torch.nan, torch.inf], [1.0, -torch.inf, 0.0]])
    graph = trace_core(lambda x: nothing(x.neg()).cos(), [x])
    before = copy_graph(graph)
    assert remove_dead(graph, HW) >= (0 if len(before.graph.nodes) == 4 else 1)
    assert [str(n.target) for n in graph.graph.nodes][1:3] == ["aten.neg.default", "aten.cos.default"]
    assert_same_numbers(before, graph, [x])
    assert remove_dead(graph, HW) == 0


@pytest.mark.parametrize(
    "something",
    [
        lambda x: x + 0.0,  # -0.0 becomes 0.0
        lambda x: x * 0,  # not 0 for nan
        lambda x: x * 1.0000001,
        lambda x: x.double(),
        lambda x: x.expand(2, 2, 3),
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x.permute(1, 0),
        lambda x: F.pad(x, (0, 1)),
        lambda x: x.repeat(1, 2),
    ],
)
def test_what_does_something_stays(something):
    assert_kept(lambda x: something(x.neg()).cos(), [torch.randn(2, 3)], remove_dead)


def test_a_multiplication_that_promotes_stays():
    assert_kept(lambda x: (x.abs() * 1.0).cos(), [torch.ones(2, dtype=torch.int64)], remove_dead)
    assert_kept(lambda x: (x.logical_not() * 1).abs(), [torch.ones(2, dtype=torch.bool)], remove_dead)


def test_dropout_in_training_stays():
    graph = trace_core(lambda x: aten.dropout(x.neg(), 0.5, True).cos(), [torch.randn(2, 3)])
    count = len(graph.graph.nodes)
    assert remove_dead(graph, HW) == 0
    assert len(graph.graph.nodes) == count


def test_what_nobody_reads_goes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.used

    graph = capture(export(Model(), [torch.randn(2, 3)])).graph
    (product,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    sine = rewrite.call(graph, aten.sin.default, (product.args[0],), before=product)
    rewrite.call(graph, aten.cos.default, (sine,), before=product)
    assert remove_dead(graph, HW) == 3
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == ["aten.mul.Tensor"]
    assert {name for name, _ in graph.named_buffers()} == {"p_used"}
    assert remove_dead(graph, HW) == 0


def test_inputs_stay():
    graph = trace_core(lambda x, y: x.neg(), [torch.randn(2), torch.randn(2)])
    assert remove_dead(graph, HW) == 0
    assert len([n for n in graph.graph.nodes if n.op == "placeholder"]) == 2


def test_random_numbers_nobody_reads_stay():
    """Leaving them out would give those drawn later other values."""

    def model(x):
        torch.rand(3)
        return x + torch.rand(2)

    graph = trace_core(model, [torch.randn(2)])
    assert [n.target for n in graph.graph.nodes].count(aten.rand.default) == 2
    assert remove_dead(graph, HW) == 0


def test_a_returned_copy_of_an_input_stays(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(torch.clone, [torch.randn(2)], remove_dead)
    assert "it is returned" in caplog.text


def test_a_returned_copy_of_a_value_read_twice_stays():
    def model(x):
        y = x.neg()
        return y, y.clone()

    assert_kept(model, [torch.randn(2)], remove_dead)


def test_a_view_of_a_copy_of_an_input_stays(caplog):
    graph = trace_core(lambda x: aten.reshape(aten.clone(x), [3, 2]), [torch.randn(2, 3)])
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert remove_dead(graph, HW) == 0
    assert "it is returned" in caplog.text


def test_a_returned_copy_of_a_fresh_value_goes():
    assert_rewrite(lambda x: x.neg().clone(), torch.neg, [torch.randn(2)], remove_dead, 1)


def test_a_copy_before_a_look_at_strides_stays(caplog):
    def model(x):
        return aten.as_strided(aten.clone(x.t().neg(), memory_format=torch.contiguous_format), [6], [1])

    graph = trace_core(model, [torch.randn(2, 3)])
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert remove_dead(graph, HW) == 0
    assert "looks at its strides" in caplog.text


def test_asserted_dtypes_are_known():
    def model(x):
        aten._assert_tensor_metadata(x, dtype=torch.float32)
        return x.neg()

    graph = trace_core(model, [torch.randn(2)])
    remove_dead(graph, HW)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == ["aten.neg.default"]


STEPS = [
    torch.clone,
    torch.neg,
    lambda x: x * 1,
    lambda x: x + 0.0,
    lambda x: x.t(),
    lambda x: x.t().contiguous(),
    lambda x: x[:],
    lambda x: x.expand(x.shape),
    torch.detach,
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(STEPS))), min_size=1, max_size=8), st.sets(st.integers(0, 7)))
def test_any_chain_keeps_its_bits(steps, returned):
    def model(x):
        outputs = []
        for i, step in enumerate(steps):
            x = STEPS[step](x)
            if i in returned:
                outputs.append(x)
        return (*outputs, x)

    x = torch.tensor([[-0.0, 1.0, torch.nan], [torch.inf, 0.0, -2.0]])
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    remove_dead(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    assert remove_dead(graph, HW) == 0


def test_a_copy_of_which_a_view_is_returned_stays():
    graph = assert_kept(lambda x: x.clone().reshape(6), [torch.randn(2, 3)], remove_dead)
    x = torch.randn(2, 3)
    (result,) = graph(x)
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_reader_that_is_dead_keeps_no_copy():
    graph = trace_core(lambda x: x.exp().clone(), [torch.randn(3)], pre_dispatch=True)
    copied = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.clone.default)
    rewrite.call(graph, torch.ops.aten.sin.default, (copied.args[0],), before=copied.next)
    assert remove_dead(graph, HW) == 2
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [torch.ops.aten.exp.default]
    assert remove_dead(graph, HW) == 0
