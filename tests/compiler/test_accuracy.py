"""Numbers that are easy to lose: long sums, small spreads around large values, signs of zero, the edge of overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphwright
from graphwright.compiler.reference import relative_l2

Function = Callable[[torch.Tensor], torch.Tensor]


def both(model: Function, x: torch.Tensor) -> tuple[float, float]:
    """The compiled model's error against float64, and eager's."""
    exact = model(x.double())
    return relative_l2(graphwright.compile(model, (x,))(x), exact), relative_l2(model(x), exact)


@pytest.mark.parametrize(
    "model",
    [lambda x: x.cumsum(0), lambda x: (1 + 1e-4 * x).cumprod(0), lambda x: x.logcumsumexp(0)],
    ids=["cumsum", "cumprod", "logcumsumexp"],
)
def test_long_scans_add_up_in_float64(model: Function) -> None:
    ours, eager = both(model, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert ours < 1.5 * eager  # float32 sums of 20,000 numbers are some 30 times worse


@pytest.mark.parametrize("offset", [1e5, 1e6])
def test_a_small_spread_around_a_large_value(offset: float) -> None:
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)) + offset
    ours, _ = both(lambda x: x.var(1), x)
    assert ours < 2e-6  # with the mean rounded to float32 1e-5 and 1e-4


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_product_with_zero_keeps_sign_and_nan(zero: float) -> None:
    x = torch.tensor([-1.0, 1.0, 0.0, -0.0, float("nan"), float("inf"), -float("inf")] * 3)
    result = graphwright.compile(lambda x: x * zero, (x,))(x)
    expected = x * zero
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(torch.signbit(result[~expected.isnan()]), torch.signbit(expected[~expected.isnan()]))


def test_where_pytorch_overflows_early_the_right_number_passes() -> None:
    x = torch.linspace(88, 89.5, 4096)
    assert relative_l2(graphwright.compile(torch.sinh, (x,))(x)[:1400], torch.sinh(x[:1400].double())) < 1e-5


@pytest.mark.parametrize("operator", [torch.maximum, torch.minimum])
def test_the_larger_of_two_bools(operator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    compiled = graphwright.compile(operator, (a, b))
    assert torch.equal(compiled(a, b), operator(a, b))
    assert not compiled.report().eager


def test_complex_constants_are_compared_in_complex128() -> None:
    class Filter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)

    model, x = Filter(), torch.randn(3, 8)
    torch.testing.assert_close(graphwright.compile(model, (x,))(x), model(x).detach())


def test_an_operator_that_float64_does_not_have_is_compared_with_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    @torch.library.custom_op("graphwright_tests::single_only", mutates_args=())
    def single_only(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x * 2

    @single_only.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    x = torch.randn(5)
    compiled = graphwright.compile(lambda x: single_only(x + 1) - 1, (x,))
    torch.testing.assert_close(compiled(x), (x + 1) * 2 - 1)
    assert "does not run in float64" in caplog.text
    (row,) = compiled.report().errors
    assert row.no_float64 is not None
    assert "float32 only" in row.no_float64
    assert "against PyTorch eager" in compiled.report().text()
    assert "not in float64: " in compiled.report().text()


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_where_fused_attention_gives_nan_the_numbers_of_its_formula_pass(scale: float) -> None:
    """PyTorch's fused kernel multiplies the -inf of hidden keys by the scale."""

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    operands = torch.randn(3, 1, 2, 5, 16).unbind()
    compiled = graphwright.compile(model, operands, cache=False)
    assert not compiled.report().eager
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(compiled(*operands), model(*operands))
