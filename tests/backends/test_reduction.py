"""Reductions, scans, normalisation and constants against PyTorch: NaN, ties, empty and 0-dim tensors, every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from lowering_harness import Checks, check_refused

aten = torch.ops.aten


def cases() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator)
    spoiled = x.clone()
    spoiled[0, 1, 2] = math.nan
    spoiled[2, 3, 4] = math.inf
    spoiled[2, 3, 3] = math.nan
    spoiled[1] = -math.inf
    integers = torch.randint(-5, 5, (3, 4, 5), generator=generator)
    return [x, spoiled, integers, integers > 0, torch.tensor(2.5), x.half(), x.bfloat16(), x.double()]


def dims(x: torch.Tensor) -> list[int]:
    return [0, 1, -1] if x.ndim > 1 else [0]


def test_sums_and_extremes() -> None:
    checks = Checks()
    for x in (*cases(), torch.zeros(3, 0, 4)):
        for op in (aten.sum, aten.any, aten.all, aten.prod):
            if op is not aten.prod or x.dtype != torch.float16:
                checks.add(op.default, x)
        for dim in [1] if x.numel() == 0 else dims(x):
            keepdim = dim == 1
            checks.add(aten.sum.dim_IntList, x, [dim], keepdim)
            checks.add(aten.any.dims, x, [dim], keepdim)
            checks.add(aten.all.dim, x, dim, keepdim)
            checks.add(aten.count_nonzero.dim_IntList, x, [dim])
            if x.is_floating_point():
                checks.add(aten.mean.dim, x, [dim], keepdim)
            if x.numel():
                checks.add(aten.amax.default, x, [dim], keepdim)
                checks.add(aten.amin.default, x, [dim], keepdim)
    checks.add(aten.sum.dim_IntList, cases()[0], [])
    checks.add(aten.sum.dim_IntList, cases()[0], [0, 2], dtype=torch.float64)
    checks.run()


def test_positions_of_extremes() -> None:
    checks = Checks()
    for x in cases():
        for dim in dims(x):
            checks.add(aten.max.dim, x, dim, dim == 1)
            checks.add(aten.min.dim, x, dim, dim == 0)
            if x.dtype != torch.bool:
                checks.add(aten.argmax.default, x, dim, dim == 0)
                checks.add(aten.argmin.default, x, None, dim == 1)
    checks.add(aten.argmax.default, torch.tensor([1.0, 3, 3, 2]))
    checks.add(aten.max.dim, torch.full((4,), -math.inf), 0)
    checks.run()


def test_variance() -> None:
    checks = Checks()
    for x in (x for x in cases() if x.is_floating_point()):
        checks.add(aten.var.correction, x, None, correction=0)
        for dim in dims(x):
            checks.add(aten.var.correction, x, [dim], correction=1, keepdim=True)
            checks.add(aten.std.correction, x, [dim], correction=1)
            if x.isfinite().all():  # PyTorch's mean of infinities is NaN here, infinite in mean()
                checks.add(aten.var_mean.correction, x, [dim], correction=2.5)
    checks.run()


@pytest.mark.parametrize("order", [0, 1, 2, 3, -1, math.inf, -math.inf], ids=str)
def test_norms(order: float) -> None:
    checks = Checks()
    x, spoiled, *_ = cases()
    checks.add(aten.linalg_vector_norm.default, x, order, [1])
    checks.add(aten.linalg_vector_norm.default, spoiled, order)
    checks.add(aten.linalg_vector_norm.default, x.bfloat16(), order, [0, 1], True)
    checks.run()


def test_scans() -> None:
    checks = Checks()
    for x in (*cases(), torch.zeros(0, 3), torch.tensor([1.0, 3, 3, 2, 3, 5, 5])):
        for dim in {0, x.ndim // 2}:
            checks.add(aten.cumsum.default, x, dim)
            checks.add(aten.cumprod.default, x, dim)
            checks.add(aten.cummax.default, x, dim)
            checks.add(aten.cummin.default, x, dim)
            if x.is_floating_point():
                checks.add(aten.logcumsumexp.default, x, dim)
    checks.run()


def test_softmax() -> None:
    checks = Checks()
    x, spoiled, _, _, scalar, half, brain, double = cases()
    for case, dim in ((x, 0), (x, 1), (spoiled, -1), (scalar, 0), (half, 1), (brain, -1), (double, -1)):
        checks.add(aten.softmax.int, case, dim)
        checks.add(aten.log_softmax.int, case, dim)
    checks.add(aten.softmax.int, half, 1, torch.float32)
    checks.add(aten._softmax.default, x, 2, False)
    checks.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_normalisation(dtype: torch.dtype) -> None:
    checks = Checks()
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, image = random(3, 4, 5), random(2, 6, 4, 3)
    checks.add(aten.layer_norm.default, x, [5], random(5), random(5))
    checks.add(aten.layer_norm.default, x, [4, 5], random(4, 5))
    checks.add(aten.native_layer_norm.default, x, [5], random(5), None, 1e-3)
    checks.add(aten.rms_norm.default, x, [5], random(5))
    checks.add(aten.rms_norm.default, x, [4, 5], None, 1e-3)
    checks.add(aten.group_norm.default, image, 3, random(6), random(6))
    checks.add(aten.native_group_norm.default, image, random(6), None, 2, 6, 12, 2, 1e-4)
    statistics = (random(6), random(6), random(6), random(6).abs() + 0.1)
    checks.add(aten.batch_norm.default, image, *statistics, False, 0.1, 1e-5, False)
    checks.add(aten._native_batch_norm_legit_no_training.default, image, *statistics, 0.1, 1e-5)
    checks.run()


def test_training_batch_norm_is_refused() -> None:
    ones = torch.ones(6)
    arguments = (torch.randn(2, 6, 4, 3), ones, ones, ones.clone(), ones.clone(), True, 0.1, 1e-5, False)
    check_refused(aten.batch_norm.default, *arguments, because="updates its statistics")


def test_constants() -> None:
    checks = Checks()
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
        for shape in ((2, 9), (), (0, 4)):
            checks.add(aten.full.default, shape, 1, dtype=dtype)
            checks.add(aten.zeros.default, shape, dtype=dtype)
        checks.add(aten.scalar_tensor.default, 2, dtype=dtype)
    checks.add(aten.full_like.default, torch.zeros(3), 0.1)
    checks.add(aten.arange.start_step, 0, 1, 0.1)
    checks.add(aten.arange.start_step, 10, -3, -2)
    checks.add(aten.arange.default, 7)
    checks.add(aten.eye.m, 3, 5, dtype=torch.int64)
    checks.add(aten.tril.default, cases()[0], 1)
    checks.add(aten.triu.default, cases()[3], -1)
    checks.run()


def test_lines_that_share_a_loop_keep_apart_on_many_threads() -> None:
    checks = Checks()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (5, 61, 131), generator=generator).float()
    x[1, 2, 3], x[4, 60, 130], x[0, 0, 0] = math.nan, math.nan, math.inf
    for dim in (0, 1, 2):
        checks.add(aten.max.dim, x, dim)
        checks.add(aten.argmin.default, x, dim)
        checks.add(aten.cumsum.default, x, dim)
        checks.add(aten.cummax.default, x, dim)
    checks.run()
