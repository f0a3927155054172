"""Small programs for the tests and benchmarks of the ahead-of-time path, and a short way to build and load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tvm import te, tirx
from tvm.script import tirx as T

from graphwright.backends.aot import library, weights
from graphwright.backends.aot.library import BuildInfo, Library
from graphwright.backends.aot.program import Buffer, Program, Step
from graphwright.hwdb import detect

WIDTH = 64


def buffer(name: str, kind: str, shape: Sequence[int] = (WIDTH, WIDTH), alias: str | None = None) -> Buffer:
    return Buffer(name, tuple(shape), "float32", kind, alias)  # type: ignore[arg-type]


def program(
    kernels: Mapping[str, Any],
    buffers: Sequence[Buffer],
    steps: Sequence[Step],
    outputs: Sequence[str],
    name: str = "region",
) -> Program:
    """A program whose inputs and weights are the buffers of that kind; a weight's tensor has the buffer's name."""
    inputs = tuple(b.name for b in buffers if b.kind == "input")
    weight_names = {b.name: b.name for b in buffers if b.kind == "weight"}
    named = {b.name: b for b in buffers}
    return Program(name, dict(kernels), named, tuple(steps), inputs, tuple(outputs), weight_names)


def matmul(rows: int = WIDTH, columns: int = WIDTH) -> Any:
    """y = x . w, made by TE, parallel over rows by a schedule: a function of schedulable blocks."""
    from tvm import ir, s_tir

    x = te.placeholder((rows, columns), name="x")
    w = te.placeholder((columns, columns), name="w")
    k = te.reduce_axis((0, columns), "k")
    y = te.compute((rows, columns), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    schedule = s_tir.Schedule(ir.IRModule({"main": te.create_prim_func([x, w, y])}))
    block = schedule.get_sblock("y")
    i, j, r = schedule.get_loops(block)
    outer, inner = schedule.split(j, [None, 8])
    schedule.reorder(i, outer, r, inner)
    schedule.vectorize(inner)
    schedule.parallel(i)
    return schedule.mod["main"]


def add_one(shape: Sequence[int] = (WIDTH, WIDTH)) -> Any:
    """y = x + 1, made by TE and left serial."""
    x = te.placeholder(tuple(shape), name="x")
    y = te.compute(tuple(shape), lambda *i: x[i] + tirx.const(1.0, "float32"), name="y")
    return te.create_prim_func([x, y])


def double() -> Any:
    """y = 2 x, written by hand: no schedulable blocks, vectors, scratch memory, parallel."""

    @T.prim_func
    def double(x: T.Buffer((WIDTH, WIDTH), "float32"), y: T.Buffer((WIDTH, WIDTH), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for i in T.parallel(WIDTH):
            row = T.alloc_buffer((1024,), "float32", scope="global")
            for j in T.serial(WIDTH // 8):
                row[T.ramp(j * 8, 1, 8)] = x[i, T.ramp(j * 8, 1, 8)] * T.broadcast(T.float32(2), 8)
            for j in T.serial(WIDTH // 8):
                y[i, T.ramp(j * 8, 1, 8)] = row[T.ramp(j * 8, 1, 8)]

    return double


def failing() -> Any:
    """Copies one element and fails where it is negative."""

    @T.prim_func
    def failing(x: T.Buffer((1,), "float32"), y: T.Buffer((1,), "float32")):
        T.func_attr({"tirx.noalias": True})
        assert x[0] >= T.float32(0), "x is negative"
        y[0] = x[0]

    return failing


def two_kernels() -> Program:
    """y = 2 (x . w): a matmul by TE and a kernel by hand, the second through an alias."""
    buffers = [
        buffer("x", "input"),
        buffer("w", "weight"),
        buffer("t", "temporary"),
        buffer("u", "temporary", (WIDTH * WIDTH,), "t"),
        buffer("y", "output"),
    ]
    steps = [Step("matmul", ("x", "w", "t")), Step("double", ("u", "y"))]
    return program({"matmul": matmul(), "double": double()}, buffers, steps, ["y"])


def load(
    programs: Program | Sequence[Program],
    directory: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    threads: int = 1,
) -> Library:
    """Build the programs for this machine and load them."""
    info = build([programs] if isinstance(programs, Program) else programs, directory)
    weights.write(directory / library.WEIGHTS_NAME, info.weights, tensors or {})
    return Library(info.library, directory / library.WEIGHTS_NAME, threads)


def build(programs: Sequence[Program], directory: Path) -> BuildInfo:
    directory.mkdir(parents=True, exist_ok=True)
    return library.build(programs, detect(), directory)


def run(code: Library, region: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    code.run(region, [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs])


def graph(sizes: list[int], reads: list[list[int]], results: list[int]) -> Program:
    """Step i writes t{i} of sizes[i] floats and reads t{j} for j in reads[i]; the input where there are none."""
    buffers = [buffer("x", "input", (1,))]
    buffers += [buffer(f"t{i}", "output" if i in results else "temporary", (n,)) for i, n in enumerate(sizes)]
    steps = [Step(f"k{i}", (*([f"t{j}" for j in r] or ["x"]), f"t{i}")) for i, r in enumerate(reads)]
    return program({}, buffers, steps, [f"t{i}" for i in results])


@st.composite
def graphs(draw: st.DrawFn) -> Program:
    """Up to seven steps of various sizes that read each other."""
    count = draw(st.integers(1, 7))
    sizes = draw(st.lists(st.sampled_from([16, 64, 160, 320, 1000]), min_size=count, max_size=count))
    reads = [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(count)]
    read = {j for r in reads for j in r}
    return graph(sizes, reads, [i for i in range(count) if i not in read])
