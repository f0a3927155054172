"""Matrix products and attention as tensor expressions, against PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lowering_harness import Checks, check_refused

aten, dialect = torch.ops.aten, torch.ops.graphwright


def maker(dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (2 * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_products(dtype: torch.dtype) -> None:
    checks, r = Checks(), maker(dtype)
    checks.add(aten.mm.default, r(3, 4), r(4, 5))
    checks.add(aten.mm.default, r(3, 0), r(0, 5))
    checks.add(aten.mm.default, r(0, 4), r(4, 5))
    checks.add(aten.bmm.default, r(2, 3, 4), r(2, 4, 5))
    checks.add(aten.mv.default, r(3, 4), r(4))
    checks.add(aten.dot.default, r(4), r(4))
    for a, b in (((4,), (4, 5)), ((2, 3, 4), (4,)), ((4,), (2, 4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((4,), (4,))):
        checks.add(aten.matmul.default, r(*a), r(*b))
    checks.add(aten.addmm.default, r(5), r(3, 4), r(4, 5), beta=2, alpha=3)
    checks.add(aten.addmv.default, r(3), r(3, 4), r(4))
    checks.add(aten.baddbmm.default, r(2, 3, 5), r(2, 3, 4), r(2, 4, 5), alpha=2)
    if dtype != torch.bfloat16:  # torch rounds after every product of the batch
        checks.add(aten.addbmm.default, r(3, 5), r(2, 3, 4), r(2, 4, 5), alpha=2)
    if dtype.is_floating_point:
        checks.add(aten.addmm.default, math.nan * r(5), r(3, 4), r(4, 5), beta=0)
        checks.add(aten.linear.default, r(2, 3, 4), r(5, 4), r(5))
        checks.add(aten.linear.default, r(4), r(5, 4))
    checks.run()


@pytest.mark.parametrize("activation", [("none", []), ("relu", []), ("gelu", []), ("clamp", [-0.5, 0.5])], ids=str)
def test_products_with_epilogue(activation: tuple[str, list[float]]) -> None:
    checks, r = Checks(), maker(torch.float32)
    checks.add(dialect.linear.default, r(2, 3, 4), r(5, 4), r(5), r(2, 3, 5), *activation)
    checks.add(dialect.matmul.default, r(2, 4, 3), r(2, 5, 4), None, r(2, 3, 5), True, True, *activation)
    checks.run()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2}),  # PyTorch rounds the scores to bfloat16, we do not
    ],
    ids=str,
)
def test_attention(dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    checks, r = Checks(), maker(dtype)
    q, k, v = r(2, 4, 6, 8), r(2, 4, 7, 8), r(2, 4, 7, 5)
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2] = False  # a row that sees nothing is zeros
    attend = aten.scaled_dot_product_attention.default
    checks.add(attend, q, k, v, **tolerance)
    checks.add(attend, q, k, v, None, 0.0, True, **tolerance)
    checks.add(attend, q, k, v, r(2, 1, 6, 7), scale=0.3, **tolerance)
    checks.add(attend, q, k, v, mask, **tolerance)
    checks.add(attend, q, k[:, :2].contiguous(), v[:, :2].contiguous(), enable_gqa=True, **tolerance)
    checks.add(attend, r(3, 4), r(5, 4), r(5, 4), **tolerance)
    checks.add(dialect.attention.default, q, k, v, mask, False, 0.3, **tolerance)
    row = 8 * (4 + 2) + 2 * 8  # q, k and v side by side
    places = [0, 6 * row, 8, row, 32, 6 * row, 8, row, 48, 6 * row, 8, row, 0, 6 * 32, 8, 32]
    joint = r(2, 6, row)
    extents = [2, 4, 2, 6, 6, 8, 8]
    strided = dialect.strided_attention.default
    checks.add(strided, joint, joint, joint, None, True, 0.3, extents, places, [2, 6, 32], **tolerance)
    checks.run()


def test_dropout_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    check_refused(aten.scaled_dot_product_attention.default, q, q, q, None, 0.5, because="random")
