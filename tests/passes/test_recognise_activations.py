"""Activations that were written out are one operator again; what only looks like one is not."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_same_numbers, text_of, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.recognise_activations import recognise_activations

CLOSE = {"rtol": 1e-5, "atol": 1e-6, "wide": 1e-7}  # as many roundings as there were operators; constants to 1e-8
X = torch.tensor([[-8.0, -3.0, -1.5, -0.0, 0.0], [0.7, 2.5, 3.0, 9.0, torch.nan]])


def gelu_tanh(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


WRITTEN = [
    (lambda x: x * torch.sigmoid(x), F.silu),
    (lambda x: torch.sigmoid(x) * x, F.silu),
    (lambda x: F.relu6(x + 3) / 6, F.hardsigmoid),
    (lambda x: (x + 3).clamp(0, 6) * (1 / 6), F.hardsigmoid),
    (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    (lambda x: x * (F.relu6(x + 3.0) / 6), F.hardswish),
    (lambda x: x * F.hardsigmoid(x), F.hardswish),
    (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    (lambda x: x * 0.5 * (torch.erf(x * 0.7071067811865476) + 1.0), F.gelu),
    (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    (gelu_fast, lambda x: F.gelu(x, approximate="tanh")),
    (lambda x: x.clamp(min=-1).clamp(max=2), lambda x: x.clamp(-1, 2)),
    (lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.ops.graphwright.swish(x, 1.702)),
    (lambda x: torch.sigmoid(x / 2) * x, lambda x: torch.ops.graphwright.swish(x, 0.5)),
    (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    (lambda x: x * torch.full([], 0.5) * (1 + torch.erf(x / torch.full([], 2.0**0.5))), F.gelu),
]


@pytest.mark.parametrize(("before", "after"), WRITTEN)
def test_written_out(before, after):
    graph = trace(before, [X])
    original = copy_graph(graph)
    assert recognise_activations(graph, HW) in (1, 2)  # a hardswish may be found by way of its hardsigmoid
    graph.graph.lint()
    assert text_of(graph) == text_of(trace_core(after, [X], pre_dispatch=True))
    assert_same_numbers(original, graph, [X], **CLOSE)
    assert recognise_activations(graph, HW) == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * torch.sigmoid(x + 1),
        lambda x: x * torch.sigmoid(x) * 2.0 / 3.0 - x.sin() * torch.sigmoid(x),
        lambda x: x * torch.sigmoid(1.702 * x * x),
        lambda x: x * torch.sigmoid(x * math.inf) * 0.0,
        lambda x: x * torch.tanh(F.softplus(x, beta=2)),
        lambda x: x * torch.tanh(torch.exp(x)),
        lambda x: F.relu6(x + 2) / 6,
        lambda x: F.relu6(x + 3) / 5,
        lambda x: x * F.relu6(x + 3) / 6.01,
        lambda x: 0.5 * x * (1 + torch.erf(x / 1.41)),
        lambda x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 2.0)))),
        lambda x: x.clamp(min=2).clamp(max=-1),
        lambda x: x.clamp(max=2).clamp(min=-1),  # another value where both ends cross, and for the order of bounds
        lambda x: x.clamp(0, 2).clamp(max=1),
    ],
)
def test_lookalikes_are_kept(model):
    graph = trace_core(model, [X])
    before = copy_graph(graph)
    recognise_activations(graph, HW)
    assert_same_numbers(before, graph, [X], **CLOSE)
    found = {str(n.target) for n in graph.graph.nodes}
    assert not found & {
        "aten.hardsigmoid.default",
        "aten.hardswish.default",
        "aten.gelu.default",
        "aten.mish.default",
        "graphwright.swish.default",
    }
    assert sum(n.target is torch.ops.aten.clamp.default for n in graph.graph.nodes) in (0, 2)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x * torch.sigmoid(x), torch.sigmoid(x).sin()),
        lambda x: [s := torch.sigmoid(x), x * s],
        lambda x: [s := x + 3, F.relu6(s) / 6],
        lambda x: [s := torch.erf(x / math.sqrt(2)), 0.5 * x * (1 + s)],
        lambda x: [s := x.clamp(min=-1), s.clamp(max=2)],
        lambda x: [s := x * 1.702, x * torch.sigmoid(s)],
        lambda x: [s := F.softplus(x), x * torch.tanh(s)],
    ],
)
def test_a_value_in_between_that_is_read_is_kept(model):
    graph = trace_core(model, [X])
    count = recognise_activations(graph, HW)
    # The first has a sigmoid of its own for each reader.
    assert count == (1 if "sin" in str(graph.graph) else 0)


def test_integers_and_broadcasts_are_kept():
    assert_kept(lambda x: x.clamp(min=1).clamp(max=2), [torch.arange(4)], recognise_activations)

    def model(x, y):
        return x * torch.sigmoid(y)

    assert_kept(model, [torch.randn(2, 3), torch.randn(3)], recognise_activations)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(range(len(WRITTEN))),
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6),
)
def test_any_input_keeps_its_numbers(which, dtype, values):
    x = torch.tensor(values, dtype=dtype)
    graph = trace_core(lambda x: WRITTEN[which][0](x.neg()), [x])
    before = copy_graph(graph)
    recognise_activations(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x], **CLOSE)
