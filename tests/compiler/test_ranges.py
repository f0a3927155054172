"""Ranges from histograms: each method on distributions whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphwright.compiler.compression.observe import certain_means
from graphwright.compiler.compression.ranges import BINS, METHODS, Seen


def seen(x: torch.Tensor) -> Seen:
    low, high = float(x.min()), float(x.max())
    reach = max(-low, high, 0.0)
    return Seen(low, high, torch.histc(x.abs(), BINS, 0.0, reach).double().numpy(), reach)


def noise(count: int = 20000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_even_distribution_keeps_its_range(method: str) -> None:
    x = torch.linspace(-1.0, 3.0, 100001)
    low, high = METHODS[method](seen(x))
    assert low == pytest.approx(-1.0, abs=0.02)
    assert high == pytest.approx(3.0, abs=0.06)


def test_minmax_is_all_of_it() -> None:
    x = torch.cat([noise(), torch.tensor([1e4])])
    assert METHODS["minmax"](seen(x)) == (float(x.min()), 1e4)


@pytest.mark.parametrize("method", ["kl", "percentile"])
def test_a_lone_outlier_is_clipped(method: str) -> None:
    """One value of 300 among 20,000 within 5: of bins 0.15 wide, kl keeps at least 255."""
    x = torch.cat([noise(), torch.tensor([300.0])])
    low, high = METHODS[method](seen(x))
    assert low == pytest.approx(float(x.min()), abs=0.3)
    assert 3.5 < high < 45.0


@pytest.mark.parametrize("shape", ["normal", "long tails", "one sign"])
def test_mse_errs_least_of_all_methods(shape: str) -> None:
    x = {"normal": noise(), "long tails": noise() ** 3, "one sign": noise().relu()}[shape]

    def error(method: str) -> float:
        low, high = METHODS[method](seen(x))
        scale = (high - low) / 255.0
        return float(((x / scale).round().clamp(low / scale, high / scale) * scale - x).square().mean())

    # Thresholds are a hundredth apart, and a bin's middle stands for its values.
    assert error("mse") <= 1.02 * min(error(method) for method in METHODS)


def test_kl_does_not_trust_a_histogram_of_gaps() -> None:
    few = noise(500)
    assert METHODS["kl"](seen(few)) == METHODS["mse"](seen(few))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_constants_and_zeros(method: str) -> None:
    low, high = METHODS[method](Seen(0.0, 0.0, np.zeros(BINS), 0.0))
    assert (low, high) == (0.0, 0.0)
    low, high = METHODS[method](seen(torch.full((50,), 2.5)))
    assert high == pytest.approx(2.5, rel=1e-3)
    assert low <= 2.5


def test_means_of_few_rows_are_not_trusted() -> None:
    """Of one row nothing is; chance is taken off nearly to 0; a mean that is there stays, as it does of many rows."""
    generator = torch.Generator().manual_seed(0)

    def certain(rows: int, mean: float) -> torch.Tensor:
        x = torch.randn(rows, 4096, generator=generator).double() + mean
        return certain_means(x.sum(0), x.square().sum(0), rows)

    assert not bool(certain(1, 5.0).any())
    by_chance = certain(8, 0.0)
    assert float(by_chance.square().mean()) < 0.5 / 8  # of the variance of a mean of 8 rows
    assert float(certain(8, 5.0).mean()) == pytest.approx(5.0, rel=0.02)
    x = torch.randn(5000, 16, generator=generator).double() + torch.linspace(1.0, 2.0, 16)
    torch.testing.assert_close(certain_means(x.sum(0), x.square().sum(0), 5000), x.mean(0), rtol=1e-3, atol=0.0)
