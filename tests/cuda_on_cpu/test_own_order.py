"""Loops in an order of their own: a thread for each independent part, and the numbers in both orders of lanes."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tvm import te
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.own_order import is_imperative
from graphwright.backends.gpu.schedule import schedules
from graphwright.backends.lowering import operators  # noqa: F401  (fills the table)
from graphwright.backends.lowering.registry import LOWERINGS, Out
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

aten = torch.ops.aten
ROWS, COLUMNS, WRITES = 300, 5, 9


def functions():
    x = te.placeholder((ROWS, COLUMNS), "float32", "x")
    index, new = te.placeholder((ROWS, WRITES), "int64", "index"), te.placeholder((ROWS, WRITES), "float32", "new")
    row, mask = te.placeholder((ROWS,), "int64", "row"), te.placeholder((ROWS, COLUMNS), "bool", "mask")
    out = Out((ROWS, COLUMNS), "float32")
    made = {
        "sums": ([x], LOWERINGS[aten.cumsum.default].compute(out, x, 1)),
        "scattered": ([x, index, new], LOWERINGS[aten.scatter_add.default].compute(out, x, 1, index, new)),
        "taken": ([x, row], LOWERINGS[aten.index_add.default].compute(out, x, 0, row, x)),
        "masked": ([x, mask], LOWERINGS[aten.masked_scatter.default].compute(out, x, mask, x)),
    }
    return {name: te.create_prim_func([*inputs, result]) for name, (inputs, result) in made.items()}


def test_independent_parts_have_a_thread_each_and_the_rest_keeps_its_order():
    hw = lookup("a100")
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    made = functions()
    assert all(map(is_imperative, made.values()))
    ((names, scheduled),) = [zip(*[next(schedules(f, target, 108)) for f in made.values()], strict=True)]
    assert set(names) == {"loops in order"}
    sources, launches = kernels.generated(dict(zip(made, scheduled, strict=True)), hw)
    threads = {name: int(np.prod(kernel.grid) * np.prod(kernel.block)) for name, kernel in launches.items()}
    assert threads["sums"] == 96  # 300 rows, four at a time
    assert threads["scattered_0"] >= ROWS * COLUMNS  # the copy
    assert ROWS <= threads["scattered_1"] < ROWS + 32  # the writes to a row are in order
    assert threads["taken_1"] == COLUMNS
    assert threads["masked"] == 1
    run = kernels.compiled(sources, launches)
    draw = np.random.default_rng(0)
    x, new = (draw.standard_normal((ROWS, n), "float32") for n in (COLUMNS, WRITES))
    index, row = draw.integers(0, COLUMNS, (ROWS, WRITES)), draw.integers(0, ROWS, ROWS)
    mask = draw.integers(0, 2, (ROWS, COLUMNS)).astype(bool)
    given = [torch.from_numpy(array) for array in (x, index, new, row, mask)]
    tx, tindex, tnew, trow, tmask = given
    expected = {
        "sums": tx.cumsum(1),
        "scattered": tx.scatter_add(1, tindex, tnew),
        "taken": tx.index_add(0, trow, tx),
        "masked": tx.masked_scatter(tmask, tx),
    }
    for reverse in (False, True):
        for name, function in made.items():
            arrays = {"x": x, "index": index, "new": new, "row": row, "mask": mask}
            for part in [key for key in launches if key == name or key.rpartition("_")[0] == name]:
                for argument in launches[part].arguments:
                    arrays.setdefault(argument, np.zeros((ROWS, COLUMNS), "float32"))
                assert run(part, arrays, reverse) is None
            result = arrays[str(function.params[-1].name)]
            torch.testing.assert_close(torch.from_numpy(result), expected[name], rtol=1e-6, atol=1e-6)
