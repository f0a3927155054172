"""scikit-learn's digits, and a small convolutional network trained on them in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] and labels: 1200 to train on, the others to test."""

    images: torch.Tensor
    labels: torch.Tensor

    @staticmethod
    def load() -> Digits:
        """The data; skips the test where scikit-learn is missing."""
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        return Digits(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0, torch.tensor(digits.target))

    @property
    def test(self) -> torch.Tensor:
        """The images of the test."""
        return self.images[1200:]

    @property
    def calibration(self) -> list[torch.Tensor]:
        """Two batches of training images, of the test's shape."""
        count = len(self.test)
        return [self.images[:count], self.images[count : 2 * count]]

    def points(self, run: nn.Module) -> float:
        """Per cent of the test images that `run` gets right."""
        with torch.no_grad():
            return 100.0 * float((run(self.test).argmax(1) == self.labels[1200:]).float().mean())

    def train(
        self,
        model: nn.Module,
        epochs: int = 6,
        rate: float = 3e-3,
        during: Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[object]] | None = None,
    ) -> nn.Module:
        """Train in place with Adam; `during(model, optimiser)` is entered meanwhile."""
        model.train()
        optimiser = torch.optim.Adam(model.parameters(), rate)
        with nullcontext() if during is None else during(model, optimiser):
            for rows in self._batches(epochs):
                optimiser.zero_grad()
                F.cross_entropy(model(self.images[rows]), self.labels[rows]).backward()
                optimiser.step()
        return model.eval()

    def _batches(self, epochs: int) -> Iterator[torch.Tensor]:
        for _ in range(epochs):
            yield from torch.randperm(1200).split(64)


def network() -> nn.Module:
    """The network, not trained."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1)),
        *(nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
