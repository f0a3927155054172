"""Fit the polynomials of `backends/kernels/vector_math.py` and print them with their error.

    python benchmarks/fit_polynomials.py

Minimax in a weighted sense by Lawson's iteration: least squares on Chebyshev nodes, the weights multiplied by the error
until it levels out (C. L. Lawson, Contributions to the theory of linear least maximum approximation, 1961). Rationals
are linearised as p - f q and divided by the last q (C. K. Sanathanan and J. Koerner, 1963). A polynomial's
coefficients are rounded to float32 one by one from the lowest order, the rest fitted anew, so that the rounding is made
good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray
ULP = 2.0**-24


@dataclass(frozen=True)
class Fit:
    """p(x) / q(x), coefficients from the lowest order, and its largest weighted error."""

    p: Array
    q: Array
    error: float


def nodes(low: float, high: float, count: int = 4000) -> Array:
    """Chebyshev nodes."""
    return 0.5 * (low + high) - 0.5 * (high - low) * np.cos(np.pi * (np.arange(count) + 0.5) / count)


def lawson(
    x: Array, f: Array, weight: Array, p_degree: int, q_degree: int, fixed: Mapping[int, float], iterations: int = 200
) -> Fit:
    """Minimise max |weight (p / q - f)| with q(0) = 1 and the coefficients of p in `fixed` given."""
    scale = np.max(np.abs(x))
    t = x / scale
    free = [i for i in range(p_degree + 1) if i not in fixed]
    given = sum((c * x**i for i, c in fixed.items()), np.zeros_like(x))
    load, q, best = np.ones_like(x), np.ones_like(x), None
    for _ in range(iterations):
        columns = np.stack([t**i for i in free] + [-f * t**j for j in range(1, q_degree + 1)], 1)
        w = np.sqrt(load) * weight / np.abs(q)
        c = np.linalg.lstsq(columns * w[:, None], (f - given) * w, rcond=None)[0]
        p = given + sum(c[k] * t**i for k, i in enumerate(free))
        q = 1 + sum((c[len(free) + j - 1] * t**j for j in range(1, q_degree + 1)), np.zeros_like(x))
        error = np.abs(weight * (p / q - f))
        if best is None or error.max() < best.error:
            coefficients = np.array([fixed.get(i, 0.0) for i in range(p_degree + 1)])
            coefficients[free] = [c[k] / scale**i for k, i in enumerate(free)]
            divisor = np.array([1.0] + [c[len(free) + j - 1] / scale**j for j in range(1, q_degree + 1)])
            best = Fit(coefficients, divisor, float(error.max()))
        load = load * (error / error.max() + 1e-12)
        load /= load.max()
    assert best is not None
    return best


def fit(x: Array, f: Array, weight: Array, p_degree: int, q_degree: int = 0, first: float | None = None) -> Fit:
    """The fit with coefficients in float32; `first` fixes p(0)."""
    fixed = {} if first is None else {0: first}
    if q_degree:
        best = lawson(x, f, weight, p_degree, q_degree, fixed)
        p, q = (c.astype(np.float32).astype(float) for c in (best.p, best.q))
    else:
        for i in range(p_degree + 1):
            if i not in fixed:
                fixed[i] = float(np.float32(lawson(x, f, weight, p_degree, 0, fixed, 60).p[i]))
        p, q = np.array([fixed[i] for i in range(p_degree + 1)]), np.ones(1)
    error = np.abs(weight * (np.polyval(p[::-1], x) / np.polyval(q[::-1], x) - f))
    return Fit(p, q, float(error.max()))


def report(name: str, result: Fit) -> None:
    """Print the coefficients and the error in units of float32's roundoff."""
    print(f"{name}: {result.error / ULP:.3f} ulp")
    print("   p", [float(c) for c in result.p])
    if len(result.q) > 1:
        print("   q", [float(c) for c in result.q])


def main() -> None:
    """Fit them all; the weights turn the error of the fitted part into the relative error of the function."""
    r = nodes(-0.3466, 0.3466)
    r = r[np.abs(r) > 1e-3]
    f = (np.expm1(r) - r) / r**2
    report("exp: 1 + r + r^2 p(r)", fit(r, f, r**2 / np.exp(r), 4))
    report("expm1: r + r^2 p(r)", fit(r, f, r**2 / np.abs(np.expm1(r)), 5))

    f = nodes(-0.5, 0.5)
    report("2^f: p(f)", fit(f, np.exp2(f), 1 / np.exp2(f), 6, first=1.0))

    report("255 * 2^f: p(f)", fit(f, 255 * np.exp2(f), 1 / (255 * np.exp2(f)), 3))

    m = nodes(np.sqrt(0.5) - 1, np.sqrt(2) - 1)
    m = m[np.abs(m) > 5e-3]
    rest = (np.log1p(m) - m + m * m / 2) / m**3
    report("log(1 + m): m - m^2/2 + m^3 p(m)", fit(m, rest, np.abs(m**3 / np.log1p(m)), 7))

    x = nodes(0, 0.8)
    x = x[x > 1e-3]
    erf = torch.special.erf(torch.tensor(x)).numpy()
    report("erf: x + x p(x^2)", fit(x * x, erf / x - 1, x / erf, 5))
    x = nodes(0.8, 3.93)
    erfc = torch.special.erfc(torch.tensor(x)).numpy()
    report("log erfc: p(x)", fit(x, np.log(erfc), erfc / (1 - erfc), 6))

    # The tail is needed less exactly the smaller it is: the weight falls with t^4 from t = 3 on.
    t = nodes(0, 13.27, 6000)
    tail = 0.5 * torch.special.erfcx(torch.tensor(t / np.sqrt(2))).numpy()
    report("normal tail: p(t) / q(t)", fit(t, tail, 1 / tail / (1 + (t / 3) ** 4), 3, 4))


if __name__ == "__main__":
    main()
