"""Calls of exp, log, log1p, tanh, sigmoid, erf and rsqrt on float32 become those of `kernels.vector_math`.

    T.exp(x) -> graphwright.exp(x)        1 + T.erf(x) -> graphwright.one_plus_erf(x), which keeps the tail of GELU

float16 and bfloat16 are computed in float32. Left alone: float64 (libm's accuracy is the point of it), sqrt and the
roundings (instructions), and pow, sin, cos and the rest (libm calls).
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op

from ..kernels.vector_math import INTRINSICS, one_plus_erf

_EXPANDED = {f"tirx.{name}": INTRINSICS[name] for name in ("exp", "log", "log1p", "tanh", "sigmoid", "erf", "rsqrt")}
_NARROW = ("float16", "bfloat16")


def _called(expression: Any) -> str | None:
    if isinstance(expression, Call) and isinstance(expression.op, Op):
        return str(expression.op.name)
    return None


def _is_one(expression: Any) -> bool:
    if isinstance(expression, tirx.Broadcast):
        expression = expression.value
    return isinstance(expression, tirx.FloatImm) and float(expression.value) == 1.0


def _expand_one_plus_erf(add: Any) -> Any:
    for one, other in ((add.a, add.b), (add.b, add.a)):
        if _is_one(one) and _called(other) == "tirx.erf" and str(add.ty.dtype).startswith("float32"):
            return one_plus_erf(other.args[0])
    return add


def _expand_call(call: Any) -> Any:
    expansion = _EXPANDED.get(_called(call) or "")
    if expansion is None:
        return call
    dtype = str(call.ty.dtype)
    element, lanes = dtype.partition("x")[::2]
    if element == "float32":
        return expansion(call.args[0])
    if element in _NARROW:
        wide = "float32" + ("x" + lanes if lanes else "")
        return tirx.Cast(dtype, expansion(tirx.Cast(wide, call.args[0])))
    return call


def expand_math(program: Any) -> Any:
    """Rewrite a tirx.PrimFunc, or every PrimFunc of an IRModule; the argument itself is not changed."""
    if isinstance(program, tvm.IRModule):
        functions = {
            name: expand_math(function) if isinstance(function, tirx.PrimFunc) else function
            for name, function in program.functions.items()
        }
        return tvm.IRModule(functions, attrs=program.attrs)
    body = tvm_ffi.structural_map(program.body, (tirx.Add, _expand_one_plus_erf))
    body = tvm_ffi.structural_map(body, (Call, _expand_call))
    return program if body.same_as(program.body) else program.with_body(body)
