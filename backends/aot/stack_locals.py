"""Buffers of scope "local" -> variables on the stack, which LLVM keeps in registers.

    acc = alloc((96,), scope="local")  ->  the same, marked: no call of TVMBackendAllocWorkspace

TVM 0.27 turns every allocation into a call of the runtime. An accumulator is then memory that escapes, stored and
loaded around each loop, and the scratch of a nested function costs a call for every vector.

A function gets 32 KiB, the smallest buffers first: a thread of musl has 128 KiB of stack, which the caller's frames
share.

Refused for what does not fit that, and for sizes that are not constant: those are scratch memory.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import DataType, ir, tirx

_MOST_BYTES = 32 << 10


@ir.transform.module_pass(opt_level=0, name="StackLocals")
class stack_locals:  # noqa: N801  (TVM's pass decorator makes an instance factory of it)
    """The pass, to run before LowerTVMBuiltin."""

    def transform_module(self, module: Any, _context: Any) -> Any:
        for name, func in list(module.functions.items()):
            module.update_func(name, func.with_body(marked(func.body)))
        return module


def marked(body: Any) -> Any:
    """`body`, of one function, with the small local buffers left to LLVM."""
    sizes: list[int] = []

    def note(allocation: Any) -> None:
        size = _bytes(allocation)
        if size is not None:
            sizes.append(size)

    tvm_ffi.structural_walk(body, ((tirx.AllocBuffer,), note))
    largest = _largest(sizes)

    def mark(allocation: Any) -> Any:
        size = _bytes(allocation)
        if size is None or size > largest:
            return allocation
        return tirx.AllocBuffer(allocation.buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)})

    return tvm_ffi.structural_map(body, (tirx.AllocBuffer, mark))


def _largest(sizes: list[int]) -> int:
    """The size up to which all buffers fit together."""
    largest = total = 0
    for size in sorted(set(sizes)):
        total += size * sizes.count(size)
        if total > _MOST_BYTES:
            break
        largest = size
    return largest


def _bytes(allocation: Any) -> int | None:
    """The size of a local buffer, where it is known."""
    kind = allocation.buffer.ty
    if kind.storage_scope != "local" or not all(isinstance(n, tirx.IntImm) for n in kind.shape):
        return None
    size: int = DataType(str(kind.dtype)).itemsize
    for extent in kind.shape:
        size *= int(extent)
    return size
