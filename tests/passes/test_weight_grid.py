"""Weights that are whole numbers of steps are rounded by those; others as they were."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from graphwright.passes.precision.int8_scales import WEIGHT_LIMIT, quantised_weight, weight_scales
from graphwright.passes.precision.weight_grid import grid_steps, on_grid


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 200), st.integers(1, 127), st.integers(0, 999))
def test_codes_come_back(rows, columns, most, seed):
    """Through any step and any factor that a batch norm multiplies by, to float32's rounding of it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-most, most + 1, (rows, columns), generator=generator)
    step = torch.rand(rows, 1, generator=generator) * 0.1 + 1e-4
    factor = torch.randn(rows, 1, generator=generator) * 3
    weight = (codes * step) * factor
    scales = weight_scales(weight)
    stored = quantised_weight(weight, scales)
    torch.testing.assert_close(stored * scales[:, None], weight, rtol=1e-4, atol=0)
    assert on_grid(weight) or not bool(codes.any())


def test_arbitrary_weights_keep_the_usual_steps():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert grid_steps(weight) is None
    assert torch.equal(weight_scales(weight), weight.abs().amax(1) / WEIGHT_LIMIT)
    assert not on_grid(weight)


def test_rows_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-90, 91, (64, 96), generator=generator) * 0.013
    weight[5] = torch.randn(96, generator=generator)
    weight[6] = 0.0
    steps = grid_steps(weight)
    assert steps is not None
    assert (steps > 0).sum() == 62
    assert not on_grid(weight)
    scales = weight_scales(weight)
    assert scales[5] == weight[5].abs().max() / WEIGHT_LIMIT
    assert scales[6] == 1.0
    torch.testing.assert_close(scales[7], torch.tensor(0.013), rtol=1e-5, atol=0)


def test_nothing_and_no_number():
    assert grid_steps(torch.zeros(0, 4)) is None
    assert grid_steps(torch.zeros(3, 4)) is None
    assert grid_steps(torch.full((3, 4), torch.inf)) is None
