"""argmax, argmin, max and min along a dim on the emulator: the first of equals, NaN before all, in both lane orders."""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.extreme import Rows, extreme
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

SIZES = {"block": (3, 700, 1), "across": (2, 97, 5), "alone": (7, 20, 41), "line": (1, 5000, 1)}
DTYPES = ("float32", "float64", "int64", "uint8", "bool")
NAMES = [f"{size}_{dtype}_{end}" for size in SIZES for dtype in DTYPES for end in ("largest", "smallest")]
# Of 256 threads a row. TVM adds one between: it puts the second 16 bests where the first 256 were, which each thread
# reads from only where it writes itself.
BARRIERS, NEEDED = 3, (0, 2)


@functools.cache
def compiled():
    functions = {}
    for name in NAMES:
        size, dtype, end = name.split("_")
        shape = SIZES[size]
        reduced = (shape[0], shape[2])
        functions[name] = extreme(Rows(*shape), end == "largest", (shape, dtype), reduced, reduced)
    sources, launches = kernels.generated(functions, lookup("a100"))
    broken = kernels.without(sources["line_float32_largest"], "sync")
    assert len(broken) == BARRIERS
    variants = {f"line_float32_largest:sync {number}": text for number, text in enumerate(broken)}
    return kernels.compiled({**sources, **variants}, launches)


def drawn(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Few different numbers, so that the extreme is there several times; NaN in some rows, infinities in others."""
    torch.manual_seed(0)
    x = torch.randint(0, 2, shape) > 0 if dtype == "bool" else torch.randint(-4, 5, shape).to(getattr(torch, dtype))
    if x.is_floating_point():
        x[0, x.shape[1] // 2] = x[0, x.shape[1] - 1] = torch.nan
        x[-1, 3:6, -1] = torch.inf
        x[-1, 7:9, -1] = -torch.inf
    if dtype == "int64":
        x[0, 5], x[0, 6] = torch.iinfo(x.dtype).max, torch.iinfo(x.dtype).min
    return x


def wrong(name: str, reverse: bool) -> bool:
    size, dtype, end = name.split(":")[0].split("_")
    x = drawn(SIZES[size], dtype)
    exact = (torch.max if end == "largest" else torch.min)(x, 1)
    values = np.zeros(exact.values.shape, x.numpy().dtype)
    places = np.full(values.shape, -1, np.int64)
    failed = compiled()(name, {"in0": x.numpy(), "out0": values, "out1": places}, reverse)
    same = np.array_equal(values, exact.values.numpy(), equal_nan=x.is_floating_point())
    return failed is not None or not same or not np.array_equal(places, exact.indices.numpy())


@pytest.mark.parametrize("reverse", [False, True], ids=["upwards", "downwards"])
def test_the_first_extreme_is_found_in_both_orders_of_lanes(reverse):
    assert [name for name in NAMES if wrong(name, reverse)] == []


def test_every_barrier_of_ours_is_needed():
    for number in NEEDED:
        variant = f"line_float32_largest:sync {number}"
        assert any(wrong(variant, reverse) for reverse in (False, True)), variant


@pytest.mark.parametrize(
    ("rows", "threads", "blocks"),
    [
        (Rows(8, 50_257, 1), (1, 256), 8),
        (Rows(1, 1000, 3136), (32, 8), 98),
        (Rows(1, 63, 1000), (256, 1), 4),
        (Rows(4, 100, 1), (1, 64), 4),
    ],
)
def test_a_long_row_has_a_block_and_short_ones_share_it(rows, threads, blocks):
    assert (rows.across, rows.down) == threads
    assert rows.blocks == blocks
