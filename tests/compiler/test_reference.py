"""The float64 reference, and the comparison that decides whether numbers are the same."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.compiler.capture import capture, export
from graphwright.compiler.compare import Reference, compare, is_random
from graphwright.compiler.compare import reference as verify_reference
from graphwright.compiler.reference import max_absolute, relative_l2, run_eager, run_float64
from graphwright.testing import trace_quickly


def test_float64_reaches_into_casts_and_constants() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.float16).to(torch.float32) + torch.full((3,), 1 / 3)).sin()

    x = torch.tensor([1e-3, 1 / 3, 7.0])
    (exact,) = run_float64(capture(export(model, (x,))).graph, [x])
    assert exact.dtype is torch.float64
    # Widened throughout: no rounding to float16 on the way. The constant is what float64 makes of the literal.
    assert torch.allclose(exact, (x.double() + 1 / 3).sin(), rtol=1e-12)


def test_relative_l2_knows_infinities_and_nans() -> None:
    reference = torch.tensor([1.0, math.inf, math.nan, 2.0])
    assert relative_l2(reference.clone(), reference) == 0.0
    assert relative_l2(torch.tensor([1.0, -math.inf, math.nan, 2.0]), reference) == math.inf
    assert relative_l2(torch.tensor([1.0, math.inf, 0.0, 2.0]), reference) == math.inf
    assert relative_l2(torch.tensor([1.0, math.inf, math.nan, math.nan]), reference) == math.inf
    assert max_absolute(torch.tensor([1.0, math.inf, math.nan, 2.5]), reference) == 0.5


def reference(values: torch.Tensor) -> Reference:
    return Reference([values.double() if values.is_floating_point() else values], [values])


@pytest.mark.parametrize("wrong", [1e-3, 1e-4, math.nan, math.inf])
def test_a_wrong_output_is_seen(wrong: float) -> None:
    expected = torch.linspace(-1, 1, 100)
    result = expected.clone()
    assert compare([result], reference(expected), None) is None
    result[7] += wrong
    difference = compare([result], reference(expected), None)
    assert difference is not None
    assert difference.output == 0


def test_a_tolerance_replaces_the_default() -> None:
    expected = torch.ones(10)
    assert compare([expected * 1.001], reference(expected), None) is not None
    assert compare([expected * 1.001], reference(expected), 1e-2) is None


def test_dtype_shape_and_integers_are_exact() -> None:
    ints = torch.arange(10)
    assert compare([ints], reference(ints), None) is None
    assert compare([ints + 1], reference(ints), None) is not None
    assert compare([ints.int()], reference(ints), None) is not None
    assert compare([ints.reshape(2, 5)], reference(ints), None) is not None


def test_dropout_in_training_is_random() -> None:
    net = torch.nn.Dropout(0.5)
    assert is_random(capture(export(net.train(), (torch.ones(3),))).graph)
    graph = capture(export(net.eval(), (torch.ones(3),))).graph
    assert not is_random(graph)
    assert run_eager(graph, [torch.ones(3)])[0].tolist() == [1.0, 1.0, 1.0]


def test_positions_of_equal_elements_are_equal_and_others_are_not() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.topk(2, 1)[1], x.argmax(), x.sort(0)[1], x.max(-1)[1]

    x = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]])
    graph = capture(export(model, (x,))).graph
    expected = verify_reference(graph, [x])
    right = [torch.tensor([[2, 1], [2, 0]]), torch.tensor(5), expected.eager[2], torch.tensor([2, 0])]
    assert compare(right, expected, None) is None
    for i, wrong in enumerate([[[0, 1], [2, 0]], 0, [[1, 1, 0], [0, 0, 1]], [0, 0]]):
        given = [*right[:i], torch.tensor(wrong), *right[i + 1 :]]
        difference = compare(given, expected, None)
        assert difference is not None
        assert difference.output == i
    outside = [torch.tensor([[2, 7], [2, 0]]), *right[1:]]
    assert compare(outside, expected, None) is not None


def test_real_functions_of_integers_are_in_float64():
    x, y = torch.tensor([1, 2, -3]), torch.tensor([3, 7, 2])
    graph = trace_quickly(lambda x, y: (torch.atan2(x, y), x / y, x + 0.1, x[y.clamp(max=2)]), [x, y], True)
    wide = [v.double() for v in (x, y)]
    expected = [torch.atan2(*wide), wide[0] / wide[1], wide[0] + 0.1]
    for result, value in zip(run_float64(graph, [x, y]), expected, strict=False):
        assert torch.equal(result, value)
    assert run_float64(graph, [x, y])[3].dtype == torch.int64


def test_an_output_that_cancels_is_judged_by_what_it_was_computed_from():
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 64, generator=draw), torch.randn(8, 64, generator=draw)
    graph = capture(export(lambda x: torch.cat([x, -x], 1) @ torch.cat([w, w], 0), (x,))).graph
    expected = verify_reference(graph, [x])
    # The same sum in another order: no relative error of nothing explains what is left of it.
    turned = (torch.cat([x, -x], 1).flip(1) @ torch.cat([w, w], 0).roll(3, 1).roll(-3, 1).flip(0)) + 2e-6
    for tolerance in (None, 4e-3):
        assert compare([turned], expected, tolerance) is None
        for wrong in (turned + 1e-4, x @ w, torch.where(turned == turned[3, 5], 1e-2, turned)):
            assert compare([wrong], expected, tolerance) is not None


def test_rounding_explains_no_more_where_nothing_cancels():
    x = torch.linspace(-1, 1, 100)
    graph = capture(export(lambda x: x * 3, (x,))).graph
    expected = verify_reference(graph, [x])
    assert expected.noise is not None
    assert 0 < expected.noise()[0] < 1e-6 * float(expected.exact[0].norm())
    assert compare([x * 3 + 1e-4], expected, None) is not None


def test_rounding_that_turns_something_over_explains_nothing():
    x = torch.arange(100.0)
    found = {
        "equal": (lambda x: (x == 50).float(), torch.zeros(100)),
        "remainder": (lambda x: x % 4, torch.zeros(100)),
        "index": (lambda x: torch.sin(x)[x.long()], torch.ones(100)),
        # float32's 0.1 is a little more than a tenth: a tie but for less than float32 rounds.
        "beside a tie": (lambda x: torch.floor(x * 0.1) % 2, torch.zeros(100)),
    }
    for function, wrong in found.values():
        expected = verify_reference(capture(export(function, (x,))).graph, [x])
        assert compare([function(x)], expected, None) is None
        assert compare([wrong], expected, None) is not None


def test_rounding_explains_nothing_where_the_model_does_not_run_with_it():
    x, rows = torch.full((8,), 0.5), torch.ones(1, 4)
    expected = verify_reference(capture(export(lambda x: rows[x.round().long()], (x,))).graph, [x])
    assert compare([torch.zeros(8, 4)], expected, None) is not None


def test_integers_that_rounding_moves_are_held_against_float64():
    x = torch.linspace(1, 2, 100)
    expected = verify_reference(capture(export(lambda x: (x.exp() * 1e9).long(), (x,))).graph, [x])
    assert compare([(x.exp() * 1e9).long() + 64], expected, None) is None
    assert compare([torch.zeros(100, dtype=torch.int64)], expected, None) is not None
