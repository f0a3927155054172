"""Nested transcendental functions -> one after the other, through a scratch variable.

    y[i] = tanh(a + sigmoid(b))  ->  t[0] = a + sigmoid(b); y[i] = tanh(t[0])
    v = tanh(a)                  ->  t[0] = tanh(a); v = t[0]

When TVM 0.27 emits LLVM it simplifies the value of every let with the earlier ones substituted, in time exponential
in their nesting: tanh(tanh(tanh(x))) takes minutes. It cannot look through memory, and LLVM keeps `t` in a register.

Refused for a call in a branch of if_then_else, which guards what it reads, or in a let expression, whose name ends
there.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx

Stmt = Any  # tvm carries no types
Expr = Any


@ir.transform.module_pass(opt_level=0, name="CutNested")
class cut_nested:  # noqa: N801  (TVM's pass decorator makes an instance factory of it)
    """The pass, for functions of which the loops are vectorised and the intrinsics not yet lowered."""

    def transform_module(self, module: Any, _context: Any) -> Any:
        for name, func in list(module.functions.items()):
            module.update_func(name, func.with_body(cut(func.body)))
        return module


def cut(body: Stmt) -> Stmt:
    """`body` in which no call of ours is part of another's argument."""
    return tvm_ffi.structural_map(body, (((tirx.BufferStore, tirx.Bind), _cut_statement), (tirx.SeqStmt, _flat)))


def _cut_statement(statement: Stmt) -> Stmt:
    before: list[Stmt] = []
    guarded = _guarded(statement.value)

    def call(node: Any) -> Any:
        # Children come first: what this argument calls has no nested argument any more.
        if not _is_ours(node) or not _calls(node.args) or any(node.same_as(other) for other in guarded):
            return node
        args = [_stored(argument, before) for argument in node.args]
        return tirx.call_intrin(str(node.ty.dtype), node.op, *args)

    value = tvm_ffi.structural_map(statement.value, (ir.Call, call))
    if isinstance(statement, tirx.Bind):
        if not _calls(value):
            return statement
        value = _stored(value, before)
        return tirx.SeqStmt([*before, tirx.Bind(statement.var, value)])
    if not before:
        return statement
    return tirx.SeqStmt([*before, tirx.BufferStore(statement.buffer, value, statement.indices)])


def _stored(value: Expr, before: list[Stmt]) -> Expr:
    scratch = tirx.decl_buffer((1,), str(value.ty.dtype), f"nested{len(before)}", scope="local")
    before += [tirx.AllocBuffer(scratch), tirx.BufferStore(scratch, value, [0])]
    return tirx.BufferLoad(scratch, [0])


def _is_ours(node: Any) -> bool:
    return isinstance(node.op, ir.Op) and str(node.op.name).startswith("graphwright.")


def _calls(root: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (ir.Call, lambda call: found.append(call) if _is_ours(call) else None))
    return found


def _guarded(value: Expr) -> list[Any]:
    """The calls of ours that stand where they may not be split off their statement."""
    found: list[Any] = []

    def branch(call: Any) -> None:
        if isinstance(call.op, ir.Op) and str(call.op.name).endswith("if_then_else"):
            found.extend(_calls(list(call.args[1:])))

    tvm_ffi.structural_walk(value, ((ir.Call, branch), (tirx.Let, lambda let: found.extend(_calls(let)))))
    return found


def _flat(sequence: Any) -> Stmt:
    """A sequence without sequences in it, so that a binding stays visible to what follows."""
    if not any(isinstance(statement, tirx.SeqStmt) for statement in sequence.seq):
        return sequence
    flat: list[Stmt] = []
    for statement in sequence.seq:
        flat.extend(statement.seq if isinstance(statement, tirx.SeqStmt) else (statement,))
    return tirx.SeqStmt(flat)
