"""Results over operands: proved where it is right, refused where one read comes too late, and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from aot_programs import buffer, load, program, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import tirx as T

from graphwright.backends.aot.memory import plan
from graphwright.backends.aot.overwriting import overwriting
from graphwright.backends.aot.program import Program, Step, check
from graphwright.backends.aot.reuse_operands import reuse_operands

N = 2048


def elementwise() -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), b: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.parallel(64):
                for j in range(4):
                    for k in T.vectorized(8):
                        y[i * 32 + j * 8 + k] = x[i * 32 + j * 8 + k] * b[i * 32 + j * 8 + k] + x[i * 32 + j * 8 + k]

    return kernel


def reshaped() -> Any:
    """The same elements through views of other shapes, vectors, a tail and a condition."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32, 64), "float32"), y: T.Buffer((64, 32), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            flat = T.decl_buffer((N,), data=x.data)
            for i in range(33):
                for j in range(T.min(i * 62 + 62, N) - i * 62):
                    if j < 64:
                        y[(i * 62 + j) // 32, (i * 62 + j) % 32] = flat[i * 62 + j] + T.float32(1)
            for i in range(1):
                if i == 0:
                    y[63, T.Ramp(30, 1, 2)] = flat[T.Ramp(2046, 1, 2)] * T.Broadcast(T.float32(0.5), 2)

    return kernel


def rows() -> Any:
    """A row is read to its end before it is written, and the result serves as scratch."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32, 64), "float32"), y: T.Buffer((32, 64), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.parallel(32):
                top = T.alloc_buffer((1,))
                top[0] = x[i, 0]
                for j in range(64):
                    top[0] = T.max(top[0], x[i, j])
                for j in range(64):
                    y[i, j] = x[i, j] - top[0]
                for j in range(64):
                    y[i, j] = y[i, j] * T.float32(2)

    return kernel


def two_phases() -> Any:
    """All is read by one loop, and written by another."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            kept = T.alloc_buffer((N,))
            for i in T.parallel(N):
                kept[i] = x[N - 1 - i]
            for i in T.parallel(N):
                y[i] = kept[i]

    return kernel


def variables() -> Any:
    """Vectors kept in variables, added and stored, as kernels do with residuals."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.parallel(N // 16):
                a: T.let[T.float32x8] = x[T.Ramp(i * 16, 1, 8)]
                b: T.let[T.float32x8] = x[T.Ramp(i * 16 + 8, 1, 8)]
                y[T.Ramp(i * 16, 1, 8)] = a * b
                y[T.Ramp(i * 16 + 8, 1, 8)] = b + b

    return kernel


def kept_too_long() -> Any:
    """A variable is used after its elements are overwritten: TVM may load them again."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N // 16):
                a: T.let[T.float32x8] = x[T.Ramp(i * 16, 1, 8)]
                b: T.let[T.float32x8] = x[T.Ramp(i * 16 + 8, 1, 8)]
                y[T.Ramp(i * 16, 1, 8)] = b
                y[T.Ramp(i * 16 + 8, 1, 8)] = a

    return kernel


def broadcast() -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                y[i] = x[i] + x[0]

    return kernel


def backwards() -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                y[i] = x[N - 1 - i]

    return kernel


def overlapping() -> Any:
    """The last vector begins early: 1 element is computed twice."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(293):
                for j in range(7):
                    y[T.min(i * 7, N - 7) + j] = x[T.min(i * 7, N - 7) + j] * T.float32(2)

    return kernel


def late() -> Any:
    """An element is read again after its result is written."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32"), z: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                y[i] = x[i] + T.float32(1)
                z[i] = x[i] * T.float32(2)

    return kernel


def neighbours() -> Any:
    """The elements of a row are read while others of it are written."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32, 64), "float32"), y: T.Buffer((32, 64), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(32):
                for j in range(64):
                    y[i, j] = x[i, j] + x[i, (j + 1) % 64]

    return kernel


def chosen() -> Any:
    """Which elements are touched depends on a tensor."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), k: T.Buffer((1,), "int32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                y[i] = x[(i + k[0]) % N]

    return kernel


def passed_on() -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            T.evaluate(T.call_extern("int32", "somebody", x.data))
            for i in range(N):
                y[i] = x[i]

    return kernel


