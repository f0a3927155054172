"""The graph function: one PrimFunc per region that calls its kernels in order, so no C compiler is needed per model.

    int32_t gw_region_<i>(void **inputs, void **outputs, void *arena, const void *weights, int32_t *status)

`status` receives the result of the last kernel called and, where that is not 0, the number of its step; the function
then returns -1 at once. Before its first step and after each, a region calls `gw_mark` with the next of its numbers, so
that the runtime can time steps. `gw_model_run(i, ...)` calls region i; `gw_model_describe(facts)` tells the runtime the
number of regions, the arena's bytes, the weights' bytes and the number of marks (runtime.c: FACT_*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.tirx import op

from .memory import Place, Plan
from .program import Program


def region_function(
    program: Program, plan: Plan, symbols: Mapping[str, str], first_mark: int, pointer_bits: int = 64
) -> Any:
    """The PrimFunc that runs `program`; `symbols` maps its kernels' names to their C names."""
    caller = _Arguments(len(program.inputs), len(program.outputs), pointer_bits)
    body = [*caller.declarations, _mark(first_mark)]
    for number, step in enumerate(program.steps):
        places = [plan.places[name] for name in step.args]
        if step.kernel is None:
            body.append(_copy(caller, places[0], places[1], program.buffers[step.args[0]].nbytes))
        else:
            call = tirx.call_extern("int32", symbols[step.kernel], *(caller.address(place) for place in places))
            body.append(caller.checked(call, number))
        body.append(_mark(first_mark + number + 1))
    body += [_copy(caller, source, target, nbytes) for source, target, nbytes in plan.copies]
    return tirx.PrimFunc(caller.parameters, tirx.SeqStmt(body), ir.PrimType("int32"))


def marks(program: Program) -> int:
    """How many numbers the region gives `gw_mark`."""
    return len(program.steps) + 1


def model_functions(
    regions: Sequence[str], arena_bytes: int, weights_bytes: int, mark_count: int = 0, pointer_bits: int = 64
) -> dict[str, Any]:
    """`gw_model_run` and `gw_model_describe` over the region functions of these C names."""
    caller = _Arguments(pointer_bits=pointer_bits)
    region = tirx.Var("region", "int32")
    body = [tirx.Evaluate(0)]
    for number, name in enumerate(regions):
        failed = tirx.call_extern("int32", name, *caller.parameters) != _int(0)
        body.append(tirx.IfThenElse(region == _int(number), tirx.IfThenElse(failed, _leave(), None), None))
    run = tirx.PrimFunc([region, *caller.parameters], tirx.SeqStmt(body), ir.PrimType("int32"))
    table = _pointer("facts", "uint64")
    facts = tirx.decl_buffer((4,), "uint64", "facts_table", data=table)
    stores = [
        tirx.BufferStore(facts, tirx.IntImm("uint64", value), [_int(position)])
        for position, value in enumerate((len(regions), arena_bytes, weights_bytes, mark_count))
    ]
    describe = tirx.PrimFunc([table], tirx.SeqStmt([tirx.DeclBuffer(facts, data=table), *stores]), ir.PrimType("int32"))
    return {"gw_model_run": run, "gw_model_describe": describe}


class _Arguments:
    """The parameters every region function has, and the expressions made of them."""

    def __init__(self, inputs: int = 0, outputs: int = 0, pointer_bits: int = 64) -> None:
        self.word = f"uint{pointer_bits}"  # an address in a table of addresses, and C's size_t
        self.inputs, self.outputs = _pointer("inputs", self.word), _pointer("outputs", self.word)
        self.arena, self.weights = _pointer("arena", "uint8"), _pointer("weights", "uint8")
        self.status = _pointer("status", "int32")
        self.parameters = [self.inputs, self.outputs, self.arena, self.weights, self.status]
        # A buffer has at least one element, also in a region without inputs.
        self._tables = {
            "input": tirx.decl_buffer((max(1, inputs),), self.word, "input_table", data=self.inputs),
            "output": tirx.decl_buffer((max(1, outputs),), self.word, "output_table", data=self.outputs),
        }
        self._status = tirx.decl_buffer((2,), "int32", "status_table", data=self.status)
        self.declarations = [
            tirx.DeclBuffer(self._tables["input"], data=self.inputs),
            tirx.DeclBuffer(self._tables["output"], data=self.outputs),
            tirx.DeclBuffer(self._status, data=self.status),
        ]

    def address(self, place: Place) -> Any:
        if place.kind in self._tables:
            word = tirx.BufferLoad(self._tables[place.kind], [_int(place.index)])
            return op.reinterpret("handle", word.astype("uint64"))
        base = self.arena if place.kind == "arena" else self.weights
        return op.handle_add_byte_offset(base, tirx.IntImm("int64", place.index))

    def checked(self, call: Any, step: int) -> Any:
        """Make the call; where it fails, note the step and leave."""
        leave = tirx.SeqStmt([tirx.BufferStore(self._status, _int(step), [_int(1)]), _leave()])
        failed = tirx.BufferLoad(self._status, [_int(0)]) != _int(0)
        return tirx.SeqStmt([tirx.BufferStore(self._status, call, [_int(0)]), tirx.IfThenElse(failed, leave, None)])


def _copy(caller: _Arguments, source: Place, target: Place, nbytes: int) -> Any:
    size = tirx.IntImm(caller.word, nbytes)
    return tirx.Evaluate(tirx.call_extern("handle", "memcpy", caller.address(target), caller.address(source), size))


def _mark(number: int) -> Any:
    return tirx.Evaluate(tirx.call_extern("int32", "gw_mark", _int(number)))


def _leave() -> Any:
    """Return -1: the only way out of a function in front of its end that TVM's code generator offers."""
    return tirx.Evaluate(op.call_intrin("int32", "tirx.tvm_throw_last_error"))


def _pointer(name: str, dtype: str) -> Any:
    return tirx.Var(name, ir.PointerType(ir.PrimType(dtype)))


def _int(value: int) -> Any:
    return tirx.IntImm("int32", value)
