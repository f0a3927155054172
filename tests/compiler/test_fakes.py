"""Custom operators whose fake kernels promise something else than they give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import graphwright
from graphwright.compiler.verify import verify_model
from graphwright.errors import NumericMismatch


@torch.library.custom_op("graphwright_tests::first_two", mutates_args=())
def first_two(x: torch.Tensor) -> torch.Tensor:
    return x[:2].clone()


@first_two.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("graphwright_tests::in_double", mutates_args=())
def in_double(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64, copy=True)


@in_double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("graphwright_tests::honest", mutates_args=())
def honest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.clone(), x.new_ones(2)


@honest.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(2)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (first_two, "first_two.default is wrong: it promises f32[3] where the operator gives f32[2]; mend"),
        (in_double, "in_double.default is wrong: it promises f32[3] where the operator gives f64[3]; mend"),
    ],
    ids=["shape", "dtype"],
)
def test_a_fake_kernel_that_lies_is_named(
    operator: Callable[[torch.Tensor], torch.Tensor], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return operator(x + 1) * 2

    x = torch.randn(3)
    compiled = graphwright.compile(model, x, cache=False)
    torch.testing.assert_close(compiled(x), model(x))
    assert f"the fake kernel of graphwright_tests.{message} the function given to its register_fake" in caplog.text
    assert "bug of graphwright" not in caplog.text
    assert all("register_fake" in row.reason for row in compiled.report().eager)
    with pytest.raises(NumericMismatch, match=r"the fake kernel of .* is wrong"):
        verify_model(model, x)


def test_a_fake_kernel_that_keeps_its_word_costs_nobody_else_the_machine_code() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        a, b = honest(x + 1)
        return a * 2 + b.sum()

    x = torch.randn(3)
    compiled = graphwright.compile(model, x, cache=False)
    torch.testing.assert_close(compiled(x), model(x))
    assert {row.operator for row in compiled.report().eager} == {"graphwright_tests.honest.default"}
