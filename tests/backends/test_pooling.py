"""Pooling with every edge torch has: padding, ceil_mode, dilation, uneven bins, NaN, both layouts."""

from __future__ import annotations

import functools
import math
from typing import Any

import lowering_harness
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import graphwright.passes.dialect as dialect

aten = torch.ops.aten
check = functools.partial(lowering_harness.check, shipped=True)

torch.manual_seed(0)
LINE, PLANE, BLOCK = torch.randn(2, 3, 11), torch.randn(2, 3, 9, 10), torch.randn(1, 2, 5, 6, 7)

MAX = [
    (aten.max_pool1d.default, LINE, [3], [2], [1]),
    (aten.max_pool1d.default, LINE[0], [2]),
    (aten.max_pool2d.default, PLANE, [3, 3], [2, 2], [1, 1]),
    (aten.max_pool2d.default, PLANE, [2, 3], [], [0, 1], [2, 1], True),
    (aten.max_pool2d.default, PLANE.to(torch.int64), [2, 2]),
    (aten.max_pool2d.default, PLANE.half(), [2, 2], [1, 1]),
    (aten.max_pool2d.default, PLANE[:0], [2, 2]),
    (aten.max_pool3d.default, BLOCK, [2, 2, 3], [2, 1, 2], [1, 0, 1]),
    (aten.max_pool2d_with_indices.default, PLANE, [3, 2], [2, 1], [1, 1], [1, 1], True),
    (aten.max_pool2d_with_indices.default, PLANE[0], [2, 2], [2, 2], [0, 0], [2, 3]),
    (aten.max_pool3d_with_indices.default, BLOCK, [2, 2, 2], [], [1, 1, 1]),
    (aten.adaptive_max_pool1d.default, LINE, [4]),
    (aten.adaptive_max_pool2d.default, PLANE, [4, 5]),
    (aten.adaptive_max_pool3d.default, BLOCK, [2, 6, 3]),
]
AVERAGE = [
    (aten.avg_pool1d.default, LINE, [3], [2], [1]),
    (aten.avg_pool1d.default, LINE, [3], [2], [1], True, False),
    (aten.avg_pool2d.default, PLANE, [3, 3], [2, 2], [1, 1]),
    (aten.avg_pool2d.default, PLANE, [2, 3], [], [1, 0], True),
    (aten.avg_pool2d.default, PLANE, [3, 3], [3, 3], [1, 1], True, False),
    (aten.avg_pool2d.default, PLANE, [3, 3], [2, 2], [1, 1], True, True, 5),
    (aten.avg_pool2d.default, PLANE.half(), [3, 3], [2, 2], [1, 1]),
    (aten.avg_pool3d.default, BLOCK, [2, 2, 3], [2, 1, 2], [1, 1, 1], True, False),
    (aten.adaptive_avg_pool1d.default, LINE, [4]),
    (aten.adaptive_avg_pool2d.default, PLANE, [1, 1]),
    (aten.adaptive_avg_pool2d.default, PLANE, [3, 5]),
    (aten._adaptive_avg_pool2d.default, PLANE[0], [4, 20]),
    (aten._adaptive_avg_pool3d.default, BLOCK, [2, 6, 3]),
    (aten.adaptive_avg_pool3d.default, BLOCK.double(), [1, 1, 1]),
]


@pytest.mark.parametrize("case", MAX, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_max_pooling_is_exact(case: tuple[Any, ...]) -> None:
    check(*case, rtol=0, atol=0)


@pytest.mark.parametrize("case", AVERAGE, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_average_pooling(case: tuple[Any, ...]) -> None:
    check(*case)


def test_max_pooling_keeps_nan_and_minus_infinity() -> None:
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 1, 1] = math.nan
    x[0, 0, 3:, 3:] = -math.inf
    for stride in ([2, 2], [1, 1]):
        check(aten.max_pool2d.default, x, [2, 2], stride)
        check(aten.max_pool2d_with_indices.default, x, [2, 2], stride)
    check(aten.adaptive_max_pool2d.default, x, [2, 3])


def test_indices_are_of_the_first_of_equals() -> None:
    check(aten.max_pool2d_with_indices.default, torch.zeros(1, 2, 5, 5), [3, 3], [2, 2], [1, 1])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_dialect_pools(layout: str) -> None:
    x = PLANE if layout == "NCHW" else PLANE.permute(0, 2, 3, 1).contiguous()
    for padding, ceil_mode in (([1, 1, 1, 1], True), ([0, 1, 1, 0], False), ([0, 0, 0, 0], False)):
        check(dialect.max_pool2d, x, [3, 3], [2, 2], padding, [1, 1], ceil_mode, layout)
        check(dialect.avg_pool2d, x, [3, 3], [2, 2], padding, ceil_mode, True, None, layout)
    check(dialect.avg_pool2d, x, [3, 2], [2, 2], [1, 1, 1, 1], True, False, None, layout)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    extent=st.integers(1, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil_mode=st.booleans(),
    counted=st.booleans(),
)
def test_any_window(extent: int, kernel: int, stride: int, padding: int, ceil_mode: bool, counted: bool) -> None:
    assume(padding <= kernel // 2 and extent + 2 * padding >= kernel)
    x = torch.randn(1, 2, extent)
    check(aten.max_pool1d.default, x, [kernel], [stride], [padding], [1], ceil_mode)
    check(aten.avg_pool1d.default, x, [kernel], [stride], [padding], ceil_mode, counted)
