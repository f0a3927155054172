"""Kernels for AMD whose loads behind a condition are made only where it holds.

    i < n and x[i]                              -> if_then_else(i < n, x[i], false)

C's `&&` leaves x[i] alone where i is past the end; of TVM's `and` its LLVM generator makes both sides. TVM itself puts
conditions into that form: it simplifies `if_then_else(i < n, x[i], false)` to it.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx


def with_guarded_loads(module: Any) -> Any:
    """The kernels without loads on the right of `and` and `or`."""

    def conjunction(node: Any) -> Any:
        return tirx.if_then_else(node.a, node.b, tirx.const(False, "bool")) if _guards(node) else node

    def disjunction(node: Any) -> Any:
        return tirx.if_then_else(node.a, tirx.const(True, "bool"), node.b) if _guards(node) else node

    functions = {
        variable: function.with_body(
            tvm_ffi.structural_map(function.body, [(tirx.And, conjunction), (tirx.Or, disjunction)])
        )
        for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def _guards(node: Any) -> bool:
    """Whether what is right of a condition on scalars loads something."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(node.b, [(ir.TensorLoad, loads.append)])
    return bool(loads) and str(node.ty.dtype) == "bool"
