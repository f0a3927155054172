"""The Relax function of a region -> the program that the ahead-of-time path compiles.

Functions of tensor expressions are scheduled here; kernels of ours pass through as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tvm import ir, relax

from ...errors import GraphwrightError
from ...hwdb import Hardware
from ...hwdb.cost import predict_seconds
from ..aot.program import Buffer, Program, Step
from ..cpu.expand_math import expand_math
from ..cpu.predict import predicted_seconds
from ..cpu.schedule import schedule
from ..region_kernel import ENTRY_SECONDS
from .registry import KernelCall, KernelInfo
from .waking import is_parallel, with_waking


class Unscheduled(GraphwrightError):
    """No schedule applies to a function of several operators."""

    def __init__(self, function: str) -> None:
        super().__init__(f"no schedule applies to {function}")
        self.function = function


@dataclass(frozen=True)
class Fused:
    """A region as a Relax module, and what its parameters and functions stand for."""

    name: str
    module: Any
    inputs: tuple[str, ...]  # parameters that are inputs of the region
    weights: dict[str, torch.Tensor]  # by name in the weights file
    parameters: dict[str, str]  # parameter -> name in the weights file
    calls: dict[str, tuple[KernelCall, str]]  # function -> our kernel in it, and the operator it serves
    reasons: dict[str, str]  # function of several operators -> why they are one kernel


@dataclass(frozen=True)
class Lowered:
    """A region as a program, the weights it reads, and what was chosen."""

    program: Program
    weights: dict[str, torch.Tensor]
    kernels: list[KernelInfo]


def extract(fused: Fused, hw: Hardware) -> Lowered:
    """Read the module back as buffers and steps, with every function scheduled for `hw`."""
    return _Extractor(fused, hw).extract()


class _Extractor:
    """Reads the fused Relax function back as buffers and steps."""

    def __init__(self, fused: Fused, hw: Hardware) -> None:
        self.fused, self.hw = fused, hw
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.kernels: dict[str, Any] = {}
        self.names: dict[Any, Any] = {}  # relax variable -> buffer name, or a tuple of them
        self.unscheduled: set[str] = set()
        self.infos: list[KernelInfo] = []

    def extract(self) -> Lowered:
        fused, main = self.fused, self.fused.module["main"]
        for var in main.params:
            name = str(var.name)
            self._add(var, name, var.ty, "weight" if name in fused.parameters else "input")
        for block in main.body.blocks:
            for binding in block.bindings:
                self.names[binding.var] = self._bind(binding.var, binding.value)
        outputs = self._outputs(self._operand(main.body.body))
        program = Program(
            fused.name, self.kernels, self.buffers, tuple(self.steps), fused.inputs, outputs, fused.parameters
        )
        parallel = [is_parallel(self.kernels[step.kernel]) for step in self.steps if step.kernel is not None]
        return Lowered(program, fused.weights, with_waking(self.infos, parallel, self.hw))

    def _add(self, var: Any, name: str, type_: Any, kind: Any, alias: str | None = None) -> str:
        shape = tuple(int(d) for d in type_.shape)
        self.buffers[name] = Buffer(name, shape, str(type_.dtype), kind, alias)
        self.names[var] = name
        return name

    def _new(self, type_: Any, alias: str | None = None) -> str:
        name = f"t{len(self.buffers)}"
        shape = tuple(int(d) for d in type_.shape)
        self.buffers[name] = Buffer(name, shape, str(type_.dtype), "temporary", alias)
        return name

    def _operand(self, expression: Any) -> Any:
        if isinstance(expression, relax.Tuple):
            return tuple(self._operand(f) for f in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            return self._operand(expression.tuple_value)[expression.index]
        return self.names[expression]

    def _bind(self, var: Any, value: Any) -> Any:
        if not isinstance(value, relax.Call):
            return self._operand(value)
        if value.op.same_as(ir.Op.get("relax.reshape")):
            return self._new(var.ty, alias=self._operand(value.args[0]))
        assert value.op.same_as(ir.Op.get("relax.call_tir")), value
        name = str(value.args[0].name_hint)
        args = [self._operand(a) for a in value.args[1].fields]
        is_tuple = isinstance(var.ty, ir.TupleType)
        results = tuple(self._new(t) for t in var.ty.fields) if is_tuple else (self._new(var.ty),)
        if name not in self.kernels:
            self.kernels[name] = self._scheduled(name)
        self.steps.append(Step(name, (*args, *results)))
        self.infos.append(replace(self._info(name, args), step=len(self.steps) - 1))
        return results if is_tuple else results[0]

    def _scheduled(self, name: str) -> Any:
        function = self.fused.module[name]
        if name in self.fused.calls:
            return function
        scheduled = schedule(function, self.hw)
        if scheduled is function and name in self.fused.reasons:
            raise Unscheduled(name)
        if scheduled is function:
            self.unscheduled.add(name)
        return expand_math(scheduled)

    def _info(self, name: str, args: list[str]) -> KernelInfo:
        info = self._described(name, args)
        known = info.predicted_us
        return info if known is None else replace(info, predicted_us=known + ENTRY_SECONDS * 1e6)

    def _described(self, name: str, args: list[str]) -> KernelInfo:
        if name not in self.fused.calls:
            choice = "no schedule applies: one thread" if name in self.unscheduled else "fused loops"
            if name in self.fused.reasons:
                choice += f": {self.fused.reasons[name]}"
            unread = name in self.unscheduled
            known = None if unread else predicted_seconds(self.fused.module[name], self.hw, self._cold(args))
            predicted = None if known is None else known * 1e6
            return KernelInfo(name, name, "generic", choice, predicted)
        call, target = self.fused.calls[name]
        seconds = call.predicted_seconds
        if seconds is None:
            seconds = predict_seconds(self.hw, call.work)
        predicted = None if seconds is None else seconds * 1e6
        return KernelInfo(name, target, call.algorithm, call.choice, predicted, decisions=call.decisions)

    def _cold(self, args: list[str]) -> list[int]:
        """The operands that are weights, where the weights of the region are more than stay in the last cache."""
        last = self.hw.caches[-1].size_bytes if self.hw.caches else 0
        if sum(tensor.nbytes for tensor in self.fused.weights.values()) <= last:
            return []
        return [i for i, name in enumerate(args) if self.buffers[self._storage(name)].kind == "weight"]

    def _outputs(self, results: tuple[str, ...]) -> tuple[str, ...]:
        """Let results be written where the caller wants them; an input, a weight or a repeated result is copied."""
        outputs: list[str] = []
        for i, name in enumerate(results):
            buffer = self.buffers[storage := self._storage(name)]
            if buffer.kind == "temporary":
                self.buffers[storage] = Buffer(storage, buffer.shape, buffer.dtype, "output")
                outputs.append(storage)
                continue
            copy = f"output_{i}"
            self.buffers[copy] = Buffer(copy, buffer.shape, buffer.dtype, "output")
            self.steps.append(Step(None, (name, copy)))
            outputs.append(copy)
        return tuple(outputs)

    def _storage(self, name: str) -> str:
        """The buffer that owns the bytes of `name`."""
        while (alias := self.buffers[name].alias) is not None:
            name = alias
        return name
