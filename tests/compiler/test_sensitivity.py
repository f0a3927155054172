"""What reducing one operator does to the outputs: first-order propagation against trying each, and the cost of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from graphwright.compiler import compare, pipeline, sensitivity
from graphwright.compiler.build import default_passes
from graphwright.compiler.capture import capture, export
from graphwright.compiler.precision import Precision, decide
from graphwright.compiler.reference import run_eager
from graphwright.hwdb import lookup
from graphwright.passes.assign_precision import assign_precision, plan_precisions

DOTS = lookup("znver4")


def rewritten(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, compare.Reference]:
    graph = capture(export(model.eval(), (x,), {})).graph
    return pipeline.run(graph, DOTS, default_passes(DOTS))[0], compare.reference(graph, [x])


def alone(graph: fx.GraphModule, choice: object, x: torch.Tensor, expected: compare.Reference) -> float:
    copy = pipeline.copy_graph(graph)
    assign_precision(copy, [choice])  # type: ignore[list-item]
    return sensitivity.error_of(run_eager(copy, [x]), expected)


class Net(nn.Module):
    """Products behind convolutions, norms, attention and a residual, and one that is scaled down a hundred times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(24, 16, 5, padding=2)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.faint, self.head = nn.Linear(16, 16), nn.Linear(16, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 16)
        x = x + self.out(y) + 0.01 * self.faint(x)
        return self.head(torch.nn.functional.gelu(x))


def test_propagation_agrees_with_trying_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 24, 8, 8)
    graph, expected = rewritten(Net(), x)
    candidates = plan_precisions(graph, DOTS, "bf16").candidates
    assert len(candidates) >= 4
    errors, method = sensitivity.sensitivities(graph, candidates, [((x,), expected)])
    assert "first-order" in method
    assert set(errors) == {(c.node, c.form) for c in candidates}
    for choice in candidates:
        # Eight probes of a mean square: within a factor of two with room.
        assert 0.5 < errors[choice.node, choice.form] / alone(graph, choice, x, expected) < 2.0
    assert min(errors.values()) < 0.1 * max(errors.values())


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_groups_where_there_is_no_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)]), torch.randn(4, 16)
    graph, expected = rewritten(model, x)
    candidates = plan_precisions(graph, DOTS, "bf16").candidates

    def fails(*given: object) -> None:
        raise RuntimeError("derivative for graphwright::linear is not implemented")

    monkeypatch.setattr(sensitivity, "_propagated", fails)
    monkeypatch.setattr(sensitivity, "GROUPS", 3)
    errors, method = sensitivity.sensitivities(graph, candidates, [((x,), expected)])
    assert "groups" in method
    values = list(errors.values())
    assert values[0] == values[1] != values[2] == values[3] != values[4] == values[5]
    assert all(v > 0 for v in values)


def test_an_operator_that_overflows_is_ruled_out() -> None:
    """3.4e38 is the largest float32 and rounds to infinity in bfloat16: never reduced, the other is."""
    # Large enough that half the arithmetic is more than a cast.
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.full((32, 64), 3.4e38)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64) * 2e-38)
    graph, expected = rewritten(model, x)
    plan, notes = decide(graph, DOTS, Precision("bf16", None, (((x,), expected),)))
    assert [c.dtype for c in plan.choices if "linear" in c.operator] == ["float32", "bfloat16"], notes


def test_the_cost_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many runs of the graph for forty products as for ten, and one more operator alone for each."""
    runs: dict[int, int] = {}
    count = [0]
    forward = fx.Interpreter.run_node

    def counted(self: fx.Interpreter, n: fx.Node) -> object:
        count[0] += 1
        return forward(self, n)

    monkeypatch.setattr(fx.Interpreter, "run_node", counted)
    for layers in (10, 40):
        model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)]), torch.randn(2, 8)
        graph, expected = rewritten(model, x)
        candidates = plan_precisions(graph, DOTS, "bf16").candidates
        count[0] = 0
        sensitivity.sensitivities(graph, candidates, [((x,), expected)])
        runs[layers] = count[0]
    assert runs[40] < 5 * runs[10]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([4, 9, 16]), min_size=3, max_size=7),
    st.sampled_from(["tanh", "relu", "softmax", "exp"]),
    st.booleans(),
    st.sampled_from([3e-2, 3e-3, 1e-3, 1e-4]),
)
def test_random_graphs_are_within_the_tolerance_or_float32(
    widths: list[int], between: str, residual: bool, tolerance: float
) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                y = torch.softmax(y, -1) if between == "softmax" else getattr(torch, between)(y)
                x = y + x if residual and y.shape == x.shape else y
            return x

    torch.manual_seed(sum(widths))
    x = torch.randn(3, widths[0])
    graph, expected = rewritten(Random(), x)
    plan, _ = decide(graph, DOTS, Precision("auto", tolerance, (((x,), expected),)))
    assign_precision(graph, plan.choices)
    graph.graph.lint()
    error = sensitivity.error_of(run_eager(graph, [x]), expected)
    assert error <= tolerance
    assert plan.reduced or error <= 1e-5