def shorter() -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((2 * N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                y[i] = x[i]

    return kernel


@pytest.mark.parametrize("make", [elementwise, reshaped, rows, two_phases, variables])
def test_kernels_that_may_overwrite_give_the_same_bits(make: Any, tmp_path: Path) -> None:
    func = make()
    made = overwriting(func, 0, len(func.params) - 1)
    assert not isinstance(made, str), made
    assert len(made.params) == len(func.params) - 1
    inputs = [torch.randn(N) for _ in func.params[:-1]]
    plain = _program(func, len(inputs), "y")
    merged, count = reuse_operands(plain)
    assert count == 1
    check(merged)
    results = []
    for name, candidate in (("plain", plain), ("merged", merged)):
        y = torch.empty(N)
        code = load(candidate, tmp_path / name, threads=2)
        run(code, 0, inputs, [y])
        results.append(y)
        code.close() if hasattr(code, "close") else None
    assert torch.equal(*results)


def _program(func: Any, inputs: int, result: str) -> Program:
    """t = copy(x0); y = func(t, x1, ...): the operand is a temporary that dies."""
    shapes = [tuple(int(n) for n in p.ty.shape) for p in func.params]
    buffers = [buffer(f"x{i}", "input", shapes[i]) for i in range(inputs)]
    buffers += [buffer("t", "temporary", shapes[0]), buffer(result, "output", shapes[-1])]
    steps = [Step(None, ("x0", "t")), Step("kernel", ("t", *(f"x{i}" for i in range(1, inputs)), result))]
    return program({"kernel": func}, buffers, steps, [result])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (broadcast, "read by one iteration and written by another"),
        (backwards, "read by one iteration and written by another"),
        (neighbours, "read by one iteration and written by another"),
        (overlapping, "written by two iterations"),
        (kept_too_long, "read after it is written"),
        (chosen, "an address or a condition has a"),
        (passed_on, "passed on"),
        (shorter, "different sizes"),
    ],
)
def test_kernels_that_may_not(make: Any, reason: str) -> None:
    func = make()
    why = overwriting(func, 0, len(func.params) - 1)
    assert isinstance(why, str)
    assert reason in why


def test_what_is_touched_too_often_is_not_gone_through() -> None:
    """A million iterations of 16 lanes: within the loops that are gone through, beyond the elements."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((N,), "float32"), y: T.Buffer((N,), "float32")):
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in range(N):
                for j in range(512):
                    y[T.Ramp(0, 1, 16)] = x[T.Ramp((i + j) % (N - 16), 1, 16)]

    assert "too often" in overwriting(kernel, 0, 1)


def test_an_element_that_is_read_again_later() -> None:
    assert "read after it is written" in overwriting(late(), 0, 1)
    assert not isinstance(overwriting(late(), 0, 2), str)  # over the second result it may


def test_an_operand_is_not_written_over_where_somebody_needs_it() -> None:
    func = elementwise()

    def made(read_later: bool = False, twice: bool = False, returned: bool = False) -> Program:
        buffers = [buffer("x", "input", (N,)), buffer("t", "temporary", (N,)), buffer("y", "output", (N,))]
        buffers.append(buffer("z", "output", (N,)))
        steps = [Step(None, ("x", "t")), Step("kernel", ("t", "t" if twice else "x", "y"))]
        steps.append(Step("kernel", ("t" if read_later else "y", "x", "z")))
        return program({"kernel": func}, buffers, steps, ["y", "z", *(["t"] if returned else [])])

    assert reuse_operands(made())[1] == 1
    assert reuse_operands(made(read_later=True))[1] == 1  # by the second step: then it is dead
    assert reuse_operands(made(read_later=True))[0].steps[1] == made(read_later=True).steps[1]
    assert reuse_operands(made(twice=True))[1] == 0
    assert reuse_operands(made(returned=True))[1] == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=7), st.integers(0, 7))
def test_any_program_computes_what_it_did(reads: list[tuple[int, int]], returned: int) -> None:
    """Programs of y = x * b + x, interpreted: kernels read all operands, then write, through the storage they share."""
    buffers, steps = [buffer("v0", "input", (N,)), buffer("v1", "input", (N,))], []
    for i, (a, b) in enumerate(reads):
        name = f"v{i + 2}"
        last = i == len(reads) - 1 or i == returned
        buffers.append(buffer(name, "output" if last else "temporary", (N,)))
        steps.append(Step("kernel", (f"v{a % (i + 2)}", f"v{b % (i + 2)}", name)))
    outputs = [b.name for b in buffers if b.kind == "output"]
    made = program({"kernel": elementwise()}, buffers, steps, outputs)
    merged, _ = reuse_operands(made, _PROOFS)
    check(merged)
    assert _interpreted(made) == _interpreted(merged)
    assert plan(merged, {}).lower_bound_bytes <= plan(made, {}).lower_bound_bytes


_PROOFS: Any = {}


def _interpreted(made: Program) -> list[int]:
    stored: dict[str, int] = {"v0": 3, "v1": 5}
    for step in made.steps:
        assert step.kernel is not None
        operands = [stored.get(made.root(name), 0) for name in step.args]
        if step.kernel == "kernel":
            stored[made.root(step.args[2])] = (operands[0] * operands[1] + operands[0]) % 9973
        elif step.kernel == "kernel_2_over_0":
            stored[made.root(step.args[1])] = (operands[1] * operands[0] + operands[1]) % 9973
        else:
            assert step.kernel == "kernel_2_over_1", step.kernel
            stored[made.root(step.args[1])] = (operands[0] * operands[1] + operands[0]) % 9973
    return [stored[made.root(name)] for name in made.outputs]
