"""Results in the place of operands that nobody reads any more.

    t1 = sigmoid(t0); ... t0 is not read again    ->    t0 = sigmoid(t0), and t1 is another name of t0

The kernel gets a parameter less (overwriting.py, which proves that it may), and the arena holds one buffer less at that
step.

Refused for inputs, weights and results of the region, for operands that a later step or another parameter of this one
reads, for those of another size or dtype, and for kernels that read an element after writing it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, TypeAlias

from .overwriting import overwriting
from .program import Buffer, Program, Step

log = logging.getLogger(__name__)

_LEAST_BYTES = 4096  # less is not worth another kernel


# Kernel, parameters of operand and result -> the kernel that overwrites (name and function), or why there is none.
Proofs: TypeAlias = "dict[tuple[str, int, int], tuple[str, Any] | str]"


def reuse_operands(program: Program, proofs: Proofs | None = None) -> tuple[Program, int]:
    """`program` with results written over dying operands of their kernels, and how many are.

    `proofs` are what was found out about its kernels, for callers who try several orders of one program.
    """
    reuse = _Reuse(program, {} if proofs is None else proofs)
    steps = tuple(reuse.step(number, step) for number, step in enumerate(program.steps))
    if not reuse.count:
        return program, 0
    used = {step.kernel for step in steps}
    kernels = {name: func for name, func in reuse.kernels.items() if name in used}
    return replace(program, kernels=kernels, buffers=reuse.buffers, steps=steps), reuse.count


class _Reuse:
    def __init__(self, program: Program, proofs: Proofs) -> None:
        self.program = program
        self.buffers: dict[str, Buffer] = dict(program.buffers)
        self.kernels: dict[str, Any] = dict(program.kernels)
        self.proofs = proofs
        self.count = 0
        self.last: dict[str, int] = {}  # the last step that names a root
        for number, step in enumerate(program.steps):
            for name in step.args:
                self.last[program.root(name)] = number
        self.written = {*program.inputs, *program.weights}
        self.kept = self.written | {program.root(name) for name in program.outputs}

    def root(self, name: str) -> str:
        while (alias := self.buffers[name].alias) is not None:
            name = alias
        return name

    def step(self, number: int, step: Step) -> Step:
        """The step with every result that can be written over an operand."""
        new = [name for name in step.args if self.root(name) not in self.written]
        self.written.update(self.root(name) for name in new)
        if step.kernel is None:
            return step
        for result in new:
            step = self._over_operand(number, step, result, set(new))
        return step

    def _over_operand(self, number: int, step: Step, result: str, new: set[str]) -> Step:
        assert step.kernel is not None
        for position, operand in enumerate(step.args):
            reason = "it is written here" if operand in new else self._refusal(number, step, operand, result)
            if reason:
                continue
            made = self._kernel(step.kernel, position, step.args.index(result))
            if isinstance(made, str):
                log.debug("%s of %s is not written over %s: %s", result, step.kernel, operand, made)
                continue
            name, func = made
            self.kernels[name] = func
            self._rename(result, operand)
            self.count += 1
            return Step(name, (*step.args[:position], *step.args[position + 1 :]))
        return step

    def _refusal(self, number: int, step: Step, operand: str, result: str) -> str:
        root = self.root(operand)
        if root in self.kept:
            return "it is an input, a weight or a result"
        if self.last[root] != number:
            return "it is read later"
        if sum(self.root(name) == root for name in step.args) > 1:
            return "it is read through another parameter too"
        old, new = self.buffers[operand], self.buffers[result]
        if (old.nbytes, old.dtype) != (new.nbytes, new.dtype):
            return "it has another size"
        if new.nbytes < _LEAST_BYTES:
            return "it is small"
        if new.alias is not None:
            return "the result is an alias already"
        return ""

    def _kernel(self, kernel: str, operand: int, result: int) -> tuple[str, Any] | str:
        key = (kernel, operand, result)
        if key not in self.proofs:
            func = overwriting(self.kernels[kernel], operand, result)
            self.proofs[key] = func if isinstance(func, str) else (f"{kernel}_{result}_over_{operand}", func)
        return self.proofs[key]

    def _rename(self, result: str, operand: str) -> None:
        root = self.root(operand)
        self.buffers[result] = replace(self.buffers[result], alias=root)
        self.last[root] = max(self.last[root], self.last[result])
        if result in self.kept:
            self.kept.add(root)
