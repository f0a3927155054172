"""Sums over one element, with work behind them, by every schedule that takes them: each adds a bias once."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi
from tvm import te
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.schedule import schedules
from graphwright.backends.gpu.single_terms import assign_single_terms
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")


def a_sum(extent: int):
    """Over so many elements of a row, and a bias."""
    x, bias = te.placeholder((8, extent), "float32", "in0"), te.placeholder((1,), "float32", "in1")
    k = te.reduce_axis((0, extent), "k")
    total = te.compute((8,), lambda i: te.sum(x[i, k] * x[i, k], axis=k), "total")
    return te.create_prim_func([x, bias, te.compute((8,), lambda i: total[i] + bias[0], "out")])


def test_a_bias_behind_a_sum_over_one_element_is_added_once():
    hw = lookup("a100")
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    functions = {f"by_{n}": function for n, (_, function) in enumerate(schedules(a_sum(1), target, 108))}
    run = kernels.compiled(*kernels.generated(functions, hw))
    x, bias = np.arange(8, dtype="float32").reshape(8, 1), np.full(1, 0.5, "float32")
    for name in functions:
        out = np.zeros(8, "float32")
        run(name, {"in0": x, "in1": bias, "out": out})
        np.testing.assert_array_equal(out, x[:, 0] ** 2 + 0.5, name)
    assert functions


def test_other_sums_stay():
    function = a_sum(2)
    assert tvm_ffi.structural_equal(assign_single_terms(function), function)
    assert not tvm_ffi.structural_equal(assign_single_terms(a_sum(1)), a_sum(1))
