"""Buffers of scope "local" -> variables on the stack, which LLVM keeps in registers.

    acc = alloc((96,), scope="local")  ->  the same, marked: no call of TVMBackendAllocWorkspace

TVM 0.27 turns every allocation into a call of the runtime. An accumulator is then memory that escapes, stored and
loaded around each loop, and the scratch of a nested function costs a call for every vector.

Refused for more than 16 KiB, and for sizes that are not constant: those are scratch memory.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import DataType, ir, tirx

_MOST_BYTES = 16 << 10


@ir.transform.module_pass(opt_level=0, name="StackLocals")
class stack_locals:  # noqa: N801  (TVM's pass decorator makes an instance factory of it)
    """The pass, to run before LowerTVMBuiltin."""

    def transform_module(self, module: Any, _context: Any) -> Any:
        for name, func in list(module.functions.items()):
            module.update_func(name, func.with_body(marked(func.body)))
        return module


def marked(body: Any) -> Any:
    """`body` with the small local buffers left to LLVM."""
    return tvm_ffi.structural_map(body, (tirx.AllocBuffer, _marked))


def _marked(allocation: Any) -> Any:
    buffer = allocation.buffer
    kind = buffer.ty
    if kind.storage_scope != "local" or not all(isinstance(n, tirx.IntImm) for n in kind.shape):
        return allocation
    dtype = DataType(str(kind.dtype))
    size = dtype.itemsize
    for extent in kind.shape:
        size *= int(extent)
    if size > _MOST_BYTES:
        return allocation
    return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)})
