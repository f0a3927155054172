"""What the ahead-of-time path compiles: kernels, and the order and operands in which one region calls them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a TVM dtype name: 4 for "float32", 1 for "bool"."""
    if dtype == "bool":
        return 1
    bits = int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz").partition("_")[0])
    return (bits + 7) // 8


@dataclass(frozen=True)
class Buffer:
    """A tensor of a region: dense, row-major, its address a multiple of 64 except for inputs and outputs."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # TVM's name: "float32", "int64", "bool" (one byte)
    kind: Literal["input", "output", "weight", "temporary"]
    alias: str | None = None  # the buffer whose bytes this one reinterprets (a reshape); it has no storage of its own

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True)
class Step:
    """One kernel call: the operands in the order of the kernel's parameters. kernel=None copies args[0] to args[1]."""

    kernel: str | None
    args: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """One compiled region of a graph.

    kernels: name -> scheduled tirx.PrimFunc (buffers only). `weights` maps a weight buffer's name to the name of the
    tensor in the weights file (several regions may share one). `outputs` may name a buffer twice, an input or a weight.
    """

    name: str
    kernels: dict[str, Any]
    buffers: dict[str, Buffer]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, str]

    def root(self, name: str) -> str:
        """The buffer that owns the storage `name` lives in."""
        seen = {name}
        while (alias := self.buffers[name].alias) is not None:
            assert alias not in seen, f"{self.name}: {name} is an alias of itself"
            seen.add(alias)
            name = alias
        return name


def check(program: Program) -> None:
    """Assert what every later stage relies on; a failure is a bug of whoever built the program."""
    where = program.name
    for name, buffer in program.buffers.items():
        assert buffer.name == name, f"{where}: buffer {buffer.name} is entered as {name}"
        assert all(extent >= 0 for extent in buffer.shape), f"{where}: {name} has shape {buffer.shape}"
        if buffer.alias is not None:
            assert buffer.alias in program.buffers, (
                f"{where}: {name} is an alias of {buffer.alias}, which does not exist"
            )
            owner = program.buffers[program.root(name)]
            assert owner.nbytes == buffer.nbytes, (
                f"{where}: {name} of {buffer.nbytes} bytes is an alias of {owner.name} of {owner.nbytes}"
            )
            assert buffer.kind in ("temporary", "output"), f"{where}: {buffer.kind} {name} is an alias"
        listed = {"input": name in program.inputs, "weight": name in program.weights}
        assert listed.get(buffer.kind, True), f"{where}: {buffer.kind} {name} is not among the region's"
    assert len(set(program.inputs)) == len(program.inputs), f"{where}: an input is listed twice"
    for names, kind in ((program.inputs, "input"), (program.weights, "weight")):
        for name in names:
            assert name in program.buffers, f"{where}: {kind} {name} is no buffer"
            assert program.buffers[name].kind == kind, f"{where}: {kind} {name} is a {program.buffers[name].kind}"
    for number, step in enumerate(program.steps):
        _check_step(program, f"{where}, step {number} ({step.kernel or 'copy'})", step)
    touched = {program.root(name) for step in program.steps for name in step.args}
    given = {*program.inputs, *program.weights}
    for name in program.outputs:
        assert name in program.buffers, f"{where}: output {name} is no buffer"
        root = program.root(name)
        assert root in given or root in touched or not program.buffers[root].nbytes, f"{where}: nothing writes {name}"


def _check_step(program: Program, where: str, step: Step) -> None:
    for name in step.args:
        assert name in program.buffers, f"{where}: operand {name} is no buffer"
    sizes = [program.buffers[name].nbytes for name in step.args]
    if step.kernel is None:
        assert len(sizes) == 2, f"{where}: a copy takes two operands"
        assert sizes[0] == sizes[1], f"{where}: copies {sizes[0]} bytes to {sizes[1]}"
        written = program.buffers[program.root(step.args[1])]
        assert written.kind not in ("input", "weight"), f"{where}: writes to {written.kind} {written.name}"
        return
    assert step.kernel in program.kernels, f"{where}: there is no such kernel"
    parameters = program.kernels[step.kernel].params
    assert len(parameters) == len(sizes), f"{where}: {len(sizes)} operands for {len(parameters)} parameters"
    for parameter, name, size in zip(parameters, step.args, sizes, strict=True):
        buffer = parameter.ty
        wanted = math.prod(int(extent) for extent in buffer.shape) * item_bytes(str(buffer.dtype))
        assert wanted == size, f"{where}: {name} has {size} bytes, parameter {parameter.name} {wanted}"
