"""Rows sorted by ranks and merges: the stable order of PyTorch, NaN behind all numbers, in both orders of lanes."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.own_order import in_own_order
from graphwright.backends.gpu.sorting import sorting
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# Shape, dtype, axis, descending, how many are kept: last runs that are cut off, of a single element, and whole.
CASES = {
    "floats": ((2, 150, 3), "float32", 1, False, 150),
    "integers": ((3, 129), "int64", 1, True, 129),
    "truths": ((64, 5), "bool", 0, False, 64),
    "best": ((2, 200), "float32", 1, True, 7),
}


def drawn(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Few different numbers, so that the order of equals shows."""
    torch.manual_seed(0)
    x = torch.randint(-9, 10, shape)
    if dtype == "float32":
        x = x.float()
        x.view(-1)[3:90:5], x.view(-1)[1], x.view(-1)[2] = torch.nan, torch.inf, -torch.inf
    return x > 0 if dtype == "bool" else x


def test_rows_are_in_the_stable_order():
    hw = lookup("a100")
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    functions = {name: in_own_order(sorting(*case), target, hw.cores) for name, case in CASES.items()}
    sources, launches = kernels.generated(functions, hw)
    run = kernels.compiled(sources, launches)
    for reverse in (False, True):
        for name, (shape, dtype, axis, descending, kept) in CASES.items():
            x, function = drawn(shape, dtype), functions[name]
            source, values, places = function.params
            buffers = [values, places, *function.body.block.alloc_buffers]
            arrays = {str(b.name): np.zeros([int(n) for n in b.shape], str(b.dtype)) for b in buffers}
            arrays[str(source.name)] = x.numpy()
            for part in [key for key in launches if key.rpartition("_")[0] == name]:
                assert run(part, arrays, reverse) is None
            expected = torch.sort(x, stable=True, dim=axis, descending=descending)
            for result, exact in zip((values, places), expected, strict=True):
                found, wanted = torch.from_numpy(arrays[str(result.name)]), exact.narrow(axis, 0, kept)
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
