"""Weights that are whole numbers of steps already: as training for 8 bits leaves them, or another quantiser.

A row lies on a grid where some m of 1 .. 127 makes every weight a whole number of largest / m. Rounding it by that step
changes nothing, where the usual one, largest / 127, would round a second time. A row of arbitrary numbers lies on none
but by chance, and then what rounding it adds is below SLACK of a step.
"""

from __future__ import annotations

import torch

SLACK = 1e-3  # of a step: float32's rounding of 127 steps, and of a batch norm folded in, is a fiftieth of it
ROWS, COLUMNS = 8, 64  # looked at first
LIMIT = 127


def grid_steps(weight: torch.Tensor) -> torch.Tensor | None:
    """A step for each row of weight[N, ...], 0 where it lies on no grid; None where hardly any row does."""
    rows = weight.detach().float().flatten(1).abs()
    if not rows.numel():
        return None
    some = _steps(rows[:: max(1, len(rows) // ROWS)][:, :: max(1, rows.shape[1] // COLUMNS)])
    if float((some > 0.0).float().mean()) < 0.5:
        return None
    steps = _steps(rows)
    return steps if bool((steps > 0.0).any()) else None


def on_grid(weight: torch.Tensor) -> bool:
    """Whether every row of weight[N, ...] that is not all zeros lies on a grid."""
    steps = grid_steps(weight)
    if steps is None:
        return False
    return bool(((steps > 0.0) | (weight.detach().flatten(1) == 0).all(1)).all())


def _steps(rows: torch.Tensor) -> torch.Tensor:
    """The largest step of each row of non-negative numbers, or 0."""
    largest = rows.amax(1)
    found = torch.zeros_like(largest)
    left = (largest > 0.0) & largest.isfinite()
    some = rows[:, :: max(1, rows.shape[1] // COLUMNS)]
    for m in range(1, LIMIT + 1):
        step = largest / m
        likely = (left & _whole(some, step)).nonzero()[:, 0]
        exact = likely[_whole(rows[likely], step[likely])]
        found[exact] = step[exact]
        left[exact] = False
        if not bool(left.any()):
            break
    return found


def _whole(rows: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Which rows are whole numbers of their step."""
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.bool)
    codes = rows / step.clamp_min(2.0**-126)[:, None]
    return (codes - codes.round()).abs().amax(1) <= SLACK
