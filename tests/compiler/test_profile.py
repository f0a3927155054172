"""Timing every kernel of a call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.errors import InputError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8), nn.Softmax(-1)).eval()


def test_every_kernel_has_a_time() -> None:
    x = torch.randn(32, 64)
    compiled = graphwright.compile(model(), x, cache=False)
    expected = compiled(x)
    found = compiled.profile(x, rounds=3)
    assert [row.kernel for row in found.rows] == list(compiled.report().kernels)
    assert all(row.measured_us > 0 for row in found.rows)
    assert found.total_us == pytest.approx(sum(row.measured_us for row in found.rows))
    assert "kernel calls" in found.text()
    assert torch.equal(compiled(x), expected), "calls after a profile are as before"


def test_regions_on_both_sides_of_a_pytorch_operator() -> None:
    class Between(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x @ x)
            return torch.linalg.inv(y + 10 * torch.eye(16)).sum(0)

    x = torch.rand(16, 16)
    compiled = graphwright.compile(Between(), x, cache=False)
    rows = compiled.profile(x, rounds=2).rows
    steps = [row.kernel.step for row in rows]
    assert steps == sorted(set(steps))
    assert all(row.measured_us > 0 for row in rows)


def test_the_larger_kernel_takes_longer() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a @ a, b @ b

    inputs = (torch.randn(8, 8), torch.randn(512, 512))
    compiled = graphwright.compile(Two(), inputs, cache=False)
    small, large = compiled.profile(*inputs, rounds=5).rows
    assert large.measured_us > small.measured_us  # 262144 times the arithmetic


def test_refusals() -> None:
    x = torch.randn(32, 64)
    compiled = graphwright.compile(model(), x, cache=False)
    with pytest.raises(InputError, match="rounds"):
        compiled.profile(x, rounds=0)
    with pytest.raises(InputError):
        compiled.profile(torch.randn(3, 3))


def test_a_prediction_counts_the_activation_of_a_depthwise_convolution() -> None:
    image = torch.randn(1, 32, 24, 24)

    def predicted(activation: torch.nn.Module) -> float:
        model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1, groups=32), activation).eval()
        kernels = graphwright.compile(model, (image,), verify=False).report().kernels
        (found,) = [k.predicted_us for k in kernels if k.algorithm == "depthwise conv"]
        assert found is not None
        return found

    assert predicted(torch.nn.SiLU()) > predicted(torch.nn.ReLU())
