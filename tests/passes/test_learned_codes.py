"""Which inputs of products training has given codes, and that nothing else is rounded for their sake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import HW, assert_same_numbers, check_graph, check_values, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect, dialect_int8
from graphwright.passes.precision.int8_scales import Scale
from graphwright.passes.precision.learned_codes import bounds_of, learned_scales
from graphwright.passes.refusals import recording
from graphwright.passes.requantise import requantise, requantise_alone
from graphwright.passes.rewrite import calls

X = torch.randn(6, 32)
GRID = torch.randint(-127, 128, (16, 32), generator=torch.Generator().manual_seed(0)) * 0.01
PLAIN = torch.randn(16, 32)
CODES = torch.randint(-127, 128, (16, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
SCALE = torch.full((16,), 0.01)


def scales(model, *inputs):
    graph = trace_core(model, inputs, pre_dispatch=True)
    products = [n for n in graph.graph.nodes if calls(n, torch.ops.aten.linear.default, dialect.linear)]
    return list(learned_scales(graph, products).values())


FOUND = {
    "a clamp": lambda x: F.linear(x.clamp(0.0, 2.55), GRID),
    "a clamp that moves": lambda x: F.linear(x.clamp(0.0, 2.55).reshape(2, 3, 32).transpose(0, 1), GRID),
    "equal clamps side by side": lambda x: F.linear(
        torch.cat([x[:, :16].clamp(0.0, 2.55), x[:, 16:].clamp(0.0, 2.55)], 1), GRID
    ),
    "a clamp within a product": lambda x: F.linear(dialect.linear(x, SQUARE, None, None, "clamp", [0.0, 2.55]), GRID),
}
SQUARE = torch.randn(32, 32)


@pytest.mark.parametrize("name", FOUND)
def test_the_ends_of_a_clamp_are_those_of_the_codes(name):
    found = scales(FOUND[name], X)
    assert found[-1:] == [Scale(pytest.approx(0.01), 0)]


def test_both_signs_and_the_bounds_of_relu6():
    assert scales(lambda x: F.linear(x.clamp(-1.28, 1.27), GRID), X) == [Scale(pytest.approx(0.01), 128)]
    assert scales(lambda x: F.linear(F.relu6(x), GRID), X) == [Scale(pytest.approx(6 / 255), 0)]


@pytest.mark.parametrize(
    "model",
    [
        lambda x: F.linear(x, GRID),
        lambda x: F.linear(x.clamp(0.0, 2.55), PLAIN),
        lambda x: F.linear(x.clamp_min(0.0), GRID),
        lambda x: F.linear(x.clamp(0.0, 2.55) + 1, GRID),
        lambda x: F.linear(torch.cat([x[:, :16].clamp(0.0, 2.55), x[:, 16:]], 1), GRID),
    ],
)
def test_others_were_not_trained(model):
    assert scales(model, X) == []


def test_no_node_has_no_bounds():
    assert bounds_of(None) is None


def product(x, residual=None, zero=0):
    q = dialect_int8.quantize(x, 0.01, zero, torch.uint8)
    return dialect_int8.qlinear(q, zero, CODES, SCALE, None, residual, 1.0, 0, "relu", [], 1.0, 0, None)


def rewritten(model, inputs, rewrite, count):
    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    with recording() as refusals:
        assert rewrite(graph, HW) == count
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs)
    assert rewrite(graph, HW) == 0
    return graph, [r.reason for r in refusals]


def test_a_clamp_at_the_ends_of_the_codes_is_not_needed():
    graph, _ = rewritten(lambda x: product(x.clamp(0.0, 2.55)), [X], requantise, 1)
    assert not [n for n in graph.graph.nodes if calls(n, torch.ops.aten.clamp.default)]
    rewritten(lambda x: product(x.clamp(-5.0, 3.0)), [X], requantise, 1)
    rewritten(lambda x: product(x.clamp(-1.28, 1.27), zero=128), [X], requantise, 1)
    rewritten(lambda x: product(x.clamp(min=-1.28), zero=128), [X], requantise, 1)


def test_a_narrower_clamp_stays():
    rewritten(lambda x: product(x.clamp(0.0, 2.0)), [X], requantise, 0)
    rewritten(lambda x: product(x.clamp(0.5, 2.55)), [X], requantise, 0)


def test_what_others_read_is_not_rounded_for_them():
    def shared(x):
        y = product(x)
        return y * 2, dialect_int8.quantize(y, 0.02, 0, torch.uint8)

    _, reasons = rewritten(shared, [X], requantise_alone, 0)
    assert reasons == ["others read it in float32, as in training"]
    rewritten(lambda x: dialect_int8.quantize(product(x), 0.02, 0, torch.uint8), [X], requantise_alone, 1)
