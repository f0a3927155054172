"""Resampling: the positions are torch's (nearest is exact), the weighted sums within rounding."""

from __future__ import annotations

import functools
import math
from typing import Any

import lowering_harness
import pytest
import torch
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import check_refused
from tvm import te
from tvm.ir import TensorLoad

from graphwright.backends.gpu.each import one_thread_each
from graphwright.backends.lowering.grid_sample import grid_sampler
from graphwright.backends.lowering.registry import Out

aten = torch.ops.aten
check = functools.partial(lowering_harness.check, shipped=True)

torch.manual_seed(0)
LINE, PLANE, BLOCK = torch.randn(2, 3, 11), torch.randn(2, 3, 9, 10), torch.randn(1, 2, 5, 6, 4)

NEAREST = [
    (aten.upsample_nearest1d.default, LINE, [7]),
    (aten.upsample_nearest1d.vec, LINE, None, [1.7]),
    (aten.upsample_nearest2d.default, PLANE, [18, 20]),
    (aten.upsample_nearest2d.default, PLANE, [7, 23], 0.8, 2.3),
    (aten.upsample_nearest2d.default, PLANE.to(torch.uint8), [4, 31]),
    (aten.upsample_nearest2d.vec, PLANE, None, [2.0, 2.0]),
    (aten.upsample_nearest2d.vec, PLANE, [9, 10], None),
    (aten.upsample_nearest3d.default, BLOCK, [10, 3, 4]),
    (aten._upsample_nearest_exact1d.default, LINE, [7]),
    (aten._upsample_nearest_exact2d.default, PLANE, [18, 15]),
    (aten._upsample_nearest_exact2d.vec, PLANE, None, [0.6, 1.9]),
    (aten._upsample_nearest_exact3d.default, BLOCK, [10, 3, 4]),
]
WEIGHTED = [
    (aten.upsample_linear1d.default, LINE, [7], False, 0.7),
    (aten.upsample_linear1d.vec, LINE, [20], True, None),
    (aten.upsample_bilinear2d.default, PLANE, [18, 20], False),
    (aten.upsample_bilinear2d.default, PLANE, [18, 20], True),
    (aten.upsample_bilinear2d.default, PLANE, [9, 3], False),
    (aten.upsample_bilinear2d.default, PLANE, [1, 1], True),
    (aten.upsample_bilinear2d.vec, PLANE, None, False, [1.3, 0.7]),
    (aten.upsample_bilinear2d.vec, PLANE.double(), [12, 13], True, None),
    (aten.upsample_trilinear3d.default, BLOCK, [3, 7, 8], False),
    (aten.upsample_bicubic2d.default, PLANE, [13, 7], False),
    (aten.upsample_bicubic2d.default, PLANE, [13, 10], True),
    (aten.upsample_bicubic2d.vec, PLANE, None, False, [2.0, 0.6]),
]


@pytest.mark.parametrize("case", NEAREST, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_nearest_is_exact(case: tuple[Any, ...]) -> None:
    check(*case, rtol=0, atol=0)


@pytest.mark.parametrize("case", WEIGHTED, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_weighted(case: tuple[Any, ...]) -> None:
    # The position is a difference of numbers around 10, its fraction exact to 1e-6; so are the weights.
    check(*case, rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(before=st.integers(1, 40), after=st.integers(1, 60), exact=st.booleans())
def test_any_nearest_size_is_exact(before: int, after: int, exact: bool) -> None:
    op = aten._upsample_nearest_exact1d.default if exact else aten.upsample_nearest1d.default
    check(op, torch.arange(float(before)).reshape(1, 1, -1), [after], rtol=0, atol=0)


def test_linear_of_integers_is_refused() -> None:
    check_refused(aten.upsample_bilinear2d.default, PLANE.to(torch.uint8), [4, 4], False, because="uint8")


GRID = torch.randn(2, 5, 6, 2) * 1.2


@pytest.mark.parametrize(
    ("mode", "padding", "align_corners"),
    [(0, 0, False), (0, 1, True), (0, 2, False), (1, 0, True), (1, 2, True), (2, 0, True), (2, 2, False)],
)
def test_grid_sampler(mode: int, padding: int, align_corners: bool) -> None:
    # Positions up to 10 rounded differently by an ulp; cubic weights amplify that a little.
    check(aten.grid_sampler_2d.default, PLANE, GRID, mode, padding, align_corners, rtol=1e-4, atol=2e-5)


def test_grid_sampler_of_as_many_images_as_taps() -> None:
    """Two taps and two images: rows of the weights are of one image only."""
    check(
        aten.grid_sampler_2d.default,
        torch.randn(2, 3, 5, 20),
        torch.randn(2, 13, 10, 2),
        0,
        1,
        True,
        atol=2e-5,
        rtol=1e-4,
    )


def test_positions_live_until_their_last_reader() -> None:
    """Positions of the first dim are read again for its weights, after those of the second were computed."""
    x, grid = torch.randn(1, 3, 9, 10), torch.randn(1, 5, 6, 2)
    check(aten.grid_sampler_2d.default, x, grid, 2, 1, False, rtol=1e-4, atol=2e-5)


def test_grid_sampler_of_volumes() -> None:
    grid = torch.randn(1, 3, 4, 2, 3)
    check(aten.grid_sampler_3d.default, BLOCK, grid, 0, 0, False, rtol=1e-4, atol=2e-5)


def test_grid_sampler_of_volumes_stays_short_in_one_expression() -> None:
    """A thread of a GPU has it so: TVM took half a minute where there were 2,312 loads."""
    source, grid = te.placeholder((1, 2, 5, 6, 4)), te.placeholder((1, 3, 4, 2, 3))
    result = grid_sampler(Out((1, 2, 3, 4, 2), "float32"), source, grid, 0, 2, False)
    function = one_thread_each(te.create_prim_func([source, grid, result]), 108, 32)
    loads: list[object] = []
    tvm_ffi.structural_walk(function.body, [(TensorLoad, loads.append)])
    assert len(loads) < 1500, len(loads)


def test_grid_sampler_reads_nothing_outside() -> None:
    wild = torch.tensor([1e30, -1e30, math.inf, -math.inf, 5.0, -5.0]).reshape(1, 1, 3, 2).expand(2, 1, 3, 2)
    for mode in (0, 1):
        check(aten.grid_sampler_2d.default, PLANE, wild, mode, 1, True)
