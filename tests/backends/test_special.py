"""Special functions and polynomials against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from lowering_harness import Checks

from graphwright.backends.lowering.polynomials import FAMILIES
from graphwright.backends.lowering.special import BESSEL

aten = torch.ops.aten

# PyTorch evaluates these in float32 with errors of up to 1e-5; we do in float64.
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_functions(dtype: torch.dtype) -> None:
    checks = Checks()
    fixed = torch.tensor([0.0, -0.0, 1, -1, 2, -2, 0.5, 1e-6, -1e-6, 10, 9.5, -9.5, 30, 31, 100, math.nan, 3.3])
    x = torch.cat([fixed, 5 * torch.randn(12, generator=torch.Generator().manual_seed(0))]).to(dtype)
    checks.add(aten.angle.default, x)
    checks.add(aten.special_spherical_bessel_j0.default, x, **LOOSE)
    checks.add(aten.special_erfcx.default, x.clamp(-9, 100), **LOOSE)
    checks.add(aten.digamma.default, x, **LOOSE)
    checks.add(
        aten.erfinv.default, torch.tensor([-1, 1, 0.99, -0.5, 0.2, 0, 0.999, 2, 0.7, math.nan]).to(dtype), **LOOSE
    )
    for n in range(4):
        checks.add(aten.polygamma.default, n, x, **LOOSE)
    checks.add(aten.special_zeta.default, torch.tensor([1, 2, 3, 0.5, 2.5]).to(dtype), x[2:7].abs(), **LOOSE)
    for op in BESSEL:
        checks.add(op, x.clamp(-50, 50), **LOOSE)
        checks.add(op, x.new_empty(2, 0), **LOOSE)
    huge = torch.tensor([29.9, 30.1, 1e3, 1e8, 1e20, 1e30, math.inf]).to(dtype)
    for op in (aten.special_scaled_modified_bessel_k0.default, aten.special_scaled_modified_bessel_k1.default):
        checks.add(op, huge, rtol=1e-4, atol=0)
    checks.run()


def test_polynomials() -> None:
    checks = Checks()
    degrees = torch.tensor([-1.0, 0, 1, 2, 3, 5, 9])
    x = 2 * torch.rand(4, 1, generator=torch.Generator().manual_seed(0)) - 1
    for op in FAMILIES:
        checks.add(op, x, degrees, **LOOSE)
    checks.run()
