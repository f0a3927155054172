"""Nested transcendental functions -> one after the other, through a scratch variable.

    y[i] = tanh(a + sigmoid(b))  ->  t[0] = sigmoid(b); y[i] = tanh(a + t[0])
    v = tanh(a)                  ->  t[0] = tanh(a); v = t[0]

When TVM 0.27 emits LLVM it simplifies the value of every let with the earlier ones substituted, in time exponential
in their nesting: tanh(tanh(tanh(x))) takes minutes. It cannot look through memory, and LLVM keeps `t` in a register.

Refused where a function is called in a branch of if_then_else, which guards what it reads, or in a let expression,
whose name ends there.
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
    value = statement.value
    if not _calls(value) or _is_guarded(value):
        return statement
    before: list[Stmt] = []

    def outer(call: Any) -> Any:
        # Children come first: calls in this one's arguments have none in theirs.
        if not _is_ours(call) or not _calls(call.args):
            return call
        args = tvm_ffi.structural_map(list(call.args), (ir.Call, lambda inner: _stored(inner, before)))
        return tirx.call_intrin(str(call.ty.dtype), call.op, *args)

    value = tvm_ffi.structural_map(value, (ir.Call, outer))
    if isinstance(statement, tirx.Bind):
        value = tvm_ffi.structural_map(value, (ir.Call, lambda inner: _stored(inner, before)))
        return tirx.SeqStmt([*before, tirx.Bind(statement.var, value)])
    if not before:
        return statement
    return tirx.SeqStmt([*before, tirx.BufferStore(statement.buffer, value, statement.indices)])


def _stored(call: Any, before: list[Stmt]) -> Expr:
    if not _is_ours(call):
        return call
    scratch = tirx.decl_buffer((1,), str(call.ty.dtype), f"nested{len(before)}", scope="local")
    before += [tirx.AllocBuffer(scratch), tirx.BufferStore(scratch, call, [0])]
    return tirx.BufferLoad(scratch, [0])


def _is_ours(node: Any) -> bool:
    return isinstance(node.op, ir.Op) and str(node.op.name).startswith("graphwright.")


def _calls(root: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (ir.Call, lambda call: found.append(call) if _is_ours(call) else None))
    return found


def _is_guarded(value: Expr) -> bool:
    """Whether a call of ours stands where its statement may not be split off."""
    found: list[Any] = []

    def branch(call: Any) -> None:
        if isinstance(call.op, ir.Op) and str(call.op.name).endswith("if_then_else"):
            found.extend(_calls(list(call.args[1:])))

    tvm_ffi.structural_walk(value, ((ir.Call, branch), (tirx.Let, lambda let: found.extend(_calls(let)))))
    return bool(found)


def _flat(sequence: Any) -> Stmt:
    """A sequence without sequences in it, so that a binding stays visible to what follows."""
    if not any(isinstance(statement, tirx.SeqStmt) for statement in sequence.seq):
        return sequence
    flat: list[Stmt] = []
    for statement in sequence.seq:
        flat.extend(statement.seq if isinstance(statement, tirx.SeqStmt) else (statement,))
    return tirx.SeqStmt(flat)
