"""Kernels whose accesses to shared memory and registers name the buffer that was allocated, for AMD.

    view = decl_buffer(int32, data=tile.data)
    view[j : j + 4] = x                         -> tile[2 j : 2 j + 8] = reinterpret(float16 x 8, x)

TVM's LLVM generator (0.27) makes a pointer to global memory of every declared buffer (CodeGenLLVM, DeclBufferNode).
From shared memory (address space 3) and registers (5) there is no such pointer on AMD's GPUs: what is stored by it is
stored anywhere. Views of ours are declared, and so is what StorageRewrite puts in the place of another buffer.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx


def without_views(module: Any) -> Any:
    """The kernels without declared buffers of shared memory and registers.

    Raises ValueError for a view whose elements are smaller than those allocated, or not whole numbers of them.
    """
    functions = {
        variable: function.with_body(_rewritten(function.body)) for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def _rewritten(body: Any) -> Any:
    roots = _roots(body)

    def declared(statement: Any) -> Any:
        return tirx.Evaluate(0) if statement.buffer in roots else statement

    def loaded(load: Any) -> Any:
        root = roots.get(load.source)
        if root is None:
            return load
        value = tirx.BufferLoad(root, _indices(root, load.source, load.indices))
        return value if value.ty == load.ty else tirx.reinterpret(str(load.ty.dtype), value)

    def stored(store: Any) -> Any:
        root = roots.get(store.buffer)
        if root is None:
            return store
        indices = _indices(root, store.buffer, store.indices)
        value, wanted = store.value, tirx.BufferLoad(root, indices).ty
        return tirx.BufferStore(
            root, value if value.ty == wanted else tirx.reinterpret(str(wanted.dtype), value), indices
        )

    changes = ((tirx.DeclBuffer, declared), (ir.TensorLoad, loaded), (tirx.BufferStore, stored))
    return tvm_ffi.structural_map(body, list(changes)) if roots else body


def _roots(body: Any) -> dict[Any, Any]:
    """By the declared buffers: what was allocated."""
    allocated: dict[Any, Any] = {}
    roots: dict[Any, Any] = {}
    data = ir.Op.get("tirx.buffer_data")

    def allocation(statement: Any) -> None:
        allocated[statement.buffer] = statement.buffer

    def declaration(statement: Any) -> None:
        source = statement.data
        if isinstance(source, ir.Call) and source.op.same_as(data):
            source = source.args[0]
        root = allocated.get(source, roots.get(source))
        if root is not None:
            roots[statement.buffer] = root

    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, allocation), (tirx.DeclBuffer, declaration)])
    return roots


def _indices(root: Any, view: Any, indices: Any) -> list[Any]:
    """Those in `root` of what `indices` are in `view`."""
    there, here = tvm_ffi.dtype(str(root.dtype)), tvm_ffi.dtype(str(view.dtype))
    if there == here:
        return list(indices)
    (index,) = indices
    base, count = (index.base, int(index.lanes)) if isinstance(index, tirx.Ramp) else (index, 1)
    bits = here.bits * here.lanes
    apart = isinstance(index, tirx.Ramp) and int(index.stride) != 1
    if there.lanes > 1 or bits % there.bits or apart:
        raise ValueError(f"{view} of {here} is a view of {root} of {there}: its elements are no neighbours there")
    each = bits // there.bits
    return [tirx.Ramp(base * each, 1, count * each) if count * each > 1 else base]
