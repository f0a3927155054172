"""Products by TVM's rules, without an epilogue and with any: nothing of a tile is written beyond or over the result."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
from tvm import te
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.schedule import schedules
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# What an epilogue makes of a product of m x n: the shape, where it reads, and the same in numpy.
EPILOGUES = {
    "none": (lambda m, n: (m, n), lambda i, m, n: i, lambda s: s - 1),
    "plain": (lambda m, n: (m, n), lambda i, m, n: i, lambda s: s),
    "flat": (lambda m, n: (m * n,), lambda i, m, n: (i[0] // n, i[0] % n), lambda s: s.reshape(-1)),
    "repeated": (lambda m, n: (2 * m, n), lambda i, m, n: (i[0] // 2, i[1]), lambda s: np.repeat(s, 2, 0)),
    "behind": (lambda m, n: (m, n - n // 2), lambda i, m, n: (i[0], i[1] + n // 2), lambda s: s[:, s.shape[1] // 2 :]),
    "mirrored": (lambda m, n: (m, n), lambda i, m, n: (m - 1 - i[0], i[1]), lambda s: s[::-1]),
}
TOGETHER = {"none", "plain"}  # whose indices are those of the product
MARGIN = 1000  # elements in front of an array and behind it, that nobody may touch


def a_product(m: int, n: int, depth: int, epilogue: str):
    """Every epilogue adds 1, but for "none"."""
    shape, places, _ = EPILOGUES[epilogue]
    x, w = te.placeholder((m, depth), "float32", "x"), te.placeholder((n, depth), "float32", "w")
    k = te.reduce_axis((0, depth), "k")
    sums = te.compute((m, n), lambda i, j: te.sum(x[i, k] * w[j, k], axis=k), "out" if epilogue == "none" else "sums")
    if epilogue == "none":
        return te.create_prim_func([x, w, sums])
    return te.create_prim_func([x, w, te.compute(shape(m, n), lambda *i: sums[places(i, m, n)] + 1, "out")])


def within_margins(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy, and the memory that it lies in the middle of."""
    memory = np.full(array.size + 2 * MARGIN, 7.5, "float32")
    memory[MARGIN:-MARGIN] = array.reshape(-1)
    return memory[MARGIN:-MARGIN].reshape(array.shape), memory


def test_the_filling_of_a_tile_is_not_written_beyond_or_over_the_result():
    hw = lookup("a100")
    target = Target(hw.tvm_target(), host={"kind": "llvm"})
    cases = {f"by_{m}_{n}_{epilogue}": (m, n, epilogue) for m, n in ((5, 7), (1, 7)) for epilogue in EPILOGUES}
    functions = {
        f"{case}_{number}": scheduled
        for case, (m, n, epilogue) in cases.items()
        for number, (rule, scheduled) in enumerate(schedules(a_product(m, n, 70, epilogue), target, 108))
        if rule in ("tiled product", "matrix times vector")
    }
    sources, launches = kernels.generated(functions, hw)
    run = kernels.compiled(sources, launches)
    draw = np.random.default_rng(0)
    assert {cases[name.rpartition("_")[0]] for name in functions} == set(cases.values())
    for name in functions:
        m, n, epilogue = cases[name.rpartition("_")[0]]
        x, w = (draw.standard_normal((rows, 70), "float32") for rows in (m, n))
        expected = EPILOGUES[epilogue][2](x @ w.T) + 1
        zeros = {"sums": np.zeros((m, n), "float32"), "out": np.zeros(expected.shape, "float32")}
        arrays, memories = {}, {}
        for key, array in {"x": x, "w": w, **zeros}.items():
            arrays[key], memories[key] = within_margins(array)
        for part in [key for key in launches if key == name or key.rpartition("_")[0] == name]:
            assert run(part, arrays) is None
        # 70 terms of about 1: a few roundings of float32.
        np.testing.assert_allclose(arrays["out"], expected, atol=2e-5, err_msg=name)
        for key, memory in memories.items():
            assert (np.delete(memory, np.s_[MARGIN:-MARGIN]) == 7.5).all(), (name, key)
    together = {cases[name.rpartition("_")[0]][2] for name in functions if name.endswith("_0") and name in launches}
    assert together >= TOGETHER
