"""Several operators in one kernel: right numbers, the kernels expected, and what happens where one cannot be built."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import graphwright
from graphwright.backends.lowering import extract, families, fusion, supported
from graphwright.compiler.capture import capture, export
from graphwright.hwdb import detect
from graphwright.passes.refusals import recording

families.load()


def compiled(function: Callable[..., Any], *inputs: Tensor) -> graphwright.Compiled:
    result = graphwright.compile(_Module(function), inputs, cache=False)
    assert isinstance(result, graphwright.Compiled)
    return result


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def check(kernels: int, function: Callable[..., Any], *inputs: Tensor) -> graphwright.Compiled:
    """Compile (which compares with float64), count kernels, compare with eager."""
    result = compiled(function, *inputs)
    assert not result.report().eager
    names = [kernel.operators for kernel in result.report().kernels]
    assert len(names) == kernels, names
    ours, theirs = result(*inputs), function(*inputs)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)  # sums in another order
    return result


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_several_results_of_a_chain_are_one_kernel() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        product = x * y
        return product, torch.tanh(product + 1)

    check(1, function, normal(64, 300), normal(64, 300))


def test_reductions_of_rows_and_what_follows_are_one_kernel() -> None:
    def function(x: Tensor) -> Any:
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        return mean, (centred * centred).mean(-1), centred.abs().amax(-1)

    check(1, function, normal(200, 333))


@pytest.mark.parametrize("shape", [(1 << 18,), (512, 512), (96, 8, 512)])
def test_statistics_of_a_whole_tensor_are_one_kernel(shape: tuple[int, ...]) -> None:
    def function(x: Tensor) -> Any:
        return x.mean(), x.amax(), (x * x).sum().sqrt()

    check(1, function, normal(*shape))


def test_a_reduction_of_a_prime_number_of_elements_keeps_its_loop() -> None:
    check(1, lambda x: x.sum(), normal(65537))


def test_splits_are_formulas_of_their_readers() -> None:
    def function(gates: Tensor, cell: Tensor) -> Any:
        i, f, g, o = gates.chunk(4, -1)
        state = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(state), state

    check(1, function, normal(32, 256), normal(32, 64))


def test_reshapes_at_the_edges_stay_names() -> None:
    def function(x: Tensor) -> Any:
        return (x.reshape(8, 16, 32) * 2 + 1).reshape(128, 32)

    result = check(1, function, normal(8, 512))
    assert "view" not in result.report().kernels[0].operators


def test_a_reshape_between_formulas_is_index_arithmetic() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return torch.tanh(x).reshape(8, 16, 32) + y

    check(1, function, normal(8, 512), normal(8, 16, 32))


def test_operators_with_loops_of_their_own_stay_alone() -> None:
    def function(x: Tensor) -> Any:
        values, places = torch.sort(x * 2, -1)
        return values + 1, places * 2

    check(3, function, normal(16, 64))


def test_a_result_that_is_an_operand_is_copied() -> None:
    def function(x: Tensor) -> Any:
        return x, x.expand(4, 7), x + 0.5

    compiled(function, normal(4, 7))(normal(4, 7))


def test_a_product_between_two_readers_keeps_them_apart() -> None:
    def function(x: Tensor) -> Any:
        g = torch.tanh(x)
        return g + torch.softmax(g, -1)

    check(3, function, normal(64, 64))


def test_small_formulas_of_one_shape_are_one_kernel() -> None:
    def function(*tensors: Tensor) -> Any:
        return tuple(torch.tanh(t * 0.5) for t in tensors)

    check(1, function, *[normal(16, 16) for _ in range(5)])


def test_refusals_are_recorded() -> None:
    with recording() as refusals:
        compiled(lambda x: (x.sum(0), x.transpose(0, 1).exp().sum(0)), normal(300, 400))
    assert any(r.rule == "fusion" for r in refusals)


def test_what_no_schedule_takes_falls_apart(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = extract.schedule

    def refuses(func: Any, hw: Any) -> Any:
        results = 2 if "several" in str(func.script()) or len(func.params) > 3 else 1
        return func if results == 2 else real(func, hw)

    monkeypatch.setattr(extract, "schedule", refuses)
    with caplog.at_level(logging.WARNING):
        result = compiled(lambda x, y: (x * y, torch.tanh(x * y + 1)), normal(8, 300), normal(8, 300))
    assert len(result.report().kernels) > 1
    assert "kernels of their own" in caplog.text
    torch.testing.assert_close(result(normal(8, 300), normal(8, 300))[0], normal(8, 300) ** 2)


def test_what_cannot_be_composed_falls_apart(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = fusion.Fusion.compute

    def fails(self: fusion.Fusion, *tensors: Any) -> Any:
        if len(self.nodes) > 1:
            raise ValueError("not today")
        return real(self, *tensors)

    monkeypatch.setattr(fusion.Fusion, "compute", fails)
    with caplog.at_level(logging.WARNING):
        result = compiled(lambda x: torch.tanh(x * 2) + 1, normal(8, 300))
    assert len(result.report().kernels) == 3
    assert "not today" in caplog.text


# ---- facts ----


def facts_of(function: Callable[..., Any], *inputs: Tensor) -> dict[str, Any]:
    """Facts of the captured graph's expressions by the operator's name."""
    captured = capture(export(_Module(function), inputs, {}), ()).graph
    nodes = [n for n in captured.graph.nodes if n.op == "call_function"]
    for node in nodes:
        assert supported.why_not(node, detect()) is None
    reshapes = frozenset(n for n in nodes if supported.is_reshape(n))
    facts, _ = fusion._facts(nodes, reshapes)
    return {str(node.target).split(".")[1]: f for node, f in facts.items() if isinstance(node, fx.Node)}


def test_facts_of_formulas_and_reductions() -> None:
    found = facts_of(lambda x, y: torch.tanh(x + y).sum(-1), normal(6, 1, 8), normal(8))
    assert found["add"].formula
    assert found["add"].shape == (6, 8)
    assert list(found["add"].aligned.values()) == [2, 0]
    assert found["tanh"].work > found["add"].work
    assert not found["sum"].formula
    assert found["sum"].rows == 1
    assert list(found["sum"].loads.values()) == [48.0]


def test_facts_of_moves() -> None:
    found = facts_of(lambda x: (x.permute(0, 2, 1) * 2, x[:, 1:] * 3), normal(6, 5, 8))
    assert list(found["permute"].aligned.values()) == [1]
    assert list(found["slice"].aligned.values()) == [1]
    assert found["permute"].work == 0


def test_parts_of_a_concatenation_are_read_once() -> None:
    found = facts_of(lambda x, y: torch.cat((x, y), 1), normal(6, 5), normal(6, 3))
    assert sum(found["cat"].loads.values()) == 48


# ---- random graphs ----

_UNARY = (torch.tanh, torch.relu, lambda x: x * 0.5, lambda x: x - 1, torch.sigmoid, lambda x: x.abs().sqrt())
_BINARY = (torch.add, torch.mul, torch.maximum, lambda a, b: a - b)
_REDUCE = (torch.sum, torch.mean, torch.amax, torch.amin)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[list[Callable[[list[Tensor]], Tensor]], list[int], tuple[int, ...]]:
    """Steps that each read earlier values, the values returned, and the shape of the two inputs."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 17]), min_size=1, max_size=3)))
    values = [shape, shape]
    steps: list[Callable[[list[Tensor]], Tensor]] = []
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["unary", "binary", "reduce", "shift", "turn"]))
        a = draw(st.integers(0, len(values) - 1))
        if kind == "binary":
            fit = [i for i, other in enumerate(values) if _broadcasts(values[a], other)]
            b = draw(st.sampled_from(fit))
            steps.append(functools.partial(_two, draw(st.sampled_from(_BINARY)), a, b))
            values.append(tuple(torch.broadcast_shapes(values[a], values[b])))
        elif kind == "reduce":
            dim = draw(st.integers(0, len(values[a]) - 1))
            steps.append(functools.partial(_reduced, draw(st.sampled_from(_REDUCE)), a, dim))
            values.append(tuple(1 if d == dim else n for d, n in enumerate(values[a])))
        elif kind == "shift":
            steps.append(functools.partial(_one, _shifted, a))
            values.append(values[a])
        elif kind == "turn":
            steps.append(functools.partial(_one, _turned, a))
            values.append(values[a][::-1])
        else:
            steps.append(functools.partial(_one, draw(st.sampled_from(_UNARY)), a))
            values.append(values[a])
    count = len(values)
    results = draw(st.lists(st.integers(2, count - 1), min_size=1, max_size=3, unique=True))
    return steps, sorted({*results, count - 1}), shape


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))


def _one(function: Callable[..., Tensor], a: int, values: list[Tensor]) -> Tensor:
    return function(values[a])


def _two(function: Callable[..., Tensor], a: int, b: int, values: list[Tensor]) -> Tensor:
    return function(values[a], values[b])


def _reduced(function: Callable[..., Tensor], a: int, dim: int, values: list[Tensor]) -> Tensor:
    return function(values[a], dim=dim, keepdim=True)


def _shifted(x: Tensor) -> Tensor:
    return torch.cat((x[..., -1:], x[..., :-1]), -1)


def _turned(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim())))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(expressions())
def test_random_expressions_with_shared_values_and_several_results(
    drawn: tuple[list[Callable[[list[Tensor]], Tensor]], list[int], tuple[int, ...]],
) -> None:
    steps, results, shape = drawn

    def function(*inputs: Tensor) -> Any:
        values = list(inputs)
        for step in steps:
            values.append(step(values))
        return tuple(values[i] for i in results)

    inputs = (normal(*shape), normal(*shape) + 0.25)
    result = compiled(function, *inputs)
    assert not result.report().eager
    for ours, theirs in zip(result(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)  # sums in another order
