"""How much Winograd's algorithm rounds, and where that is too much: decided from its points and the channels alone.

For operands of independent random numbers a sum of C products, one after the other, errs by u * R * C / sqrt(2) times
the size of a term: u float32's unit roundoff, R the root mean square of a rounding in units of it. In one dimension

    out[k] = sum over points i of A[k,i] M[i],   M[i] = sum over C of V[i] U[i],   |V[i]| ~ |B_i|, |U[i]| ~ |G_i|

so errors grow by S = sqrt(mean over k of sum over i of (A[k,i] |B_i| |G_i|)^2), in two dimensions by S^2, and the
transforms, which round a few times at either end, add as much as T further channels would. The direct sum has 9 C
terms:

    growth(m, C) = S^2 / 9 * sqrt(1 + 2 T / C)            m = 2: 0.56, m = 4: 1.71 for many channels

Measured against float64 with 8 to 2048 channels, R and T fit within a sixth. Eager sums in blocks where there are many
terms, or not: its error was between 0.4 and 1 of the single sum's. F(m x m) is therefore refused where it errs by more
than twice the single sum, which keeps it within four times eager's error; and beyond 2e-5 of the result in any case.
Error norms as in Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

UNIT = 2.0**-24
ROUNDING = 0.43  # R
TRANSFORMS = 5.0  # T
MOST_GROWTH = 2.0
MOST_ERROR = 2e-5


def refusal(pairs: Sequence[float], channels: int) -> str | None:
    """Why the points 0, +-pairs and infinity round too much over `channels`, or None."""
    growth, error = error_growth(pairs, channels), relative_error(pairs, channels)
    if growth > MOST_GROWTH:
        return f"it rounds {growth:.1f} times as much as the direct sum"
    if error > MOST_ERROR:
        return f"its error over {channels} channels is {error:.0e} of the result"
    return None


def error_growth(pairs: Sequence[float], channels: int) -> float:
    """The error over that of the direct sum, one product after the other."""
    return amplification(pairs) / 9 * sqrt(1 + 2 * TRANSFORMS / channels)


def relative_error(pairs: Sequence[float], channels: int) -> float:
    """The expected error, relative to the result (both as L2 norms)."""
    direct = UNIT * ROUNDING * 9 * channels / sqrt(2) / (3 * sqrt(channels))
    return direct * error_growth(pairs, channels)


def amplification(pairs: Sequence[float]) -> float:
    """S^2 of F(m x m, 3 x 3) with points 0, +-pairs and infinity."""
    points = [0.0, *(s * p for p in pairs for s in (1.0, -1.0))]
    outputs = len(points) - 1
    factors = []
    for i, p in enumerate(points):
        scale = prod(p - q for q in points[:i] + points[i + 1 :])
        taps = sum((p**k / scale) ** 2 for k in range(3))
        factors.append(_norm(points[:i] + points[i + 1 :]) * taps)
    total = sum(p ** (2 * k) * f for k in range(outputs) for p, f in zip(points, factors, strict=True))
    return (total + _norm(points)) / outputs  # infinity: one tap, the last output


def _norm(roots: Sequence[float]) -> float:
    """The squared norm of the coefficients of the product of (x - root): a row of B^T."""
    coefficients = [1.0]
    for root in roots:
        shifted = [0.0, *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, 0.0], strict=True)]
    return sum(c * c for c in coefficients)
